"""Where a landscape looks at the truth when it isn't told where: never at its anchor, where it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax.curvature import landscape

UNIFORM, FIRST, SECOND = [1 / 3] * 3, [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]
DELTAS = [np.eye(3)[t].astype(np.float32) for t in range(3)]


def loss(params):
    return jnp.sum(jnp.exp(params) + params**4)


@pytest.mark.parametrize(
    ("anchor", "points"),
    [
        (None, (UNIFORM, FIRST)),
        ([0.2, 0.3, 0.5], (UNIFORM, FIRST)),
        (UNIFORM, (FIRST, SECOND)),
        (jnp.full(3, 1 / 3), (FIRST, SECOND)),
        (FIRST, (UNIFORM, SECOND)),
        (SECOND, (UNIFORM, FIRST)),
    ],
)
def test_the_anchor_is_left_out(anchor, points):
    land = landscape(loss, np.zeros(3, np.float32), DELTAS, anchor=anchor)
    np.testing.assert_allclose(land.checked, points)
    assert np.all(land.remainder().loss > 1e-5) and np.all(land.remainder().slope > 1e-3)


def test_of_a_traced_anchor_the_halves_are_looked_at():
    land = jax.jit(lambda anchor: landscape(loss, np.zeros(3, np.float32), DELTAS, anchor=anchor))(jnp.array(UNIFORM))
    np.testing.assert_allclose(land.checked, [FIRST, SECOND])


def test_of_two_modules_the_halves_are_the_modules():
    land = landscape(loss, np.zeros(3, np.float32), DELTAS[:2], anchor=[0.5, 0.5])
    np.testing.assert_allclose(land.checked, [[1, 0], [0, 1]])


def test_an_anchor_of_another_shape_is_still_told():
    with pytest.raises(ValueError, match=r"3 modules need an anchor of shape \(3,\)"):
        landscape(loss, np.zeros(3, np.float32), DELTAS, anchor=[0.5, 0.5])
