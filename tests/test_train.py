"""The training loop: steps, checkpoints, resumed runs, several devices, and what it refuses."""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from compo_jax.mesh import data_mesh
from compo_jax.train import Checkpoints, Log, fit, init_state, jit_runner, open_run, pmap_runner, progress_bar

STEPS = 20
CONFIG = {"steps": STEPS, "rate": 1e-2}
TRACES = [0]
COMPILATIONS = [0]


def count_compilations(event, seconds, **_):
    COMPILATIONS[0] += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(count_compilations)


def optimizer():
    return optax.adamw(1e-2)


def start():
    random = np.random.default_rng(0)
    params = {"in": random.normal(size=(3, 6)), "out": random.normal(size=(6, 2)), "hole": None}
    return init_state(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), optimizer())


def context():
    return {"shift": jnp.linspace(-1, 1, 6), "key": jax.random.key(3)}


def loss(params, context, batch, step):
    TRACES[0] += 1
    hidden = jnp.tanh(batch["x"] @ params["in"] + context["shift"])
    error = hidden @ params["out"] - batch["y"]
    return jnp.mean(error**2), {"magnitude": jnp.mean(jnp.abs(hidden)), "seen": jnp.float32(step)}


def batch_of(step):
    random = np.random.default_rng([1, step])
    x, y = random.normal(size=(16, 3)), random.normal(size=(16, 2))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def batches(first):
    return map(batch_of, itertools.count(first))


def broken(bad, error=None):
    """The batches, with NaN in that of step `bad` (from 0), or `error` raised instead of it."""

    def make(step):
        batch = batch_of(step)
        if step == bad:
            if error is not None:
                raise error
            batch["x"][5, 1] = np.nan
        return batch

    return lambda first: map(make, itertools.count(first))


def one_device():
    return jit_runner(loss, optimizer(), mesh=data_mesh(1))


def close(a, b, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=atol, atol=atol)


def identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def lines(folder):
    """The records of a run's log without the one entry that a clock decides."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


# -- the runners -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five_steps():
    """Parameters after five steps and the five losses, by optax alone."""
    state, transform = start(), optimizer()
    params, inner, losses = state.params, transform.init(state.params), []
    for step in range(5):
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, context(), batch_of(step), step)
        updates, inner = transform.update(gradients, inner, params)
        params = optax.apply_updates(params, updates)
        losses.append((value, metrics["magnitude"]))
    return params, inner, losses


@pytest.mark.parametrize(
    "make",
    [*(lambda n=n: jit_runner(loss, optimizer(), mesh=data_mesh(n)) for n in (1, 2)),
     lambda: jit_runner(loss, optimizer()), lambda: pmap_runner(loss, optimizer()),
     lambda: pmap_runner(loss, optimizer(), devices=2)],
    ids=["jit 1", "jit 2", "jit 8", "pmap 8", "pmap 2"],
)  # fmt: skip
def test_every_runner_takes_the_steps_of_a_plain_loop_and_compiles_once(make, five_steps):
    runner = make()
    placed, fixed = runner.place(start()), runner.place(context())
    traces, metrics = TRACES[0], []
    for step in range(5):
        batch = runner.shard(batch_of(step))
        compiled = COMPILATIONS[0]
        # Nothing may travel to a device in a step, and least of all the frozen weights.
        with jax.transfer_guard("disallow"):
            placed, found = runner.step(placed, fixed, batch)
        assert COMPILATIONS[0] == compiled or step == 0
        metrics.append(runner.fetch(found))
    assert TRACES[0] == traces + 1
    params, inner, losses = five_steps
    state = runner.fetch(placed)
    assert state.step == 5
    close(state.params, params)
    close(state.optimizer.inner_state, inner)
    close([(m["loss"], m["magnitude"]) for m in metrics], losses)
    assert [float(m["seen"]) for m in metrics] == [0, 1, 2, 3, 4]
    assert all(m["not_finite"] == 0 for m in metrics)


def test_a_placed_context_is_whole_on_each_device():
    for runner, part in ((jit_runner(loss, optimizer()), (6,)), (pmap_runner(loss, optimizer()), (1, 6))):
        shift = runner.place(context())["shift"]
        assert {s.device for s in shift.addressable_shards} == set(jax.devices())
        assert all(s.data.shape == part for s in shift.addressable_shards)
        np.testing.assert_array_equal(shift.addressable_shards[5].data.ravel(), context()["shift"])


@pytest.mark.parametrize("make", [jit_runner, pmap_runner])
def test_a_batch_that_cannot_be_divided_is_refused(make):
    with pytest.raises(ValueError, match="a batch of 12 can't be divided among 8 devices: choose a multiple of 8"):
        make(loss, optimizer()).shard({"x": np.ones((12, 3))})


@pytest.mark.parametrize(
    "batch", [{}, {"x": np.ones((0, 3))}, {"x": np.ones(())}, {"x": np.ones((16, 3)), "y": np.ones((8, 2))}]
)
def test_a_batch_without_rows_or_with_uneven_ones_is_refused(batch):
    with pytest.raises(ValueError, match="arrays of as many rows each, one or more"):
        one_device().shard(batch)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="9 devices were asked for and 8 are there"):
        pmap_runner(loss, optimizer(), devices=9)


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_a_nan_stops_the_run_and_the_last_good_state_is_kept(tmp_path, every):
    checkpoints, log = Checkpoints(tmp_path / "checkpoints"), Log(tmp_path / "metrics.jsonl")
    record = {"run": "ita", "task": 3}
    with pytest.raises(FloatingPointError, match=r"step 4 of ita 3 .*learning rate.*kept in .*check"):
        fit(
            one_device(), start(), context(), broken(3), 8, every=every, log=log, record=record, checkpoints=checkpoints
        )
    kept = checkpoints.load({"state": start(), "position": np.zeros((), np.int64)})["state"]
    good = fit(one_device(), start(), context(), batches, 3)
    identical(kept.params, good.params)
    identical(kept.optimizer.inner_state, good.optimizer.inner_state)
    assert kept.optimizer.total_notfinite == 1
    assert [r["step"] for r in log.records()] == ([1, 2, 3] if every == 1 else [1])


def test_an_extra_argument_that_is_not_finite_is_not_taken_either():
    """The guard of optax looks at the gradients; a regulariser reaches the update beside them."""

    def update(updates, state, params=None, *, pull):
        return jax.tree.map(jnp.subtract, updates, pull), state

    plain = optax.chain(optax.sgd(0.1), optax.GradientTransformationExtraArgs(lambda params: (), update))
    state = init_state({"w": jnp.ones(2)}, plain)
    runner = jit_runner(
        lambda params, context, batch, step: (jnp.sum(params["w"] ** 2), {}), plain, mesh=data_mesh(1),
        extras=lambda params, context, step: ({"pull": {"w": jnp.where(step == 1, jnp.inf, 0.05 * params["w"])}}, {}),
    )  # fmt: skip
    for _ in range(2):
        state, metrics = runner.step(state, None, np.zeros(1))
    assert metrics["not_finite"] == 1
    np.testing.assert_allclose(state.params["w"], 1 - 0.1 * 2 - 0.05, rtol=1e-6)


def test_the_new_state_takes_the_memory_of_the_old_one_and_the_arrays_given_to_fit_stay():
    runner, state, fixed = jit_runner(loss, optimizer(), mesh=data_mesh(1)), start(), context()
    step = runner.step.lower(runner.place(state), runner.place(fixed), runner.shard(batch_of(0))).compile()
    arrays = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert step.memory_analysis().alias_size_in_bytes >= arrays
    ended = fit(runner, state, {**fixed, "start": state.params}, batches, 2)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, fixed, ended)) if isinstance(x, jax.Array))


# -- killed and resumed ------------------------------------------------------------------------------------------------


def train(folder, source=batches, **options):
    with open_run(folder, CONFIG) as run:
        return fit(
            one_device(), start(), context(), source, STEPS, every=1, log=run.log, record={"run": "x"},
            checkpoints=Checkpoints(folder / "checkpoints"), **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(folder), lines(folder)


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path, uninterrupted, seconds):
    state, records = uninterrupted
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    with pytest.raises(RuntimeError, match="no such image"):
        train(tmp_path, broken(6, RuntimeError("no such image")), checkpoint_seconds=seconds)
    assert [r["step"] for r in lines(tmp_path)] == list(range(1, 7))
    assert Checkpoints(tmp_path / "checkpoints").latest == (6 if seconds == 0 else 0)
    identical(train(tmp_path), state)
    assert lines(tmp_path) == records
    identical(train(tmp_path), state)  # once more: nothing is left to do
    assert lines(tmp_path) == records


def killed(folder, moments):
    """Trains in child processes, kills each at its moment, lets one more finish. Not where JAX already has threads."""

    def slow(step):
        time.sleep(0.01)
        return batch_of(step)

    def child():
        if pid := os.fork():
            return pid
        status = 1
        try:
            train(folder, lambda first: map(slow, itertools.count(first)), checkpoint_seconds=0.05)
            status = 0
        finally:
            os._exit(status)

    log = folder / "metrics.jsonl"
    for number, (count, delay) in enumerate(moments):
        pid = child()
        end = time.monotonic() + 30
        while time.monotonic() < end and not (log.exists() and len(log.read_bytes().splitlines()) >= count):
            time.sleep(0.001)
        if number == 1:
            with pytest.raises(ValueError, match="another process is writing"), open_run(folder, CONFIG):
                pass
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert os.waitpid(child(), 0)[1] == 0


def test_a_killed_process_goes_on_as_if_it_had_not_been(tmp_path, uninterrupted):
    state, records = uninterrupted
    chance = random.Random(0)
    moments = [(count, chance.uniform(0, 0.05)) for count in (chance.randint(0, 3), chance.randint(4, 8), 13)]
    program = "from orbax.checkpoint import v1\n"  # before the fork, so that no child is killed while it loads that
    program += f"import test_train, pathlib; test_train.killed(pathlib.Path({str(tmp_path)!r}), {moments})"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path) == records
    saved = Checkpoints(tmp_path / "checkpoints").load({"state": start(), "position": np.zeros((), np.int64)})
    identical(saved["state"], state)
    assert saved["position"] == (tmp_path / "metrics.jsonl").stat().st_size


def test_batches_that_end_early_are_refused():
    with pytest.raises(ValueError, match="the batches ended after step 3 of 8"):
        fit(one_device(), start(), context(), lambda first: itertools.islice(batches(first), 3), 8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"every": 0}, "every=0"),
        ({"every": -10}, "every 1 or more"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds=-1.0"),
        ({"checkpoint_seconds": np.nan}, "checkpoint_seconds no less than 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_written(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        fit(
            one_device(), start(), context(), batches,
            **{"steps": 8, "checkpoints": Checkpoints(tmp_path / "checkpoints")} | options,
        )  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


def test_steps_that_are_no_whole_number_are_refused():
    with pytest.raises(TypeError):
        fit(one_device(), start(), context(), batches, 2.5)


def test_a_state_past_the_last_step_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    fit(one_device(), start(), context(), batches, 3, checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"at step 3 already, by what .*checkpoints.*to end at step 2"):
        fit(one_device(), start(), context(), batches, 2, checkpoints=checkpoints)


def test_a_batch_that_cannot_be_divided_leaves_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="can't be divided among 3 devices"):
        fit(
            jit_runner(loss, optimizer(), mesh=data_mesh(3)), start(), context(), batches, 3,
            checkpoints=Checkpoints(tmp_path / "checkpoints"),
        )  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_goes_on_on_another_number_of_devices(tmp_path):
    """On 1 device, then on 4, then under pmap on 2, each from the checkpoint of the one before."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    whole = fit(one_device(), start(), context(), batches, 9)
    for runner, steps in (
        (one_device(), 3),
        (jit_runner(loss, optimizer(), mesh=data_mesh(4)), 6),
        (pmap_runner(loss, optimizer(), devices=2), 9),
    ):
        state = fit(runner, start(), context(), batches, steps, checkpoints=checkpoints)
    close(state, whole)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_keep_two_and_say_what_does_not_fit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.latest is None
    trees = [{"a": jnp.full((2, 3), k, jnp.float32), "b": (np.array(k), None)} for k in range(4)]
    for number in (2, 5, 9):
        checkpoints.save(number, trees[number % 4])
    checkpoints.save(9, trees[0])  # is there already, and stays
    assert sorted(p.name for p in (tmp_path / "new" / "checkpoints").iterdir()) == ["5", "9"]
    again = Checkpoints(tmp_path / "new" / "checkpoints")
    assert again.latest == 9
    identical(again.load(trees[0]), trees[1])
    for other, told in (
        ({"a": jnp.zeros((2, 4)), "b": (np.array(0), None)}, r"\(a: float32\[2, 3\] there, float32\[2, 4\] now\)"),
        ({"a": jnp.zeros((2, 3), jnp.bfloat16), "b": (np.array(0), None)}, r"float32\[2, 3\] there, bfloat16\[2, 3\]"),
        ({"b": (np.array(0), None)}, r"a: float32\[2, 3\] there, nothing now"),
        ({**trees[0], "c": jnp.zeros(1), "d": jnp.zeros(2)}, r"c: nothing there, float32\[1\] now; d: nothing there"),
    ):
        with pytest.raises(ValueError, match=f"doesn't fit this run.*{told}.*Remove the folder"):
            again.load(other)
    again.remove()
    assert again.latest is None
    again.save(1, trees[0])
    assert again.latest == 1


