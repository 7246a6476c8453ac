"""Every merge rule on the same modules: how much of each module's own skill is left, in what time and memory.

    python experiments/merging.py                                       # makes a small run of its own first
    python experiments/merging.py --run RUN [RUN ...]                   # runs of incremental.py, one a seed
    python experiments/merging.py --recipe FILE --out FILE              # checkpoints into one, as a recipe says

For each pool: the curvature of every module at its own weights, on its own training images, taken once and kept beside
a copy of the module (RUN/merging/pools); then every rule of `compose.RULES` that makes one model, without steps on
images, on all modules, each tested on all tasks with the modules' own heads. Normalised accuracy is the merged model's
over the module's own, where the task is known.
Seconds are of the rule alone, compiled (the least of three calls, or one of over ten seconds); memory is XLA's count of
the whole rule as one program, arguments and result included, in multiples of the base. Options are the rules' defaults
but for those in OPTIONS. Writes report.html and metrics.json to RUN/merging of the first run. A few minutes on 2 CPU
cores with no arguments, the run included. Expected numbers: README.md.
With --recipe no rules are compared: checkpoint files are merged into one as a YAML file says, as mergekit's users know
it (compo_jax/compose/recipes.py has an example), a tensor at a time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import job
import options as line
from job import closing, console
from merge_rules import A_TASK, BY_STEPS, OPTIONS, RULES
from options import OPEN, Count, OnRuns, OpenPath, Seed, names

SMALL = ["none-lora", "none-full"]


@dataclass(frozen=True)
class Options(OnRuns):
    images: Count = 64
    """training images of a task for its curvature"""
    rules: Annotated[tuple[str, ...], names([rule for rule in RULES if rule not in A_TASK]), OPEN] = ()
    """rules to compare (default: all that take this many modules and go by no steps)"""
    seed: Seed = 0
    """of the images and of the rules that draw"""
    recipe: OpenPath = None
    """merge the checkpoints of this recipe, and nothing else"""
    out: OpenPath = None
    """of a recipe: the safetensors file to write"""
    card: OpenPath = None
    """of a recipe: a model card to write, README.md say"""


def parse(arguments: Sequence[str] | None = None) -> Options:
    options = line.parse(Options, __doc__, arguments)
    if options.recipe is None:
        line.refuse(options, "without --recipe", "out", "card")
    else:
        line.refuse(options, "with --recipe", "run", "runs", "data_dir", "methods", "images", "rules", "seed")
        if options.out is None:
            raise ValueError("--recipe wants --out, the file to write")
    return options


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import merge_recipe
import numpy as np
import optax

from compo_jax import adapters, compose, curvature, incremental, report, tree
from compo_jax.compose.rule_results import MergedPool, MergingResults, MergingRun, PoolMerges
from compo_jax.incremental.fisher import task_fisher
from compo_jax.pool import ModulePool
from compo_jax.train import write_result

KINDS = {"diagonal": "fishers", "kronecker": "factors"}  # of a Fisher, and what rules call it
PATTERNS = [pattern for pattern, _ in adapters.VIT_TARGETS]


def with_curvature(
    run: incremental.FinishedRun, name: str, images: int, seed: int, needs: set[str]
) -> tuple[ModulePool, dict]:
    """(a copy of the pool, each module with the Fisher at its own weights on its own task, by the kinds that are
    needed; seconds spent, None where some was kept already)."""
    pool, kept = run.pools[name], ModulePool(run.folder / "merging" / "pools" / f"{name}-{images}-{seed}")
    settings = incremental.Settings(fisher_images=images, fisher_method="monte_carlo", eval_batch=images)
    setup = incremental.Setup(run.model, run.base, run.stream, settings, seed)
    for module in pool.names():
        if module not in kept:
            manifest = pool.manifest(module)
            parts = {part: pool.load(module, part) for part in ("head", "start")}
            kept.add(
                module, pool.load(module), base=manifest.base, adapter=manifest.adapter, settings=manifest.settings,
                task=manifest.task, classes=manifest.classes, **parts,
            )  # fmt: skip
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

    matvecs, batches = [], []
    for t, (name, task) in enumerate(zip(names, run.stream.tasks, strict=True)):
        rows = np.random.default_rng([seed, t]).permutation(len(task.train))[:images]
        pixels, labels = jnp.asarray(task.train.images(rows)), jnp.asarray(task.train.labels[rows])
        columns = jax.tree.map(jnp.asarray, kept.load(name, "head"))
        matvecs.append(curvature.ggn(partial(apply, columns), tree.add(weights, deltas[t]), [(pixels,)]))
        batches.append((pixels, labels + run.stream.offsets[t]))
    parts, seconds = {"key": jax.random.key(seed), "matvecs": matvecs, "loss": loss, "batches": batches}, {}
    if "unlabelled" in needs:  # as the authors do, AdaMerging's are test images, 16 at once
        heads = [jax.tree.map(jnp.asarray, kept.load(name, "head")) for name in names]
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


def alone(z, task, first: int, head) -> float:
    """A module's accuracy on its own task, which is known."""
    _, predicted = incremental.predictions(z @ head["kernel"] + head["bias"], first, len(task.classes))
    return float(np.mean(predicted == task.test.labels))


