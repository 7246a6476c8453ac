"""The modules of a pool under every merge rule: what is taken of them once, and how a rule is run, timed and tested."""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import merge_forecasts
import numpy as np
import optax
from job import console
from merge_rules import A_TASK, BY_STEPS, OPTIONS, TAKEN

from compo_jax import adapters, compose, curvature, incremental, tree
from compo_jax.compose.rule_results import MergedPool, MergingRun, PoolMerges, Weightings
from compo_jax.incremental.fisher import task_fisher
from compo_jax.pool import ModulePool
from compo_jax.train import read_result, write_result

Result = TypeVar("Result", bound=tuple)
KINDS = {"diagonal": "fishers", "kronecker": "factors"}  # of a Fisher, and what rules call it
PATTERNS = [pattern for pattern, _ in adapters.VIT_TARGETS]


def copy(pool: ModulePool, place: ModulePool, module: str) -> None:
    """A module with its heads in another pool, where it isn't there already."""
    if module in place:
        return
    manifest = pool.manifest(module)
    place.add(
        module, pool.load(module), base=manifest.base, adapter=manifest.adapter, settings=manifest.settings,
        task=manifest.task, classes=manifest.classes, **{part: pool.load(module, part) for part in ("head", "start")},
    )  # fmt: skip


def with_curvature(
    run: incremental.FinishedRun, name: str, images: int, seed: int, needs: set[str]
) -> tuple[ModulePool, dict]:
    """(a copy of the pool, each module with the Fisher at its own weights on its own task, by the kinds that are
    needed; seconds spent, None where some was kept already)."""
    pool, kept = run.pools[name], ModulePool(run.folder / "merging" / "pools" / f"{name}-{images}-{seed}")
    settings = incremental.Settings(fisher_images=images, fisher_method="monte_carlo", eval_batch=images)
    setup = incremental.Setup(run.model, run.base, run.stream, settings, seed)
    for module in pool.names():
        copy(pool, kept, module)
    seconds = {}
    for kind in (kind for kind, what in KINDS.items() if what in needs):
        fisher = task_fisher(setup, PATTERNS, [kind])
        clock, count = time.perf_counter(), 0
        for t, (module, task) in enumerate(zip(pool.names(), run.stream.tasks, strict=True)):
            if kind not in kept.manifest(module).curvature:
                params, classes = pool.compose(run.base, [module], [1.0]), len(task.classes)
                wide = incremental.task_columns(pool.load(module, "head"), 0, classes, len(run.stream.classes))
                by_kind = fisher.of(params, task.train, wide, 0, classes, jax.random.key(seed + t), seed=[seed, t])
                kept.attach(module, curvature=by_kind[kind])
                count += 1
        seconds[kind] = time.perf_counter() - clock if count == len(pool) else None
    return kept, seconds


def ingredients(
    run: incremental.FinishedRun, kept: ModulePool, head, images: int, seed: int, needs: set[str], known: bool
) -> tuple[dict, dict]:
    """(what rules want beside the deltas, under the names of `compose.MADE_BY`, and `unlabelled_train`, RegMean++'s;
    seconds that the landscape took). In the loss an image is told apart from its own task's classes where tasks are
    `known`, else from all."""
    names, weights = kept.names(), tree.partition(run.base, PATTERNS)[0]
    rest = tree.partition(run.base, PATTERNS)[1]
    deltas = [jax.tree.map(lambda d, _: d, delta, weights) for delta in kept.deltas(run.base)]

    def apply(columns, weights, images):
        z = run.model.apply({"params": tree.combine(weights, rest)}, run.stream.prepare(images), method="features")
        return z @ columns["kernel"] + columns["bias"]

    owner = jnp.asarray(np.repeat(np.arange(len(names)), [len(task.classes) for task in run.stream.tasks]))

    def loss(weights, images, labels):
        values = apply(head, weights, images)
        if known:
            values = jnp.where(owner == owner[labels][:, None], values, -1e30)
        return optax.softmax_cross_entropy_with_integer_labels(values, labels).mean()

    heads = [jax.tree.map(jnp.asarray, kept.load(name, "head")) for name in names]
    matvecs, batches = [], []
    for t, task in enumerate(run.stream.tasks):
        rows = np.random.default_rng([seed, t]).permutation(len(task.train))[:images]
        pixels, labels = jnp.asarray(task.train.images(rows)), jnp.asarray(task.train.labels[rows])
        if "matvecs" in needs:
            matvecs.append(curvature.ggn(partial(apply, heads[t]), tree.add(weights, deltas[t]), [(pixels,)]))
        batches.append((pixels, labels + run.stream.offsets[t]))
    parts, seconds = {"key": jax.random.key(seed), "matvecs": matvecs, "loss": loss, "batches": batches}, {}
    if "unlabelled" in needs:  # as the authors do, AdaMerging's are test images, 16 at once
        size = min(16, *(len(task.test) for task in run.stream.tasks))
        of_test = [
            [jnp.asarray(task.test.images(np.arange(i, i + size))) for i in range(0, len(task.test) - size + 1, size)]
            for task in run.stream.tasks
        ]
        of_train = [[pixels] for pixels, _ in batches]
        for name, images_of in (("unlabelled", of_test), ("unlabelled_train", of_train)):
            parts[name] = [compose.Unlabelled(partial(apply, h), x) for h, x in zip(heads, images_of, strict=True)]
    for kind, what in KINDS.items():
        if what in needs:
            parts[what] = [kept.curvature(name, kind=kind) for name in names]
    if "landscape" in needs:
        clock, uniform = time.perf_counter(), [1 / len(names)] * len(names)
        made = curvature.landscape(loss, weights, deltas, batches=batches, anchor=uniform)
        parts["landscape"], seconds = jax.block_until_ready(made), {"landscape": time.perf_counter() - clock}
    return parts, seconds


