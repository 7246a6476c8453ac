"""InfLoRA, SD-LoRA, EASE and TUNA: their formulas against loops in NumPy, their usual mistakes, and all on a stream."""

import importlib
import itertools
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import ROOT
from test_ways import setup as small_setup

from compo_jax import adapters, incremental, tree
from compo_jax.incremental.baselines.ease import OTHERS, completed, reweighted
from compo_jax.incremental.baselines.sdlora import decoupled, whole
from compo_jax.incremental.baselines.subspaces import design, input_grams, protect
from compo_jax.incremental.baselines.tuna import agreed, fused, mean_row, overlap
from compo_jax.mesh import data_mesh
from compo_jax.train import jit_runner

X64 = jax.enable_x64
LORA = adapters.lora(1)
setup = small_setup


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def in_double(*trees):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), trees)


def mode_of(setup, way):
    return incremental.WAYS[way].mode(setup, incremental.method(way, LORA, learning_rate=1e-2))


# -- InfLoRA -----------------------------------------------------------------------------------------------------------


def inputs_of(seed, count=40, width=8):
    """Inputs (count, width) whose variance falls from direction to direction."""
    rotation = np.linalg.qr(normal(seed, width, width))[0]
    return normal(seed + 100, count, width) * 0.6 ** np.arange(width) @ rotation


def dual_memory(tasks, shares):
    """DualGPM in its own words: a basis of what is protected, and once that fills half of the space one of the rest."""
    basis, rest = np.zeros((8, 0)), None
    for h, share in zip(tasks, shares, strict=True):
        inside = h @ basis @ basis.T if rest is None else h - h @ rest @ rest.T
        _, s, vt = np.linalg.svd(h - inside)
        count, held = 0, np.sum(inside**2)
        while held < share * np.sum(h**2):
            held += s[count] ** 2
            count += 1
        if rest is None:
            basis = np.linalg.qr(np.hstack([basis, vt[:count].T]))[0]
            if basis.shape[1] > 4:
                rest = np.linalg.svd(basis)[0][:, basis.shape[1] :]
        else:
            taken = rest - vt[:count].T @ vt[:count] @ rest
            rest = np.linalg.svd(taken)[0][:, : rest.shape[1] - count]
    return (basis @ basis.T if rest is None else np.eye(8) - rest @ rest.T), rest is None


def test_the_protected_subspace_is_dual_gradient_projection_memory_s_whichever_basis_that_keeps():
    tasks, shares, kinds = [inputs_of(seed) for seed in range(4)], (0.6, 0.8, 0.9, 0.95), []
    with X64(True):
        protected = jnp.zeros((2, 8, 8))
        for t in range(4):
            gram = jnp.stack([tasks[t].T @ tasks[t]] * 2)
            protected = protect(gram, protected, shares[t])
            expected, of_itself = dual_memory(tasks[: t + 1], shares[: t + 1])
            kinds.append(of_itself)
            for layer in protected:
                np.testing.assert_allclose(layer, expected, atol=1e-9)
    assert kinds == [True, True, False, False] and round(np.trace(expected)) < 8, np.trace(expected)


def test_a_module_reads_the_principal_directions_of_what_is_left():
    first, second = inputs_of(0), inputs_of(1)
    with X64(True):
        protected = protect(jnp.asarray(first.T @ first), jnp.zeros((8, 8)), 0.8)
        a = np.asarray(design(jnp.asarray(second.T @ second), protected, rank=2))
    left = second - second @ np.asarray(protected)
    expected = np.linalg.svd(left)[2][:2].T
    np.testing.assert_allclose(a @ a.T, expected @ expected.T, atol=1e-9)
    np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-9)


@pytest.mark.parametrize("x64", [True, False])
def test_a_rank_above_what_is_left_reads_nothing_that_is_protected(x64):
    """The usual mistake: beyond the rank of the projected inputs eigenvectors are any, and may well be protected."""
    first = normal(0, 30, 5) @ normal(1, 5, 8)
    with X64(x64):
        protected = protect(jnp.asarray(first.T @ first), jnp.zeros((8, 8)), 1.0)
        a = np.asarray(design(jnp.eye(8), protected, rank=6))
    assert np.linalg.matrix_rank(a) == 3
    np.testing.assert_allclose(first @ a, 0, atol=1e-9 if x64 else 1e-4)


