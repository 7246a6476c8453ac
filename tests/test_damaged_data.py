"""Sets that are damaged, misused or smaller than asked for: told with their file, split and place."""

import io
import itertools
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from compo_jax import data
from compo_jax.data import sources, stream
from compo_jax.data.sets import data_set


def png(grey):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6), grey, np.uint8)).save(file, "png")
    return file.getvalue()


class Plain(tfds.core.GeneratorBasedBuilder):
    """4 classes, 6 train and 3 test images each (grey 40 x label + number); the split `broken` has half an image."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(6, 6, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list("abcd")),
            "pair": tfds.features.ClassLabel(names=["first", "second"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(3), "broken": self._broken()}

    def _generate_examples(self, count):
        for label, number in itertools.product(range(4), range(count)):
            yield (
                f"{label}-{number}",
                {"image": io.BytesIO(png(40 * label + number)), "label": label, "pair": label // 2},
            )

    def _broken(self):
        for key, example in self._generate_examples(2):
            if key == "1-1":
                example["image"] = io.BytesIO(png(0)[:40])
            yield key, example


class Gtsrb32(Plain):
    """Under the name of a set of signs."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Plain, Gtsrb32):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def opened(data_dir, name="plain", **options):
    return data.tfds_stream(name, data_dir, **({"size": 6, "tasks": 2} | options))


def greys(split):
    return split.images(np.arange(len(split)))[:, 0, 0, 0].astype(int)


def shard(folder):
    return folder / "plain-train.array_record-00000-of-00001"


def rewrite(name, change):
    def damage(folder):
        file = folder / name if isinstance(name, str) else name(folder)
        file.write_bytes(change(file.read_bytes()))

    return damage


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NAMES = "plain-train.array_record"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: shard(f).unlink(), f"{NAMES}.*, of the split 'train', is not there"),
        (rewrite(shard, lambda b: b""), f"{NAMES}.*, of the split 'train', holds no images, it is empty"),
        (rewrite(shard, lambda b: POINTER), f"{NAMES}.*holds no images, it is a Git LFS pointer: run git lfs pull"),
        (
            rewrite(shard, lambda b: b[: len(b) // 2]),
            f"plain/1.0.0, split 'train': record 0 in .*{NAMES}.* can't be read",
        ),
        (lambda f: (f / "features.json").unlink(), "lacks features.json"),
        (rewrite("features.json", lambda b: b[:-9]), "features.json is no JSON"),
        (rewrite("features.json", lambda b: POINTER), "features.json is no JSON, it is a Git LFS pointer"),
        (lambda f: (f / "dataset_info.json").unlink(), "lacks dataset_info.json"),
        (rewrite("dataset_info.json", lambda b: b""), "dataset_info.json is no JSON, it is empty"),
        (rewrite("dataset_info.json", lambda b: b'{"splits": 3}'), "TFDS can't open .*plain/1.0.0"),
        (lambda f: (f / "label.labels.txt").unlink(), "lacks label.labels.txt, the names of its 4 classes"),
        (rewrite("label.labels.txt", lambda b: b"a\nb\n"), r"record \d+ has label [23], and there are 2"),
        (rewrite("label.labels.txt", lambda b: b"a\na\nb\nc\n"), "label.labels.txt has a name twice"),
    ],
)
def test_a_damaged_file_is_named(data_dir, tmp_path, damage, told):
    folder = shutil.copytree(data_dir / "plain", tmp_path / "plain") / "1.0.0"
    damage(folder)
    with pytest.raises((ValueError, OSError), match=told):
        opened(tmp_path)


def test_names_of_classes_may_be_missing_on_purpose_and_of_what_is_not_asked_for(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / "plain", tmp_path / "plain") / "1.0.0"
    (folder / "pair.labels.txt").unlink()
    assert sorted(opened(tmp_path).classes) == list("abcd")
    with pytest.raises(FileNotFoundError, match="lacks pair.labels.txt"):
        opened(tmp_path, by="pair")
    (folder / "label.labels.txt").unlink()
    assert sorted(opened(tmp_path, numbered=True).classes) == list("0123")


