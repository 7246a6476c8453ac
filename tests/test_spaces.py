"""Rules in the coordinates that tasks share, KnOTS and Core Space: against NumPy, and nothing is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, normal

from compo_jax import adapters, tree
from compo_jax.compose import compose, core_space, iso, knots_space, merge, ties
from compo_jax.pool import ModulePool

X64 = functools.partial(jax.enable_x64, True)


def knots_ties_loop(xs, density):
    """Of one matrix alone; TIES looks at all blocks of a tree."""
    u, s, v = np.linalg.svd(np.vstack(xs), full_matrices=False)
    rows = np.stack([block.ravel() for block in np.split(u * s, len(xs))])
    kept = round(density * rows.shape[1])
    for row in rows:
        row[np.argsort(-np.abs(row))[kept:]] = 0
    agreeing = (np.sign(rows) == np.sign(rows.sum(0))) & (rows != 0)
    merged = (rows * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
    return merged.reshape(xs[0].shape[0], -1) @ v


def test_ties_in_the_coordinates_of_knots():
    with X64():
        zero, deltas = {"w": np.zeros((6, 5))}, [{"w": normal(t, 6, 5)} for t in range(3)]
        found = merge("knots", zero, deltas, rule="ties", density=0.5)["w"]
        np.testing.assert_allclose(found, knots_ties_loop([x["w"] for x in deltas], 0.5), atol=1e-9)
        space = knots_space(zero, deltas)
        close(space.back(ties(space.base, space.deltas, density=0.5))["w"], found)
        drawn = merge("knots", zero, deltas, rule="dare", key=jax.random.key(0), rate=0.0)
        close(drawn["w"], np.mean([x["w"] for x in deltas], axis=0))


def lora_modules():
    """Modules of ranks 1 to 3 and a full delta of the bias; the last one doesn't change the blocks."""
    made = []
    for t, rank in enumerate((1, 2, 3)):
        pair = lambda i, stack, n, m, t=t, rank=rank: {
            "a": normal((t, i), *stack, n, rank),
            "b": normal((t, i, 1), *stack, rank, m),
        }
        blocks = {"kernel": pair(0, (2,), 8, 9) if t < 2 else None, "bias": normal((t, 3), 2, 9)}
        made.append({"blocks": blocks, "head": pair(1, (), 10, 8)})
    base = {"blocks": {"kernel": normal(0, 2, 8, 9), "bias": normal(1, 2, 9)}, "head": normal(2, 10, 8)}
    delta = adapters.lora(targets="kernel").delta
    return base, made, [delta(module, base) for module in made]


def test_core_space_takes_a_module_of_rank_0_for_one_that_changes_nothing_there():
    pair = lambda seed, rank: {"a": normal(seed, 5, rank), "b": normal(seed + 1, rank, 4)}
    base, modules = (
        {"w": normal(0, 5, 4), "v": normal(1, 5, 4)},
        [{"w": pair(2, 0), "v": pair(4, 1)}, {"w": pair(6, 2)}],
    )
    modules[1]["v"] = None
    expected = {"w": base["w"] + modules[1]["w"]["a"] @ modules[1]["w"]["b"] / 2}
    expected["v"] = base["v"] + modules[0]["v"]["a"] @ modules[0]["v"]["b"] / 2
    with X64():
        close(merge("core_space", base, modules), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_core_space_keeps_a_module_that_is_weak_beside_another(dtype):
    """Factors are exact, whatever their type: none of their directions is an error of rounding."""
    base = {"w": jnp.zeros((64, 48))}
    draw = lambda seed, scale: {"a": scale * normal(seed, 64, 4), "b": normal(seed + 1, 4, 48)}
    weak, strong = ({"w": jax.tree.map(lambda x: x.astype(dtype), draw(t, scale))} for t, scale in ((0, 1e-3), (5, 1)))
    alone = np.asarray(weak["w"]["a"], np.float64) @ np.asarray(weak["w"]["b"], np.float64)
    found = merge("core_space", base, [weak, strong], weights=[1.0, 0.0])["w"]
    np.testing.assert_allclose(found, alone, atol=1e-3 * np.abs(alone).max())


def test_core_space_takes_lora_modules_of_any_ranks_and_loses_nothing():
    with X64():
        base, made, deltas = lora_modules()
        mixed = [made[0], deltas[1], made[2]]
        close(merge("core_space", base, mixed, weights=[0.2, 0.5, 0.3]), compose(base, deltas, [0.2, 0.5, 0.3]))
        close(merge("core_space", base, made, rule="iso"), iso(base, deltas))
        space = core_space(base, made)
        assert space.deltas[0]["blocks"]["kernel"].shape == (2, 3, 3) and space.deltas[2]["blocks"]["kernel"] is None
        assert space.deltas[1]["head"].shape == (6, 6)
        # the bases are the factors' singular vectors: TIES sees these coordinates
        left = np.linalg.svd(np.hstack([m["head"]["a"] for m in made]), full_matrices=False)[0]
        right = np.linalg.svd(np.vstack([m["head"]["b"] for m in made]), full_matrices=False)[2]
        for t, delta in enumerate(deltas):
            np.testing.assert_allclose(
                np.abs(space.deltas[t]["head"]), np.abs(left.T @ delta["head"] @ right.T), atol=1e-9
            )
        close(merge("core_space", base, made, rule="ties", density=1.0),
              tree.add(base, space.back(ties(space.base, space.deltas, density=1.0))))  # fmt: skip


def shapes(jaxpr):
    """Of all arrays that a program makes."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from shapes(inner)


def test_core_space_makes_as_few_whole_matrices_for_many_modules_as_for_two():
    counts = []
    for tasks in (2, 6):
        made = [{"w": {"a": jnp.ones((41, 2)), "b": jnp.ones((2, 37))}}] * tasks
        run = functools.partial(merge, "core_space", {"w": jnp.ones((41, 37))}, rule="tsv")
        counts.append(sum({41, 37} <= set(shape) for shape in shapes(jax.make_jaxpr(run)(made).jaxpr)))
    assert counts[0] == counts[1]


def test_a_pool_hands_its_lora_modules_to_core_space(tmp_path):
    base = {"w": jnp.asarray(normal(0, 8, 6), jnp.float32), "b": jnp.ones(6)}
    pool, deltas = ModulePool(tmp_path / "pool"), []
    for rank in (1, 2):
        adapter = adapters.lora(rank, targets="w")
        module = jax.tree.map(lambda x: x + 0.1, adapter.init(jax.random.key(rank), base))
        pool.add(f"rank{rank}", module, base=base, adapter=adapter)
        deltas.append(adapter.delta(module, base))
    merged = merge("core_space", base, [pool.load(name) for name in pool.names()], rule="task_arithmetic", scale=0.7)
    close(merged, merge("task_arithmetic", base, deltas, scale=0.7), rtol=1e-5)