# -- progress ----------------------------------------------------------------------------------------------------------


def test_the_progress_bar_needs_no_terminal():
    written = io.StringIO()
    with progress_bar(console=Console(file=written, width=120)) as progress:
        seen = []
        progress.update = lambda bar, **fields: seen.append(fields)
        fit(one_device(), start(), context(), batches, 6, every=4, progress=progress, record={"task": "greek"})
    assert [s["completed"] for s in seen] == [1, 4, 6]
    assert all(np.isfinite(s["loss"]) and s["rate"] > 0 for s in seen)
    assert "\x1b" not in written.getvalue()


@pytest.mark.parametrize("end", [3.1, 4.5])
def test_a_training_that_ends_far_above_its_start_is_no_result(tmp_path, end):
    """Told at the end, before it is kept, and after a resume as well."""
    losses = jnp.linspace(1.0, end, 6)

    def loss(params, context, batch, step):
        return losses[step] + 0 * params["w"].sum() + 0 * batch["x"].sum(), {}

    runner = jit_runner(loss, optax.sgd(0.1), mesh=data_mesh(1))
    state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1))
    batches = lambda start: iter([{"x": jnp.ones((1, 1))}] * 6)
    log, checkpoints = Log(tmp_path / "log.jsonl"), Checkpoints(tmp_path / "checkpoints")
    options = {"log": log, "record": {"run": "m"}, "checkpoints": checkpoints, "every": 1}
    log.write(run="other", step=1, loss=100.0)
    fit(runner, state, {}, batches, 4, **options)
    if np.mean(losses[-3:]) <= 3:
        assert int(fit(runner, state, {}, batches, 6, **options).step) == 6
    else:
        with pytest.raises(FloatingPointError, match="the loss of m rose from 1 at its start to 3"):
            fit(runner, state, {}, batches, 6, **options)
        assert checkpoints.latest < 6
