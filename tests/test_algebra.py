"""Sums and multiples of modules against the same of their dense deltas, in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from test_adapters import MLP, randomised

from compo_jax import adapters, tree

X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
SHAPES = {"qkv": (3, 8, 24), "fc1": (8, 10)}
QKV, FC1, BIAS = "qkv/kernel", "fc1/kernel", "fc1/bias"
KINDS = {
    "lora": adapters.lora(2, (("qkv/kernel", 3), "fc1/kernel"), stacked=r"^qkv/"),
    "ia3": adapters.ia3("kernel", stacked=r"^qkv/"),
    "full": adapters.full("kernel"),
}


def weights(seed=0):
    kernels = {name: {"kernel": jnp.asarray(normal((seed, i), *s))} for i, (name, s) in enumerate(SHAPES.items())}
    return kernels | {"fc1": kernels["fc1"] | {"bias": jnp.asarray(normal((seed, 9), 10))}}


def lora(seed, rank, names=("qkv", "fc1")):
    """A LoRA module with ranks 3r and r, on some of the kernels."""

    def entry(i, name):
        if name not in names:
            return None
        *stack, fan_in, fan_out = SHAPES[name]
        width = 3 * rank if name == "qkv" else rank
        a, b = normal((seed, i, 0), *stack, fan_in, width), normal((seed, i, 1), *stack, width, fan_out)
        return {"a": a, "b": b}  # NumPy's, as a pool's are

    entries = {name: {"kernel": entry(i, name)} for i, name in enumerate(SHAPES)}
    return entries | {"fc1": entries["fc1"] | {"bias": None}}


def module(kind, seed):
    if kind == "lora":
        return lora(seed, 1 + seed % 3)
    made = jax.eval_shape(KINDS[kind].init, jax.random.key(seed), weights())
    return jax.tree.map(lambda x: jnp.asarray(normal((seed, x.size), *x.shape)), made)


def dense(kind, module, base):
    """Each leaf's delta, by NumPy; zero where nothing is adapted."""
    found = {}
    for name, leaf in zip(tree.names(base), jax.tree.leaves(base), strict=True):
        layer, part = name.split("/")
        entry = module[layer][part]
        if entry is None:
            found[name] = np.zeros(leaf.shape)
        elif kind == "full":
            found[name] = np.asarray(entry)
        elif kind == "lora":
            found[name] = np.einsum("...ir,...ro->...io", entry["a"], entry["b"])
        else:
            found[name] = np.einsum("...io,...o->...io", leaf, entry["l"] - 1)
    return found


def close(kind, found, expected, base, tolerance=1e-12):
    found = dense(kind, found, base)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [-1, 0.3, 0])
