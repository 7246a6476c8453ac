"""Every merge rule on the same modules: how much of each module's own skill is left, in what time and memory.

    python experiments/merging.py                                       # makes a small run of its own first
    python experiments/merging.py --run RUN [RUN ...]                   # runs of incremental.py, one a seed
    python experiments/merging.py --recipe FILE --out FILE              # checkpoints into one, as a recipe says

For each pool: the curvature of every module at its own weights, on its own training images, taken once and kept beside
a copy of the module (RUN/merging/pools); then every rule of `compose.RULES` that goes by no steps on images, on all
modules, each tested on all tasks with the modules' own heads (of `tall` and `emr`, which make a model for each task,
each model on its task). Normalised accuracy is the merged model's over the module's own, where the task is known.
Beside it stands what the curvature's images tell before any test: the loss, and its forecast to second order around the
average, of each merged model and of weightings that no rule chose, from the base over the average to the sum.
Seconds are of the rule alone, compiled (the least of three calls, or one of over ten seconds); memory is XLA's count of
the whole rule as one program, arguments and result included, in multiples of the base. Options are the rules' defaults
but for those in OPTIONS. Writes report.html and metrics.json to RUN/merging of the first run; those of an earlier
command with other options go to RUN/merging/earlier-1 and so on. A killed comparison goes on behind its last rule. A
few minutes on 2 CPU cores with no arguments, the run included. Expected numbers: README.md.
With --recipe no rules are compared: checkpoint files are merged into one as a YAML file says, as mergekit's users know
it (compo_jax/compose/recipes.py has an example), a tensor at a time.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import job
import options as line
from job import closing, console
from merge_rules import BY_STEPS, RULES
from options import OPEN, Count, OnRuns, OpenPath, Seed, names

SMALL = ["none-lora", "none-full"]


@dataclass(frozen=True)
class Options(OnRuns):
    images: Count = 64
    """training images of a task for its curvature"""
    rules: Annotated[tuple[str, ...], names(RULES), OPEN] = ()
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

import merge_bench
import merge_recipe

from compo_jax import incremental, report
from compo_jax.compose.rule_results import MergingResults, PoolMerges
from compo_jax.train import write_result


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
    rules = options.rules or [rule for rule in RULES if rule not in BY_STEPS and (rule != "slerp" or tasks == 2)]
    programs: dict[str, dict[str, merge_bench.Program]] = {name: {} for name in pools}

    def unfinished(run: incremental.FinishedRun, name: str) -> Path:
        return run.folder / "merging" / "unfinished" / f"{name}-{options.images}-{options.seed}"

    def merged(run: incremental.FinishedRun, name: str) -> PoolMerges:
        of_pool = (options.images, options.seed, unfinished(run, name))
        return merge_bench.merged_pool(run, name, rules, programs[name], *of_pool)

    measured = [merge_bench.merged_run(run, {name: merged(run, name) for name in pools}) for run in runs]
    results = MergingResults(
        "merging", runs[0].stream.name, runs[0].backbone, options.images, measured, time.perf_counter() - began
    )
    folder = folders[0] / "merging"
    job.put_aside(folder, options)
    write_result(folder / "metrics.json", results)
    path = report.merging_page(folder, results)
    for run, name in itertools.product(runs, pools):
        merge_bench.forget(unfinished(run, name))
    for table in report.merging_tables(results):
        console.print(table.rich())
    console.print(f"{results.seconds:.0f} s; report: {path}", soft_wrap=True)


if __name__ == "__main__":
    closing(main)