class Program(NamedTuple):
    """A rule, ready to run: `call(base, deltas, arrays)`, and its memory in multiples of the base's bytes."""

    call: Callable
    memory: float


def program(rule: str, base, deltas, arrays: dict) -> Program:
    """The rule compiled as one program; its memory is of arguments, temporaries and result together."""
    options = compose.RULES[rule].defaults | OPTIONS.get(rule, {})
    merge = getattr(compose, rule) if rule in A_TASK else compose.RULES[rule].run

    def run(base, deltas, arrays):
        made = merge(base, deltas, **arrays, **options)
        if rule in A_TASK:
            return made
        return made if isinstance(made, compose.Solved) else compose.rules.params_of(made)

    outside = rule == "best_weights" or rule in BY_STEPS
    if outside:  # its weights come from a solver on the CPU, or step by step: the memory is of the composition
        made = jax.jit(compose.compose).lower(base, deltas, jnp.zeros(len(deltas))).compile()
    else:
        made = jax.jit(run).lower(base, deltas, arrays).compile()
    count = made.memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    memory = (count.argument_size_in_bytes + count.temp_size_in_bytes + count.output_size_in_bytes) / size
    return Program(run if outside else made, memory)


def timed(call: Callable) -> tuple:
    """(parameters, the least seconds of three calls, or of one over ten seconds, what a solve has to tell)."""
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        made = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - clock)
        if seconds[-1] > 10:
            break
    if not isinstance(made, compose.Solved):
        return made, min(seconds), []
    left = f"stopped after {int(made.iterations)} iterations with a relative residual of {float(made.residual):.1e}"
    return made.params, min(seconds), [] if made.converged else [left]


class Ground(NamedTuple):
    """What every rule is tried on: the modules of a pool and their deltas, what is known of them (`ingredients`), and
    what tests a merged model."""

    run: incremental.FinishedRun
    head: dict
    modules: list
    deltas: list
    parts: dict
    extract: incremental.extraction.Extract
    expected: merge_forecasts.Expectation

    def tested(self, params) -> incremental.Accuracies:
        """A model's accuracies on all tasks."""
        stream = self.run.stream
        return incremental.evaluator(self.extract, stream)(params, self.head, len(stream.tasks))

    def by_rule(self, rule: str, needs: Sequence[str], programs: dict[str, Program]) -> MergedPool:
        """The modules under a rule, whose program is kept in `programs` where another run can use it."""
        arrays = {what: self.parts[what] for what in needs if what != "task"}
        if rule == "regmean_plus":
            arrays["unlabelled"] = self.parts["unlabelled_train"]
        changes = self.modules if rule == "core_space" else self.deltas
        base, tasks = self.run.base, len(self.deltas)
        of_heads = {"matvecs", "loss", "unlabelled"} & arrays.keys()  # which are of other widths in each run
        if of_heads or rule not in programs:
            programs[rule] = program(rule, base, changes, arrays)
        made, seconds, warnings = timed(partial(programs[rule].call, base, changes, arrays))
        options = {key: str(value) for key, value in OPTIONS.get(rule, {}).items()}
        told = (seconds, programs[rule].memory, warnings, options)
        if rule in A_TASK:
            models = (made.params(base, t) for t in range(tasks))
            within = alone(self.run.stream, self.extract, models, self.head)
            return MergedPool(within, np.full(tasks, np.nan), *told)
        among_all, within = self.tested(made)
        return MergedPool(within, among_all, *told, self.expected.of(made))


