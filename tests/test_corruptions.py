"""Corruptions of images against closed forms, and the domains that are made of one set by them."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from compo_jax import data
from compo_jax.data.corruptions import CORRUPTIONS, corrupt
from compo_jax.data.domains import DOMAINS, HELD_OUT

COLOURS = {"hue", "saturate"}


def pictures(count=6, size=32, seed=0):
    """Smooth images in all colours."""
    noise = np.random.default_rng(seed).standard_normal((count, size, size, 3))
    waves = 2 * size / 8 * ndimage.gaussian_filter(noise, size / 16, mode="wrap", axes=(1, 2))
    return np.uint8(np.clip(128 + 60 * waves, 0, 255))


def distance(images, others):
    return ((images.astype(float) - others) ** 2).mean()


def flat(value, count=4, size=16):
    return np.full((count, size, size, 3), value, np.uint8)


# What holds for all


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_is_farther_from_the_image(name, size):
    images = pictures(size=size)
    before = images.copy()
    corrupted = [corrupt(images, name, severity, seed=3) for severity in range(1, 6)]
    assert all(each.dtype == np.uint8 and each.shape == images.shape for each in corrupted)
    distances = [distance(images, each) for each in corrupted]
    assert distances[0] > 0 and (np.diff(distances) > 0).all()
    assert (images == before).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_by_its_row_alone(name):
    images = pictures(7, 16)
    whole = corrupt(images, name, seed=[1, 2])
    chosen = np.array([5, 0, 3])
    assert (corrupt(images[chosen], name, seed=[1, 2], rows=chosen) == whole[chosen]).all()
    assert (corrupt(images[4:5], name, seed=[1, 2], rows=[4]) == whole[4:5]).all()
    assert corrupt(images[:0], name).shape == (0, 16, 16, 3)


def test_images_beyond_a_chunk_are_corrupted_as_those_before():
    images = np.tile(pictures(1, 8), (1030, 1, 1, 1))
    noisy = corrupt(images, "gaussian_noise", seed=4)
    assert (corrupt(images[:20], "gaussian_noise", seed=4, rows=range(1000, 1020)) == noisy[1000:1020]).all()
    assert len(np.unique(noisy.reshape(1030, -1), axis=0)) == 1030


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "elastic", "fog"])
def test_what_is_random_follows_the_seed(name):
    images = pictures()
    first, again, other = (corrupt(images, name, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_a_combination_applies_one_after_another():
    images = pictures()
    by_hand = corrupt(corrupt(images, "contrast", 4, 7), "gaussian_noise", 4, 7)
    assert (corrupt(images, "contrast+gaussian_noise", 4, 7) == by_hand).all()
    assert (corrupt(images, ["contrast", "gaussian_noise"], 4, 7) == by_hand).all()
    assert (corrupt(images, "gaussian_noise+contrast", 4, 7) != by_hand).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_images_are_changed_unless_by_colours(name):
    grey = np.repeat(pictures()[..., :1], 3, axis=-1)
    assert (corrupt(grey, name) == grey).all() == (name in COLOURS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": "snow"}, r"no corruption is called 'snow'; there are gaussian_noise, .*jpeg"),
        ({"names": "fog+rain+hail"}, "no corruption is called 'rain', 'hail'"),
        ({"names": ""}, "no corruption is called ''"),
        ({"names": "fog+fog"}, r"named twice in fog\+fog: ask for a higher severity"),
        ({"severity": 0}, "from 1 .* to 5, not 0"),
        ({"severity": 6}, "from 1 .* to 5, not 6"),
        ({"images": pictures() / 255}, r"are float64 of shape \(6, 32, 32, 3\): corrupt them before"),
        ({"images": pictures()[..., 0]}, r"are uint8 of shape \(6, 32, 32\)"),
        ({"images": pictures()[..., :1]}, "grey ones repeated in three channels"),
        ({"rows": [1, 2]}, "6 images need as many rows, not 2"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        corrupt(**({"images": pictures(), "names": "fog", "severity": 3} | change))


# Closed forms


def test_contrast_shrinks_towards_the_mean_of_each_channel():
    images = pictures().astype(float)
    mean = images.mean((1, 2), keepdims=True)
    assert np.abs(corrupt(pictures(), "contrast", 3) - (mean + 0.4 * (images - mean))).max() <= 0.51


def test_inverting_twice_gives_the_image_back():
    images = pictures()
    assert (corrupt(images, "invert", 5) == 255 - images).all()
    assert (corrupt(corrupt(images, "invert", 5), "invert", 5) == images).all()


def test_half_a_turn_of_the_colours_and_another_give_the_image_back():
    images = pictures()
    turned = corrupt(images, "hue", 5)
    assert np.abs(corrupt(turned, "hue", 5).astype(int) - images).max() <= 1
    assert (turned.max(-1) == images.max(-1)).all() and (turned.min(-1) == images.min(-1)).all()
    red, cyan = flat(0), flat(0)
    red[..., 0], cyan[..., 1:] = 200, 200
    assert (corrupt(red, "hue", 5) == cyan).all()


def test_brightness_is_added_to_the_largest_channel():
    assert (corrupt(flat(51), "brightness", 3) == round(255 * 0.5)).all()
    images = pictures()
    brightest = np.minimum(images.max(-1) + 255 * 0.3, 255)
    assert np.abs(corrupt(images, "brightness", 3).max(-1) - brightest).max() <= 0.51


def test_saturating_keeps_the_largest_channel_and_moves_the_smallest_away():
    images = np.clip(pictures(), 60, 255)
    largest, smallest = images.max(-1).astype(float), images.min(-1)
    expected = largest * (1 - np.minimum(3 * (1 - smallest / largest), 1))
    saturated = corrupt(images, "saturate", 3)
    assert (saturated.max(-1) == largest).all() and np.abs(saturated.min(-1) - expected).max() <= 0.51


@pytest.mark.parametrize(("severity", "part"), [(1, 0.01), (3, 0.05), (5, 0.15)])
def test_impulses_hit_their_part_of_the_values_half_of_them_white(severity, part):
    noisy = corrupt(flat(100, 40, 32), "impulse_noise", severity)
    assert set(np.unique(noisy)) == {0, 100, 255}
    deviation = np.sqrt(part / 2 / noisy.size)
    assert abs((noisy == 0).mean() - part / 2) < 4 * deviation and abs((noisy == 255).mean() - part / 2) < 4 * deviation


def test_noise_has_the_mean_and_variance_of_its_law():
    gaussian = corrupt(flat(128, 40, 32), "gaussian_noise", 1) / 255
    assert abs(gaussian.mean() - 128 / 255) < 0.002 and abs(gaussian.std() - 0.04) < 0.001
    shot = corrupt(flat(51, 40, 32), "shot_noise", 1) / 255
    assert abs(shot.mean() - 0.2) < 0.002 and abs(shot.var() - 0.2 / 250) < 1e-4
    assert (corrupt(flat(0), "shot_noise", 5) == 0).all()


def test_a_gaussian_blur_is_scipy_s_at_a_part_of_the_side():
    images = pictures(3, 40)
    for image, blurred in zip(images, corrupt(images, "gaussian_blur", 4), strict=True):
        expected = ndimage.gaussian_filter(image.astype(float), (0.05 * 40, 0.05 * 40, 0), mode="nearest")
        assert np.abs(blurred - expected).max() < 0.51


def test_a_motion_blur_spreads_a_point_along_a_line():
    size = 41
    images = flat(0, 30, size)
    images[:, 20, 20] = 255
    blurred = corrupt(images, "motion_blur", 5)[..., 0].astype(float)
    assert np.abs(blurred.sum((1, 2)) - 255).max() < 15  # rounded at some 30 pixels
    offsets = np.stack(np.indices((size, size))) - 20
    moments = np.einsum("nhw,ahw,bhw->nab", blurred / blurred.sum((1, 2), keepdims=True), offsets, offsets)
    across, along = np.linalg.eigvalsh(moments).T
    assert across.max() < 0.6 and (np.abs(np.sqrt(12 * along) / (0.25 * size) - 1) < 0.2).all()
    assert np.linalg.eigh(moments)[1][:, 0, 1].std() > 0.2  # of many directions


def test_blur_fog_and_bending_leave_a_flat_image_as_flat_as_they_should():
    for name in ("gaussian_blur", "motion_blur", "elastic", "contrast", "pixelate"):
        assert (corrupt(flat(77), name, 5) == 77).all(), name
    fog = corrupt(flat(77, 8, 32), "fog", 5).astype(float)
    grey = 77 / 255
    assert (fog.max((1, 2, 3)) == 77).all()
    assert np.abs(fog.min((1, 2, 3)) - 255 * grey * grey / (grey + 2)).max() <= 0.51
    assert (fog == fog[..., :1]).all() and len(np.unique(fog[:, 0, 0, 0])) > 1


def test_bending_moves_a_ramp_by_its_part_of_the_side():
    size = 64
    ramp = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None] * 3, (40, size, size, 3))
    moved = (corrupt(ramp, "elastic", 3).astype(float) - ramp)[:, 12:-12] / 3
    assert abs(moved.std() - 0.03 * size) < 0.15 and abs(moved.mean()) < 0.4


def test_pixels_are_means_and_a_jpeg_is_pillow_s():
    images = pictures(3, 16)
    coarse = corrupt(images, "pixelate", 4)  # half of the side
    cells = images.reshape(3, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(coarse[:, ::2, ::2] - cells).max() <= 1 and (coarse[:, 1::2, 1::2] == coarse[:, ::2, ::2]).all()
    file = io.BytesIO()
    Image.fromarray(images[1]).save(file, "jpeg", quality=15)
    assert (corrupt(images, "jpeg", 3)[1] == np.asarray(Image.open(file))).all()


# Domains


def numbered(images=40, colour=True, size=8):
    """A stream of 2 classes; the first pixels of an image hold its number, which `clean` leaves readable."""
    pixels = pictures(images + 20, size) if colour else flat(40, images + 20, size)
    pixels[:, 0, 0] = np.arange(images + 20)[:, None]
    labels = np.arange(images + 20) % 2
    return data.array_stream(pixels[:images], labels[:images], pixels[images:], labels[images:], tasks=1)


def numbers(split):
    return split.images(np.arange(len(split)))[:, 0, 0, 0].tolist()


def test_each_domain_has_other_training_images_and_the_same_test_images():
    every = numbered(43)
    stream = data.corrupted_domains(every, sources=["clean"], held_out=["fog", "invert-5"], seed=5)
    assert [task.name for task in stream.tasks] == ["clean", "fog", "invert-5"]
    assert stream.held_out == ("fog", "invert-5") and stream.size == every.size
    clean, _, inverted = stream.tasks
    assert sorted(numbers(clean.test)) == list(range(43, 63))
    assert [255 - n for n in numbers(inverted.test)] == numbers(clean.test)
    assert sum(len(task.train) for task in stream.tasks) == 43
    assert not set(numbers(clean.train)) & {255 - n for n in numbers(inverted.train)}
    for task in stream.tasks:
        assert task.classes == ("0", "1") and {tuple(np.bincount(task.train.labels))} <= {(7, 7), (8, 7), (7, 8)}
    assert [n % 2 for n in numbers(clean.train)] == clean.train.labels.tolist()


def test_domains_follow_the_seed_and_the_number_of_images():
    def of(**options):
        stream = data.corrupted_domains(numbered(), sources=["clean", "gaussian_noise"], held_out=["fog"], **options)
        return [task.train.pixels for task in stream.tasks]

    first, again, other, few = of(), of(), of(seed=1), of(images=3)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, other, strict=True))
    assert [len(pixels) for pixels in few] == [6, 6, 6]
    for some, all_of_it in zip(few, first, strict=True):
        assert {image.tobytes() for image in some} < {image.tobytes() for image in all_of_it}


def test_noise_of_a_test_image_is_not_that_of_a_training_image():
    size = 8
    every = data.array_stream(
        flat(128, 8, size), np.arange(8) % 2, flat(128, 4, size), np.arange(4) % 2, tasks=1, overlap=True
    )
    stream = data.corrupted_domains(every, sources=["gaussian_noise"], held_out=["impulse_noise"])
    for task in stream.tasks:
        pixels = np.concatenate([task.train.pixels, task.test.pixels])
        assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) == len(pixels)


@pytest.mark.parametrize(("colour", "two"), [(True, {"hue", "saturate"}), (False, {"shot_noise", "jpeg"})])
def test_the_sources_are_clean_and_twelve_corruptions_that_act_on_the_images(colour, two):
    stream = data.corrupted_domains(numbered(60, colour))
    names = [task.name for task in stream.tasks]
    sources = [task.name for task in stream.sources("fog-5")]
    assert len(names) == DOMAINS == 20 and tuple(names[13:]) == HELD_OUT == stream.held_out
    assert sources == names[:13] and sources[0] == "clean" and two < set(sources) <= {"clean", *CORRUPTIONS}
    assert stream.sources("fog") == tuple(task for task in stream.tasks[:13] if task.name != "fog")
    for name in HELD_OUT:
        assert set(name.split("-")[0].split("+")) < set(sources)


def test_without_held_out_domains_the_others_are_a_target_s_sources():
    stream = data.corrupted_domains(numbered(), sources=["clean", "fog", "invert"], held_out=())
    assert stream.held_out == () and [task.name for task in stream.sources("fog")] == ["clean", "invert"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ["clean", "snow"]}, "no corruption is called 'snow'"),
        ({"sources": ["clean", "fog-9"]}, "to 5, not 9"),
        ({"sources": ["clean", "fog-hard"]}, "'fog-hard' has no severity behind its dash, as fog-5 has"),
        ({"sources": ["clean", "fog"], "held_out": ["fog"]}, "domains are named twice: fog"),
        ({"images": 0}, "images is 0 and must be 1 or more"),
        ({}, "class '0' of arrays has 19 training images, and each of 20 domains needs another"),
    ],
)
def test_domains_that_cannot_be_made(options, message):
    with pytest.raises(ValueError, match=message):
        data.corrupted_domains(numbered(38), **options)


def test_rendered_digits_are_corrupted_without_a_download():
    stream = data.open_domains("rendered-corrupted", 12, images=2)
    assert (stream.name, len(stream.tasks), stream.held_out, stream.augment) == (
        "rendered-corrupted",
        20,
        HELD_OUT,
        None,
    )
    for task in stream.tasks:
        assert task.classes == tuple("0123456789") and np.bincount(task.train.labels).tolist() == [2] * 10
        assert np.bincount(task.test.labels).tolist() == [8] * 10
    means = {task.name: task.test.pixels.mean() for task in stream.tasks}
    assert means["clean"] < means["brightness"] < means["invert"]
    with pytest.raises(ValueError, match="cifar100-corrupted needs data_dir.*rendered, rendered-corrupted"):
        data.open_domains("cifar100-corrupted", 12)