def test_the_grams_are_of_the_very_inputs_of_a_layer_and_count_each_image_once(setup):
    """The usual mistake: the images that fill up the last batch count too."""
    setup = setup._replace(settings=setup.settings._replace(eval_batch=20))
    split, p = setup.stream.tasks[0].train, jax.tree.map(np.float64, setup.base)
    x = np.asarray(setup.stream.prepare(split.images(np.arange(len(split)))), np.float64)
    x = x.reshape(-1, 2, 8, 2, 8, 3).swapaxes(2, 3).reshape(len(x), 4, -1)
    x = x @ p["patch"]["kernel"].reshape(-1, 12) + p["patch"]["bias"]
    x = np.concatenate([np.broadcast_to(p["cls"], (len(x), 1, 12)), x], axis=1) + p["position"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = (x * p["blocks"]["norm1"]["scale"][0] + p["blocks"]["norm1"]["bias"][0]).reshape(-1, 12)
    grams = input_grams(setup, ["blocks/attention/qkv/kernel", "blocks/mlp/fc2/kernel"])(setup.base, split)
    assert jax.tree.map(np.shape, grams["blocks"]["mlp"]) == {
        "fc1": {"kernel": None, "bias": None}, "fc2": {"kernel": (1, 48, 48), "bias": None},
    }  # fmt: skip
    np.testing.assert_allclose(grams["blocks"]["attention"]["qkv"]["kernel"][0], x.T @ x, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="dense layers that are used once, and these are none: position"):
        input_grams(setup, ["position"])(setup.base, split)


# -- SD-LoRA -----------------------------------------------------------------------------------------------------------


def low_rank(seed):
    """A module of rank 2 of a stack of 3 kernels (5, 4)."""
    return {"w": {"a": normal(seed, 3, 5, 2), "b": normal(seed + 50, 3, 2, 4)}, "hole": None}


def test_the_model_is_the_sum_of_the_directions_times_their_magnitudes_and_the_new_module():
    with X64(True):
        blank = {"w": {"a": jnp.zeros((3, 5, 8)), "b": jnp.zeros((3, 8, 4))}, "hole": None}
        magnitudes, directions = {"w": jnp.zeros((3, 4)), "hole": None}, blank
        for t in range(2):
            magnitudes, directions = decoupled(*in_double(low_rank(t)), magnitudes, directions, t)
        trained = {"w": magnitudes["w"] * jnp.array([0.5, -2, 1, 1]), "hole": None}
        module = jax.tree.map(np.asarray, whole(*in_double(low_rank(2)), trained, directions))
    for layer in range(3):
        products = [m["w"]["a"][layer] @ m["w"]["b"][layer] for m in map(low_rank, range(3))]
        sizes = [np.sqrt(np.sum(x**2)) for x in products]
        np.testing.assert_allclose(magnitudes["w"][layer], [*sizes[:2], 0, 0], rtol=1e-12)
        unit = [x / size for x, size in zip(products, sizes, strict=True)]
        expected = 0.5 * sizes[0] * unit[0] - 2 * sizes[1] * unit[1] + products[2]
        np.testing.assert_allclose(module["w"]["a"][layer] @ module["w"]["b"][layer], expected, rtol=1e-9)


def test_a_task_begins_with_the_model_that_was_left_and_trains_the_magnitudes_of_the_tasks_seen(setup):
    """The usual mistakes: directions of length 1 whose magnitude is lost, so that the model jumps between two tasks,
    and a new direction that is divided by its norm, which is zero at the start."""
    mode, key = mode_of(setup, "sdlora"), jax.random.key(0)
    begin = jax.jit(lambda key, memory: mode.begin(key, memory, None))
    trained = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), begin(key, mode.memory))
    memory = mode.remember(mode.memory, setup.stream.tasks[0], 0, trained, {}, key)
    assert jax.tree.map(np.shape, memory) == jax.tree.map(np.shape, mode.memory)

    images = setup.stream.prepare(setup.stream.tasks[0].train.images(np.arange(4)))
    loss = lambda trained, held: (mode.features(held, trained, images) ** 3).sum()
    loss_and_slope, again = jax.jit(jax.value_and_grad(loss)), begin(jax.random.key(1), memory)
    before, _ = loss_and_slope(trained, mode.hold(mode.memory))
    now, slope = loss_and_slope(again, mode.hold(memory))
    np.testing.assert_allclose(now, before, rtol=1e-4)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slope))
    for of_magnitudes in jax.tree.leaves(slope["magnitudes"]):
        assert np.all(of_magnitudes[..., 0] != 0) and not np.any(of_magnitudes[..., 1:])


