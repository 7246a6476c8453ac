"""The reference, every way of training and the pools that come of it, on a small stream."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

from compo_jax import adapters, compose, curvature, incremental, tree
from compo_jax.curvature import fisher_diagonal
from compo_jax.data import ArraySplit, array_stream
from compo_jax.incremental import Method, Settings, Setup
from compo_jax.incremental.fisher import task_fisher
from compo_jax.incremental.learner import training
from compo_jax.mesh import data_mesh
from compo_jax.models import ViT
from compo_jax.pool import ModulePool
from compo_jax.train import init_state, jit_runner, make_step

X64 = jax.enable_x64
KINDS = {"lora": adapters.lora(1), "ia3": adapters.ia3(), "full": adapters.full()}


def all_of(split):
    """The images and labels of a split."""
    return split.images(np.arange(len(split))), split.labels


def cross_entropy(values, labels):
    values = np.asarray(values, np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return -np.mean(values[np.arange(len(labels)), labels] - np.log(np.exp(values).sum(axis=-1)))


MODEL = ViT(image_size=16, patch=8, width=12, depth=1, heads=2, unroll=True)  # compiles faster than a scan
ADAPTED = [r"(qkv|proj|fc1|fc2)/kernel$"]
SETTINGS = Settings(
    epochs=8, batch=16, components=2, probe_epochs=2, align_epochs=(2, 1), align_samples=32, fisher_method="exact",
    eval_batch=16,
)  # fmt: skip
WIDTH = 3
MODES = {
    "independent": incremental.task_arithmetic, "ensemble": incremental.ensemble_learning,
    **{way: incremental.WAYS[way].mode for way in ("tmc", "sequential", "ewc", "lwf")},
}  # fmt: skip


def setup(stream, base, settings=SETTINGS):
    return Setup(MODEL, base, stream, settings, seed=0)


def method(adapter, mode="independent", **options):
    return Method("m", MODES[mode], adapter, **{"learning_rate": 1e-2} | options)


@pytest.fixture(scope="module")
def stream():
    """Two tasks of two and three classes and as many images: noisy pictures of one pattern a class."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, size=(5, 16, 16, 3))

    def split(count):
        labels = np.repeat(np.arange(5), [3 * count, 3 * count, 2 * count, 2 * count, 2 * count])
        noise = 80 * random.normal(size=(len(labels), 16, 16, 3))
        return np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels

    return array_stream(*split(8), *split(3), tasks=[[0, 1], [2, 3, 4]])


@pytest.fixture(scope="module")
def base():
    """Three times its start, where the features of different pictures differ."""
    start = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return jax.tree.map(lambda x: 3 * np.asarray(x), start)


@pytest.fixture(scope="module")
def features(stream):
    """`(params, pixels) -> features` in NumPy."""
    forward = jax.jit(lambda p, x: MODEL.apply({"params": p}, stream.prepare(x), method="features"))
    return lambda params, pixels: np.asarray(forward(params, pixels))


@pytest.fixture(scope="module")
def references(stream, base):
    start, after = incremental.reference_stage(setup(stream, base), ADAPTED, kinds=("diagonal", "kronecker"))
    zero = after(start, 0)
    return start, zero, after(zero, 1)


def test_the_reference_is_of_the_classes_seen(stream, base, references):
    start, zero, one = references
    for name in start.head:
        np.testing.assert_array_equal(zero.head[name][..., 2:], start.head[name][..., 2:])
        assert np.any(one.head[name][..., 2:] != zero.head[name][..., 2:])
    assert np.sum(zero.mixtures.weights, axis=1).round(5).tolist() == [1, 1, 0, 0, 0]
    np.testing.assert_array_equal(one.mixtures.means[:2], zero.mixtures.means[:2])
    for kind in ("diagonal", "kronecker"):
        assert [int(r.newest[kind].count) for r in (zero, one)] == [48, 48]
        assert [int(r.seen[kind].count) for r in (zero, one)] == [48, 96]
    assert not any(np.any(x) for x in jax.tree.leaves(zero.others.head))
    for known in (one.others, zero.every, one.every):
        seen = slice(0, 2 if known is zero.every else None)
        assert np.all((known.head["bias"][seen] > 0) & (known.head["bias"][seen] <= 0.25))


