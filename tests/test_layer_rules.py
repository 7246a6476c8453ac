"""Rules by depth, masks, competition and tails, against loops in NumPy; their add-ons; and what they refuse."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

from compo_jax import compose, tree
from compo_jax.compose import merge
from compo_jax.compose.entries import computed
from compo_jax.compose.numbers import require_key
from compo_jax.compose.tails import della

SHAPES = {"blocks/kernel": (3, 4, 2), "blocks/bias": (3, 2), "head": (3, 5)}


def twelve_blocks(changed):
    """(base, a delta of ones in these blocks and in no others, by their numbers)."""
    blocks = {str(i): {"kernel": np.zeros((3, 3), np.float32)} for i in range(12)}
    ones = {name: {"kernel": np.ones((3, 3), np.float32) if int(name) in changed else None} for name in blocks}
    return {"blocks": blocks}, {"blocks": ones}


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_are_counted_in_the_network_and_not_in_what_a_module_changes(when):
    for changed in (range(6), range(6, 12)):
        base, delta = twelve_blocks(changed)
        found = merge("lines", base, [delta], alpha=0.0, beta=1.0, when=when)["blocks"]
        for i in changed:
            np.testing.assert_allclose(found[str(i)]["kernel"], i / 11, rtol=1e-6)


def test_blocks_that_flax_numbers_are_no_stack():
    """Axis 0 of `blocks/Block_0/kernel` are inputs, however square it is."""
    base = {"blocks": {f"Block_{i}": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)} for i in range(3)}}
    deltas = [jax.tree.map(lambda x, t=t: normal((t, x.ndim), *x.shape), base) for t in range(2)]
    for rule in ("tsv", "iso", "wudi"):
        found, right = merge(rule, base, deltas), merge(rule, base, deltas, stacked=())
        jax.tree.map(np.testing.assert_array_equal, found, right)
    scaled = merge("lines", base, [jax.tree.map(jnp.ones_like, base)], alpha=0.0, beta=1.0)
    for i in range(3):
        np.testing.assert_allclose(scaled["blocks"][f"Block_{i}"]["kernel"], i / 2)


def nest(flat):
    return {"blocks": {"kernel": flat["blocks/kernel"], "bias": flat["blocks/bias"]}, "head": flat["head"]}


def modules(tasks):
    """(base, deltas with holes, by path the leaves of all tasks with zeros for holes), rounded to bfloat16."""
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    base = nest({name: rounded(normal(1, *shape)) for name, shape in SHAPES.items()})
    stacks = {name: rounded(normal(2, tasks, *shape)) for name, shape in SHAPES.items()}
    holes = {(1, "head"), (2, "blocks/bias")}
    for t, name in holes:
        stacks[name][t:][:1] = 0
    flat = [{name: None if (t, name) in holes else x[t] for name, x in stacks.items()} for t in range(tasks)]
    return base, [nest(one) for one in flat], stacks


def every_layer(function, stacks):
    """`function(rows (tasks, ...))` of each layer of a stack, or of a leaf."""
    alone = lambda name, x: function(x) if name == "head" else np.stack([function(x[:, i]) for i in range(3)])
    return {name: alone(name, x) for name, x in stacks.items()}


def by_depth(stacks):
    steps = np.array([0.5, 0.9, 1.3])
    factor = {name: 0.5 if name == "head" else steps.reshape(3, *[1] * (len(SHAPES[name]) - 1)) for name in SHAPES}
    return {name: factor[name] * x.mean(0) for name, x in stacks.items()}


def average(stacks):
    return {name: x.mean(0) for name, x in stacks.items()}


def without_tails(stacks):
    def one(x):
        flat = x.copy().reshape(len(x), -1)
        for row in flat:
            order, size = np.argsort(np.abs(row), kind="stable"), row.size
            left, top = int(0.6 * size + 1e-9), int(0.2 * size + 1e-9)
            least, most = np.abs(row)[order[size - left - top]], np.abs(row)[order[size - top - 1]]
            row[(np.abs(row) < least) | (np.abs(row) > most)] = 0
        return 0.7 * flat.sum(0).reshape(x.shape[1:])

    return every_layer(one, stacks)


def masked_sum(x, ratio):
    return np.abs(x) >= ratio * np.abs(x.sum(0) - x)


def of_task(function):
    """From a function of all entries in a row, (tasks, n) -> (n,)."""

    def whole(stacks):
        rows = np.concatenate([x.reshape(len(x), -1) for x in stacks.values()], axis=1)
        cuts = np.cumsum([np.prod(shape) for shape in SHAPES.values()])[:-1]
        parts = np.split(function(rows), cuts)
        return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}

    return whole


def emr_of_the_last(x):
    sign = np.sign(x.sum(0))
    unified = sign * np.max(np.where(x * sign > 0, np.abs(x), 0), axis=0)
    masked = np.where(x[-1] * unified > 0, unified, 0)
    return np.abs(x[-1]).sum() / np.abs(masked).sum() * masked


def competed(x, density=0.5, clip=0.05):
    tasks, size = x.shape
    shares, values = [], []
    for row in x:
        ordered = np.sort(np.abs(row))
        low, high = ordered[int(size * clip)], ordered[int(size * (1 - clip) - 1)]  # as the authors' code has it
        value = np.clip(np.abs(row), low, high)
        score = np.exp(tasks * ((value - low) / (high - low)) ** 2) * np.tanh(row * x.sum(0))
        least = np.sort(score)[int(size * (1 - density))]
        shares.append((np.maximum(score, least) - least) / (score.max() - least))
        values.append(np.sign(row) * value)
    shares, values = np.array(shares), np.array(values)
    total = shares.sum(0)
    return 1.2 * (shares * values).sum(0) / np.where(total > 0, total, 1)


def selected(stacks):
    def one(x):
        spread = x.var(0)
        if len(x) > 1:
            least = np.sort(spread.ravel())[spread.size - max(1, int(0.5 * np.count_nonzero(spread) + 1e-6))]
            x = np.where(spread >= least, x, 0)
        energy = (x**2).sum(tuple(range(1, x.ndim)), keepdims=True)
        share = np.where(np.sign(x) == np.where(x.sum(0) >= 0, 1, -1), energy, 0)
        return (share * x).sum(0) / np.where(share.sum(0) > 0, share.sum(0), 1)

    return every_layer(one, stacks)


class Row(NamedTuple):
    """A rule, its options, the loop that it is, and the options with which one module alone is kept, if any."""

    name: str
    options: dict[str, Any]
    loop: Callable
    alone: dict[str, Any] | None


ROWS = [
    Row("lines", {"alpha": 0.5, "beta": 0.8}, by_depth, {"beta": 0.0}),
    Row("lines", {"alpha": 0.5, "beta": 0.8, "when": "before"}, by_depth, None),
    Row("della", {"rate": 0.0, "window": 0.0}, average, {"rate": 0.0, "window": 0.0}),
    Row(
        "breadcrumbs", {"kept": 0.6, "largest": 0.2, "scale": 0.7}, without_tails,
        {"kept": 1.0, "largest": 0.0, "scale": 1.0},
    ),
    Row(
        "consensus", {"least": 2, "ratio": 0.4, "scale": 0.5},
        of_task(lambda x: 0.5 * np.where(masked_sum(x, 0.4).sum(0) >= 2, x.sum(0), 0)), {"least": 1, "scale": 1.0},
    ),
    Row("tall", {"ratio": 0.6}, of_task(lambda x: np.where(masked_sum(x, 0.6)[-1], x.sum(0), 0)), {}),
    Row("emr", {}, of_task(emr_of_the_last), {}),
    Row("pcb", {"density": 0.5, "clip": 0.05, "scale": 1.2}, of_task(competed), None),
    Row("sce", {"density": 0.5}, selected, {}),
]  # fmt: skip


def needed(name, tasks):
    everything = {"key": jax.random.key(0), "task": tasks - 1}
    return {what: everything[what] for what in compose.RULES[name].needs}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}{'-before' if 'when' in row.options else ''}")
def test_a_rule_is_its_loop_in_numpy_for_any_number_of_tasks_and_in_16_bits(row):
    for tasks in (3, 30):
        base, deltas, stacks = modules(tasks)
        wanted = row.loop(stacks)
        kind = np.float64 if tasks == 3 else jnp.bfloat16
        with jax.enable_x64(kind == np.float64):
            narrow = functools.partial(jax.tree.map, lambda x, kind=kind: jnp.asarray(x, kind))
            found = merge(row.name, narrow(base), narrow(deltas), **needed(row.name, tasks), **row.options)
            for name, x in tree.by_name(found).items():
                start = tree.by_name(base)[name]
                assert x.dtype == kind and x.shape == start.shape
                eps = float(jnp.finfo(kind).eps)
                size = np.abs(start) + np.abs(wanted[name]) + 1e-3
                assert np.all(np.abs(np.asarray(x, np.float64) - start - wanted[name]) <= 8 * eps * size), name
    if row.alone is not None:
        base, (delta,), _ = modules(1)
        merged = merge(row.name, base, [delta], **needed(row.name, 1), **row.alone)
        jax.tree.map(lambda x, b, d: np.testing.assert_allclose(x, b + d, rtol=2e-6, atol=1e-6), merged, base, delta)


def test_no_vote_is_needed_and_no_entry_competes():
    base, deltas, _ = modules(3)
    every = merge("consensus", base, deltas, least=0, scale=0.3)
    plain = merge("task_arithmetic", base, deltas, scale=0.3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), every, plain)
    none = merge("consensus", base, deltas, least=4)
    jax.tree.map(lambda x, b: np.testing.assert_allclose(x, b, rtol=1e-6), none, base)
    even = [jax.tree.map(lambda b: np.full(b.shape, 0.5), base)] * 3  # equal scores, nothing dropped
    merged = merge("pcb", base, even, density=1.0)
    jax.tree.map(lambda x, b: np.testing.assert_allclose(x, b + 0.5, rtol=1e-6), merged, base)


def test_a_unified_vector_gives_each_task_its_model():
    base, deltas, _ = modules(3)
    for name, function in (("emr", compose.emr), ("tall", compose.tall)):
        unified = function(base, deltas)
        assert len(unified.masks) == 3 and all(x.dtype == bool for x in jax.tree.leaves(unified.masks))
        for task in (0, 2):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
                unified.params(base, task), merge(name, base, deltas, task=task),
            )  # fmt: skip


def test_a_unified_vector_in_float64_has_scales_in_float64():
    with jax.enable_x64(True):
        base, deltas, _ = modules(3)
        unified = compose.emr(base, deltas)
        assert unified.scales.dtype == np.float64
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14),
            unified.params(base, 1), merge("emr", base, deltas, task=1),
        )  # fmt: skip


def test_della_is_unbiased_and_drops_the_small_sooner():
    delta = {"w": jnp.asarray(np.linspace(0.1, 2.0, 10)[None] * [[1], [-1]], jnp.float32)}
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(jax.jit(jax.vmap(lambda k: della(None, [delta], key=k, rate=0.6, window=0.4)[0]["w"]))(keys))
    z = (draws.mean(0) - delta["w"]) / (draws.std(0) / np.sqrt(4000))
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose((draws == 0).mean((0, 1)), np.linspace(0.8, 0.4, 10), atol=0.03)
    np.testing.assert_allclose(np.abs(draws[draws != 0]).max(), 2 / (1 - 0.4), rtol=1e-5)


def test_layers_are_found_in_numbered_paths_and_add_ons_pass_on_what_the_rule_behind_needs():
    base = {f"encoder.layer.{i}.w": np.ones((2, 2), np.float32) for i in range(3)} | {"norm": np.ones(2, np.float32)}
    delta = jax.tree.map(np.ones_like, base)
    found = merge("lines", base, [delta], alpha=0.0, beta=1.0)
    assert [float(found[f"encoder.layer.{i}.w"][0, 0]) for i in range(3)] == [1, 1.5, 2] and found["norm"][0] == 1
    fishers = [delta, jax.tree.map(lambda x: 3 * x, delta)]
    both = [delta, jax.tree.map(lambda x: 0 * x, delta)]
    for name, options in {"lines": {"beta": 0.0}, "breadcrumbs": {"kept": 1.0, "largest": 0.0},
                          "della": {"rate": 0.0, "window": 0.0, "key": jax.random.key(0)}}.items():  # fmt: skip
        merged = merge(name, base, both, rule="fisher", fishers=fishers, **options)
        np.testing.assert_allclose(merged["norm"], 1.25, rtol=1e-6)


def _sum(numbers, *rows):
    return numbers[0] * sum(rows)


def test_what_is_computed_when_it_is_read_is_what_entrywise_makes(monkeypatch):
    monkeypatch.setattr(compose.entries, "PIECE", 256)
    leaves = [np.asarray(normal(s, 300, 3), np.float32) for s in (1, 2)]
    found = computed(_sum, leaves, [2.0])
    np.testing.assert_allclose(np.asarray(found), 2 * sum(leaves), rtol=1e-6)
    np.testing.assert_allclose(found.open()[250:700], (2 * sum(leaves)).ravel()[250:700], rtol=1e-6)
    assert found.open()[5:5].size == 0


@pytest.mark.parametrize("key", [0, np.zeros(2, np.float32), jax.random.split(jax.random.key(0))])
def test_a_seed_is_no_key(key):
    with pytest.raises(ValueError, match=r"key is a random key, jax.random.key\(seed\), and not"):
        require_key(key)
    for able in (jax.random.key(0), jax.random.PRNGKey(0)):
        require_key(able)
        jax.jit(require_key)(able)


def test_bad_input():
    base, deltas, _ = modules(3)
    key = jax.random.key(0)
    table = [
        ("lines", {"when": "now"}, "when is 'before' the rule or 'after' it, not 'now'"),
        ("lines", {"alpha": np.nan}, "alpha is the scale of the first layer"),
        ("lines", {"stacked": "nowhere"}, "'nowhere' matches no parameter"),
        ("lines", {"stacked": ()}, "no leaf is in a layer: none matches .*The modules change blocks/bias"),
        ("lines", {"rule": "mean"}, "unknown rule 'mean'"),
        ("della", {"key": key, "rate": 0.95}, "window is how far the smallest entry's probability is above"),
        ("della", {}, "needs key .a random key"),
        ("breadcrumbs", {"kept": 0.0}, "kept is the fraction of entries that is kept"),
        ("breadcrumbs", {"largest": 1.0}, "largest is the fraction of entries cut off as outliers"),
        ("breadcrumbs", {"rule": "fisher"}, "the rule 'fisher' needs fishers"),
        ("consensus", {"least": 1.5}, "least is a whole number of tasks"),
        ("consensus", {"ratio": [0.1]}, "1 weights were given for 3 modules"),
        ("tall", {"task": 0, "ratio": -1.0}, "ratio is one number, or one a module, none of them negative"),
        ("tall", {"task": 3}, "task is the number of a module, from 0 to 2"),
        ("emr", {"task": True}, "task is the number of a module, from 0 to 2"),
        ("emr", {}, "the rule 'emr' needs task .the number of the module"),
        ("pcb", {"clip": 0.5}, "clip is the fraction of outliers at each end"),
        ("pcb", {"density": 0.0}, "density is the fraction of entries that is kept"),
        ("sce", {"density": 2.0}, "density is the fraction of entries that is kept"),
    ]
    for name, options, match in table:
        with pytest.raises(ValueError, match=match):
            merge(name, base, deltas, **options)


def test_a_rule_behind_another_draws_by_itself():
    base, ones = {"w": jnp.zeros((40, 50))}, [{"w": jnp.ones((40, 50))}]
    key = jax.random.key(0)
    for name, options in (("dare", {"rule": "della", "window": 0.0}), ("della", {"rule": "dare", "window": 0.0})):
        kept = np.asarray(merge(name, base, ones, key=key, rate=0.5, **options)["w"])
        assert abs(kept.mean() - 1) < 0.2, name  # the delta in expectation; alike draws would give 2


def test_a_key_may_be_traced():
    base, deltas = {"w": jnp.zeros((4, 5))}, [{"w": jnp.arange(20.0).reshape(4, 5)}]
    of_key = lambda key: merge("della", base, deltas, key=key)["w"]
    np.testing.assert_allclose(jax.jit(of_key)(jax.random.key(3)), of_key(jax.random.key(3)), rtol=1e-6)


def test_a_hundred_tasks_compete_and_modules_that_cancel_have_no_scale():
    random = np.random.default_rng(0)
    base = {"w": jnp.zeros((6, 7))}
    many = [{"w": jnp.asarray(random.normal(size=(6, 7)), jnp.float32)} for _ in range(100)]
    assert np.isfinite(merge("pcb", base, many)["w"]).all()
    opposite = compose.emr(base, [many[0], jax.tree.map(jnp.negative, many[0])])
    np.testing.assert_array_equal(np.asarray(opposite.scales), 1)


def test_the_option_that_counts_is_told_by_its_name():
    base, deltas = {"w": jnp.zeros((4, 5))}, [{"w": jnp.ones((4, 5))}]
    with pytest.raises(ValueError, match="^iterations is a whole number"):
        merge("wudi", base, deltas, iterations=-1)
