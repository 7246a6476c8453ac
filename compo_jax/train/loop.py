"""The training loop: progress, logging, checkpoints, resume, and a stop on numbers that are not finite."""

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compo_jax import mesh
from compo_jax.train.checkpoints import Checkpoints
from compo_jax.train.log import Log
from compo_jax.train.runners import Runner
from compo_jax.train.step import TrainState
from compo_jax.tree import Tree


def progress_bar(**kwargs) -> Progress:
    """A bar with loss, images/s and time left, for `fit(progress=...)`; use as a context manager.

    Of several processes, process 0 shows it.
    """
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        **{"disable": not mesh.is_writer()} | kwargs,
    )


def fit(
    runner: Runner,
    state: TrainState,
    context: Tree,
    batches: Callable[[int], Iterator[Tree]],
    steps: int,
    *,
    log: Log | None = None,
    record: dict[str, Any] | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
    every: int = 10,
) -> TrainState:
    """Takes the steps from `state.step` (or from the newest checkpoint) to `steps`.

    Of several processes, which all call it, process 0 writes the log and the checkpoints.

    Args:
      runner: see `jit_runner`, `pmap_runner`.
      context: what stays the same; see `make_step`.
      batches: `start -> iterator` over the batches from step `start` on, so that a resumed run sees the very batches
        that an uninterrupted one sees.
      log, record: a line at the first step, every `every` steps and at the last one: `record`, step, metrics,
        images_per_second.
      checkpoints: saved every `checkpoint_seconds` and at the end; where one is there, training goes on from it.
      progress: see `progress_bar`.

    Raises ValueError for options out of range, for a state that is past `steps`, and for batches that end early or
    can't be divided among the devices; FloatingPointError after an update that was not finite: it was not made, and the
    state is saved where its loss on the first batch is finite; and where the loss, or that of one of several tasks (a
    metric `loss_...`), ends far above its start: above twice the start and 1. Nothing is made of that.
    """
    _require_counts(steps, every, checkpoint_seconds)
    record, state = record or {}, jax.tree.map(jnp.asarray, state)
    label = " ".join(str(value) for value in record.values()) or "training"
    state = _restored(state, checkpoints, log)
    if (first := _first_step(state, steps, label, checkpoints)) == steps:
        return state

    def save(state):
        if checkpoints is not None:
            position = np.array(0 if log is None else log.position, np.int64)
            checkpoints.save(int(np.max(state.step)), {"state": state, "position": position})

    bar = None if progress is None else progress.add_task(label, total=steps, completed=first, loss=np.nan, rate=np.nan)
    # A step uses up the state that it gets; the caller's arrays, and the context's, stay.
    placed, context = runner.place(jax.tree.map(jnp.copy, state)), runner.place(context)
    last_save, since, images, k = (now := time.perf_counter()), now, 0, first
    history = _earlier_losses(log, record) if first and log is not None else []
    for k, batch in zip(range(first + 1, steps + 1), batches(first), strict=False):
        divided = runner.shard(batch)
        if k == first + 1:  # the log's position, for a run that is killed before its first checkpoint
            save(state)
        images += jax.tree.leaves(batch)[0].shape[0]
        placed, metrics = runner.step(placed, context, divided)
        if k % every and k not in (1, steps):
            continue
        values = {name: float(value) for name, value in runner.fetch(metrics).items()}
        now = time.perf_counter()
        rate, images, since = images / (now - since), 0, now
        if values.pop("not_finite") or not np.isfinite(values["loss"]):
            # the loss on the first batch tells whether the parameters are good, and a later batch isn't
            known = runner.step(jax.tree.map(jnp.copy, placed), context, runner.shard(next(batches(first))))[1]
            if np.isfinite(float(runner.fetch(known)["loss"])):
                save(runner.fetch(placed))
            raise _not_finite(label, k, values["loss"], checkpoints)
        history.append(_losses(values))
        if k == steps:
            _require_progress(history, label)
        if log is not None:
            log.write(**record, step=k, **values, images_per_second=round(rate, 1))
        if progress is not None:
            progress.update(bar, completed=k, loss=values["loss"], rate=rate)
        if k == steps or mesh.agreed(now - last_save > checkpoint_seconds):
            save(runner.fetch(placed))
            last_save = time.perf_counter()
    if k < steps:
        raise ValueError(f"the batches ended after step {k} of {steps}: give an iterator that goes on to the last step")
    mesh.barrier("checkpoints are written")
    if progress is not None:
        progress.remove_task(bar)
    return jax.tree.map(jnp.asarray, runner.fetch(placed))


def _require_counts(steps: int, every: int, checkpoint_seconds: float) -> None:
    if operator.index(steps) < 0 or operator.index(every) < 1 or not checkpoint_seconds >= 0:
        raise ValueError(
            f"steps={steps}, every={every}, checkpoint_seconds={checkpoint_seconds}: steps is 0 or more, every 1 or "
            "more, and checkpoint_seconds no less than 0"
        )


def _first_step(state: TrainState, steps: int, label: str, checkpoints: Checkpoints | None) -> int:
    """The step that the state is at; ValueError where it is past the last one."""
    first = int(np.max(state.step))
    if first > steps:
        where = "" if checkpoints is None else f", by what {checkpoints.path} has or what was given"
        raise ValueError(f"{label} is at step {first} already{where}, and was to end at step {steps}")
    return first


def _restored(state: TrainState, checkpoints: Checkpoints | None, log: Log | None) -> TrainState:
    """The newest checkpoint's state, the log put back to it; the state itself where there is none."""
    if checkpoints is not None and checkpoints.latest is not None:
        saved = checkpoints.load({"state": state, "position": np.zeros((), np.int64)})
        state = saved["state"]
        if log is not None:
            log.position = int(saved["position"])
    mesh.barrier("checkpoints are read")
    return state


def _not_finite(label: str, step: int, loss: float, checkpoints: Checkpoints | None) -> FloatingPointError:
    return FloatingPointError(
        f"the gradient was not finite at or shortly before step {step} of {label} (loss {loss}): the learning rate or "
        "the regulariser may be too large, or an image may hold NaN. The last good state was kept"
        + ("." if checkpoints is None else f" in {checkpoints.path}.")
    )


def _losses(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name == "loss" or name.startswith("loss_")}


def _earlier_losses(log: Log, record: dict[str, Any]) -> list[dict[str, float]]:
    """Those that earlier starts of this training wrote."""
    return [_losses(line) for line in log.records() if "loss" in line and record.items() <= line.items()]


def _require_progress(history: Sequence[Mapping[str, float]], label: str) -> None:
    """FloatingPointError where a loss ends above its start by more than the start's size and 1."""
    for name in history[0]:
        start, end = history[0][name], float(np.mean([losses[name] for losses in history[-3:]]))
        start, end = (float(value) for value in mesh.agreed((start, end)))
        if end - start > abs(start) + 1:
            raise FloatingPointError(
                f"the {name} of {label} rose from {start:.3g} at its start to {end:.3g} at its end: the "
                "learning rate or the weight of a regulariser is too large. Nothing was made of this training"
            )