# -- EASE --------------------------------------------------------------------------------------------------------------


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def test_old_classes_in_new_subspaces_are_the_new_classes_means_by_how_near_these_are_in_the_old_one():
    counts = (2, 3, 2)
    measured = [[normal(10 * t + s, counts[t], 4) for s in range(t + 1)] for t in range(3)]
    every = completed(measured)
    assert [[p.shape for p in row] for row in every] == [[(n, 4)] * 3 for n in counts]
    for task, newer in ((0, 1), (0, 2), (1, 2)):
        for i in range(counts[task]):
            near = [np.exp(cosine(measured[task][task][i], new)) for new in measured[newer][task]]
            expected = sum(w * new for w, new in zip(near, measured[newer][newer], strict=True)) / sum(near)
            np.testing.assert_allclose(every[task][newer][i], expected, rtol=1e-12)
    assert [len(row) for row in measured] == [1, 2, 3]  # what was measured is used again for the next task

    z = [normal(90 + s, 5, 4) for s in range(3)]
    logits = reweighted(z, every)
    owner = [(t, i) for t in range(3) for i in range(counts[t])]
    for n in range(5):
        for c, (t, i) in enumerate(owner):
            expected = sum((1 if s == t else OTHERS) * cosine(z[s][n], every[t][s][i]) for s in range(3))
            np.testing.assert_allclose(logits[n, c], expected, rtol=1e-12)


# -- TUNA --------------------------------------------------------------------------------------------------------------


def test_the_universal_adapter_has_the_sum_s_sign_and_the_largest_magnitude_that_agrees():
    """The usual mistake: the largest magnitude of all, 3 in the first entry, whose sign lost the vote."""
    rows = np.array([[3.0, 1.0, 0.0, -1.0], [-2.0, 2.0, 0.0, 1.0], [-2.0, -0.5, 0.0, -3.0]])
    deltas = [{"w": jnp.asarray(row), "hole": None} for row in rows]
    np.testing.assert_array_equal(fused(lambda: iter(deltas))["w"], [-2.0, 2.0, 0.0, -3.0])
    with X64(True):
        rows = normal(0, 4, 30)
        found = np.asarray(fused(lambda: iter([{"w": jnp.asarray(row)} for row in rows]))["w"])
    for column, value in zip(rows.T, found, strict=True):
        sign = np.sign(column.sum())
        assert value == sign * max(abs(x) for x in column if np.sign(x) == sign)


def test_each_image_is_answered_by_its_surest_adapter_and_the_universal_one():
    """The usual mistake: one adapter for all images, or entropies over the classes of its task alone."""
    specific, universal = [3 * normal(k, 6, 5) for k in range(3)], normal(9, 6, 5)
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    found, chosen = agreed(specific, universal), set()
    for n in range(6):
        p = [softmax(logits[n]) for logits in specific]
        surest = np.argmin([-np.sum(q * np.log(q)) for q in p])
        chosen.add(int(surest))
        np.testing.assert_allclose(found[n], p[surest] + softmax(universal[n]), rtol=1e-12)
    assert len(chosen) > 1


def test_the_loss_of_orthogonality_is_the_mean_cosine_with_earlier_adapters_and_has_a_slope_at_the_start():
    """The usual mistake: rows are scaled to length 1 when `b` is zero, and the first gradient is NaN."""
    with X64(True):
        old, other, new = in_double(*map(low_rank, range(3)))
        rows = [mean_row(m["w"]["b"]) for m in (old, other)]
        earlier = {"w": jnp.stack([*rows, jnp.zeros_like(rows[0])]), "hole": None}  # one task is yet to come
        value = overlap(new, earlier)
        at_start = {"w": {**new["w"], "b": jnp.zeros_like(new["w"]["b"])}, "hole": None}
        slope = jax.grad(overlap)(at_start, earlier)
    expected = 0
    for layer, before in itertools.product(range(3), (old, other)):
        columns = (np.asarray(m["w"]["b"])[layer].T for m in (new, before))
        expected += abs(np.mean([cosine(x, y) for x, y in itertools.product(*columns)])) / 3
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.all(np.isfinite(slope["w"]["b"]))


