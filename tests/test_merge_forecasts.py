"""What training images expect of merged models, in the experiments: against the landscape and a closed form."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jobs import ROOT

from compo_jax import compose, tree
from compo_jax.curvature import landscape

sys.path.insert(0, str(ROOT / "experiments"))
import merge_forecasts


def case():
    draw = np.random.default_rng(0)
    base = {"learned": draw.normal(size=(3, 2)), "rest": draw.normal(size=4)}
    deltas = [{"learned": draw.normal(size=(3, 2)), "rest": None} for _ in range(3)]
    loss = lambda part, x: jnp.mean(jnp.tanh(x @ part["learned"]) ** 2)
    batches = [(draw.normal(size=(4, 3)),), (draw.normal(size=(4, 3)),)]
    return base, deltas, loss, batches, lambda params: {"learned": params["learned"]}


def test_compositions_are_expected_as_their_landscape_expects_them():
    base, deltas, loss, batches, part = case()
    expected = merge_forecasts.expectation(loss, batches, part, base, deltas)
    weights = merge_forecasts.weights_to_test(3, 0)
    seen = []
    made = merge_forecasts.tested(
        expected, deltas, weights, lambda params: (seen.append(params), np.array([0.1, 0.2, float(len(seen))]))[1]
    )
    learned = [part(delta) for delta in deltas]
    land = landscape(loss, part(base), learned, batches=batches, anchor=[1 / 3] * 3, check=weights)
    np.testing.assert_allclose(made.expected.forecast, land.predict(weights), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.expected.loss, land.checked_loss, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), seen[1], compose.compose(base, deltas, weights[1])
    )
    np.testing.assert_array_equal(made.within[:, 2], 1 + np.arange(len(weights)))


def test_distance_is_in_units_of_the_averages_from_the_base():
    base, deltas, loss, batches, part = case()
    expected = merge_forecasts.expectation(loss, batches, part, base, deltas)
    np.testing.assert_allclose(float(expected.of(base).distance), 1)
    np.testing.assert_allclose(float(expected.of(compose.compose(base, deltas)).distance), 0, atol=1e-6)
    summed = tree.add(base, tree.weighted_sum(deltas, [1.0] * 3))
    np.testing.assert_allclose(float(expected.of(summed).distance), 2, rtol=1e-5)  # 3 averages from the base
    moved = summed | {"rest": base["rest"] + 9}  # no part of the loss
    np.testing.assert_array_equal(expected.of(moved), expected.of(summed))


def test_weightings_lead_from_the_base_over_the_average_to_the_sum():
    weights = merge_forecasts.weights_to_test(8, 0)
    even = np.ptp(weights, axis=1) == 0
    sums = weights.sum(axis=1)
    np.testing.assert_allclose(sums[even], [0, 0.5, 1, 1.5, 2, 3, 4, 8])
    np.testing.assert_allclose(sums[~even], 1)
    assert (~even).sum() == merge_forecasts.RANDOM
    assert np.any(weights != merge_forecasts.weights_to_test(8, 1))
    np.testing.assert_allclose(merge_forecasts.weights_to_test(2, 0).sum(1)[:5], [0, 0.5, 1, 1.5, 2])