class Program(NamedTuple):
    """A rule, ready to run: `call(base, deltas, arrays)`, and its memory in multiples of the base's bytes."""

    call: Callable
    memory: float


def program(rule: str, base, deltas, arrays: dict) -> Program:
    """The rule compiled as one program; its memory is of arguments, temporaries and result together."""
    options = compose.RULES[rule].defaults | OPTIONS.get(rule, {})

    def run(base, deltas, arrays):
        made = compose.RULES[rule].run(base, deltas, **arrays, **options)
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


def merged_pool(
    run: incremental.FinishedRun,
    name: str,
    rules: Sequence[str],
    programs: dict[tuple[str, str], Program],
    images: int,
    seed: int,
    joint: np.ndarray | None = None,
    known: bool = False,
) -> PoolMerges:
    """A pool of the run under every rule; `programs` are those of earlier runs, and take in the new ones; `joint` is
    the accuracy of one module of all tasks, `known` as in `ingredients`."""
    tasks = len(run.stream.tasks)
    extract = incremental.features(run.model, run.stream, 256)
    test = incremental.evaluator(extract, run.stream)

    # -- the modules alone, and what is known of them ------------------------------------------------------------------
    needs = set().union(*(compose.RULES[rule].needs for rule in rules))
    kept, seconds = with_curvature(run, name, images, seed, needs)
    head = incremental.pool_head(kept, kept.names(), run.head)
    individual = np.array([
        alone(extract(kept.compose(run.base, [module], [1.0]), task.test), task, first, head)
        for module, task, first in zip(kept.names(), run.stream.tasks, run.stream.offsets, strict=True)
    ])  # fmt: skip
    parts, taken = ingredients(run, kept, jax.tree.map(jnp.asarray, head), images, seed, needs, known)
    deltas, modules = list(kept.deltas(run.base)), [kept.load(module) for module in kept.names()]
    base, cosines = test(run.base, run.head, tasks).within, np.asarray(compose.cosines(deltas))
    pool = PoolMerges(individual, base, seconds | taken, {}, cosines, joint)

    # -- every rule ----------------------------------------------------------------------------------------------------
    for rule in rules:
        arrays = {what: parts[what] for what in compose.RULES[rule].needs}
        if rule == "regmean_plus":
            arrays["unlabelled"] = parts["unlabelled_train"]
        changes = modules if rule == "core_space" else deltas
        of_heads = {"matvecs", "loss", "unlabelled"} & arrays.keys()  # which are of other widths in each run
        if of_heads or (name, rule) not in programs:
            programs[name, rule] = program(rule, run.base, changes, arrays)
        params, taken, warnings = timed(partial(programs[name, rule].call, run.base, changes, arrays))
        among_all, within = test(params, head, tasks)
        options = {key: str(value) for key, value in OPTIONS.get(rule, {}).items()}
        pool.rules[rule] = MergedPool(within, among_all, taken, programs[name, rule].memory, warnings, options)
        console.print(
            f"{run.folder.name} {name} {rule}: known {within.mean():.3f}, normalised "
            f"{pool.normalised(within).mean():.3f}, all classes {among_all.mean():.3f}, {taken:.2f} s"
        )
    return pool


def merged_run(run: incremental.FinishedRun, pools: dict[str, PoolMerges]) -> MergingRun:
    tasks, tested = zip(*((task.name, len(task.test)) for task in run.stream.tasks), strict=True)
    return MergingRun(run.folder.name, run.config["seed"], list(tasks), list(tested), pools)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.recipe is not None:
        merge_recipe.merge(options.recipe, options.out, options.card)
        return
    began = time.perf_counter()
    folders = job.finished_runs(options, "merging-pools", SMALL)
    runs = incremental.open_several(folders, options.data_dir)
    pools = incremental.common_methods(runs, options.methods)
    tasks = len(runs[0].stream.tasks)
    if any(len(run.stream.tasks) != tasks for run in runs) or tasks < 2:
        counts = ", ".join(f"{run.folder.name} has {len(run.stream.tasks)}" for run in runs)
        raise ValueError(f"merging wants runs of equally many tasks, two at least: {counts}")
    if "slerp" in (options.rules or []) and tasks != 2:
        raise ValueError(f"slerp goes from one module to another, and there are {tasks}: leave it out of --rules")
    fewest = min(len(task.train) for run in runs for task in run.stream.tasks)
    if options.images > fewest:
        raise ValueError(f"--images {options.images}: a task has {fewest} training images; ask for that many at most")
    rules = options.rules or [
        rule for rule in RULES if rule not in A_TASK + BY_STEPS and (rule != "slerp" or tasks == 2)
    ]
    programs: dict[tuple[str, str], Program] = {}
    measured = [
        merged_run(run, {name: merged_pool(run, name, rules, programs, options.images, options.seed) for name in pools})
        for run in runs
    ]
    results = MergingResults(
        "merging", runs[0].stream.name, runs[0].backbone, options.images, measured, time.perf_counter() - began
    )
    folder = folders[0] / "merging"
    folder.mkdir(exist_ok=True)
    write_result(folder / "metrics.json", results)
    path = report.merging_page(folder, results)
    for table in report.merging_tables(results):
        console.print(table.rich())
    console.print(f"{results.seconds:.0f} s; report: {path}")


if __name__ == "__main__":
    closing(main, "the same command begins again with the run, which is kept")
