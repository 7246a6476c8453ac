"""What the experiments on modular networks share: a run of several seeds, networks in and out of a pool."""

import argparse
import contextlib
import functools
import shutil
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
from compo_jax.modular import ModularNet, Network, Settings, routes
from compo_jax.pool import ModulePool
from compo_jax.train import Run, jit_runner, once, open_run, pmap_runner, progress_bar, read_json, write_json

FIXED = (0.0, 0.0)  # phases of a training on a fixed route


@contextlib.contextmanager
def opened(options: argparse.Namespace, net: ModularNet) -> Iterator[tuple[Run, Progress]]:
    """The run's folder and a progress bar, once this network is seen to be possible. What a run may be started again
    with is no part of its settings."""
    images = jax.ShapeDtypeStruct((len(net.classes), 2, options.size, options.size, 3), jnp.float32)
    jax.eval_shape(net.init, jax.random.key(0), images)
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
            run.log.position = read_json(began)
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
    seconds = sum(read_json(path)["seconds"] for path in (run.folder / "parts").iterdir())
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


def store_network(folder: Path, network: Network, tasks: Sequence[Task], accuracy: Sequence[float], seed: int) -> None:
    """Puts a network's templates and its tasks into a pool."""
    pool = ModulePool(folder)
    modular.save_templates(pool, "templates", network, seed=seed, overwrite=True)
    for t, task in enumerate(tasks):
        modular.save_task(
            pool, f"task-{t:03d}", network, t,
            task=task.name, classes=task.classes, metrics={"accuracy": accuracy[t]}, seed=seed, overwrite=True,
        )  # fmt: skip


def load_network(folder: Path, tasks: int) -> Network:
    """The network put together again from its pool."""
    pool = ModulePool(folder)
    shared = modular.load_templates(pool, "templates")
    parts = [modular.load_task(pool, f"task-{t:03d}", shared) for t in range(tasks)]
    return functools.reduce(modular.add_task, parts)
