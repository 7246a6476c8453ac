"""Streams from folders of images and from lists: what is read, in what order, how it looks, what is refused."""

import io
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from compo_jax import data
from compo_jax.data import folders, reading
from compo_jax.data.stream import group_classes

CLASSES = ("ant", "bee", "cat", "dog")


def saved(file, value, size=(12, 8), **options):
    """An image of one grey value, so that it can be told which one was read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(file, **options)


@pytest.fixture
def folder(tmp_path):
    """4 classes of 3 training and 2 test images; the value of image i of class c in part p is 100 p + 10 c + i."""
    for part, (name, count) in enumerate((("train", 3), ("test", 2))):
        for c, label in enumerate(CLASSES):
            for i in range(count):
                saved(tmp_path / "pets" / name / label / f"{i}.png", 100 * part + 10 * c + i)
    return tmp_path / "pets"


def opened(folder, **options):
    return data.folder_stream(folder, **{"size": 4, "tasks": 2, "seed": None, "augment": None} | options)


def values(split):
    return split.images(np.arange(len(split)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("memory", [0, 2**30])
def test_every_image_stands_once_under_its_class_in_sorted_order(folder, memory):
    (folder / "train" / "ant" / "notes.txt").write_text("no image")
    stream = opened(folder, memory=memory)
    assert stream.name == "pets" and [task.classes for task in stream.tasks] == [CLASSES[:2], CLASSES[2:]]
    assert values(stream.tasks[1].train) == [20, 21, 22, 30, 31, 32] and values(stream.tasks[1].test) == [
        120, 121, 130, 131
    ]  # fmt: skip
    assert stream.tasks[1].train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(opened(folder, images=2).tasks[0].train) == 4


def test_the_class_order_of_the_field_is_numpys_older_permutation(folder):
    np.random.seed(1993)  # noqa: NPY002
    order = np.random.permutation(4).tolist()  # noqa: NPY002
    assert [c for group in group_classes(4, 2, seed=5, class_order=1993) for c in group] == order
    assert opened(folder, class_order=1993).classes == tuple(CLASSES[c] for c in order)
    # the order of CIFAR-100's classes in papers that use it
    assert group_classes(100, 10, None, 1993)[0] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]


def test_lists_name_files_and_labels_and_go_before_folders(folder):
    saved(folder / "more" / "a b.png", 77)
    lines = ["train/ant/0.png ant", "more/a b.png\tbee", "train/bee/1.png", "train/ant/2.png"]
    (folder / "train.txt").write_text("\n".join(lines) + "\n\n")
    (folder / "val.txt").write_text("test/ant/0.png\ntest/bee/1.png\n")
    task = opened(folder, tasks=1, test_split="val").tasks[0]
    assert task.classes == ("ant", "bee") and values(task.train) == [0, 77, 11, 2] and values(task.test) == [100, 111]
    assert task.train.labels.tolist() == [0, 1, 1, 0]


def test_numbers_as_labels_are_sorted_as_numbers(folder):
    for name in ("train", "test"):
        (folder / f"{name}.txt").write_text(f"{name}/ant/0.png 10\n{name}/bee/0.png 9\n")
    assert opened(folder, tasks=1).classes == ("9", "10")


def test_numbers_that_are_equal_have_one_order(folder):
    """Of a set of names the order is another one in each process."""
    names = ["1", "01", "001", "2", "02", "10"]
    assert sorted(names, key=folders._order(names)) == ["001", "01", "1", "02", "2", "10"]


def test_hidden_folders_are_not_read_wherever_they_are(folder):
    before = values(opened(folder, tasks=1).tasks[0].train)
    for place in ("train/ant/.ipynb_checkpoints", "train/.cache", "train/bee/deeper/.AppleDouble"):
        saved(folder / place / "0-checkpoint.png", 200)
    assert values(opened(folder, tasks=1).tasks[0].train) == before


def test_a_folder_that_links_lead_back_to_is_read_once(folder):
    os.symlink(".", folder / "train" / "ant" / "again")
    os.symlink(folder / "train" / "bee", folder / "train" / "ant" / "bees")
    assert values(opened(folder, tasks=1, images=9).tasks[0].train)[:6] == [0, 1, 2, 10, 11, 12]
    assert np.bincount(opened(folder, tasks=1).tasks[0].train.labels).tolist() == [6, 3, 3, 3]


def test_two_folders_of_one_name_are_two_tasks_and_one_named_twice_is_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more" / "pets")
    stream = data.open_tasks(["folder:pets", "folder:more/pets"], 4, data_dir=tmp_path)
    assert [task.name for task in stream.tasks] == ["pets", "more/pets"] and stream.name == "pets+more/pets"
    with pytest.raises(ValueError, match="two tasks of pets.pets are called pets: name each once"):
        data.open_tasks(["folder:pets", "folder:pets"], 4, data_dir=tmp_path)


def test_val_is_tested_on_without_test_and_a_part_is_held_out_where_one_is_named(folder):
    shutil.move(folder / "test", folder / "val")
    assert values(opened(folder).tasks[0].test) == [100, 101, 110, 111]
    shutil.rmtree(folder / "val")
    task = opened(folder, train_split="train", test_fraction=1 / 3).tasks[0]
    assert values(task.train) == [0, 1, 10, 11] and values(task.test) == [2, 12]


def test_kinds_of_images_become_upright_rgb():
    def decoded(image, **options):
        file = io.BytesIO()
        image.save(file, **{"format": "PNG"} | options)
        return reading.Decoding(4)(file.getvalue())

    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    grey = Image.fromarray(ramp)
    expected = np.repeat(ramp[..., None], 3, axis=-1)
    alpha = Image.merge("RGBA", [grey, grey, grey, Image.new("L", (4, 4), 7)])
    deep = Image.fromarray(ramp.astype(np.uint16) * 256)
    for image in (grey, grey.convert("RGB"), grey.convert("P"), alpha, Image.merge("LA", [grey, grey]), deep):
        assert (decoded(image) == expected).all(), image.mode
    see_through = grey.convert("P")
    assert (decoded(see_through, transparency=bytes(range(256))) == expected).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert (decoded(grey, exif=turned) == np.rot90(expected, -1)).all()
    assert (decoded(grey.convert("RGB"), format="BMP") == expected).all()


def test_test_images_are_resized_to_256_and_cropped_to_224_or_in_that_ratio():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    by_hand = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC).crop((6, 2, 34, 30))
    decoded = reading.Decoding(28, reading.CROP)(file.getvalue())
    assert np.abs(decoded.astype(int) - np.asarray(by_hand)).max() <= 1 and reading.CROP == 224 / 256


def test_boxes_of_random_crops_have_areas_and_ratios_within_bounds_or_are_central():
    crop, generator = reading.RandomCrop(8), np.random.default_rng(0)
    boxes = np.array([crop.box(400, 300, generator) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 400 and boxes[:, 3].max() <= 300
    area, ratio = width * height / 120_000, width / height
    assert 0.07 < area.min() < 0.12 and 0.85 < area.max() <= 1 and ratio.min() > 0.73 and ratio.max() < 1.36
    assert len(np.unique(boxes[:, 0])) > 50
    # nothing fits a strip: by hand, its height times 4/3 from its middle
    assert crop.box(1000, 30, generator) == (480, 0, 520, 30)


def test_crops_drawn_while_reading_are_parts_of_the_stored_image_in_full_resolution(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    flips = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        box = reading.RandomCrop(16).box(60, 40, generator)
        part = np.asarray(Image.fromarray(pixels).crop(box).resize((16, 16), Image.Resampling.BICUBIC))
        mirrored = generator.random() < 0.5
        flips += mirrored
        drawn = reading.RandomCrop(16)(file.getvalue(), np.random.default_rng(seed))
        assert (drawn == (part[:, ::-1] if mirrored else part)).all()
    assert 4 < flips < 16


@pytest.mark.parametrize("augment", [None, "original"])
def test_batches_read_ahead_are_the_images_one_by_one_and_the_same_after_a_restart(tmp_path, augment):
    for name in ("train", "test"):
        for c, label in enumerate(("a", "b")):
            for i in range(5):
                noise = np.random.default_rng([c, i, name == "test"]).integers(0, 256, (9, 12, 3)).astype(np.uint8)
                (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise).save(tmp_path / name / label / f"{i}.png")
    stream = opened(tmp_path, tasks=1, augment=augment, memory=0)
    task, pool = stream.tasks[0], data.pooled(stream)
    for split in (task.train, pool.train, data.validation(stream, 0.2).tasks[0].train):
        whole = list(data.train_batches(split, 4, [3, 1], steps=7))
        length = data.steps_per_epoch(split, 4)
        for step, batch in enumerate(whole):
            epoch, row = divmod(step, length)
            order = np.resize(np.random.default_rng([3, 1, epoch]).permutation(len(split)), (length, 4))[row]
            keys = [(3, 1, epoch, row, i) for i in range(4)]
            one_by_one = [
                (split.images(np.array([k]), [key]) if augment else split.images(np.array([k])))[0]
                for k, key in zip(order, keys, strict=True)
            ]
            assert (batch["image"] == np.array(one_by_one)).all() and (batch["label"] == split.labels[order]).all()
        again = list(data.train_batches(split, 4, [3, 1], start=5, steps=7))
        assert all((a["image"] == b["image"]).all() for a, b in zip(whole[5:], again, strict=True))
    first, second = (next(iter(data.train_batches(task.train, 10, s, steps=1)))["image"] for s in ([3, 1], [3, 2]))
    assert (sorted(first.sum((1, 2, 3))) == sorted(second.sum((1, 2, 3)))) == (augment is None)
    assert stream.augment is None


def test_training_images_that_crops_are_drawn_from_stay_on_disk_and_look_as_the_tests(folder):
    task = opened(folder, augment="original").tasks[0]
    assert isinstance(task.train, reading.SourceSplit) and isinstance(task.test, data.ArraySplit)
    assert task.train.decoding == reading.Decoding(4, reading.CROP) and task.train.draw == reading.RandomCrop(4)


def emptied(path):
    def damage(folder):
        shutil.rmtree(folder / path)
        (folder / path).mkdir()

    return damage


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def broken(folder):
    (folder / "train" / "ant" / "1.png").write_bytes(b"\x89PNG no image")
    (folder / "test" / "bee" / "0.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, "there is no folder .*pets: lay it out as train/CLASS"),
        (lambda f: shutil.rmtree(f / "train"), r"pets lacks train, a folder or a list, and holds test: lay it out as"),
        (lambda f: shutil.rmtree(f / "test"), r"pets lacks test or val, .* name the one to train on alone"),
        (emptied("train/cat"), "train has classes without images: cat; an image's name ends in .jpg"),
        (emptied("train"), "train has no folders of classes"),
        (lambda f: saved(f / "test" / "emu" / "0.png", 9), "test has classes that .*train lacks: emu"),
        (lambda f: shutil.rmtree(f / "test" / "dog"), "classes with no test images: dog"),
        (lambda f: shutil.copy(f / "train/ant/1.png", f / "test/ant/1.png"), "1 of 8 images of .*test are in .*train"),
        (lambda f: os.symlink(f / "train/ant/1.png", f / "test/ant/9.png"), "1 of 9 images .*9.png: a test would tell"),
        (broken, r"2 of 20 images can't be read, .*ant/1.png \(UnidentifiedImageError\), .*bee/0.png \(it is empty\)"),
        (written("train.txt", "\n"), "train.txt lists no images"),
        (written("train.txt", "train/ant/0.png\nalone\n"), "line 2: 'alone' has no path or no label"),
        (written("train.txt", "train/ant/0.png ant\ntrain/x.png bee"), "lists 1 files that are not there: .*x.png"),
        (written("train.txt", "train/ant/0.png ant\ntrain/ant/0.png bee"), "has the label bee and, further up, ant"),
        (written("train.txt", "train/ant/0.png, 0\ntrain/bee/0.png, 1"), "not there: .* no comma between them"),
    ],
)  # fmt: skip
def test_what_can_not_be_learned_is_told_by_name(folder, damage, told):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        opened(folder)


def test_a_file_whose_pixels_are_cut_off_is_told_when_it_is_read(folder):
    file = folder / "train" / "bee" / "2.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:300])
    split = opened(folder, memory=0).tasks[0].train
    with pytest.raises(ValueError, match=re.escape(str(file)) + " can't be decoded .* copy the file again"):
        list(data.eval_batches(split, 3))


def test_a_folder_is_opened_by_its_name(folder):
    stream = data.open_stream("folder:pets", 4, data_dir=folder.parent, tasks=2, seed=0, augment=None)
    absolute = data.open_stream(f"folder:{folder}", 4, tasks=2, seed=0, augment=None)
    assert stream.classes == absolute.classes and sorted(stream.classes) == list(CLASSES)
    tasks = data.open_tasks([f"folder:{folder}", "glyphs"], 4, tasks=1, images=2).tasks
    assert tasks[0].name == "pets" and len(tasks) == 2
    for options, told in (
        ({"data_dir": folder}, "data_dir .* plays no part"),
        ({"by": "colour"}, "by='colour' plays no"),
    ):
        with pytest.raises(ValueError, match=told):
            data.open_stream(f"folder:{folder}", 4, **options)


def test_folders_of_folders_are_domains(folder):
    for label in CLASSES:
        saved(folder / "test" / label / "2.png", 9)
    domains = data.open_domains(f"folder:{folder}", 4).tasks
    assert [domain.name for domain in domains] == ["test", "train"] and domains[0].classes == CLASSES
    assert [len(domains[1].train), len(domains[1].test)] == [8, 4]


def test_pixels_of_no_certain_range_are_told():
    stored = io.BytesIO()
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(stored, "TIFF")
    with pytest.raises(ValueError, match="32-bit numbers of no certain range"):
        reading.Decoding(4)(stored.getvalue())