def test_a_multiple_of_a_module(kind, factor):
    with X64(True):
        base, own = weights(), module(kind, 1)
        scaled = jax.jit(KINDS[kind].scale)(own, base, factor)
        close(kind, scaled, {name: factor * x for name, x in dense(kind, own, base).items()}, base)
        twice = KINDS[kind].scale(KINDS[kind].scale(own, base, -1), base, -1)
        close(kind, twice, dense(kind, own, base), base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_of_modules_is_exact(kind):
    with X64(True):
        base, own = weights(), [module(kind, seed) for seed in range(3)]
        factors = [0.5, -1.5, 2.0]
        total = KINDS[kind].sum(iter(own), base, factors)
        deltas = [dense(kind, m, base) for m in own]
        expected = {k: sum(w * d[k] for w, d in zip(factors, deltas, strict=True)) for k in deltas[0]}
        close(kind, total, expected, base)
        delta = KINDS[kind].delta(total, base)
        assert tree.names(delta) == ["fc1/kernel", "qkv/kernel"]
        np.testing.assert_allclose(delta["qkv"]["kernel"], expected[QKV], rtol=1e-12, atol=1e-12)


def test_ranks_add_up_and_a_module_may_leave_leaves_out():
    with X64(True):
        base = weights()
        first, second = lora(1, 2), lora(2, 1, names=("fc1",))
        total = KINDS["lora"].sum([first, second], base, [1, 2])
        assert total["fc1"]["kernel"]["a"].shape == (8, 3)
        assert total["qkv"]["kernel"]["b"].shape == (3, 6, 24)
        assert total["fc1"]["bias"] is None
        a, b = dense("lora", first, base), dense("lora", second, base)
        close("lora", total, {QKV: a[QKV], FC1: a[FC1] + 2 * b[FC1]}, base)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("rank", [1, 2])
def test_recompression_is_the_best_of_its_rank_and_says_its_error(kind, rank):
    with X64(True):
        base = weights()
        own = lora(3, 4) if kind == "lora" else module("full", 3)  # a qkv of rank 12 in 8 x 24: more than it can have
        found = adapters.recompress(own, base, rank, (("qkv/kernel", 3), "fc1/kernel"), stacked="^qkv/")
        assert found.module["qkv"]["kernel"]["a"].shape == (3, 8, 3 * rank)
        assert found.module["fc1"]["kernel"]["b"].shape == (rank, 10)
        deltas, lost, total = dense(kind, own, base), 0, 0
        new = dense("lora", found.module, base)
        for name, error in ((QKV, found.errors["qkv"]["kernel"]), (FC1, found.errors["fc1"]["kernel"])):
            width = rank * (3 if name == QKV else 1)
            u, s, vt = np.linalg.svd(deltas[name], full_matrices=False)
            best = u[..., :width] * s[..., None, :width] @ vt[..., :width, :]
            np.testing.assert_allclose(new[name], best, atol=1e-12)
            missing, norm = np.sum((deltas[name] - new[name]) ** 2), np.sum(deltas[name] ** 2)
            np.testing.assert_allclose(error, np.sqrt(missing / norm), rtol=1e-10)
            lost, total = lost + missing, total + norm
        np.testing.assert_allclose(found.error, np.sqrt(lost / total), rtol=1e-10)
        assert found.errors["fc1"]["bias"] is None


def test_recompression_of_a_sum_loses_nothing_where_the_rank_suffices():
    with X64(True):
        base, own = weights(), [lora(1, 1), lora(2, 1)]
        total = KINDS["lora"].sum([*own, own[0]], base, [1, 1, -0.5])
        found = adapters.recompress(total, base, 2, (("qkv/kernel", 3), "fc1/kernel"))
        assert found.module["qkv"]["kernel"]["a"].shape == (3, 8, 6)
        assert found.error < 1e-14
        close("lora", found.module, dense("lora", total, base), base)
        wide = adapters.recompress(total, base, 100)
        assert wide.module["fc1"]["kernel"]["a"].shape == (8, 3) and wide.error == 0


def equations(jaxpr):
    """Those of a program and of all that are called in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_recompression_never_forms_the_matrix():
    base = {"kernel": jax.ShapeDtypeStruct((4000, 5000), jnp.float32)}
    own = {
        "kernel": {"a": jax.ShapeDtypeStruct((4000, 8), jnp.float32), "b": jax.ShapeDtypeStruct((8, 5000), jnp.float32)}
    }
    jaxpr = jax.make_jaxpr(lambda m: adapters.recompress(m, base, 4))(own)
    sizes = [np.prod(v.aval.shape, dtype=int) for equation in equations(jaxpr.jaxpr) for v in equation.outvars]
    assert max(sizes) == 8 * 5000


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_recompression_gives_lapack_one_matrix_at_a_time(kind):
    jaxpr = jax.make_jaxpr(lambda m: adapters.recompress(m, weights(), 1, stacked="^qkv/"))(module(kind, 1))
    found = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("svd", "qr", "geqrf", "householder_product")]
    assert len(found) >= 2
    assert all(v.aval.ndim <= 2 for e in found for v in e.invars)


def test_recompression_of_zeros_and_of_16_bit_arrays():
    base = jax.tree.map(lambda x: x.astype(jnp.float32), weights())
    zeros = KINDS["lora"].init(jax.random.key(0), base)
    found = adapters.recompress(zeros, base, 1)
    assert found.error == 0 and found.errors["qkv"]["kernel"] == 0
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(found))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), lora(1, 2))
    found = adapters.recompress(half, base, 2, (("qkv/kernel", 3), "fc1/kernel"))
    assert found.module["fc1"]["kernel"]["a"].dtype == jnp.bfloat16 and found.error < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_unfuse_is_the_inverse_of_fuse(kind):
    with X64(True):
        base = weights()
        delta = KINDS[kind].delta(module(kind, 1), base)
        fused = adapters.fuse(base, delta)
        expected = dense(kind, module(kind, 1), base)
        np.testing.assert_allclose(fused["qkv"]["kernel"], base["qkv"]["kernel"] + expected[QKV], atol=1e-14)
        again = adapters.unfuse(fused, delta)
        assert again["fc1"]["bias"] is base["fc1"]["bias"]
        for name in ("qkv", "fc1"):
            limit = np.finfo(np.float64).eps * np.abs(fused[name]["kernel"]).max()
            np.testing.assert_allclose(again[name]["kernel"], base[name]["kernel"], rtol=0, atol=limit)


# A whole fine-tuned delta


def whole():
    """A network's base, a change of all its leaves, and images."""
    model, x = MLP(), jnp.linspace(-1, 1, 12).reshape(4, 3)
    base = randomised(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    return model, x, base, randomised(base, 1)


def test_a_whole_delta_is_recompressed_and_its_vectors_kept_or_dropped():
    with X64(True):
        base, delta = (jax.tree.map(lambda a: a.astype(jnp.float64), t) for t in whole()[2:])
        kept, dropped = (adapters.recompress(delta, base, 2, others=others) for others in ("keep", "drop"))
        for name in ("inner", "out"):
            u, s, vt = np.linalg.svd(np.asarray(delta[name]["kernel"]), full_matrices=False)
            entry = kept.module[name]["kernel"]
            np.testing.assert_allclose(entry["a"] @ entry["b"], u[:, :2] * s[:2] @ vt[:2], atol=1e-12)
            assert kept.module[name]["bias"] is delta[name]["bias"] or np.array_equal(
                kept.module[name]["bias"], delta[name]["bias"]
            )
            assert dropped.module[name]["bias"] is None
            assert kept.errors[name]["bias"] == 0 and dropped.errors[name]["bias"] == 1
        for found in (kept, dropped):
            change = tree.combine(adapters.lora(2).delta(found.module, base), jax.tree.map(jnp.zeros_like, base))
            lost = sum(
                float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (change, delta)), strict=True)
            )
            size = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(delta))
            np.testing.assert_allclose(found.error, np.sqrt(lost / size), rtol=1e-10)