def alone(stream, extract, models, head) -> np.ndarray:
    """The accuracy of a model for each task, on it, which is known."""
    accuracies = []
    for params, task, first in zip(models, stream.tasks, stream.offsets, strict=True):
        logits = extract(params, task.test) @ head["kernel"] + head["bias"]
        _, predicted = incremental.predictions(logits, first, len(task.classes))
        accuracies.append(np.mean(predicted == task.test.labels))
    return np.array(accuracies)


def forget(unfinished: Path) -> None:
    """Removes what `once` wrote for a comparison, and the folder around it where no other's parts are there."""
    if unfinished.exists():
        shutil.rmtree(unfinished)
    with contextlib.suppress(OSError):
        unfinished.parent.rmdir()


def once(path: Path, kind: type[Result], make: Callable[[], Result]) -> Result:
    """What an earlier start of this comparison wrote there, or else what is made now, which it writes."""
    if path.exists():
        return read_result(path, kind)
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, result)
    return result


def merged_pool(
    run: incremental.FinishedRun,
    name: str,
    rules: Sequence[str],
    programs: dict[str, Program],
    images: int,
    seed: int,
    unfinished: Path,
    joint: np.ndarray | None = None,
    known: bool = False,
) -> PoolMerges:
    """A pool of the run under every rule; `programs` are those of earlier runs, and take in the new ones; `unfinished`
    is the folder of what was tested, for a comparison that is killed to go on; `joint` is the accuracy of one module of
    all tasks, `known` as in `ingredients`."""
    needs = {rule: (*compose.RULES[rule].needs, *TAKEN.get(rule, ())) for rule in rules}
    wanted, extract = set().union(*needs.values()), incremental.features(run.model, run.stream, 256)
    kept, seconds = with_curvature(run, name, images, seed, wanted)
    head = incremental.pool_head(kept, kept.names(), run.head)
    parts, taken = ingredients(run, kept, jax.tree.map(jnp.asarray, head), images, seed, wanted, known)
    modules, deltas = [kept.load(module) for module in kept.names()], list(kept.deltas(run.base))
    part = lambda params: tree.partition(params, PATTERNS)[0]
    expected = merge_forecasts.expectation(parts["loss"], parts["batches"], part, run.base, deltas)
    ground = Ground(run, head, modules, deltas, parts, extract, expected)

    individual = alone(run.stream, extract, (kept.compose(run.base, [m], [1.0]) for m in kept.names()), head)
    base = ground._replace(head=run.head).tested(run.base).within
    weights = merge_forecasts.weights_to_test(len(deltas), seed)
    of_weights = lambda: merge_forecasts.tested(expected, deltas, weights, lambda params: ground.tested(params).within)
    weightings = once(unfinished / "weightings.json", Weightings, of_weights)
    cosines = np.asarray(compose.cosines(deltas))
    pool = PoolMerges(individual, base, seconds | taken, {}, cosines, joint, weightings)
    for rule in rules:
        of_rule = partial(ground.by_rule, rule, needs[rule], programs)
        pool.rules[rule] = merged = once(unfinished / f"{rule}.json", MergedPool, of_rule)
        among_all = merged.incremental.mean()
        classes = "" if np.isnan(among_all) else f"all classes {among_all:.3f}, "
        console.print(
            f"{run.folder.name} {name} {rule}: known {merged.within.mean():.3f}, normalised "
            f"{pool.normalised(merged.within).mean():.3f}, {classes}"
            f"{merged.seconds:.2f} s",
            soft_wrap=True,
        )
    return pool


def merged_run(run: incremental.FinishedRun, pools: dict[str, PoolMerges]) -> MergingRun:
    tasks, tested = zip(*((task.name, len(task.test)) for task in run.stream.tasks), strict=True)
    return MergingRun(run.folder.name, run.config["seed"], list(tasks), list(tested), pools)
