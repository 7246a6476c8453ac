"""What a pool refuses before anything is written: numbers that aren't finite, modules that fit nothing, texts for
lists."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pool import same

from compo_jax import adapters, incremental, tree
from compo_jax.curvature import FisherDiagonal, fisher_diagonal, kronecker
from compo_jax.pool import ModulePool

LORA = adapters.lora(rank=2, targets="kernel$")
FULL = adapters.full("kernel$")
BASE = {
    "fc1": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)},
    "fc2": {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)},
}
OTHER = {"fc1": {"kernel": jnp.ones((7, 5)), "bias": jnp.zeros(5)}, "fc9": {"kernel": jnp.ones((5, 3))}}
MODULE = LORA.init(jax.random.key(0), BASE)
DELTA = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), BASE)
KERNELS = tree.partition(BASE, "kernel$")[0]
IMAGES = jax.random.normal(jax.random.key(1), (4, 6))


@pytest.fixture
def pool(tmp_path):
    return ModulePool(tmp_path / "pool")


def apply(params, x):
    return jnp.tanh(x @ params["fc1"]["kernel"]) @ params["fc2"]["kernel"]


def fisher(params):
    total = jax.tree.map(lambda x: np.ones(x.shape, np.float32), params)
    return FisherDiagonal(total, jnp.array(4), jnp.array(1.0))


def with_leaf(params, value):
    kernel = jax.tree.map(lambda x: x.at[0, 0].set(value), params["fc1"]["kernel"])
    return params | {"fc1": params["fc1"] | {"kernel": kernel}}


def add(pool, module=MODULE, **changed):
    return pool.add("m", module, **({"base": BASE, "adapter": LORA} | changed))


REFUSED = {
    "NaN": (dict(module=with_leaf(MODULE, np.nan)), "part 'module' of module 'm' .* fc1/kernel/a, fc1/kernel/b:"),
    "infinite": (dict(module=with_leaf(DELTA, -np.inf), adapter=FULL), "part 'module' of module 'm' holds .* fc1"),
    "NaN head": (dict(head={"h": np.array([1, np.nan])}), "part 'head' of module 'm' holds NaN or .* in h"),
    "NaN curvature": (dict(curvature=fisher(BASE)._replace(total=with_leaf(BASE, np.nan))), "diagonal' .* NaN"),
    "unknown adapter": (dict(adapter="lroa"), "of module 'm' is not built: unknown adapter 'lroa'; known are"),
    "misspelled setting": (dict(adapter="lora", settings={"rnak": 2}), "adapter of module 'm' is not built: .*rnak"),
    "impossible setting": (dict(adapter="lora", settings={"rank": 0}), "is not built: the rank of a LoRA module"),
    "another base": (dict(base=OTHER), "module 'm'.* this base|delta of module 'm' doesn't fit"),
    "another adapter": (dict(adapter=adapters.ia3("kernel$")), "module 'm' is none of the adapter 'ia3' for this base"),
    "lora for full": (dict(adapter=FULL), "module 'm' is none of the adapter 'full' .*fc1/kernel/a is unknown"),
    "full for lora": (dict(module=DELTA), "module 'm' is none of the adapter 'lora' for this base"),
    "other shapes": (dict(module=OTHER, adapter=FULL), r"fc1/kernel is \(7, 5\) and should be \(6, 5\)"),
    "part of a tree": (dict(module={"fc1": MODULE["fc1"]}), "module 'm' is none of the adapter 'lora' for this base"),
    "foreign curvature": (dict(curvature=fisher(OTHER)), r"is of fc1/kernel \(7, 5\), fc9/kernel \(5, 3\)"),
    "classes": (dict(classes="abc"), r"classes is the text 'abc' and should be a list: \['abc'\]"),
    "task": (dict(task=3), "its task is a int|'task'"),
    "metrics": (dict(metrics=[1]), "its metrics is a list|'metrics'"),
    "metrics that are no JSON": (dict(metrics={"f": {1, 2}}), "is no plain value"),
    "keys that are no JSON": (dict(metrics={(1, 2): 3}), "keys must be str|'metrics'"),
    "seed": (dict(seed=1.5), "seed"),
    "seed in words": (dict(seed="3"), "seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_add_refuses_and_writes_nothing(pool, case):
    changed, told = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=told):
        add(pool, **changed)
    assert not pool.path.exists()
    add(pool)
    before = pool.manifest("m")
    with pytest.raises((ValueError, TypeError), match=told):
        add(pool, **changed, overwrite=True)
    assert pool.manifest("m") == before
    assert os.listdir(pool.path) == ["m"]


def test_what_is_not_finite_or_not_known_is_let_through_on_purpose(pool):
    bad = with_leaf(MODULE, np.nan)
    add(pool, module=bad, check_finite=False)
    same(pool.load("m"), bad)
    pool.attach("m", head={"h": np.array([np.inf])}, check_finite=False)
    pool.add("own", {"x": np.ones(1)}, base=BASE, adapter="mine", check_adapter=False)
    assert pool.manifest("own").adapter == "mine"
    add(pool, module={"w": np.array([1e300])}, base="0" * 64, overwrite=True)  # finite, beyond float32


ATTACHED = {
    "NaN": (fisher(BASE)._replace(total=with_leaf(BASE, np.nan)), "NaN or infinite numbers in fc1/kernel"),
    "other model": (fisher(OTHER), r"fc1/kernel \(7, 5\), fc9/kernel \(5, 3\), which its base hasn't"),
    "other shape": (fisher({"fc1": {"kernel": jnp.ones((5, 6))}}), r"is of fc1/kernel \(5, 6\), which its base hasn't"),
    "factors": (
        kronecker(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 3))}, IMAGES),
        r"is of w \(6, 3\), which its base",
    ),
}


@pytest.mark.parametrize("case", ATTACHED)
def test_attach_refuses_curvature_of_other_parameters(pool, case):
    curvature, told = ATTACHED[case]
    add(pool)
    with pytest.raises(ValueError, match=told):
        pool.attach("m", curvature=curvature)
    assert pool.manifest("m").curvature == {}
    pool.attach("m", curvature=fisher(BASE))
    pool.attach("m", curvature=kronecker(apply, KERNELS, IMAGES))
    pool.attach("m", curvature=fisher_diagonal(apply, KERNELS, IMAGES))  # of a part of it
    with pytest.raises(ValueError, match="part 'head' of module 'm' holds NaN"):
        pool.attach("m", head={"h": np.array([np.nan])})


def test_of_a_base_of_which_only_the_fingerprint_is_known_the_adapted_leaves_are(pool):
    add(pool, base="0" * 64)
    with pytest.raises(ValueError, match="which its base hasn't"):
        pool.attach("m", curvature=fisher({"fc7": {"kernel": jnp.ones((6, 5))}}))
    pool.attach("m", curvature=fisher(BASE))


WEIGHTS = [([np.nan, 1.0], "the weights of a are not finite"), ([1.0, -np.inf], "the weights of b are not finite"),
           ([1.0], "1 weights were given for 2 modules: a, b"), (jnp.ones(3), "3 weights were given")]  # fmt: skip


def test_compose_refuses_weights_and_results_that_are_not_finite(pool):
    pool.add("a", DELTA, base=BASE, adapter=FULL)
    pool.add("b", with_leaf(DELTA, np.nan), base=BASE, adapter=FULL, check_finite=False)
    for weights, told in WEIGHTS:
        with pytest.raises(ValueError, match=told):
            pool.compose(BASE, weights=weights)
    with pytest.raises(ValueError, match="the delta of module 'b' holds NaN or infinite numbers in fc1/kernel:"):
        pool.compose(BASE)
    assert np.isnan(pool.compose(BASE, check_finite=False)["fc1"]["kernel"][0, 0])
    pool.compose(BASE, ["a"])
    with pytest.raises(
        ValueError, match="the composition of a holds NaN or infinite"
    ):  # which no module is to blame for
        pool.compose(BASE, ["a"], [1e39])


def test_a_text_is_no_list_of_names(pool):
    for name in ("m", "0", "m0"):
        pool.add(name, DELTA, base=BASE, adapter=FULL)
    for call in (
        lambda: pool.compose(BASE, "m0"),
        lambda: pool.deltas(BASE, "m0"),
        lambda: pool.check("m0"),
        lambda: incremental.merge_pool("average", pool, BASE, "m0"),
        lambda: incremental.pool_head(pool, "m0", {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}),
    ):
        with pytest.raises(TypeError, match=r"names is the text 'm0' and should be a list: \['m0'\]"):
            call()
