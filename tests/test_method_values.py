"""What a method can't be given is told before anything is trained, and what a way says of itself holds."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from way_cases import noisy_pictures

from compo_jax import adapters, incremental
from compo_jax.incremental.baselines.ranpac import random_projection
from compo_jax.incremental.learner import training

NAN = float("nan")


@pytest.fixture(scope="module")
def setup():
    return noisy_pictures([[0, 1], [2, 3], [4, 5]], noise=40)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("units", "Relative", "units is one of relative, paper, not 'Relative'"),
        ("curvature", "diag", "curvature is one of diagonal, kronecker, not 'diag'"),
        ("coupled", "no", "coupled is one of True, False, None, not 'no'"),
        ("alpha", NAN, "alpha is a finite number that isn't negative"),
        ("alpha", -1.0, "alpha is a finite number that isn't negative"),
        ("learning_rate", NAN, "learning_rate is a finite number that isn't negative"),
        ("learning_rate", -1.0, "learning_rate is a finite number that isn't negative"),
        ("pull", (NAN, 1.0), "ita-lora's pull's λ_F is a finite number"),
        ("pull", (1.0, -3.0), "ita-lora's pull's λ_I is a finite number"),
        ("pull", (1.0,), "pull is two numbers"),
        ("pull", 0.1, "pull is two numbers"),
    ],
)
def test_what_a_method_can_not_have_is_told_by_its_name(setup, tmp_path, field, value, told):
    method = incremental.method("ita", adapters.lora(1), learning_rate=1e-2)._replace(**{field: value})
    with pytest.raises(ValueError, match=told):
        training(setup, method)
    with pytest.raises(ValueError, match=told):
        next(iter(incremental.learn_stream(setup, [method], tmp_path / "run")))
    assert not list(tmp_path.glob("run/pools/*/*"))


@pytest.mark.parametrize("way", incremental.WAYS)
def test_only_what_is_a_mean_of_modules_is_said_to_be_composed_of_all(setup, way):
    """The summary leaves modules out one by one of a composition of all, and speaks of their mean: also of the tangent
    model's, which merge rules of the network itself don't take."""
    adapter = None if way == "ncm" else adapters.full() if way == "tmc" else adapters.lora(1)
    mode = incremental.WAYS[way].mode(setup, incremental.method(way, adapter, learning_rate=1e-2))
    names = [f"module {t}" for t in range(3)]
    after = mode.compose(names, 2)
    assert (after is not None and after.modules == names) == (incremental.WAYS[way].averages or way == "tmc")


@pytest.mark.parametrize("alpha", [NAN, -1.0, 2.0])
def test_opcm_takes_out_a_part(setup, alpha):
    method = incremental.method("opcm", adapters.lora(1), learning_rate=1e-2)
    with pytest.raises(ValueError, match="alpha is the part of the singular values' sum"):
        incremental.WAYS["opcm"].mode(setup, method, alpha=alpha)
    with pytest.raises(ValueError, match="scale is the finite factor"):
        incremental.WAYS["magmax"].mode(setup, method, scale=NAN)


def features(images):
    random = np.random.default_rng(0)
    labels = np.arange(images) % 2
    return random.normal(size=(images, 5)) + labels[:, None], labels


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ridges": (NAN, 1.0)}, "a ridge is a finite number above zero"),
        ({"ridges": (-5.0,)}, "a ridge is a finite number above zero"),
        ({"ridges": ()}, "no ridges"),
        ({"width": 0}, "width is the number"),
        ({"width": -3}, "width is the number"),
        ({"newest": 21}, "newest=21 of 20 images"),
    ],
)
def test_a_random_projection_is_of_numbers_that_can_be(options, told):
    with pytest.raises(ValueError, match=told):
        random_projection(jax.random.key(0), *features(20), **options)


def test_the_largest_ridge_stands_where_there_is_nothing_to_try_them_on():
    z, labels = features(4)
    projection, head = random_projection(jax.random.key(0), z, labels, width=3, ridges=(1e-8, 10.0, 0.1))
    expected = Ridge(alpha=10.0, fit_intercept=False).fit(np.maximum(z @ projection, 0), np.eye(2)[labels])
    np.testing.assert_allclose(head["kernel"], expected.coef_.T, rtol=1e-6)