def test_the_fisher_of_the_other_tasks_is_that_of_the_base_on_them(stream, base, references):
    _, zero, one = references
    for leaf in jax.tree.leaves(zero.others.weights["diagonal"]):
        np.testing.assert_allclose(leaf, SETTINGS.epsilon, rtol=1e-6)
    kept = tree.partition(base, ADAPTED)[0]
    images = stream.prepare(all_of(stream.tasks[0].train)[0])

    def apply(params, images):
        z = MODEL.apply({"params": tree.combine(params, base)}, images, method="features")
        return z @ zero.head["kernel"][:, :2] + zero.head["bias"][:2]

    fisher = jax.jit(lambda p, x: fisher_diagonal(apply, p, x, method="low_rank", tolerance=0.0).mean)
    found = jax.tree.map(np.asarray, fisher(kept, images))
    for known in (one.others.weights["diagonal"], zero.every.weights["diagonal"]):
        assert jax.tree.structure(found) == jax.tree.structure(known)
        for x, y in zip(jax.tree.leaves(known), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(x, y + SETTINGS.epsilon, rtol=1e-4, atol=1e-5 * y.max())
            assert y.max() > 1e-4
    own = jax.tree.map(np.asarray, (zero.newest["diagonal"].total, one.newest["diagonal"].total))
    for a, b, both in zip(*map(jax.tree.leaves, (*own, one.every.weights["diagonal"])), strict=True):
        np.testing.assert_allclose(both, (a + b) / 96 + SETTINGS.epsilon, rtol=1e-5)

    factors = jax.jit(partial(curvature.kronecker, apply))(kept, images)
    for x, y in zip(*map(jax.tree.leaves, (one.others.weights["kronecker"], factors)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())
    assert not any(np.any(x) for x in jax.tree.leaves(zero.others.weights["kronecker"]))


def trainer(stream, base, adapter, *, width=WIDTH, **options):
    """`(task, first, reference) -> (module, head)` of a method of ITA."""
    mode, train = incremental.task_trainer(
        setup(stream, base), method(adapter, **options), width=width, runner=partial(shared_runner, adapter.name)
    )
    return lambda task, first, reference: train(task, first, reference, mode.memory)[:2]


RUNNERS = {}


def shared_runner(name, loss, optimizer, **options):
    """One for all methods of ITA with an adapter, to save compilations: their penalty is one, and its weight is in the
    context. A method of another mode has a penalty and a loss of its own, and needs a runner of its own."""
    if name not in RUNNERS:
        RUNNERS[name] = jit_runner(loss, optimizer, mesh=data_mesh(1), **options)
    return RUNNERS[name]


@pytest.fixture(scope="module")
def plain(stream, base, references):
    """A trainer of LoRA modules with no penalty, and what it makes of the first task."""
    train = trainer(stream, base, adapters.lora(1))
    return train, train(stream.tasks[0], 0, references[1])


def test_training_lowers_the_tasks_loss_and_twice_is_bit_for_bit_the_same(stream, base, features, references, plain):
    train, (module, head) = plain
    images, labels = all_of(stream.tasks[0].train)

    def loss(params, head):
        return cross_entropy(features(params, images) @ head["kernel"] + head["bias"], labels)

    started = jax.tree.map(lambda x: np.asarray(x)[..., :2], references[1].head)
    trained = tree.add(base, adapters.lora(1).delta(module, base))
    assert head["kernel"].shape == (12, 2)
    assert loss(trained, head) < 0.8 * loss(base, started)
    assert loss(trained, started) < loss(base, started)  # the module's own part
    again = train(stream.tasks[0], 0, references[1])
    for x, y in zip(jax.tree.leaves((module, head)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_columns_that_fill_up_a_head_do_not_matter(stream, base, references, plain):
    wider = trainer(stream, base, adapters.lora(1), width=6)(stream.tasks[0], 0, references[1])
    for x, y in zip(jax.tree.leaves(wider), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def size(adapter, module, base):
    """L2 norm of the module's delta."""
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(adapter.delta(module, base))))


def test_the_decoupled_penalty_holds_a_module_near_zero_and_a_head_at_its_reference(stream, base, references, plain):
    adapter = adapters.lora(1)
    held = trainer(stream, base, adapter, alpha=1e5, units="paper", pull=(0.0, 0.2))
    module, head = held(stream.tasks[0], 0, references[1])
    assert size(adapter, module, base) < 0.5 * size(adapter, plain[1][0], base)
    started = np.asarray(references[1].head["kernel"])[:, :2]
    assert np.abs(head["kernel"] - started).max() < 0.5 * np.abs(plain[1][1]["kernel"] - started).max()


def test_the_coupled_penalty_holds_a_full_delta_near_zero(stream, base, references):
    adapter = adapters.full()
    free, held = (
        trainer(stream, base, adapter, alpha=a, units="paper")(stream.tasks[1], 2, references[2])[0] for a in (0.0, 1e6)
    )
    assert size(adapter, held, base) < 0.3 * size(adapter, free, base)


@pytest.mark.parametrize(
    ("mode", "kind"), [("independent", "lora"), ("ensemble", "ia3"), ("independent", "full"), ("ewc", "full")]
)
def test_no_weight_of_a_penalty_makes_a_training_end_above_its_start(
    monkeypatch, stream, base, features, references, mode, kind
):
    """Neither in its own units nor on Fishers of any scale."""
    shared_fisher = cache(lambda adapted: task_fisher(setup(stream, base), adapted, ["diagonal"]))
    monkeypatch.setattr(
        "compo_jax.incremental.baselines.ewc.task_fisher", lambda _, adapted, kinds: shared_fisher(tuple(adapted))
    )
    adapter, (task, first) = KINDS[kind], (stream.tasks[1], 2)
    images, labels = all_of(task.train)
    started = incremental.task_columns(references[2].head, first, 3, 3)
    logits = lambda params, head: features(params, images) @ head["kernel"] + head["bias"]
    before = cross_entropy(logits(base, started), labels)
    shared = partial(shared_runner, f"{mode}-{kind}")
    for units, scale in [("relative", 1e-6), ("relative", 1e6), ("paper", 1e-6), ("paper", 1.0), ("paper", 1e6)]:
        scaled = {
            part: getattr(references[2], part)._replace(
                weights=jax.tree.map(lambda f, s=scale: s * f, getattr(references[2], part).weights)
            )
            for part in ("others", "every")
        }
        for alpha in (1e-4, 1.0, 1e4, 1e8):
            made, train = incremental.task_trainer(
                setup(stream, base), method(adapter, mode, alpha=alpha, units=units), width=WIDTH, runner=shared
            )
            memory = made.memory
            if mode == "ewc":
                memory = memory | {"fisher": scaled["others"].weights["diagonal"], "tasks": jnp.ones(())}
            learned = train(task, first, references[2]._replace(**scaled), memory)
            trained = tree.add(base, adapter.delta(learned.module, base))
            assert cross_entropy(logits(trained, learned.head), labels) < before, (units, scale, alpha)


def test_the_evaluator_counts_right_answers(stream, base, features, references):
    head = jax.tree.map(np.asarray, references[2].head)
    found = incremental.evaluator(incremental.features(MODEL, stream, 16), stream)(base, head, 2)
    for t, (task, first) in enumerate(zip(stream.tasks, (0, 2), strict=True)):
        images, labels = all_of(task.test)
        values = features(base, images) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(found.incremental[t], np.mean(values.argmax(1) == labels + first))
        own = values[:, first : first + len(task.classes)].argmax(1)
        np.testing.assert_allclose(found.within[t], np.mean(own == labels))


# -- the modes ---------------------------------------------------------------------------------------------------------


def plan(stream, base, mode, adapter, **options):
    return training(setup(stream, base), method(adapter, mode, **options), width=WIDTH)


def some_module(adapter, base, seed):
    """A module away from its start."""
    start = adapter.init(jax.random.key(seed), base)
    leaves, structure = jax.tree.flatten(start)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [x + jnp.asarray(0.1 * random.normal(size=x.shape), x.dtype) for x in leaves])


@pytest.mark.parametrize(
    ("mode", "curvature", "known"),
    [
        ("independent", "diagonal", "others"),
        ("independent", "kronecker", "others"),
        ("ensemble", "diagonal", "every"),
        ("ensemble", "kronecker", "every"),
    ],
)
def test_a_penalty_gets_the_curvature_of_the_right_tasks(stream, base, references, mode, curvature, known):
    p = plan(stream, base, mode, KINDS["lora"], alpha=0.7, pull=(0.1, 0.2), curvature=curvature, units="paper")
    reference = references[2]
    _, context = p.start(stream.tasks[1], 2, reference, p.mode.memory)
    assert context["curvature"] is getattr(reference, known).weights[curvature]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(context["head"][name], reference.head[name][..., 2:5])
        np.testing.assert_array_equal(context["head_fisher"][name], getattr(reference, known).head[name][..., 2:5])
    np.testing.assert_allclose([context["alpha"], *context["pull"]], [0.7, 0.1, 0.2])
    assert context["mask"].tolist() == [True] * 3
    _, context = p.start(stream.tasks[0], 0, references[1], p.mode.memory)
    assert context["mask"].tolist() == [True, True, False]


def test_curvature_that_the_reference_lacks_is_told(stream, base, references):
    p = plan(stream, base, "independent", KINDS["lora"], curvature="kronecker")
    only = references[1]._replace(others=references[1].others._replace(weights={"diagonal": None}))
    with pytest.raises(ValueError, match=r"'m' wants kronecker curvature, .* reference has diagonal: .*kinds="):
        p.start(stream.tasks[0], 0, only, p.mode.memory)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_in_training_is_the_mean_of_its_modules(stream, base, kind):
    with X64(True):
        base = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), base)
        adapter, mode = KINDS[kind], plan(stream, base, "ensemble", KINDS[kind]).mode
        images = jnp.asarray(stream.prepare(all_of(stream.tasks[0].test)[0]), jnp.float64)
        modules, memory = [some_module(adapter, base, t) for t in range(3)], mode.memory
        for t, module in enumerate(modules):
            deltas = [adapter.delta(m, base) for m in modules[: t + 1]]
            merged = tree.add(base, tree.weighted_sum(deltas, [1 / (t + 1)] * (t + 1)))
            expected = MODEL.apply({"params": merged}, images, method="features")
            held = mode.hold(memory)
            np.testing.assert_allclose(mode.features(held, module, images), expected, rtol=1e-9, atol=1e-9)

            fisher = jax.tree.map(jnp.square, some_module(adapters.full(), base, 9))
            past = tree.weighted_sum(deltas[:-1], [1.0] * t) if t else None
            found = mode.penalty(held, module, fisher, 0.7)
            np.testing.assert_allclose(found, incremental.iel_penalty(deltas[-1], past, fisher, 0.7, t + 1), rtol=1e-9)
            memory = mode.remember(memory, stream.tasks[0], 0, module, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_ensemble_costs_the_same_at_task_50_as_at_task_1(stream, base, references, kind):
    """One compiled program serves both: the shapes of what it takes are the same, and so is XLA's count."""
    adapter = KINDS[kind]
    p = plan(stream, base, "ensemble", adapter, alpha=1.0)
    memory = p.mode.memory
    module = adapter.init(jax.random.key(1), base)
    batch = next(p.batches(stream.tasks[0], 0)(0))
    step = jax.jit(make_step(p.loss, p.optimizer, extras=p.extras))
    costs = []
    for t in range(50):
        if t in (0, 49):
            params, context = p.start(stream.tasks[0], 0, references[1], memory)
            assert float(context["held"]["tasks"]) == t + 1
            cost = step.lower(init_state(params, p.optimizer), context, batch).compile().cost_analysis()
            costs.append((cost["flops"], cost["bytes accessed"]))
        memory = p.mode.remember(memory, stream.tasks[0], 0, module, None, None)
    assert costs[0] == costs[1]
    alone = plan(stream, base, "independent", adapter, alpha=1.0)
    params, context = alone.start(stream.tasks[0], 0, references[1], alone.mode.memory)
    step = jax.jit(make_step(alone.loss, alone.optimizer, extras=alone.extras))
    cost = step.lower(init_state(params, alone.optimizer), context, batch).compile().cost_analysis()
    assert costs[0][0] < 1.1 * cost["flops"]


def test_tangent_features_are_the_models_first_order(stream, base):
    with X64(True):
        base = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), base)
        images = jnp.asarray(stream.prepare(all_of(stream.tasks[0].test)[0]), jnp.float64)
        adapter = adapters.full()
        delta = adapter.delta(some_module(adapter, base, 0), base)
        at = lambda scale: MODEL.apply({"params": tree.add(base, delta, scale)}, images, method="features")
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        linear = incremental.tangent_features(MODEL)
        np.testing.assert_allclose(linear(base, delta, images), at(0.0) + slope, atol=1e-6)
        mode = plan(stream, base, "tmc", adapter).mode
        module = jax.tree.map(lambda x: 3 * x, some_module(adapter, base, 0))
        np.testing.assert_allclose(mode.features({"base": base}, module, images), at(0.0) + 3 * slope, atol=1e-6)
        extract = incremental.features(MODEL, stream, 16, around=base)
        found = extract(tree.add(base, delta), stream.tasks[0].test)
        np.testing.assert_allclose(found, at(0.0) + slope, rtol=1e-4, atol=1e-4)


