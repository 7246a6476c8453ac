"""The first order of a model as a forward pass, and the penalty that keeps modules of it out of one another's way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from compo_jax import adapters, compose, curvature, tree

X64 = jax.enable_x64


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def network(seed=0, widths=(5, 6, 3)):
    """A network of two dense layers with biases, and its pattern of kernels."""
    first, last = widths[:2], widths[1:]
    base = {
        "in": {"kernel": normal(seed, *first) / 2, "bias": normal(seed + 1, first[1])},
        "out": {"kernel": normal(seed + 2, *last) / 2, "bias": normal(seed + 3, last[1])},
    }

    def apply(p, x):
        hidden = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
        return hidden @ p["out"]["kernel"] + p["out"]["bias"]

    return apply, base


def delta_of(base, seed, scale=1.0):
    """A change of the kernels, none of the biases."""
    kernels = tree.partition(base, "kernel")[0]
    return jax.tree.map(lambda x: jnp.asarray(scale * normal(seed, *x.shape)), kernels)


# -- the forward pass --------------------------------------------------------------------------------------------------
def test_a_linear_network_is_its_first_order():
    with X64(True):
        base = {"kernel": normal(0, 4, 3), "bias": normal(1, 3), "steps": np.int32(7)}
        apply = lambda p, x: x @ p["kernel"] + p["bias"]
        delta = {"kernel": normal(2, 4, 3), "bias": None, "steps": None}
        x = normal(3, 8, 4)
        np.testing.assert_allclose(
            adapters.linearised(apply)(base, delta, x), apply(tree.add(base, delta), x), atol=1e-14
        )


def test_a_network_differs_from_its_first_order_by_a_second_order():
    with X64(True):
        apply, base = network()
        x, linear = normal(4, 7, 5), adapters.linearised(apply)

        def error(scale):
            delta = delta_of(base, 5, scale)
            return np.linalg.norm(apply(tree.add(base, delta), x) - linear(base, delta, x))

        np.testing.assert_allclose(linear(base, delta_of(base, 5, 0.0), x), apply(base, x), atol=1e-14)
        np.testing.assert_allclose([error(2e-3) / error(1e-3), error(2e-4) / error(1e-4)], 4, rtol=0.02)


def test_what_modules_change_adds_up_in_any_adapter():
    with X64(True):
        apply, base = network()
        x = normal(4, 7, 5)
        for adapter in (adapters.full("kernel"), adapters.lora(2, "kernel", stacked=())):
            forward = adapters.linearised(apply, adapter)
            modules = [
                jax.tree.map(lambda m, t=t: m + normal(t, *m.shape), adapter.init(jax.random.key(t), base))
                for t in (0, 1)
            ]
            changes = [forward(base, module, x) - apply(base, x) for module in modules]
            total = tree.weighted_sum([adapter.delta(module, base) for module in modules], [1, 1])
            summed = adapters.linearised(apply)(base, total, x)
            np.testing.assert_allclose(summed, apply(base, x) + sum(changes), atol=1e-12)


def test_a_delta_of_another_base_is_told():
    apply, base = network()
    wrong = delta_of(base, 0) | {"more": np.ones(2)}
    with pytest.raises(ValueError, match="the delta doesn't fit the parameters: more is unknown"):
        adapters.linearised(apply)(base, wrong, normal(0, 2, 5))


# -- the penalty -------------------------------------------------------------------------------------------------------
def features_of(base):
    """The network as a function of its kernels, and these."""
    kernels, rest = tree.partition(base, "kernel")
    apply, _ = network()
    return lambda k, x: apply(tree.combine(k, rest), x), kernels


def test_factors_of_one_linear_layer_and_one_image_are_the_gauss_newton_matrix():
    with X64(True):
        weights, image = {"w": normal(0, 4, 3)}, normal(1, 1, 4)
        factors = curvature.jacobian_factors(lambda p, x: x @ p["w"], weights, image)
        jacobian = jax.jacobian(lambda w: (image @ w)[0])(weights["w"]).reshape(3, -1)
        flat, unravel = ravel_pytree(weights)
        dense = jax.vmap(lambda v: ravel_pytree(factors.matvec(unravel(v)))[0])(jnp.eye(flat.size))
        np.testing.assert_allclose(dense, jacobian.T @ jacobian, atol=1e-12)


def test_the_penalty_is_the_dense_kronecker_product_of_the_merged_factors():
    with X64(True):
        _, base = network()
        features, kernels = features_of(base)
        images = [normal(t, 6 + t, 5) for t in range(3)]
        factors = [curvature.jacobian_factors(features, kernels, x) for x in images]
        others = curvature.factors_of_others(factors)[1]
        delta, expected = delta_of(base, 9), 0.0
        for layer in ("in", "out"):
            pairs = [dense_factors(base, layer, images[s]) for s in (0, 2)]
            share = np.array([len(images[0]), len(images[2])]) / (len(images[0]) + len(images[2]))
            a = sum(w * pair[0] for w, pair in zip(share, pairs, strict=True))
            b = sum(pair[1] for pair in pairs)
            v = delta[layer]["kernel"].reshape(-1)
            expected += v @ np.kron(a, b) @ v
        np.testing.assert_allclose(others.quadratic(delta), expected, rtol=1e-10)


def dense_factors(base, layer, x):
    """(mean Gram of the layer's inputs, mean Gram of its outputs' gradients, summed over the features)."""
    hidden = np.tanh(x @ base["in"]["kernel"] + base["in"]["bias"])
    back = np.broadcast_to(np.eye(3), (len(x), 3, 3))
    if layer == "out":
        return hidden.T @ hidden / len(x), np.eye(3)
    back = (back @ base["out"]["kernel"].T) * (1 - hidden**2)[:, None]
    return x.T @ x / len(x), np.einsum("nki,nkj->ij", back, back) / len(x)


def test_probes_estimate_the_sum_over_the_features():
    with X64(True):
        _, base = network()
        features, kernels = features_of(base)
        images = np.repeat(normal(3, 1, 5), 20_000, axis=0)
        exact = curvature.jacobian_factors(features, kernels, images[:1])
        drawn = curvature.jacobian_factors(features, kernels, images, key=jax.random.key(0))
        delta = delta_of(base, 1)
        np.testing.assert_allclose(drawn.quadratic(delta), exact.quadratic(delta), rtol=0.03)


def test_a_delta_at_right_angles_to_the_other_tasks_inputs_costs_nothing():
    with X64(True):
        weights, inputs = {"w": normal(0, 6, 3)}, [normal(1, 9, 6), normal(2, 9, 6)]
        inputs[1][:, :2] = 0  # the other task never uses the first two inputs
        factors = [curvature.jacobian_factors(lambda p, x: x @ p["w"], weights, x) for x in inputs]
        others = curvature.factors_of_others(factors)[0]
        free = {"w": jnp.asarray(normal(3, 6, 3) * (np.arange(6) < 2)[:, None])}
        np.testing.assert_allclose(jax.grad(others.quadratic)(free)["w"], 0, atol=1e-12)
        assert float(others.quadratic({"w": jnp.asarray(normal(3, 6, 3))})) > 1


def test_one_task_has_no_others():
    factors = curvature.jacobian_factors(lambda p, x: x @ p["w"], {"w": np.ones((2, 2))}, np.ones((1, 2)))
    with pytest.raises(ValueError, match="need two tasks at least, and there are 1"):
        curvature.factors_of_others([factors])


def test_modules_with_the_penalty_are_added_and_subtracted_with_less_harm_than_those_without():
    """Two tasks that share half of their inputs, under heads that stay: each one's label is the sign of an input."""
    apply, base = network(widths=(8, 16, 4))
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), base)
    adapter, linear = adapters.full("kernel"), adapters.linearised(apply)
    tasks = []
    for t in (0, 1):
        x = normal(10 + t, 400, 8).astype(np.float32)
        x[:, 6 - 2 * t : 8 - 2 * t] = 0  # inputs 6, 7 are silent in the first task, 4, 5 in the second
        tasks.append((x, (x[:, 4 + 2 * t] + x[:, t] > 0).astype(int)))
    head = jnp.asarray(normal(7, 2, 4, 2), jnp.float32)
    kernels, rest = tree.partition(base, "kernel")
    features = lambda k, x: apply(tree.combine(k, rest), x)
    factors = [curvature.jacobian_factors(features, kernels, x[:256], key=jax.random.key(0)) for x, _ in tasks]
    others = curvature.factors_of_others(factors)

    def loss(module, t):
        x, labels = tasks[t]
        logits = linear(base, module, x) @ head[t]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def trained(t, strength):
        optimizer, module = optax.adam(1e-2), adapter.init(jax.random.key(t), base)

        def step(carry, _):
            module, state = carry
            gradient = jax.grad(lambda m: loss(m, t) + strength * others[t].quadratic(m))(module)
            update, state = optimizer.update(gradient, state)
            return (optax.apply_updates(module, update), state), None

        return jax.jit(lambda m: jax.lax.scan(step, (m, optimizer.init(m)), length=300)[0][0])(module)

    lost, harmed = {}, {}
    for strength in (0.0, 0.1):
        modules = [trained(t, strength) for t in (0, 1)]
        total = compose.task_vector(compose.compose(kernels, modules, [1.0, 1.0]), kernels)
        lost[strength] = [loss(total, t) - loss(modules[t], t) for t in (0, 1)]
        negated = [jax.tree.map(jnp.negative, m) for m in modules]
        zero = jax.tree.map(jnp.zeros_like, kernels)
        harmed[strength] = [loss(negated[1 - t], t) - loss(zero, t) for t in (0, 1)]
        assert all(loss(modules[t], t) < 0.6 * loss(zero, t) for t in (0, 1))  # learned alone
        assert all(loss(negated[t], t) > 1.5 * loss(zero, t) for t in (0, 1))  # and forgotten
    assert all(a < 0.5 * b for a, b in zip(lost[0.1], lost[0.0], strict=True))
    assert all(abs(a) < 0.5 * abs(b) for a, b in zip(harmed[0.1], harmed[0.0], strict=True))
