"""What the experiments on modular networks share: a run of several seeds, trainings, networks in and out of a pool."""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import job
import numpy as np
import options as line
from job import console
from rich.progress import Progress

from compo_jax import data, modular
from compo_jax.data import Task, TaskStream
from compo_jax.modular import ModularNet, Network, Settings, routes
from compo_jax.modular.results import Job, NetShape
from compo_jax.pool import ModulePool
from compo_jax.report.table import Table
from compo_jax.train import RUNNERS, Run, once, open_run, progress_bar, read_json, write_json
from compo_jax.train.results import structured, unstructured, write_result

Result = TypeVar("Result", bound=tuple)


class Session(NamedTuple):
    """What all parts of a run share; `settings` are those of a training with learned orders."""

    options: Any
    stream: TaskStream
    settings: Settings
    run: Run
    progress: Progress

    @property
    def size(self) -> int:
        """Side of the images, in pixels."""
        return self.stream.size

    def learner(
        self, net: ModularNet, settings: Settings | None = None, *, part: str | None = None, fixed: bool = False
    ) -> modular.Learner:
        """Of this network, or with `part` of that part of a new task, or with a `fixed` order of all but the route;
        made once."""
        settings = (settings or self.settings)._replace(route_rate=route_rate(self.options, net))
        return _learner(net, self.stream, settings, part, fixed, RUNNERS[self.options.training.runner])

    def logged(self, label: str, about: str) -> dict[str, Any]:
        """Options of a training: its lines in the log carry these names."""
        return {"log": self.run.log, "record": {"run": label, "task": about}, "progress": self.progress}


def route_rate(options: Any, net: ModularNet) -> float:
    """Of the network's routes: that of their kind, unless the command line has one."""
    return options.training.route_rate or (1.0 if net.route == "linear" else 3.0)


@functools.cache
def _learner(net, stream, settings, part, fixed, runner):
    if part is None:
        trained = modular.FIXED_ORDER if fixed else ""
        return modular.learner(net, stream.prepare, settings, stream.augment, trained=trained, runner=runner)
    return modular.transfer(net, stream.prepare, settings, part, stream.augment, runner=runner)


def open_tasks(options: Any) -> TaskStream:
    """The tasks that the options ask for; says what they are."""
    it = options.stream
    names = [it.data] if isinstance(it.data, str) else list(it.data)
    split = {"train_split": getattr(it, "train_split", None)}
    stream = data.open_tasks(names, it.size, data_dir=it.data_dir, tasks=it.tasks, images=it.images, **split)
    job.tell_images(stream, it.images)
    stream = held_out(stream, it.validation)
    images = sum(len(task.train) for task in stream.tasks)
    console.print(f"{stream.name}: {len(stream.tasks)} tasks, {len(stream.classes)} classes, {images} images")
    return stream


def held_out(stream: TaskStream, validation: float) -> TaskStream:
    """The stream, tested on a part of its training images where one is asked for; says so."""
    if not validation:
        return stream
    console.print(f"tested on {validation:.0%} of the training images, which are not trained on")
    return data.validation(stream, validation)


@contextlib.contextmanager
def opened(options: Any, stream: TaskStream, net: ModularNet) -> Iterator[Session]:
    """The run, once this network is seen to be possible. What it may be started again with is no setting of its."""
    images = jax.ShapeDtypeStruct((len(net.classes), 2, *[options.stream.size] * 2, 3), jnp.float32)
    jax.eval_shape(net.init, jax.random.key(0), images)
    free = ("runs", "tensorboard", "seeds", "data_dir", "analysis_images")
    config = {key: value for key, value in line.flat(options).items() if key not in free}
    chosen, place = options.training, options.place
    settings = Settings(
        chosen.steps, chosen.batch, chosen.learning_rate, route_rate=route_rate(options, net),
        relaxation=chosen.relaxation, phases=chosen.phases,
    )  # fmt: skip
    with (
        open_run(place.runs / place.name, config, tensorboard=place.tensorboard) as run,
        progress_bar(console=console) as progress,
    ):
        yield Session(options, stream, settings, run, progress)