def test_a_module_of_factors_and_full_deltas_is_scaled_summed_and_run():
    with X64(True):
        model, x, base, delta = whole()
        base, delta = (jax.tree.map(lambda a: a.astype(jnp.float64), t) for t in (base, delta))
        adapter = adapters.lora(2, "kernel")
        mixed = adapters.recompress(delta, base, 2).module
        change = adapter.delta(mixed, base)
        total = adapter.sum([mixed, adapter.scale(mixed, base, -0.25)], base, [1.0, 2.0])
        for a, b in zip(*map(jax.tree.leaves, (adapter.delta(total, base), change)), strict=True):
            np.testing.assert_allclose(a, 0.5 * b, rtol=1e-12, atol=1e-12)
        found = adapters.adapted(model, adapter)(base, mixed, x)
        np.testing.assert_allclose(found, model.apply({"params": tree.add(base, change)}, x), rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="entries for inner/bias, .* aren't those of ia3"):
            adapters.ia3("kernel").delta(mixed, base)


def test_kernels_with_heads_are_no_stack_to_recompression():
    base = {
        "query": {"kernel": jnp.zeros((6, 3, 4))},
        "blocks": {"bias": jnp.zeros((2, 9)), "kernel": jnp.zeros((2, 5, 4))},
    }
    delta = randomised(base, 2)
    found = adapters.recompress(delta, base, 1)
    np.testing.assert_array_equal(found.module["query"]["kernel"], delta["query"]["kernel"])
    np.testing.assert_array_equal(found.module["blocks"]["bias"], delta["blocks"]["bias"])
    assert found.module["blocks"]["kernel"]["a"].shape == (2, 5, 1)


# 16 bits, and what is not finite


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_of_16_bit_modules_are_rounded_once(kind, dtype):
    base, terms, share = weights(), 64, 1 / 64
    own = jax.tree.map(lambda x: jnp.asarray(1 + 0.01 * x, dtype), module(kind, 1))
    total = KINDS[kind].sum([own] * terms, base, [share] * terms)
    exact = dense(kind, jax.tree.map(lambda x: np.asarray(x, np.float64), own), base)
    found = dense(kind, jax.tree.map(lambda x: np.asarray(x, np.float64), total), base)
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype(dtype)}
    for name, value in exact.items():
        limit = float(jnp.finfo(dtype).eps) * (
            np.abs(value).max() if kind != "ia3" else np.abs(base_leaf(base, name)).max()
        )
        np.testing.assert_allclose(found[name], value, rtol=0, atol=limit)


def base_leaf(base, name):
    return dict(zip(tree.names(base), jax.tree.leaves(base), strict=True))[name]