def test_elastic_weight_consolidation_is_its_formula(stream, base, references):
    adapter = adapters.full()
    p = plan(stream, base, "ewc", adapter, alpha=5.0)
    task, random = stream.tasks[1], np.random.default_rng(5)
    head = {"kernel": jnp.asarray(random.normal(size=(12, 3)), jnp.float32), "bias": jnp.zeros(3)}
    modules = [some_module(adapter, base, t) for t in range(2)]
    memory, fishers = p.mode.memory, []
    assert not any(np.any(x) for x in jax.tree.leaves(memory))
    for module in modules:
        memory = p.mode.remember(memory, task, 2, module, head, jax.random.key(0))

        def apply(params, images, module=module):
            z = MODEL.apply({"params": tree.combine(params, base)}, images, method="features")
            return z @ head["kernel"] + head["bias"]

        weights = tree.partition(tree.add(base, module), ADAPTED)[0]
        images = stream.prepare(all_of(task.train)[0])
        fishers.append(jax.jit(partial(fisher_diagonal, apply))(weights, images).mean)
    expected = jax.tree.map(lambda a, b: 0.95 * a + b, *fishers)
    for x, y in zip(jax.tree.leaves(memory["fisher"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * np.abs(y).max())
    held, other = p.mode.hold(memory), some_module(adapter, base, 7)
    assert p.mode.begin(None, memory, stream.tasks[1]) is modules[1]
    assert p.mode.penalty(held, modules[1], None, 5.0) == 0
    by_hand = sum(
        2.5 * np.sum(np.asarray(f, np.float64) * np.square(np.asarray(o, np.float64) - np.asarray(m)))
        for f, o, m in zip(*map(jax.tree.leaves, (memory["fisher"], other, modules[1])), strict=True)
    )
    np.testing.assert_allclose(p.mode.penalty(held, other, None, 5.0), by_hand, rtol=1e-4)


def test_the_distillation_of_learning_without_forgetting_is_its_formula(stream, base):
    adapter = adapters.lora(1)
    mode = plan(stream, base, "lwf", adapter).mode
    images = stream.prepare(all_of(stream.tasks[1].train)[0])
    z = jnp.asarray(np.random.default_rng(0).normal(size=(len(images), 12)), jnp.float32)
    fresh = mode.hold(mode.memory)
    assert mode.distil(fresh, z, images, 3.0) == 0
    assert not np.any(jax.grad(mode.distil, argnums=1)(fresh, z, images, 3.0))

    module = some_module(adapter, base, 3)
    random = np.random.default_rng(1)
    head = {"kernel": random.normal(size=(12, 2)).astype(np.float32), "bias": random.normal(size=2).astype(np.float32)}
    memory = mode.remember(mode.memory, stream.tasks[0], 0, module, head, None)
    held = mode.hold(memory)
    before = mode.features(held, module, images)

    def softened(z):
        values = (np.asarray(z, np.float64) @ head["kernel"] + head["bias"]) / 2
        p = np.exp(values - values.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    old, new = softened(before), softened(z)
    expected = 3.0 * 4 * np.mean(np.sum(old * np.log(old / new), axis=1))
    np.testing.assert_allclose(mode.distil(held, z, images, 3.0), expected, rtol=1e-4)
    np.testing.assert_allclose(mode.distil(held, before, images, 3.0), 0, atol=1e-5)


@pytest.mark.parametrize(("mode", "alpha"), [("sequential", 0.0), ("ewc", 1e5)])
def test_sequential_training_goes_on_from_the_last_module(stream, base, references, mode, alpha):
    adapter = adapters.full()
    made, train = incremental.task_trainer(setup(stream, base), method(adapter, mode, alpha=alpha))
    first = train(stream.tasks[0], 0, references[1], made.memory)
    second = train(stream.tasks[1], 2, references[2], first.memory)
    moved = size(adapter, tree.weighted_sum([second.module, first.module], [1.0, -1.0]), base)
    whole = size(adapter, first.module, base)
    assert moved < 0.3 * whole if mode == "ewc" else moved > 0.3 * whole
    for x, y in zip(jax.tree.leaves(second.memory["module"]), jax.tree.leaves(second.module), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_penalty_in_kronecker_factors_is_the_dense_matrixs(stream, base, references):
    with X64(True):
        factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), references[2].others.weights["kronecker"])
        adapter = adapters.lora(1)
        delta = adapter.delta(some_module(adapter, jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), base), 0), base)
        expected = 0.0
        for name, x in zip(tree.names(delta), jax.tree.leaves(delta), strict=True):
            x = x.reshape(x.shape[-2:])
            a, b = (f[name].reshape(f[name].shape[-2:]) for f in (factors.inputs, factors.outputs))
            expected += x.ravel() @ np.kron(a, b) @ x.ravel()
        assert expected > 0
        np.testing.assert_allclose(incremental.ita_penalty(delta, factors, 3.0), 1.5 * expected, rtol=1e-9)


