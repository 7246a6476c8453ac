"""Characters: what a key determines, that labels fit the pictures, that classes differ."""

import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from compo_jax.data import glyphs

GREEK = glyphs.TASKS["greek"]
STILL = glyphs.Distortion(0.0, 0.0, scale=(1.0, 1.0), shift=0.0, bend=0.0, contrast=(1.0, 1.0), noise=0.0)


@pytest.fixture(scope="module")
def greek():
    return glyphs.masters(GREEK)


def test_images_are_grey_bytes_of_the_asked_size(greek):
    images = glyphs.images(jax.random.key(0), greek, np.arange(7))
    assert images.shape == (7, 32, 32, 3) and images.dtype == np.uint8
    assert (images[..., :1] == images).all() and images.max() > 100
    assert glyphs.images(jax.random.key(0), greek, np.arange(3), size=20).shape == (3, 20, 20, 3)


def test_a_key_determines_the_images(greek):
    labels = np.arange(20)
    first, again, other = (glyphs.images(jax.random.key(k), greek, labels) for k in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any(axis=(1, 2, 3)).all()


def test_the_first_images_stay_when_more_are_asked_for(greek):
    labels = np.resize(np.arange(20), 40)
    few, many = (glyphs.images(jax.random.key(0), greek, labels[:n], chunk=16) for n in (5, 40))
    assert (few == many[:5]).all()
    assert (many[:16] != many[16:32]).any(axis=(1, 2, 3)).all()  # each piece has a key of its own


def test_images_of_one_label_differ(greek):
    images = glyphs.images(jax.random.key(0), greek, np.zeros(30, np.int32))
    assert len(np.unique(images.reshape(30, -1), axis=0)) == 30


def test_undistorted_images_are_the_masters_of_their_labels(greek):
    labels = np.random.default_rng(0).integers(0, 20, 60)
    images = glyphs.images(jax.random.key(0), greek, labels, greek.shape[-1], STILL)[..., 0].astype(int)
    for image, label in zip(images, labels, strict=True):
        # the renderer may be off by a rounding of the grid's coordinates
        assert np.abs(greek[label] - image).max(axis=(1, 2)).min() <= 2


def test_distorted_images_are_recognised_by_the_nearest_master(greek):
    labels = np.repeat(np.arange(20), 20)
    mild = STILL._replace(rotation=0.05, shear=0.05, scale=(0.95, 1.05), shift=0.02)
    images = glyphs.images(jax.random.key(0), greek, labels, greek.shape[-1], mild)[..., 0]

    def features(x):
        x = gaussian_filter(x.reshape(-1, 64, 64).astype(float), (0, 2, 2)).reshape(len(x), -1)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    nearest = (features(images) @ features(greek.reshape(-1, 64, 64)).T).argmax(1) // greek.shape[1]
    assert (nearest == labels).mean() > 0.95


def test_no_character_stands_in_two_places():
    every = "".join(glyphs.SCRIPTS.values())
    assert len(set(every)) == len(every)
    assert all(len(characters) == 20 for characters in glyphs.TASKS.values())
    assert set("".join(glyphs.TASKS.values())).isdisjoint("".join(glyphs.PRETRAINING.values()))


def test_no_two_characters_of_the_tasks_look_alike():
    characters = "".join(c for script, c in glyphs.TASKS.items() if script != "ogham")  # Ogham's differ by a stroke
    shapes = gaussian_filter(glyphs.masters(characters)[:, 0].astype(float), (0, 1.5, 1.5)).reshape(len(characters), -1)
    shapes -= shapes.mean(axis=1, keepdims=True)
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True)
    pairs = np.triu(shapes @ shapes.T, 1)
    worst = np.unravel_index(pairs.argmax(), pairs.shape)
    assert pairs.max() < 0.96, [characters[i] for i in worst]


def test_masters_fill_their_frame(greek):
    assert greek.shape == (20, 18, 64, 64) and greek.dtype == np.uint8
    inked = [(greek > 0).any(axis=axis) for axis in (3, 2)]
    rows, columns = (64 - line.argmax(axis=2) - line[..., ::-1].argmax(axis=2) for line in inked)
    longer = np.maximum(rows, columns)  # a fine tip may fade away
    assert longer.min() >= 42 and longer.max() == 44 and (longer == 44).mean() > 0.9


def test_a_character_that_no_font_has():
    with pytest.raises(ValueError, match="DejaVu fonts has the character '漢'"):
        glyphs.masters("α漢")