def damaged(tree_, value):
    leaves, structure = jax.tree.flatten(tree_)
    return jax.tree.unflatten(structure, [leaves[0] * value, *leaves[1:]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told_and_passes_on_purpose_only(value):
    base, own, full = weights(), module("full", 1), KINDS["full"]
    bad = damaged(own, value)
    acts = {
        "module 1": lambda **k: full.sum([own, bad], base, [1, 1], **k),
        "the module": lambda **k: adapters.recompress(bad, base, 1, stacked="^qkv/", **k),
        "the delta": lambda **k: adapters.fuse(base, bad, **k),
    }
    for who, act in acts.items():
        with pytest.raises(ValueError, match=f"{who} holds NaN or infinite numbers in fc1/kernel: "):
            act()
        found = act(check_finite=False)
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert np.isfinite(acts["the module"](check_finite=False).module["qkv"]["kernel"]["a"]).all()
    for factor in (value, -value, jnp.asarray(value)):
        with pytest.raises(ValueError, match="a module's weight is one finite number"):
            full.scale(own, base, factor)
        with pytest.raises(ValueError, match="a module's weight is one finite number"):
            full.sum([own], base, [factor])
    jax.eval_shape(lambda: full.sum([bad, bad], base, [1.0, 1.0], check_finite=False))
    jax.jit(lambda: full.scale(own, base, 0.5))()  # arrays that a traced function closes over
    jax.eval_shape(lambda: full.sum([own], base, [0.5]))
    with pytest.raises(ValueError, match="module 0 holds NaN"):
        jax.eval_shape(lambda: full.sum([bad], base, [0.5]))


def test_numbers_too_large_for_their_type_are_told():
    """As in `compose`: an infinity that comes out is none that went in."""
    base, delta = {"w": jnp.full(3, 6e4, jnp.float16)}, {"w": jnp.full(3, 6e4, jnp.float16)}
    told = r"numbers too large for their type come out in w \(float16\)"
    with pytest.raises(ValueError, match=told):
        adapters.fuse(base, delta)
    with pytest.raises(ValueError, match=told):
        adapters.unfuse(base, {"w": -delta["w"]})
    assert np.isinf(adapters.fuse(base, delta, check_finite=False)["w"]).all()
    masked = {"w": jnp.array([-jnp.inf, 0.0], jnp.float16)}
    assert np.isinf(adapters.fuse(masked, {"w": jnp.ones(2, jnp.float16)})["w"][0])  # it was there already
    full, lora = adapters.full(), adapters.lora(rank=1, targets="w")
    low = {"w": {"a": jnp.ones((2, 1), jnp.float16), "b": jnp.full((1, 2), 200.0, jnp.float16)}}
    for adapter, module, like in ((full, delta, base), (lora, low, {"w": jnp.ones((2, 2), jnp.float16)})):
        with pytest.raises(ValueError, match="numbers too large for their type come out in w"):
            adapter.scale(module, like, 1e3)
        with pytest.raises(ValueError, match="numbers too large for their type come out in w"):
            adapter.sum([module], like, [1e3])


def test_bad_input():
    base, total = weights(), KINDS["lora"].sum
    with pytest.raises(ValueError, match="the module's tree isn't the base's"):
        KINDS["lora"].scale({"fc1": lora(1, 1)["fc1"]}, base, 2)
    with pytest.raises(ValueError, match="at least one module"):
        total([], base, [])
    with pytest.raises(ValueError, match="one weight for each module: 2 were given for 1"):
        total([lora(1, 1)], base, [1, 2])
    with pytest.raises(ValueError, match=r"entries for fc1/kernel, qkv/kernel aren't those of lora .* or arrays: take"):
        total([lora(1, 1), module("ia3", 1)], base, [1, 1])
    with pytest.raises(ValueError, match="fc1/kernel is adapted by modules of the kinds arrays and lora.*add their"):
        total([lora(1, 1), module("full", 1)], base, [1, 1])
    with pytest.raises(ValueError, match="1 are fewer than the modules"):
        total([lora(1, 1)] * 2, base, [1])
    with pytest.raises(ValueError, match="others='skip' is not among keep, drop"):
        inspect.unwrap(adapters.recompress)(lora(1, 1), base, 1, others="skip")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        adapters.recompress(lora(1, 1), base, 0)
    with pytest.raises(ValueError, match="aren't those of lora"):
        adapters.recompress(module("ia3", 1), base, 1)
    vectors = tree.map_with_name(lambda name, x: x if x.ndim == 1 else None, base)
    with pytest.raises(ValueError, match="changes no matrices but .* alone.*adapters.full"):
        adapters.recompress(vectors, base, 1)
    other = {"qkv": {"kernel": jnp.ones((3, 8, 9))}, "fc1": {"kernel": None, "bias": None}}
    for act in (adapters.fuse, adapters.unfuse):
        with pytest.raises(
            ValueError, match=r"delta doesn't fit.*qkv/kernel is \(3, 8, 9\) and should be \(3, 8, 24\)"
        ):
            act(base, other)