# -- tasks at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "devices", "mode"), [("lora", 1, "independent"), ("full", 2, "tmc")])
def test_tasks_trained_at_once_are_those_trained_one_after_another(stream, base, references, kind, devices, mode):
    """Three tasks, the second of fewer steps than the others, on devices that don't divide them."""
    fewer = ArraySplit(*(x[:17] for x in all_of(stream.tasks[0].train)))
    tasks = [stream.tasks[0], stream.tasks[0]._replace(train=fewer), stream.tasks[1]]
    firsts, refs = [0, 0, 2], [references[1], references[1], references[2]]
    work = setup(stream, base, SETTINGS._replace(epochs=2))
    chosen = method(KINDS[kind], mode, learning_rate=3e-3, alpha=1.0, pull=(0.1, 0.1))
    made, train = incremental.task_trainer(work, chosen)
    at_once = incremental.parallel_trainer(work, chosen, mesh=data_mesh(devices))(tasks, firsts, refs)
    for task, first, reference, learned in zip(tasks, firsts, refs, at_once, strict=True):
        alone = train(task, first, reference, made.memory)
        for x, y in zip(jax.tree.leaves(learned[:2]), jax.tree.leaves(alone[:2]), strict=True):
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-4)
    assert np.abs(at_once[0].head["kernel"] - at_once[1].head["kernel"]).max() > 1e-3


