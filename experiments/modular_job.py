"""What the experiments on modular networks share: options, a run of several seeds, networks in and out of a pool."""

import argparse
import contextlib
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from job import console
from rich.progress import Progress
from rich.table import Table

from compo_jax import modular
from compo_jax.data import Task
from compo_jax.modular import ModularNet, Settings, routes
from compo_jax.pool import ModulePool
from compo_jax.train import Run, jit_runner, once, open_run, pmap_runner, progress_bar, write_json

FIXED = (0.0, 0.0)  # phases of a training on a fixed route
PHASES = "parts of the steps after which routes begin to harden, and are fixed"


def modular_parser(documentation: str | None) -> argparse.ArgumentParser:
    """Options of all experiments on modular networks; those without a default have one for each data set."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="where TFDS has prepared the set")
    add("--images", type=int, help="training images of a class (rendered characters)")
    add("--size", type=int, help="side of the images, in pixels")
    add("--layers", type=int, help="layers of the network")
    add("--width", type=int, help="channels")
    add("--patch", type=int, default=4, help="side of the stem's patches, in pixels")
    add("--block", choices=["basic", "bottleneck", "inverted"], default="basic")
    add("--route", choices=["soft", "straight_through", "gumbel"], default="soft", help="how routes are learned")
    add("--phases", type=float, nargs=2, default=(0.1, 0.4), metavar=("A", "B"), help=PHASES)
    add("--steps", type=int, help="steps of a training")
    add("--batch", type=int, help="images of each task in a step")
    add("--learning-rate", type=float, default=3e-3)
    add("--runner", choices=["jit", "pmap"], default="jit")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="a finished run may be given more: name the old ones too",
    )
    add("--name", help="name of the run; default: made from the experiment and the data")
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    add("--tensorboard", action="store_true")
    return parser


def with_presets(options: argparse.Namespace, presets: dict, default: dict) -> argparse.Namespace:
    """The options, each that the command line leaves open as this data set wants it."""
    name = "+".join(options.data) if isinstance(options.data, list) else options.data
    for key, value in (default | presets.get(name, {})).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    options.name = options.name or f"{Path(sys.argv[0]).stem.replace('_', '-')}-{name}"
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """What would fail later, when there is a run folder with these settings, or work to lose."""
    for key in ("size", "patch", "layers", "width", "steps", "batch", "images"):
        if getattr(options, key) < 1:
            raise ValueError(f"--{key} is 1 or more, not {getattr(options, key)}")
    if options.size % options.patch:
        raise ValueError(f"images of {options.size} pixels can't be cut into patches of {options.patch}")
    begin, end = options.phases
    if not 0 <= begin <= end <= 1:
        raise ValueError(f"--phases are parts of the steps, 0 to 1, the first not after the second: not {begin} {end}")
    for key in ("seeds", "targets", "budgets", "templates"):
        values = getattr(options, key, None)
        if isinstance(values, list) and len(set(values)) < len(values):
            raise ValueError(f"--{key} has one of its values twice: {' '.join(map(str, values))}")


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Run, Progress]]:
    """The run's folder and a progress bar. What a run may be started again with is no part of its settings."""
    free = ("runs", "tensorboard", "seeds", "data_dir", "analysis_images")
    config = {k: v for k, v in vars(options).items() if k not in free}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    with (
        open_run(options.runs / options.name, config, tensorboard=options.tensorboard) as run,
        progress_bar(console=console) as progress,
    ):
        yield run, progress


def part(run: Run, name: str, make: Callable[[Path], dict]) -> dict:
    """`make(folder for checkpoints)`, made once and its wall time kept; see `train.once`.

    Where it was killed, the log goes back to where it began, and checkpoints set it forward from there.
    """
    folder, began = run.folder / "checkpoints" / name, run.folder / "checkpoints" / f"{name}.json"

    def timed():
        began.parent.mkdir(exist_ok=True)
        if began.exists():
            run.log.position = json.loads(began.read_text())
        else:
            write_json(began, run.log.position)
        clock = time.perf_counter()
        return {"made": make(folder), "seconds": time.perf_counter() - clock}

    found = once(run, name, timed)
    shutil.rmtree(folder, ignore_errors=True)
    began.unlink(missing_ok=True)
    return found["made"]


def finish(run: Run, metrics: dict, page: Callable[[Path, dict], Path], table: Callable[[dict], Table]) -> None:
    """Writes the metrics and the page, and prints the table.

    Adds its seconds: the wall time of all parts; of one that was killed, since it was taken up again.
    """
    seconds = sum(json.loads(path.read_text())["seconds"] for path in (run.folder / "parts").iterdir())
    metrics = metrics | {"seconds": seconds}
    write_json(run.folder / "metrics.json", metrics)
    path = page(run.folder, metrics)
    console.print(table(metrics))
    console.print(f"{seconds:.0f} s; report: {path}")


def settings_of(options: argparse.Namespace) -> Settings:
    shared = {"route": options.route, "phases": tuple(options.phases)}
    return Settings(options.steps, options.batch, options.learning_rate, **shared)


def runner_of(options: argparse.Namespace) -> Callable:
    return {"jit": jit_runner, "pmap": pmap_runner}[options.runner]


def described(net: ModularNet, size: int) -> dict:
    """The network's settings as the reports want them."""
    return {key: getattr(net, key) for key in ("layers", "templates", "width", "patch", "block", "bn")} | {"size": size}


@functools.cache
def _init(net: ModularNet) -> Callable:
    return jax.jit(net.init)  # kept: random numbers take XLA seconds to compile


def initial(net: ModularNet, size: int, seed: int, order=None) -> dict:
    """New variables; with `order`, templates (layers,) or (tasks, layers), their route is that."""
    images = jnp.zeros((len(net.classes), 2, size, size, 3))
    variables = _init(net)(jax.random.key(seed), images)
    if order is None:
        return variables
    logits = routes.fixed(jnp.asarray(order), net.templates)
    return modular.set_route(variables, jnp.broadcast_to(logits, variables["params"]["route"].shape))


def store_network(
    folder: Path, net: ModularNet, variables: dict, tasks: Sequence[Task], accuracy: Sequence[float], seed: int
) -> None:
    """Puts a network's templates and its tasks into a pool."""
    pool = ModulePool(folder)
    modular.save_templates(pool, "templates", net, variables, seed=seed, overwrite=True)
    for t, task in enumerate(tasks):
        modular.save_task(
            pool, f"task-{t:03d}", net, variables, t,
            task=task.name, classes=task.classes, metrics={"accuracy": accuracy[t]}, seed=seed, overwrite=True,
        )  # fmt: skip


def load_network(folder: Path, tasks: int) -> tuple[ModularNet, dict]:
    """The network put together again from its pool."""
    pool = ModulePool(folder)
    shared = modular.load_templates(pool, "templates")
    parts = [modular.load_task(pool, f"task-{t:03d}", shared) for t in range(tasks)]
    return functools.reduce(lambda joined, part: modular.add_task(*joined, *part), parts)