# -- on a stream -------------------------------------------------------------------------------------------------------

WAYS = ("inflora", "sdlora", "ease", "tuna")


def learn(setup, folder):
    methods = [incremental.method(way, LORA, learning_rate=1e-2) for way in WAYS]
    return incremental.learn_stream(setup, methods, folder, runner=partial(jit_runner, mesh=data_mesh(1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def learned(setup, folder):
    """What is known after each of the two tasks; `stopped` is what there was when the first was learned."""
    stream = learn(setup, folder / "whole")
    one = next(stream)
    shutil.copytree(folder / "whole", folder / "stopped")
    return one, *stream


def test_each_learns_a_stream_and_goes_on_after_a_kill(folder, setup, learned):
    for outcome in learned[1].outcomes.values():
        assert outcome.final_accuracy > 0.4 and outcome.task_incremental_accuracy > 0.6  # by chance 0.2 and 0.42
    before, after = learn(setup, folder / "stopped")
    assert before.restored and not after.restored
    for name, outcome in after.outcomes.items():
        np.testing.assert_array_equal(outcome.accuracy_matrix, learned[1].outcomes[name].accuracy_matrix)
    # no mean of modules is taken, and so none is left out of it
    assert incremental.summary(learned[1], name="test", backbone="a small ViT").unlearn == []


def test_a_module_of_inflora_is_read_where_it_was_designed_and_added_to_those_before_it(setup, learned):
    """The usual mistakes: the factor that is fixed is trained, too; and the mean of the modules' deltas, where each was
    trained on top of the sum of those before it."""
    snapshot, protected = learned[1].snapshots["inflora-lora"], learned[0].snapshots["inflora-lora"].memory["protected"]
    pool, names, test = snapshot.pool, snapshot.pool.names(), setup.stream.tasks[0].test
    at = lambda module: module["blocks"]["attention"]["qkv"]["kernel"]
    a = at(pool.load(names[1]))["a"][0]
    np.testing.assert_allclose(a.T @ a, np.eye(3) / 3, atol=1e-4)
    np.testing.assert_allclose(at(protected)[0] @ a, 0, atol=1e-4)
    total = pool.compose(setup.base, names, weights=[1.0, 1.0])
    head = incremental.pool_head(pool, names, learned[1].reference.head)
    expected = incremental.linear(partial(snapshot.extract, total), head)(test)
    np.testing.assert_allclose(learned[1].classifier("inflora-lora")(test), expected, rtol=1e-4, atol=1e-4)


def test_ease_shows_no_images_of_an_older_task_to_a_newer_adapter(setup, learned):
    """The usual mistake: prototypes in new subspaces that are measured, which needs images that are gone."""
    snapshot, seen = learned[1].snapshots["ease-lora"], set()
    modules = [snapshot.pool.compose(setup.base, [name]) for name in snapshot.pool.names()]
    splits, test = [task.train for task in setup.stream.tasks], setup.stream.tasks[0].test

    def extract(params, split):
        subspace = next(s for s, m in enumerate(modules) if tree.fingerprint(m) == tree.fingerprint(params))
        if split in splits:
            seen.add((splits.index(split), subspace))
        return snapshot.extract(params, split)

    logits = mode_of(setup, "ease").classify(snapshot._replace(extract=extract))(test)
    assert seen == {(0, 0), (1, 0), (1, 1)} and logits.shape == (len(test), 5)


def test_the_main_job_makes_each_of_them(monkeypatch, setup):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    job = importlib.import_module("incremental")
    names = [*(f"{way}-lora" for way in WAYS), "ease-ia3", "ease-full"]
    made = job.methods(job.parse(["--methods", *names, "--rank", "2"]), setup.base)
    assert [method.name for method in made] == names
    assert job.at_once(("ease-lora",)) and not any(
        job.at_once((f"{way}-lora",)) for way in ("inflora", "sdlora", "tuna")
    )


@pytest.mark.parametrize("way", ["inflora", "sdlora", "tuna"])
def test_those_of_low_rank_refuse_other_adapters(setup, way):
    with pytest.raises(ValueError, match=r"method '\w+-ia3' .* take adapters.lora\(\)"):
        incremental.WAYS[way].mode(setup, incremental.method(way, adapters.ia3()))