@pytest.mark.parametrize("mode", ["ensemble", "sequential"])
def test_tasks_that_need_each_other_are_not_trained_at_once(stream, base, mode):
    with pytest.raises(ValueError, match="tasks of 'm' are trained one after another, for one needs what the others"):
        incremental.parallel_trainer(setup(stream, base), method(KINDS["lora"], mode))


# -- classifiers on frozen features ------------------------------------------------------------------------------------


def drawn_features(seed=0, classes=4):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(classes, size=56)])
    return (random.normal(size=(classes, 5))[labels] + random.normal(size=(60, 5))).astype(np.float32), labels


def test_the_nearest_class_mean_is_scikit_learns():
    z, labels = drawn_features()
    new = drawn_features(1)[0]
    head = incremental.nearest_class_mean(z, labels)
    found = (new @ head["kernel"] + head["bias"]).argmax(1)
    np.testing.assert_array_equal(found, NearestCentroid().fit(z, labels).predict(new))


def test_random_projections_end_in_scikit_learns_ridge_regression():
    z, labels = drawn_features()
    y, held = np.eye(4)[labels], np.random.default_rng(0).permutation(60) % 5 == 4
    ridges = (1e-3, 1e1, 1e5)
    projection, head = incremental.random_projection(jax.random.key(0), z, labels, width=20, ridges=ridges)
    h = np.maximum(z.astype(np.float64) @ projection, 0)
    fits = [Ridge(alpha=r, fit_intercept=False).fit(h[~held], y[~held]) for r in ridges]
    best = ridges[int(np.argmin([np.sum((f.predict(h[held]) - y[held]) ** 2) for f in fits]))]
    expected = Ridge(alpha=best, fit_intercept=False).fit(h, y).coef_.T
    np.testing.assert_allclose(head["kernel"], expected, rtol=1e-6, atol=1e-9)
    assert best == 1e1


