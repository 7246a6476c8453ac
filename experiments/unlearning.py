"""What a pool can forget and what it can be reduced to, with no training: every task, every method.

    python experiments/unlearning.py                                    # makes a small run of its own first
    python experiments/unlearning.py --run RUN [RUN ...]                # runs of incremental.py, one a seed

For each pool and each task: specialise (its module alone), unlearn (all modules but its), subtract (all but its, less
its share); the head is treated too, for what training did to the columns of tasks that are left out is undone. Tests
all tasks each time, and writes report.html and metrics.json to RUN/unlearning of the first run. A few minutes on 2
CPU cores with no arguments, the run included. Expected numbers: README.md.
"""

import time
from collections.abc import Sequence

import job
import options as line
from job import closing, console
from options import OnRuns

SMALL = ["ita-lora", "iel-lora", "ita-ia3", "iel-ia3", "ita-full", "iel-full"]

Options = OnRuns


def parse(arguments: Sequence[str] | None = None) -> Options:
    return line.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded


from compo_jax import incremental, report
from compo_jax.incremental.unlearning_results import PoolSkills, RunSkills, UnlearningResults
from compo_jax.train import write_result


def measure(run: incremental.FinishedRun, name: str) -> PoolSkills:
    """Accuracy on every task (columns) with no module, all modules, and for each task the modules left (rows)."""
    pool, tasks = run.pools[name], len(run.stream.tasks)
    names = pool.names()
    test = incremental.evaluator(incremental.features(run.model, run.stream, 256), run.stream)
    head = incremental.pool_head(pool, names, run.head)
    return PoolSkills(
        frozen=test(run.base, run.head, tasks).incremental,
        composed=test(pool.compose(run.base), head, tasks).incremental,
        **{way: incremental.skills(way, pool, run.base, run.head, test) for way in incremental.WEIGHTINGS},
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.perf_counter()
    folders = job.finished_runs(options, "unlearning-pools", SMALL)
    runs = incremental.open_several(folders, options.data_dir)
    methods = incremental.common_methods(runs, options.methods)
    if any(len(run.stream.tasks) < 2 for run in runs):
        raise ValueError("a run of one task has nothing to unlearn it from: give runs of two tasks or more")
    measured = []
    for run in runs:
        pools = {}
        for name in methods:
            pools[name] = measure(run, name)
            console.print(f"{run.folder.name}: {name}")
        tasks, tested = zip(*((task.name, len(task.test)) for task in run.stream.tasks), strict=True)
        measured.append(RunSkills(run.folder.name, run.config["seed"], list(tasks), list(tested), pools))
    seconds = time.perf_counter() - began
    results = UnlearningResults("unlearning", runs[0].stream.name, runs[0].backbone, measured, seconds)
    folder = folders[0] / "unlearning"
    job.put_aside(folder, options)
    write_result(folder / "metrics.json", results)
    path = report.unlearning_page(folder, results)
    for table in report.unlearning_tables(results):
        console.print(table.rich())
    console.print(f"{seconds:.0f} s; report: {path}", soft_wrap=True)


if __name__ == "__main__":
    closing(main, "the same command begins again with the run, which is kept")
