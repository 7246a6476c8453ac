"""Several processes on one machine: one's training, one writer of each file, runs that outlive a killed process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import ENVIRONMENT, ROOT, command, main
from test_train import CONFIG, batch_of, context, lines, loss, optimizer, start

from compo_jax import mesh
from compo_jax.incremental.outcomes import Results
from compo_jax.pool import ModulePool
from compo_jax.train import RUNNERS, Checkpoints, fit, once, open_run, read_result

STEPS = 12


def job(lines, devices=2):
    """Starts one process for each command line."""
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # the tests' XLA_FLAGS are in it
    environment = {**ENVIRONMENT, "PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": str(devices)}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(line, **options) for line in lines]


def finished(processes):
    """(exit code, what it printed) of each; those that hang are ended."""
    try:
        told = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def kill(processes, which, when):
    """Kills one of two processes `when` it is time, and the other, which ends by itself a minute later."""
    until = time.monotonic() + 100
    while time.monotonic() < until and not when() and processes[which].poll() is None:
        time.sleep(0.01)
    for process in (processes[which], processes[1 - which]):
        process.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    assert [code for code, _ in finished(processes)][which] == -signal.SIGKILL


def modules(folder):
    pool = ModulePool(folder / "pool")
    assert pool.check() == {}
    return {name: {part: pool.load(name, part) for part in pool.manifest(name).parts} for name in pool.names()}


def same(a, b, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=atol, atol=atol)


def written(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(folder, kind, slow):
    """What each process of the small job runs."""

    def batches(first):
        for step in range(first, STEPS):
            time.sleep(slow)
            yield batch_of(step)

    runner = RUNNERS[kind](loss, optimizer())
    with open_run(folder, CONFIG) as run:
        state = fit(
            runner, start(), context(), batches, STEPS, every=1, log=run.log, record={"run": "x"},
            checkpoints=Checkpoints(folder / "checkpoints"), checkpoint_seconds=0.1,
        )  # fmt: skip
        pool = ModulePool(folder / "pool")
        drifted = jax.tree.map(lambda x: x + jax.process_index(), state.params)  # hosts may differ: the first counts
        pool.add("m", drifted, base="0" * 64, adapter="full", overwrite=True)
        pool.attach("m", twice=pool.load("m"))
        return once(run, "part", lambda: {"devices": jax.device_count(), "written by": jax.process_index()})


def small(folder, kind, port=None, process=0, slow=0.0):
    if port is not None:
        mesh.start_distributed(f"127.0.0.1:{port}", 2, process)
    print(json.dumps(train(Path(folder), kind, slow)))


def small_job(folder, kind, processes=2, slow=0.0):
    port, devices = free_port() if processes > 1 else None, 4 // processes
    called = (f"{str(folder)!r}, {kind!r}, {port}, {i}, {slow}" for i in range(processes))
    return job([[sys.executable, "-c", f"import test_hosts; test_hosts.small({text})"] for text in called], devices)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    ((code, told),) = finished(small_job(folder, "jit", 1))
    assert code == 0, told
    return folder


@pytest.mark.parametrize(("kind", "killed"), [("jit", 1), ("pmap", 0)])
def test_two_processes_one_of_them_killed_and_started_again_train_what_one_does(tmp_path, alone, kind, killed):
    folder = tmp_path / "run"
    count = random.Random(killed).randint(1, STEPS - 4)
    kill(small_job(folder, kind, slow=0.05), killed, lambda: len(written(folder)) >= count)
    assert count <= len(written(folder)) < STEPS
    both = finished(small_job(folder, kind))
    assert [code for code, _ in both] == [0, 0], both
    found = [json.loads(told.splitlines()[-1]) for _, told in both]
    assert found == [{"devices": 4, "written by": 0}] * 2
    same(modules(folder), modules(alone))
    got, wanted = lines(folder), lines(alone)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([r["loss"] for r in got], [r["loss"] for r in wanted], rtol=1e-5)


# -- the main job ------------------------------------------------------------------------------------------------------


def test_the_main_job_on_two_hosts_ends_with_the_modules_of_one(tmp_path):
    small = [
        "--tasks",
        "2",
        "--classes",
        "3",
        "--images",
        "8",
        "--epochs",
        "2",
        "--batch",
        "24",
        "--fisher-images",
        "8",
    ]
    whole, both = tmp_path / "whole", tmp_path / "both"

    def start(name, processes):
        started, port = command(*small, "--runs", tmp_path, "--name", name), free_port()
        hosts = [["--hosts", f"127.0.0.1:{port},2,{i}"] for i in range(2)] if processes == 2 else [[]]
        return job([[*started, *host] for host in hosts], devices=4 // processes)

    kill(start("both", 2), 1, (both / "pool" / "00-arabic").exists)
    assert not (both / "metrics.json").exists()
    for name, processes in (("whole", 1), ("both", 2)):
        ended = finished(start(name, processes))
        assert [code for code, _ in ended] == [0] * processes, ended
    for name in ("00-arabic", "01-armenian"):
        for part in ("module", "head", "start"):
            same(*(ModulePool(folder / "pool").load(name, part) for folder in (both, whole)))
    first, second = (read_result(folder / "metrics.json", Results) for folder in (both, whole))
    np.testing.assert_array_equal(*(one.methods[one.method].accuracy_matrix for one in (first, second)))
    assert (both / "report.html").exists()


@pytest.mark.parametrize("text", ["", "here", "host:1,2", "host:1,2,2", "host,2,0", "host:1,-1,0"])
def test_hosts_that_make_no_sense_are_told(text, capsys):
    with pytest.raises((SystemExit, ValueError)) as raised:
        main("--hosts", text)
    assert "is not auto or ADDRESS:PORT,N,I" in capsys.readouterr().err + str(raised.value)