def test_the_ridge_is_chosen_on_all_classes_whatever_the_order_of_the_images():
    random, labels = np.random.default_rng(0), np.tile(np.arange(5), 30)  # every fifth image is of one class
    means = 4 * random.normal(size=(5, 6))
    z, new = (means[labels] + random.normal(size=(150, 6)) for _ in range(2))
    projection, head = incremental.random_projection(jax.random.key(0), z, labels, width=100)
    assert np.mean((np.maximum(new @ projection, 0) @ head["kernel"]).argmax(1) == labels) > 0.95


# -- pools of tasks' modules -------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path, base):
    """Two LoRA modules with heads of two and three classes, each with its curvature."""
    pool = ModulePool(tmp_path / "pool")
    random = np.random.default_rng(0)
    for t, count in enumerate((2, 3)):
        head, start = ({"kernel": random.normal(size=(12, count)), "bias": random.normal(size=count)} for _ in "12")
        fisher = jax.tree.map(jnp.square, some_module(adapters.full(), base, 10 + t))
        pool.add(
            f"task{t}", some_module(KINDS["lora"], base, t), base=base, adapter=KINDS["lora"], head=head, start=start,
            classes=[f"{t}.{c}" for c in range(count)],
            curvature=curvature.FisherDiagonal(fisher, jnp.array(4), jnp.array(1.0)),
        )  # fmt: skip
    return pool


