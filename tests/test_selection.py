"""Thresholds by selection against a full sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

from compo_jax.compose import drop, entries, selection, sparse, ties, trim
from compo_jax.compose.selection import kth_largest


def heavy(n):
    return np.random.default_rng(1).standard_t(1.5, size=n)


def rows(n):
    """Rows of very different sizes, so that a sample of some misleads."""
    return np.concatenate([normal(i, len(part)) * 10.0**-i for i, part in enumerate(np.array_split(np.empty(n), 7))])


#: Many entries, by what may go wrong with them.
ENTRIES = {
    "normal": lambda n: normal(0, n),
    "heavy tails": heavy,
    "equal magnitudes": lambda n: np.random.default_rng(2).integers(-3, 4, n) / 4,
    "mostly zero": lambda n: np.where(np.arange(n) % 10 == 0, normal(3, n), 0.0),
    "all equal": lambda n: np.full(n, -2.5),
    "rows of many sizes": rows,
    "sorted": lambda n: np.sort(normal(4, n)),
    "infinite": lambda n: np.where(np.arange(n) % 5 == 0, np.inf, normal(5, n)),
    "not numbers": lambda n: np.where(np.arange(n) % 5 == 0, np.nan, normal(6, n)),
}


def cut(x, dtype):
    """The entries as several leaves, one of no entries and a scalar among them."""
    x = x.astype(dtype)
    third = len(x) // 3
    return [x[:third], np.empty((0, 2), dtype), np.asarray(x[third]), x[third + 1 :].reshape(-1, 2)]


def by_sort(leaves, k):
    sizes = np.concatenate([np.abs(np.asarray(x, np.float64)).ravel() for x in leaves])
    return np.sort(np.where(np.isnan(sizes), np.inf, sizes))[len(sizes) - k]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("what", ENTRIES)
def test_the_kth_largest_is_the_sorts(what, dtype, monkeypatch):
    monkeypatch.setattr(entries, "PIECE", 1 << 10)
    monkeypatch.setattr(selection, "_RUNS", 16)  # a sample of some, not of all
    for n in (10, 30_004):
        leaves = cut(ENTRIES[what](n), dtype)
        for k in {1, 2, n // 5, n // 2, n - n // 5, n - 1, n}:
            found = kth_largest(leaves, k)
            assert found == by_sort(leaves, k), (n, k)
            if n == 10:
                assert kth_largest([jnp.asarray(x) for x in leaves], k) == found


@pytest.mark.parametrize("what", ENTRIES)
def test_traced_leaves_have_the_same_kth_largest(what):
    leaves = cut(ENTRIES[what](1000), np.float32)
    select = jax.jit(lambda leaves: [kth_largest(leaves, k) for k in (1, 200, 999, 1000)])
    assert select(leaves) == [by_sort(leaves, k) for k in (1, 200, 999, 1000)]
    pair = [np.stack([x, 2 * x]) for x in leaves]
    both = jax.vmap(lambda leaves: kth_largest(leaves, 200))(pair)
    np.testing.assert_array_equal(both, [by_sort(leaves, 200), 2 * by_sort(leaves, 200)])


def test_in_float64():
    with jax.enable_x64(True):
        leaves = cut(normal(0, 1000), np.float64)
        assert kth_largest(leaves, 300) == by_sort(leaves, 300)
        assert jax.jit(lambda x: kth_largest(x, 300))(leaves) == by_sort(leaves, 300)


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_trim_keeps_what_the_sort_keeps(density, dtype):
    for what in ("normal", "equal magnitudes", "mostly zero"):
        leaves = cut(ENTRIES[what](601), dtype)
        least = by_sort(leaves, max(1, round(density * 601)))
        for found, x in zip(trim(leaves, density), leaves, strict=True):
            assert found.dtype == x.dtype
            np.testing.assert_array_equal(found, np.where(np.abs(x) < least, np.zeros_like(x), x))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, np.nan])
def test_a_density_that_keeps_nothing_is_no_density(density):
    with pytest.raises(ValueError, match="density is the fraction of entries that is kept"):
        ties({"w": np.ones(3)}, [{"w": np.ones(3)}], density=density)


def test_pieces_and_whole_leaves_are_merged_alike(monkeypatch):
    """In pieces on the host, whole where a function is traced."""
    monkeypatch.setattr(entries, "PIECE", 64)
    start = {"w": normal(0, 30, 11).astype(np.float32), "b": normal(1, 5).astype(np.float32)}
    deltas = [jax.tree.map(lambda x, s=s: normal(s, *x.shape).astype(np.float32), start) for s in (2, 3, 4)]
    for density in (0.3, 1.0):
        merged = ties(start, deltas, [0.2, 0.5, 0.3], density=density)
        traced = jax.jit(lambda b, d, density=density: ties(b, d, [0.2, 0.5, 0.3], density=density))(start, deltas)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), merged, traced)


def test_dropped_in_pieces_is_dropped_whole(monkeypatch):
    monkeypatch.setattr(entries, "PIECE", 64)
    monkeypatch.setattr(sparse, "PIECE", 64)
    delta, key = {"w": normal(0, 30, 11).astype(np.float32), "b": np.ones(5, np.float32)}, jax.random.key(2)
    found, traced = drop(key, delta, 0.3), jax.jit(lambda x: drop(key, x, 0.3))(delta)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, traced)
    kept = np.asarray(found["w"]) != 0
    np.testing.assert_allclose(np.asarray(found["w"])[kept], delta["w"][kept] / 0.7, rtol=1e-6)
    assert 0.6 < kept.mean() < 0.8 and not np.array_equal(kept.ravel()[:64], kept.ravel()[64:128])