def test_labels_beyond_the_names_are_told_with_their_place(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / "plain", tmp_path / "plain") / "1.0.0"
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "3"
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "label.labels.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match=r"split 'train': record \d+ has label 3, and there are 3 of them"):
        opened(tmp_path)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_damaged_image_is_told_with_its_place(data_dir, memory):
    def read():
        made = opened(data_dir, train_split="broken", test_split="test", memory=memory, seed=None, tasks=1)
        for split in (made.tasks[0].train, data.pooled(made).train):
            list(data.train_batches(split, 3, 0, steps=4))

    rows = [k for k, record in enumerate(sources.Records(sources.open_builder("plain", data_dir), "broken")[range(8)])
            if len(record["image"]) == 40]  # fmt: skip
    with pytest.raises(ValueError, match=f"plain/1.0.0, split 'broken': image {rows[0]} can't be decoded"):
        read()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train_split": "train", "test_split": "train"}, "24 of 24 test images of plain are training images too"),
        ({"train_split": "train", "test_split": "train[:50%]"}, "12 of 12 test images"),
        ({"train_split": "train[:50%]", "test_split": "test+train[25%:75%]"}, "6 of 24 test images"),
        ({"size": 0}, "size is 0"),
        ({"images": 0}, "images is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"std": (0.5, 0.0, 0.5)}, "divided by std, which must be above 0"),
        ({"mean": (np.nan, 0.0, 0.5)}, "three finite numbers"),
        ({"tasks": 5}, "5 tasks were asked for and there are 4 classes"),
        ({"train_split": "nothing"}, r"Unknown split 'nothing'. Should be one of \['train', 'test', 'broken'\]"),
        ({"train_split": "train[:0]"}, "split 'train.:0.' has no images"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(data_dir, options, told):
    with pytest.raises(ValueError, match=told):
        opened(data_dir, **options)


def test_parts_of_one_split_that_share_nothing_are_no_overlap(data_dir):
    made = opened(data_dir, train_split="train[:75%]", test_split="train[75%:]", tasks=1, seed=None)
    assert (len(made.tasks[0].train), len(made.tasks[0].test)) == (18, 6)


def test_as_many_images_of_each_class_as_asked_for_drawn_by_the_seed(data_dir):
    whole = opened(data_dir)
    two = [opened(data_dir, images=2, seed=seed) for seed in (0, 0, 1)]
    for made in two:
        for task in made.tasks:
            assert np.bincount(task.train.labels).tolist() == [2, 2] and len(task.test) == 6
            assert [task.classes[x] for x in task.train.labels] == ["abcd"[g // 40] for g in greys(task.train)]
    drawn = [sorted(np.concatenate([greys(task.train) for task in made.tasks])) for made in two]
    assert drawn[0] == drawn[1] != drawn[2]
    assert two[0].classes == whole.classes
    many = opened(data_dir, images=1000)
    for task, other in zip(many.tasks, whole.tasks, strict=True):
        np.testing.assert_array_equal(greys(task.train), greys(other.train))
    held = opened(data_dir, images=2, train_split="train", tasks=1)  # the test is taken first
    assert (len(held.tasks[0].train), len(held.tasks[0].test)) == (8, 8)
    for open_named in (data.open_stream, lambda *a, **k: data.open_tasks([a[0]], a[1], **k)):
        options = {"tasks": 2} if open_named is data.open_stream else {}
        counts = [len(task.train) for task in open_named("plain", 6, data_dir=data_dir, images=3, **options).tasks]
        assert sum(counts) == 12
    assert sum(len(task.train) for task in data.open_stream("plain", 6, data_dir=data_dir, tasks=2).tasks) == 24


def test_signs_and_characters_are_not_mirrored(data_dir):
    for name in ("gtsrb32", "letters64", "kmnist28", "visual_domain_decathlon/svhn:1.2.0"):
        assert data_set(name).characters
    assert not data_set("cifar100:3.0.2").characters
    assert opened(data_dir, "gtsrb32").augment is data.augment.random_affine
    assert data.open_tasks(["gtsrb32"], 6, data_dir=data_dir).augment is None
    assert data.open_tasks(["plain"], 6, data_dir=data_dir).augment is data.augment.random_flip


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda d: data.open_stream("glyphs", 8, tasks=12), "12 tasks .* glyphs has 11 scripts: arabic, "),
        (lambda d: data.open_stream("glyphs", 8, tasks=0), "0 tasks were asked for"),
        (lambda d: data.open_tasks(["plain"], 6, data_dir=d, tasks=2), "tasks=2 plays no part with plain"),
        (lambda d: data.open_stream("/etc", 6, data_dir=d), "'/etc' is not the name of a set"),
        (lambda d: data.open_stream("../plain", 6, data_dir=d), "'../plain' is not the name of a set"),
        (lambda d: data.glyph_stream(["greek", "greek"], train=1, test=1), "a script is named twice"),
        (lambda d: data.glyph_stream(["greek"], classes=0), "0 classes"),
        (lambda d: data.glyph_stream(["greek"], size=0), "0 pixels"),
        (lambda d: stream.group_classes(4, 2, -1), "a seed is 0 or more"),
    ],
)  # fmt: skip
def test_names_and_numbers_that_can_not_be_are_refused(data_dir, call, told):
    with pytest.raises(ValueError, match=told):
        call(data_dir)


PIXELS, LABELS = np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3), np.arange(8) % 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": LABELS + 0.5}, "labels are whole numbers, .* float64 of shape .8,."),
        ({"labels": np.eye(2, dtype=int)[LABELS]}, "of shape .8, 2.: cast them to int, with argmax"),
        ({"test_images": PIXELS}, "train and test images are the same"),
        ({"test_images": PIXELS.copy()}, "train and test images are the same"),
        ({"test_images": PIXELS[4:], "test_labels": LABELS[4:]}, "train and test images are the same"),
        ({"class_names": ["a", "a"]}, "has classes of one name: a"),
        ({"std": (1.0, 0.0, 1.0)}, "divided by std"),
        ({"images": PIXELS[:, :0, :0], "overlap": True, "test_images": PIXELS[:, :0, :0]}, "0 pixels a side"),
    ],
)  # fmt: skip
def test_arrays_that_can_not_be_are_refused(change, told):
    good = {"images": PIXELS, "labels": LABELS, "test_images": 255 - PIXELS, "test_labels": LABELS, "tasks": 1}
    data.array_stream(**good)
    with pytest.raises(ValueError, match=told):
        data.array_stream(**(good | change))


def test_a_label_beyond_the_task_and_what_is_no_augmentation_are_told():
    split = data.ArraySplit(PIXELS, LABELS)
    wrong = data.ArraySplit(PIXELS, LABELS * 2)
    with pytest.raises(ValueError, match="task 't' has 2 classes and test image 1 the label 2"):
        stream.checked(data.TaskStream("s", (data.Task("t", ("a", "b"), split, wrong),), 2))
    with pytest.raises(ValueError, match="augment='foo' is no augmentation"):
        stream.checked(data.TaskStream("s", (data.Task("t", ("a", "b"), split, split),), 2, augment="foo"))
    with pytest.raises(ValueError, match="8 images need as many labels, not 7"):
        data.ArraySplit(PIXELS, LABELS[:7])