def part(session: Session, name: str, kind: type[Result], make: Callable[[Path], Result]) -> Result:
    """`make(folder for checkpoints)`, of this type, made once and its wall time kept; see `train.once`.

    Where it was killed, the log goes back to where it began, and checkpoints set it forward from there.
    """
    run = session.run
    folder, began = run.folder / "checkpoints" / name, run.folder / "checkpoints" / f"{name}.json"

    def timed():
        began.parent.mkdir(exist_ok=True)
        if began.exists():
            run.log.position = read_json(began)
        else:
            write_json(began, run.log.position)
        clock = time.perf_counter()
        return {"made": unstructured(make(folder)), "seconds": time.perf_counter() - clock}

    stored = once(run, name, timed)
    shutil.rmtree(folder, ignore_errors=True)
    began.unlink(missing_ok=True)
    made = stored.get("made") if isinstance(stored, dict) else stored
    return structured(made, kind, f"part {name} of {run.folder}", "remove it, and the same command makes it again")


def about(session: Session, net: ModularNet, tasks: Sequence[Task] | None = None) -> Job:
    """What the results say of the run, whose seconds are the wall time of all parts: of one that was killed, since it
    was taken up again."""
    options, tasks = session.options, session.stream.tasks if tasks is None else tasks
    seconds = sum(read_json(path)["seconds"] for path in (session.run.folder / "parts").iterdir())
    shape = NetShape(*(getattr(net, key) for key in NetShape._fields[:-1]), session.size)
    images = ({task.name: len(getattr(task, split)) for task in tasks} for split in ("train", "test"))
    validation = options.stream.validation
    it = (options.place.name, session.stream.name, options.place.seeds, seconds, shape, session.settings)
    return Job(*it, *images, validation)


def finish(session: Session, results: Any, page: Callable[[Path, Any], Path], table: Callable[[Any], Table]) -> None:
    """Writes the results and the page, and prints the table."""
    write_result(session.run.folder / "metrics.json", results)
    path = page(session.run.folder, results)
    console.print(table(results).rich())
    console.print(f"{results.job.seconds:.0f} s; report: {path}", soft_wrap=True)


# -- networks ----------------------------------------------------------------------------------------------------------
@functools.cache
def _init(net: ModularNet | modular.ExpertNet) -> Callable:
    return jax.jit(net.init)  # kept: random numbers take XLA seconds to compile


def initial(net: ModularNet | modular.ExpertNet, size: int, seed: int, order=None) -> dict:
    """New variables; with `order`, templates (layers,) or (tasks, layers), their route is that."""
    images = jnp.zeros((len(net.classes), 2, size, size, 3))
    variables = _init(net)(jax.random.key(seed), images)
    if order is None:
        return variables
    one_hot, shape = routes.fixed(jnp.asarray(order), net.templates), variables["params"]["route"].shape
    if net.groups > 1:  # all groups of a layer alike
        one_hot = one_hot[..., None, :]
    return modular.set_route(variables, jnp.broadcast_to(one_hot, shape))


def train(
    session: Session,
    net: ModularNet,
    tasks: Sequence[Task],
    label: str,
    seed: int,
    folder: Path,
    order=None,
    *,
    fixed: bool = False,
) -> tuple[modular.Trained, float]:
    """A new network trained on these tasks, and the seconds that it took; in this order, or else one that it learns;
    with `fixed` in the order that it starts with."""
    clock, splits = time.perf_counter(), [task.train for task in tasks]
    trained = session.learner(net, fixed=fixed or order is not None).train(
        initial(net, session.size, seed, order), splits, seed, folder, **session.logged(label, f"seed {seed}")
    )
    return trained, time.perf_counter() - clock


def accuracies(session: Session, net: ModularNet, variables: dict, tasks: Sequence[Task]) -> np.ndarray:
    """On the test images of each task."""
    return modular.accuracies(net, session.stream.prepare)(variables, [task.test for task in tasks])


def store_network(
    session: Session, name: str, network: Network, tasks: Sequence[Task], accuracy: Sequence[float], seed: int
) -> None:
    """Puts a network's templates and its tasks into a pool of the run."""
    pool = ModulePool(session.run.folder / "pools" / name)
    modular.save_templates(pool, "templates", network, seed=seed, overwrite=True)
    for t, task in enumerate(tasks):
        modular.save_task(
            pool, f"task-{t:03d}", network, t,
            task=task.name, classes=task.classes, metrics={"accuracy": float(accuracy[t])}, seed=seed, overwrite=True,
        )  # fmt: skip


def load_network(session: Session, name: str, tasks: int) -> Network:
    """The network put together again from its pool."""
    pool = ModulePool(session.run.folder / "pools" / name)
    shared = modular.load_templates(pool, "templates")
    return functools.reduce(modular.add_task, [modular.load_task(pool, f"task-{t:03d}", shared) for t in range(tasks)])
