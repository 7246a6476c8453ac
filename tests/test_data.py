"""Task streams, splits, batches and augmentation, on arrays and on small TFDS sets that the tests prepare."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from compo_jax import data
from compo_jax.data import augment, reading
from compo_jax.data.splits import JoinedSplit


def arrays(images=24, classes=6, size=5, seed=0):
    """Images whose first pixel holds the label and second the index, so that every image is known by its content."""
    pixels = np.random.default_rng(seed).integers(0, 256, (images, size, size, 3)).astype(np.uint8)
    labels = np.arange(images) % classes
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = labels, np.arange(images)
    return pixels, labels


def arrays_stream(**options):
    return data.array_stream(*arrays(24), *arrays(12), **({"tasks": 3} | options))


class Toy(tfds.core.GeneratorBasedBuilder):
    """6 classes in 3 families, 8 train and 4 test images each; a flat image's grey is 40 x label + number."""

    VERSION = tfds.core.Version("1.0.0")
    FAMILY = (2, 0, 1, 1, 2, 0)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list("abcdef")),
            "family": tfds.features.ClassLabel(names=["red", "green", "blue"]),
            "torn": tfds.features.ClassLabel(names=["even", "odd"]),
            "number": tfds.features.Scalar(np.int64),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),  # which is never decoded
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(4), "half": self._generate_half()}

    def _generate_examples(self, count):
        for label, number in itertools.product(range(6), range(count)):
            yield (
                f"{label}-{number}",
                {
                    "image": Image.fromarray(np.full((8, 10), 40 * label + number, np.uint8)),
                    "label": label,
                    "family": self.FAMILY[label],
                    "torn": number % 2,
                    "number": number,
                    "mask": Image.new("L", (10, 8)),
                },
            )

    def _generate_half(self):
        return ((key, example) for key, example in self._generate_examples(4) if example["label"] < 3)


class Omniglot(Toy):
    """Under the name of a set that has defaults of its own."""


class Weather(Toy):
    """Its splits are domains."""

    def _split_generators(self, manager):
        return {"sun": self._generate_examples(5), "rain": self._generate_examples(10)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Toy, Omniglot, Weather):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def greys(split):
    return split.images(np.arange(len(split)))[:, 0, 0, 0].astype(int)


# Streams of arrays


def test_an_array_stream_divides_the_classes_and_renumbers_them():
    stream = arrays_stream(class_names=list("abcdef"))
    assert stream.classes == tuple("abcdef") and stream.offsets == (0, 2, 4) and stream.size == 5
    for offset, task in zip(stream.offsets, stream.tasks, strict=True):
        for split in (task.train, task.test):
            pixels = split.images(np.arange(len(split)))
            assert isinstance(split, data.Split) and split.labels.dtype == np.int32
            assert (pixels[:, 0, 0, 0] == split.labels + offset).all()
    assert sum(len(t.train) for t in stream.tasks) == 24 and sum(len(t.test) for t in stream.tasks) == 12


def test_a_seed_shuffles_the_classes_and_names_follow():
    streams = [arrays_stream(class_names=list("abcdef"), seed=seed) for seed in (1, 1, 2)]
    assert streams[0].classes == streams[1].classes != streams[2].classes
    for stream in streams:
        assert sorted(stream.classes) == list("abcdef")
        task = stream.tasks[1]
        names = [task.classes[label] for label in task.train.labels]
        assert names == ["abcdef"[c] for c in task.train.images(np.arange(len(task.train)))[:, 0, 0, 0]]


def test_groups_of_classes_can_be_given_or_be_uneven():
    assert [t.classes for t in arrays_stream(tasks=[[4, 1], [0, 5, 2]]).tasks] == [("4", "1"), ("0", "5", "2")]
    assert sorted(len(t.classes) for t in data.array_stream(*arrays(35, 7), *arrays(14, 7), tasks=3).tasks) == [2, 2, 3]


