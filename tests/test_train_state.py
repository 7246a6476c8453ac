"""What a training keeps: good parameters, of whatever types, with keys and empty arrays among them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compo_jax.train import Checkpoints, fit, init_state, jit_runner, make_step


def identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_update_that_overflows_is_not_made():
    step = make_step(lambda p, c, b, s: (jnp.sum(p * b), {}), optax.sgd(1e30))
    state, metrics = step(init_state(jnp.ones(1), optax.sgd(1e30)), {}, jnp.full(1, 1e10))
    assert state.params == 1 and metrics["not_finite"] == 1
    state, metrics = step(state, {}, jnp.full(1, 1e-30))  # and what is, is
    np.testing.assert_allclose(state.params, 0, atol=1e-6)
    assert metrics["not_finite"] == 1


def test_parameters_that_blow_up_are_not_kept(tmp_path):
    loss = lambda params, context, batch, step: (jnp.mean((batch @ params["w"]) ** 2), {})
    start, made = {"w": np.ones(3)}, [np.ones((8, 3), np.float32)] * 60
    checkpoints = Checkpoints(tmp_path)
    for every in (10, 40):
        state, batches = init_state(start, optax.sgd(1e3)), lambda first: iter(made[first:])
        with pytest.raises(FloatingPointError, match="not finite"):
            fit(jit_runner(loss, optax.sgd(1e3)), state, {}, batches, 40, checkpoints=checkpoints, every=every)
        state = init_state(jax.tree.map(jnp.asarray, start), optax.sgd(1e3))
        kept = checkpoints.load({"state": state, "position": np.zeros((), np.int64)})["state"]
        assert np.isfinite(loss(kept.params, {}, made[0], 0)[0])


@pytest.mark.parametrize("start", [{"w": np.ones(3)}, {"w": np.ones(3, np.float16)}, {"w": 0.5}])
def test_a_run_of_numpys_arrays_and_numbers_goes_on(tmp_path, start):
    loss = lambda params, context, batch, step: (jnp.mean((batch * params["w"]) ** 2), {})
    made, begun = [np.ones((8, 3), np.float32)] * 20, []

    def from_step(first):
        begun.append(first)
        return iter(made[first:])

    def trained(steps, checkpoints):
        state, runner = init_state(start, optax.sgd(0.1)), jit_runner(loss, optax.sgd(0.1))
        return fit(runner, state, {}, from_step, steps, checkpoints=checkpoints)

    trained(5, Checkpoints(tmp_path))
    identical(trained(10, Checkpoints(tmp_path)).params, trained(10, None).params)
    assert begun == [0, 5, 0]


def test_keys_and_empty_leaves_are_kept_in_checkpoints(tmp_path):
    noisy = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.sgd(0.1))
    loss = lambda params, context, batch, step: (jnp.mean((batch @ params["w"]) ** 2) + jnp.sum(params["none"]), {})
    made = [np.ones((8, 3), np.float32)] * 20

    def trained(steps, checkpoints):
        state = init_state({"w": jnp.ones(3), "none": jnp.zeros((0, 2))}, noisy)
        return fit(jit_runner(loss, noisy), state, {}, lambda first: iter(made[first:]), steps, checkpoints=checkpoints)

    trained(5, Checkpoints(tmp_path))
    again, whole = trained(10, Checkpoints(tmp_path)), trained(10, None)
    identical(again.params, whole.params)
    keys = [x for x in jax.tree.leaves(again.optimizer) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert keys and again.params["none"].shape == (0, 2)


def test_logits_of_minus_infinity_stay_and_the_others_learn():
    """As of a route, for a template that a layer can't take."""
    loss = lambda params, context, batch, step: (jnp.sum(jax.nn.softmax(params)[1:] * batch), {})
    start = jnp.array([0.0, -jnp.inf, 1.0])
    state, metrics = make_step(loss, optax.sgd(0.1))(init_state(start, optax.sgd(0.1)), {}, jnp.ones(2))
    assert metrics["not_finite"] == 0 and state.params[1] == -jnp.inf
    assert state.params[0] > 0 and state.params[2] < 1