def test_a_pools_head_is_put_together_and_a_module_unlearned_in_it(pool):
    reference = {"kernel": np.zeros((12, 5)), "bias": np.arange(5.0)}
    names = ["task0", "task1"]
    trained, started = ([pool.load(n, part) for n in names] for part in ("head", "start"))
    whole = incremental.pool_head(pool, names, reference)
    changes = [t["bias"] - s["bias"] for t, s in zip(trained, started, strict=True)]
    np.testing.assert_allclose(whole["bias"], np.arange(5) + np.concatenate(changes))
    without = incremental.pool_head(pool, names, reference, without=["task1"])
    np.testing.assert_allclose(without["kernel"][:, 2:], 0)
    np.testing.assert_allclose(without["kernel"][:, :2], whole["kernel"][:, :2])


def test_a_task_of_more_classes_than_its_head_is_told(stream, base, references):
    mode, train = incremental.task_trainer(setup(stream, base), method(adapters.lora(2)), width=2)
    with pytest.raises(ValueError, match="has 3 classes and its head 2 columns: make the trainer with a width of 3"):
        train(stream.tasks[1], 2, references[1], mode.memory)


def test_overlapping_classes_are_named(pool, base):
    pool.add("again", pool.load("task0"), base=base, adapter=KINDS["lora"], classes=["0.1", "new"])
    with pytest.raises(ValueError, match=r"'task0' and 'again' .* both have the class '0.1'"):
        incremental.pool_head(pool, ["task0", "again"], {})


def test_a_rule_runs_on_a_pool_with_the_curvature_kept_there(pool, base):
    deltas = [KINDS["lora"].delta(pool.load(name), base) for name in pool.names()]
    fishers = [pool.curvature(name) for name in pool.names()]
    for rule, options in (("ties", {"density": 0.3}), ("fisher", {"fishers": fishers})):
        found = incremental.merge_pool(rule, pool, base, **({} if rule == "fisher" else options))
        for x, y in zip(*map(jax.tree.leaves, (found, compose.merge(rule, base, deltas, **options))), strict=True):
            np.testing.assert_array_equal(x, y)
    average = incremental.merge_pool("average", pool, base, ["task1"])
    for x, y in zip(*map(jax.tree.leaves, (average, pool.compose(base, ["task1"]))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_a_rule_without_its_curvature_or_its_name_is_told(pool, base):
    with pytest.raises(ValueError, match="'regmean' needs factors, and task0, task1 of .* keep no kronecker curvature"):
        incremental.merge_pool("regmean", pool, base)
    with pytest.raises(ValueError, match="unknown rule 'best'; known are average, task_arithmetic"):
        incremental.merge_pool("best", pool, base)
    with pytest.raises(ValueError, match="made on another base"):
        incremental.merge_pool("average", pool, jax.tree.map(lambda x: x + 1, base))
    with pytest.raises(ValueError, match="'ties' has no option densty; its options are density, scale"):
        incremental.merge_pool("ties", pool, base, densty=0.5)
    for call in (incremental.merge_pool, lambda _, *args: incremental.pool_head(*args, {})):
        with pytest.raises(TypeError, match=r"names is the text 'task0' and should be a list: \['task0'\]"):
            call("average", pool, *([base] if call is incremental.merge_pool else []), "task0")