def test_grey_images_get_three_equal_channels():
    pixels, labels = arrays()
    for grey in (pixels[..., 0], pixels[..., :1]):
        stream = data.array_stream(grey, labels, grey, labels, tasks=[[0, 1, 2, 3, 4, 5]], overlap=True)
        assert (stream.tasks[0].train.images(np.arange(24)) == pixels[..., :1]).all()


def test_prepare_normalises_inside_jit():
    stream = arrays_stream(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels = stream.tasks[0].train.images(np.arange(4))
    prepared = jax.jit(stream.prepare)(pixels)
    assert prepared.dtype == jnp.float32
    np.testing.assert_allclose(prepared, (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0], rtol=1e-5, atol=1e-6)


def test_pooling_makes_labels_global_and_reads_in_the_asked_order():
    pool = data.pooled(arrays_stream())
    assert pool.classes == tuple("012345") and len(pool.train) == 24
    order = np.random.default_rng(0).permutation(24)
    assert (pool.train.images(order)[:, 0, 0, 0] == pool.train.labels[order]).all()
    assert sorted(pool.train.images(order)[:, 0, 1, 0]) == list(range(24))
    assert pool.train.images(np.array([], int)).shape == (0, 5, 5, 3)
    with pytest.raises(IndexError):
        pool.train.images(np.array([24]))


def test_pooling_reads_nothing_before_it_is_asked():
    class Closed:
        labels = np.zeros(3, np.int32)

        def __len__(self):
            return 3

        def images(self, indices):
            raise AssertionError("read")

    open_split = data.ArraySplit(arrays()[0], arrays()[1])
    joined = JoinedSplit([Closed(), open_split], [0, 1])
    assert joined.labels.tolist() == [0, 0, 0, *(arrays()[1] + 1)]
    assert (joined.images(np.array([4, 3])) == open_split.pixels[[1, 0]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": arrays()[0][:, :4]}, "uint8 of shape"),
        ({"images": arrays()[0] / 255}, "float64.*scale values"),
        ({"test_images": arrays(12, size=6)[0]}, r"train images are \(5, 5, 3\), test images \(6, 6, 3\)"),
        ({"labels": arrays()[1][:-1]}, "24 train and 12 test images need as many labels, not 23 and 12"),
        ({"labels": arrays()[1] - 1}, "labels run from -1 to 5"),
        ({"class_names": list("abcde")}, "labels run from 0 to 5 and must lie in 0 to 4"),
        ({"class_names": list("abcdefg")}, "no train images: g"),
        ({"test_labels": np.arange(12) % 5}, "no test images: 5"),
        ({"tasks": 7}, "7 tasks were asked for and there are 6 classes"),
        ({"tasks": 0}, "0 tasks"),
        ({"tasks": 4}, "has 1 class and needs two"),
        ({"tasks": [[0, 1], [1, 2]]}, "each at most once"),
        ({"tasks": [[0, 6]]}, "must name classes 0 to 5"),
        ({"tasks": []}, "must name classes"),
    ],
)
def test_bad_arrays(change, message):
    (images, labels), (test_images, test_labels) = arrays(), arrays(12)
    good = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels, "tasks": 3}
    with pytest.raises(ValueError, match=message):
        data.array_stream(**(good | change))


# Streams of glyphs


def test_a_glyph_stream_has_a_task_per_script():
    stream = data.glyph_stream(["greek", "lao"], classes=4, train=6, test=3, size=16)
    assert [t.name for t in stream.tasks] == ["greek", "lao"] and stream.classes[:4] == ("α", "β", "γ", "δ")
    for task in stream.tasks:
        assert np.bincount(task.train.labels).tolist() == [6] * 4 and np.bincount(task.test.labels).tolist() == [3] * 4
        both = np.concatenate([task.train.pixels, task.test.pixels])
        assert both.shape == (36, 16, 16, 3) and len(np.unique(both.reshape(36, -1), axis=0)) == 36
    alone = data.glyph_stream(["lao"], classes=4, train=6, test=3, size=16)
    assert (alone.tasks[0].train.pixels == stream.tasks[1].train.pixels).all()
    other = data.glyph_stream(["lao"], classes=4, train=6, test=3, size=16, seed=1)
    assert (alone.tasks[0].train.pixels != other.tasks[0].train.pixels).any()


def test_bad_glyph_streams():
    with pytest.raises(ValueError, match="no script is called klingon; there are arabic, "):
        data.glyph_stream(["greek", "klingon"])
    with pytest.raises(ValueError, match="21 classes were asked for and greek has only 20"):
        data.glyph_stream(["greek"], classes=21)
    with pytest.raises(ValueError, match="0 test images of each character"):
        data.glyph_stream(["greek"], classes=2, train=2, test=0)
    with pytest.raises(ValueError, match="has 1 class and needs two"):
        data.glyph_stream(["greek"], classes=1, train=2, test=2)


# Streams from TFDS


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_tfds_stream_holds_every_image_once_under_its_class(data_dir, memory):
    stream = data.tfds_stream("toy", data_dir, size=6, tasks=3, memory=memory)
    kind = data.ArraySplit if memory else reading.SourceSplit
    assert sorted(stream.classes) == list("abcdef") and stream.classes != tuple("abcdef")
    for which, count in (("train", 8), ("test", 4)):
        splits = [getattr(t, which) for t in stream.tasks]
        assert all(isinstance(s, kind) and isinstance(s, data.Split) for s in splits)
        for task, split in zip(stream.tasks, splits, strict=True):
            assert [task.classes[x] for x in split.labels] == ["abcdef"[g // 40] for g in greys(split)]
        expected = [40 * label + number for label in range(6) for number in range(count)]
        assert sorted(np.concatenate([greys(s) for s in splits])) == expected
    assert stream.tasks[0].train.images(np.array([3, 0])).shape == (2, 6, 6, 3)


def test_a_tfds_stream_without_a_seed_keeps_the_order(data_dir):
    stream = data.tfds_stream("toy:1.0.0", str(data_dir), size=4, tasks=2, seed=None)
    assert [t.classes for t in stream.tasks] == [tuple("abc"), tuple("def")] and stream.name == "toy"


def test_tasks_by_a_label_feature(data_dir):
    stream = data.tfds_stream("toy", data_dir, size=4, by="family", tasks=None, seed=None)
    found = {t.name: "".join(t.classes) for t in stream.tasks}
    assert found == {"red": "bf", "green": "cd", "blue": "ae"} and list(found) == ["red", "green", "blue"]
    two = [data.tfds_stream("toy", data_dir, size=4, by="family", tasks=2, seed=seed) for seed in range(6)]
    assert all(len(s.tasks) == 2 for s in two) and len({tuple(t.name for t in s.tasks) for s in two}) > 1


def test_a_split_divided_within_each_class(data_dir):
    streams = [
        data.tfds_stream("omniglot", data_dir, size=4, tasks=3, invert=False, seed=seed) for seed in (0, 0, 1, None)
    ]
    for stream in streams:
        for task in stream.tasks:
            assert np.bincount(task.train.labels).tolist() == [6, 6]
            assert np.bincount(task.test.labels).tolist() == [2, 2]
            assert sorted([*greys(task.train), *greys(task.test)]) == sorted(
                40 * "abcdef".index(c) + n for c in task.classes for n in range(8)
            )
    held_out = [sorted(np.concatenate([greys(t.test) for t in s.tasks])) for s in streams]
    assert held_out[0] == held_out[1] != held_out[2]


def test_omniglot_is_inverted_and_left_unmirrored(data_dir):
    task = data.tfds_stream("omniglot", data_dir, size=4, tasks=3, seed=None).tasks[0]
    assert [task.classes[(255 - g) // 40] for g in greys(task.train)] == [task.classes[x] for x in task.train.labels]
    assert data.tfds_stream("omniglot", data_dir, size=4, tasks=3).augment is augment.random_affine
    assert data.tfds_stream("toy", data_dir, size=4, tasks=3, augment=None).augment is None


def test_tasks_of_several_sets_stand_side_by_side(data_dir):
    stream = data.open_tasks(["toy", "glyphs"], 12, data_dir=data_dir, tasks=2, classes=3, images=5)
    assert [task.name for task in stream.tasks] == ["toy", "arabic", "armenian"]
    assert [len(task.classes) for task in stream.tasks] == [6, 3, 3]
    assert stream.tasks[0].train.images(np.arange(2)).shape == stream.tasks[1].train.images(np.arange(2)).shape
    assert (len(stream.tasks[1].train), stream.augment) == (15, None)
    assert data.open_tasks(["toy"], 12, data_dir=data_dir).augment is augment.random_flip
    with pytest.raises(ValueError, match="toy needs data_dir"):
        data.open_tasks(["toy"], 12)


def test_domains_share_their_classes(data_dir):
    stream = data.open_domains("weather", 4, data_dir=data_dir)
    assert [(task.name, task.classes) for task in stream.tasks] == [("sun", tuple("abcdef")), ("rain", tuple("abcdef"))]
    rain = stream.tasks[1]
    assert sorted([*greys(rain.train), *greys(rain.test)]) == sorted(
        40 * label + number for label in range(6) for number in range(10)
    )
    assert np.bincount(rain.test.labels).tolist() == [2] * 6
    rendered = data.open_domains("rendered", 12, images=5)
    assert {task.classes for task in rendered.tasks} == {tuple("0123456789")} and len(rendered.tasks) == 4
    first, second = (task.train.images(np.arange(10)).astype(int) for task in rendered.tasks[:2])
    assert first.mean() < 128 < second.mean()  # light on dark, dark on light
    with pytest.raises(ValueError, match="domains are of the same classes, and those of toy are not"):
        data.open_domains("toy", 4, data_dir=data_dir)


def test_a_set_under_corruptions_is_divided_into_domains(data_dir):
    with pytest.raises(ValueError, match="class 'a' of toy has 8 training images, and each of 20 domains"):
        data.open_domains("toy-corrupted", 4, data_dir=data_dir)
    stream = data.open_domains("toy-corrupted", 4, data_dir=data_dir, label="torn", seed=3)
    assert (stream.name, stream.augment) == ("toy-corrupted", augment.random_flip)
    assert {task.classes for task in stream.tasks} == {("even", "odd")}
    assert [len(task.train) for task in stream.tasks] == [4] * 4 + [2] * 16 and len(stream.tasks[0].test) == 24
    clean, invert = (next(task for task in stream.tasks if task.name == name) for name in ("clean", "invert"))
    assert (np.abs(greys(invert.test) - (0.9 * 255 - 0.8 * greys(clean.test))) <= 0.5).all()
    assert len({task.name for task in stream.sources("fog-5")} - {"clean"}) == 12


def test_classes_absent_from_both_splits_are_left_out(data_dir):
    half = {"train_split": "half", "test_split": "half", "overlap": True}
    stream = data.tfds_stream("toy", data_dir, size=4, tasks=1, seed=None, **half)
    assert stream.classes == tuple("abc")


def test_the_default_augmentation_keeps_the_shape(data_dir):
    stream = data.tfds_stream("toy", data_dir, size=4, tasks=3)
    images = stream.prepare(stream.tasks[0].train.images(np.arange(5)))
    assert jax.jit(stream.augment)(jax.random.key(0), images).shape == (5, 4, 4, 3)


def stored(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_decoding_resizes_the_shorter_side_and_crops_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    by_hand = np.asarray(Image.fromarray(pixels).crop((12, 2, 48, 38)).resize((9, 9), Image.Resampling.BOX))
    decoded = reading.Decoding(9, crop=0.9, reduce="BOX")(stored(pixels))
    assert (decoded == by_hand).all()
    assert np.abs(decoded - pixels[2:38, 12:48].reshape(9, 4, 9, 4, 3).mean((1, 3))).max() < 1  # rounded twice
    assert (reading.Decoding(40)(stored(pixels)) == pixels[:, 10:50]).all()


def test_decoding_keeps_thin_strokes_and_one_bit_images():
    stroke = np.zeros((105, 105), bool)
    stroke[:, 50] = True
    decoded = reading.Decoding(32, invert=True, reduce="BOX")(stored(~stroke))
    assert decoded.shape == (32, 32, 3) and decoded.max(axis=1).min() > 30
    assert decoded.mean() == pytest.approx(255 / 105, rel=0.25)  # a filter of whole pixels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "nothing"}, "can't be divided into tasks by 'nothing'; its other label features are: family, torn"),
        ({"by": "number"}, "by 'number'"),
        ({"by": "torn", "tasks": None}, "class 'a' of toy would be in several tasks"),
        ({"by": "family", "tasks": 4}, "4 tasks were asked for and toy divides into 3"),
        ({"tasks": 7}, "7 tasks were asked for and there are 6 classes"),
        ({"tasks": 5}, "has 1 class and needs two"),
        ({"tasks": None}, "number of tasks is needed"),
        ({"label": "number"}, "class labels 'number', and has family, image, label, mask, n"),
        ({"tasks": 3, "train_split": "half", "test_split": "test"}, "no train images"),
        ({"tasks": 3, "train_split": "train", "test_split": "half"}, "no test images"),
        ({"train_split": "validation"}, "Unknown split 'validation'"),
    ],
)
def test_bad_tfds_streams(data_dir, options, message):
    with pytest.raises(ValueError, match=message):
        data.tfds_stream("toy", data_dir, size=4, **options)


def test_sets_that_are_not_there(data_dir):
    with pytest.raises(FileNotFoundError, match="no prepared set 'mnist'; it has omniglot, toy, weather; prepare"):
        data.tfds_stream("mnist", data_dir, size=4)
    with pytest.raises(FileNotFoundError, match="no prepared set 'toy:2.0.0'"):
        data.tfds_stream("toy:2.0.0", data_dir, size=4)
    with pytest.raises(FileNotFoundError, match="there is no folder .*download_and_prepare"):
        data.tfds_stream("mnist", data_dir / "elsewhere", size=4)


# Batches


class Lazy:
    """An array split that isn't one, so that grain prepares its batches."""

    def __init__(self, split):
        self.labels, self.images, self.__class__.__len__ = split.labels, split.images, lambda _: len(split)


@pytest.fixture(params=[data.ArraySplit, lambda *a: Lazy(data.ArraySplit(*a))], ids=["array", "lazy"])
def split(request):
    return request.param(*arrays(10, 3))


def numbers(batch):
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
    return batch["image"][:, 0, 1, 0].tolist()


def test_train_batches_are_permutations_filled_up_from_their_start(split):
    assert data.steps_per_epoch(split, 4) == 3
    rows = [numbers(b) for b in data.train_batches(split, 4, [7, 1], steps=6)]
    for epoch in range(2):
        order = np.random.default_rng([7, 1, epoch]).permutation(10).tolist()
        assert sum(rows[3 * epoch : 3 * epoch + 3], []) == order + order[:2]


def test_a_resumed_run_sees_the_same_batches(split):
    whole = [numbers(b) for b in itertools.islice(data.train_batches(split, 4, 3), 9)]
    for start in (1, 3, 8):
        assert [numbers(b) for b in data.train_batches(split, 4, 3, start, 9)] == whole[start:]
    assert list(data.train_batches(split, 4, 3, start=9, steps=9)) == []
    assert [numbers(b) for b in data.train_batches(split, 4, 4, steps=9)] != whole


def test_a_batch_larger_than_the_split_repeats_it(split):
    rows = numbers(next(iter(data.train_batches(split, 25, 0))))
    assert sorted(rows[:10]) == list(range(10)) and rows[10:20] == rows[:10] and rows[20:] == rows[:5]


def test_eval_batches_show_every_image_once_in_order(split):
    batches = list(data.eval_batches(split, 4))
    assert [real for _, real in batches] == [4, 4, 2]
    assert [numbers(b) for b, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 9]]


def test_decoded_and_loaded_sets_give_the_same_batches(data_dir):
    loaded, lazy = (data.pooled(data.tfds_stream("toy", data_dir, size=4, tasks=2, memory=m)) for m in (2**30, 0))
    in_memory = data.ArraySplit(loaded.train.images(np.arange(48)), loaded.train.labels)
    for other in (loaded.train, lazy.train):
        pairs = zip(data.train_batches(in_memory, 7, 0, 2, 12), data.train_batches(other, 7, 0, 2, 12), strict=True)
        assert all((a["image"] == b["image"]).all() and (a["label"] == b["label"]).all() for a, b in pairs)


def test_bad_batches(split):
    with pytest.raises(ValueError, match="batches of 0"):
        data.steps_per_epoch(split, 0)
    with pytest.raises(ValueError, match="a split of 0 images"):
        next(data.train_batches(data.ArraySplit(np.zeros((0, 2, 2, 3), np.uint8), np.zeros(0, int)), 4, 0))


# Augmentation


def ramps(batch, height, width):
    """Images whose channels are the row, the column and a constant."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return jnp.asarray(np.tile(np.stack([rows, columns, 0 * rows + 9], -1), (batch, 1, 1, 1)), jnp.float32)


def test_flips_mirror_about_half_of_the_images():
    images = jax.random.normal(jax.random.key(0), (200, 3, 4, 3))
    flipped = jax.jit(augment.random_flip)(jax.random.key(1), images)
    same = (flipped == images).all((1, 2, 3))
    assert (same | (flipped == images[:, :, ::-1]).all((1, 2, 3))).all()
    assert 70 < same.sum() < 130


def test_a_crop_of_the_whole_image_is_a_resize():
    images = jax.random.normal(jax.random.key(0), (4, 12, 12, 3))
    crop = augment.random_resized_crop(jax.random.key(1), images, 8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(crop, jax.image.resize(images, (4, 8, 8, 3), "bicubic"), atol=1e-4)


def test_crops_map_straight_lines_to_straight_lines_inside_the_bounds():
    size, scale, ratio = 16, (0.2, 0.6), (0.75, 4 / 3)
    crops = augment.random_resized_crop(jax.random.key(0), ramps(300, 64, 64), size, scale, ratio)
    np.testing.assert_allclose(crops[..., 2], 9, atol=1e-3)
    # an antialiased cubic filter all but reproduces linear functions, away from the image's border: the slope is the
    # crop's side / size
    middle = np.asarray(crops[:, 6:10, 6:10, :2])
    np.testing.assert_allclose(np.diff(middle[..., 0], 2, axis=1), 0, atol=0.1)
    sides = size / 3 * np.stack([middle[:, 3, 0, 0] - middle[:, 0, 0, 0], middle[:, 0, 3, 1] - middle[:, 0, 0, 1]], 1)
    share, aspect = sides.prod(1) / 64**2, sides[:, 1] / sides[:, 0]
    assert 0.19 < share.min() < 0.25 and 0.55 < share.max() < 0.61
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    centre = middle[:, 1:3, 1:3].mean((1, 2)) + 0.5
    assert (centre - sides / 2 > -0.1).all() and (centre + sides / 2 < 64.1).all()


def test_affine_maps_within_their_bounds():
    images = ramps(300, 33, 33)
    still = augment.random_affine(jax.random.key(0), images, 0.0, (1.0, 1.0), 0.0, 0.0)
    np.testing.assert_allclose(still, images, atol=1e-4)

    def jacobian(**options):
        quiet = {"rotation": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "shear": 0.0}
        out = np.asarray(augment.random_affine(jax.random.key(0), images, **(quiet | options)))[:, 14:19, 14:19, :2]
        columns = [out[:, 3, 2] - out[:, 2, 2], out[:, 2, 3] - out[:, 2, 2]]  # d(row, column) / dy, and / dx
        return np.stack(columns, -1), out[:, 2, 2]

    turn, centre = jacobian(rotation=0.3)
    np.testing.assert_allclose(turn @ turn.swapaxes(1, 2), np.tile(np.eye(2), (300, 1, 1)), atol=1e-3)
    angle = np.arctan2(turn[:, 1, 0], turn[:, 0, 0])
    assert -0.301 < angle.min() < -0.27 and 0.27 < angle.max() < 0.301
    np.testing.assert_allclose(centre, 16, atol=1e-3)
    zoom, _ = jacobian(scale=(0.5, 2.0))
    np.testing.assert_allclose(zoom[:, 0, 1], 0, atol=1e-3)
    assert 0.49 < zoom[:, 0, 0].min() < 0.6 and 1.7 < zoom[:, 1, 1].max() < 2.01
    _, moved = jacobian(shift=0.1)
    assert 2.8 < np.abs(moved - 16).max() < 3.31 and np.abs(moved.mean(0) - 16).max() < 0.5
    slant, _ = jacobian(shear=0.2)
    assert 0.18 < slant[:, 1, 0].max() < 0.201 and np.abs(slant[:, 0, 1]).max() < 1e-3


def test_chains_apply_in_order_with_different_keys():
    images = jnp.zeros((2, 3, 3, 3))

    def noise(key, x):
        return 2 * x + jax.random.normal(key, x.shape)

    first, second = jax.random.split(jax.random.key(5))
    expected = 2 * jax.random.normal(first, images.shape) + jax.random.normal(second, images.shape)
    np.testing.assert_allclose(augment.chain(noise, noise)(jax.random.key(5), images), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "augmentation",
    [augment.random_flip, augment.random_affine, lambda k, x: augment.random_resized_crop(k, x, 6)],
    ids=["flip", "affine", "crop"],
)
def test_augmentations_are_pure_and_treat_images_independently(augmentation):
    images = jax.random.normal(jax.random.key(0), (8, 10, 10, 3))
    once, again, other = (augmentation(jax.random.key(k), images) for k in (1, 1, 2))
    assert (once == again).all() and (once != other).any() and once.dtype == images.dtype
    changed = augmentation(jax.random.key(1), images.at[0].set(0.0))
    np.testing.assert_allclose(changed[1:], once[1:], atol=1e-6)


def test_a_validation_part_is_of_each_class_and_trained_on_no_more():
    labels = np.repeat([0, 1, 2], [10, 5, 2])
    pixels = np.arange(17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    task = data.Task("a", ("x", "y", "z"), data.ArraySplit(pixels, labels), data.ArraySplit(pixels[:1], labels[:1]))
    stream = data.TaskStream("one", (task,), 4)
    (divided,) = data.validation(stream, 0.2).tasks
    assert np.bincount(divided.test.labels).tolist() == [2, 1, 1]
    assert np.bincount(divided.train.labels).tolist() == [8, 4, 1]
    rows = np.concatenate([split.images(np.arange(len(split)))[:, 0, 0, 0] for split in divided[2:]])
    assert sorted(rows) == list(range(17))
    np.testing.assert_array_equal(labels[divided.test.images(np.arange(4))[:, 0, 0, 0]], divided.test.labels)
    other = data.validation(stream, 0.2, seed=1).tasks[0]
    assert not np.array_equal(other.test.rows, divided.test.rows)
    for part in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="it lies between 0 and 1"):
            data.validation(stream, part)
    lonely = task._replace(train=data.ArraySplit(pixels[:3], np.array([0, 0, 1])))
    with pytest.raises(ValueError, match="class 'y' of 'a' has one training image"):
        data.validation(stream._replace(tasks=(lonely,)), 0.5)
