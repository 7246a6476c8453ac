"""Writers that are killed and writers at once: what was finished is there bit for bit, and never half a module or
checkpoint.

COMPO_JAX_KILLS=200 kills as many writers at random moments.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
from test_pool import same

from compo_jax import files
from compo_jax.pool import ModulePool, changes, manifest, storage
from compo_jax.train import Checkpoints

KILLS = int(os.environ.get("COMPO_JAX_KILLS", "15"))
BASE = "0" * 64

# One process imports everything and forks a writer for each line that it is given: nothing of JAX or orbax has run yet.
# A writer logs an operation before it and after it.
WORKER = """
import itertools, os, random, signal, sys
import numpy as np
from orbax.checkpoint import v1 as loaded_before_the_fork
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints

POOL, LOG = sys.argv[1:]

def value(serial):
    values = np.random.default_rng(serial)
    return {"w": values.normal(size=(40, 50)), "l": [values.integers(9, size=3), None]}

def say(*words):
    with open(LOG, "ab", buffering=0) as log:
        log.write((" ".join(map(str, words)) + "\\n").encode())

def change(pool, what, name, serial):
    say("begin", serial, what, name)
    if what == "put":
        pool.add(name, value(serial), base="0" * 64, adapter="full", extra={"serial": serial}, overwrite=True)
    elif what == "attach":
        pool.attach(name, head=value(serial))
    else:
        pool.remove(name)
    say("end", serial)

def random_changes(first):
    pool, choose = ModulePool(POOL), random.Random(first)
    for serial in itertools.count(first):
        name = choose.choice("abcd")
        change(pool, choose.choice(["put", "attach", "remove"]) if name in pool else "put", name, serial)

def saves(first):
    kept = Checkpoints(POOL + ".checkpoints")
    for serial in itertools.count(first):
        say("begin", serial)
        kept.save(serial, value(serial))
        say("end", serial)

def killed_before(step, what, serial):
    '''One change, killed before the call number `step` of those that move, make or remove something.'''
    calls = itertools.count()
    def watched(function):
        def call(*args, **kwargs):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("rename", "replace", "mkdir", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    if what == "save":
        Checkpoints(POOL + ".checkpoints").save(serial, value(serial))
    else:
        change(ModulePool(POOL), what, "a", serial)

def shared(who, count):
    '''Modules of its own, and one that others replace too.'''
    pool = ModulePool(POOL)
    for i in range(count):
        pool.add(f"{who}{i}", value(i), base="0" * 64, adapter="full")
        pool.add("shared", {"w": np.full((64, 64), i)}, base="0" * 64, adapter="full", overwrite=True)
        try:
            pool.add(f"one{i}", {"w": np.full(3, ord(who))}, base="0" * 64, adapter="full")
            say("won", who, i)
        except FileExistsError:
            say("lost", who, i)

if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                eval(line)
                os._exit(0)
            finally:
                os._exit(1)
        print(pid, flush=True)
        if not line.startswith("shared"):
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    while True:
        try:
            print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        except ChildProcessError:
            break
"""
made = {}
exec(WORKER.replace("POOL, LOG = sys.argv[1:]", "").replace('"__main__"', "0"), made)
value = made["value"]


class Writers:
    """The process that forks writers, their pool, and what the log says must be in it."""

    def __init__(self, folder):
        self.pool, self.log = ModulePool(folder / "pool"), folder / "log"
        self.log.write_text("")
        self.seen = 0
        self.known = {}  # name: (serial of the module, serial of its head or None)
        command = [sys.executable, "-W", "ignore", "-c", WORKER, str(self.pool.path), str(self.log)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "ready"

    def answer(self):
        return self.process.stdout.readline().strip()

    def start(self, call):
        self.process.stdin.write(call + "\n")
        self.process.stdin.flush()
        return int(self.answer())

    def observed(self, name):
        """What is there of a module, every array of which is looked at."""
        if name not in self.pool:
            return None
        serial = self.pool.manifest(name).extra["serial"]
        same(self.pool.load(name), value(serial))
        if "head" not in self.pool.manifest(name).parts:
            return serial, None
        head = self.pool.load(name, "head")
        at = next(n for n in reversed(self.heads) if (value(n)["w"] == head["w"]).all())
        same(head, value(at))
        return serial, at

    def verify(self):
        """(operations finished, whether one was cut off): the pool is as they left it, that one done or not done."""
        lines = [line.split() for line in self.log.read_text().splitlines()[self.seen :]]
        self.seen += len(lines)
        done = {line[1] for line in lines if line[0] == "end"}
        self.heads = [int(line[1]) for line in lines if line[2:3] == ["attach"]] + [
            head for _, head in self.known.values() if head is not None
        ]
        either = {}
        for serial, what, name in (line[1:] for line in lines if line[0] == "begin"):
            before, number = self.known.get(name), int(serial)
            after = {"put": (number, None), "attach": (before and before[0], number), "remove": None}[what]
            if serial in done:
                self.known[name] = after
            else:
                either[name] = (before, after)
        for name in "abcd":
            now = self.observed(name)
            assert now in either.get(name, (self.known.get(name),)), name
            self.known[name] = now
        self.known = {name: now for name, now in self.known.items() if now}
        assert self.pool.names() == sorted(self.known)
        assert self.pool.check() == {}
        return len(done), bool(either)


@pytest.fixture
def writers(tmp_path):
    made = Writers(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()
    made.process.stdin.close()
    made.process.stdout.close()


def hidden(pool):
    return [entry for entry in os.listdir(pool.path) if entry.startswith(".")]


def leftovers(pool):
    inside = [f"{name}/{e}" for name in pool.names() for e in os.listdir(pool.path / name)]
    used = {f"{m.name}/{f['folder']}" for m in pool.manifests().values() for f in m.files.values()}
    return [e for e in inside if e not in used and not e.endswith((".lock", "manifest.json"))]


def clean(pool):
    """Nothing is left, though of those that were killed in the moment before their lock only after an hour."""
    pool.clean()
    for entry in hidden(pool):
        assert not (pool.path / entry / ".lock").exists()
        os.utime(pool.path / entry, (time.time() - 3700,) * 2)
    pool.clean()
    assert (hidden(pool), leftovers(pool)) == ([], [])


def test_killed_at_random_moments(writers):
    random.seed(0)
    finished, cut, most = 0, 0, 0.4  # seconds; a change takes longer where other work is going on
    for kill in range(KILLS):
        pid = writers.start(f"random_changes({(kill + 1) * 10_000})")
        time.sleep(random.uniform(0.1, 1) * most)
        os.kill(pid, signal.SIGKILL)
        assert writers.answer() == "-9"
        done, half = writers.verify()
        finished, cut = finished + done, cut + half
        most *= 1.5 if done == 0 else 0.8 if done > 2 else 1
    left = len(hidden(writers.pool))
    print(f"{KILLS} kills, {cut} during a change; {finished} changes finished, all intact; {left} folders left over")
    assert finished >= KILLS / 4 and cut >= KILLS / 4
    assert left
    clean(writers.pool)
    assert writers.verify() == (0, False)


@pytest.mark.parametrize("what", ["put", "attach", "remove"])
def test_killed_before_every_single_step(writers, what):
    serial = itertools.count(1)
    writers.start(f"change(ModulePool(POOL), 'put', 'a', {next(serial)})")
    assert writers.answer() == "0"
    states, killed = set(), 0
    for step in itertools.count():
        if what == "remove" and "a" not in writers.pool:
            writers.start(f"change(ModulePool(POOL), 'put', 'a', {next(serial)})")
            assert writers.answer() == "0"
            writers.verify()
        before = writers.observed("a") if step else (1, None)
        writers.start(f"killed_before({step}, {what!r}, {next(serial)})")
        status = writers.answer()
        writers.verify()
        states.add(writers.known.get("a") == before)
        if status == "0":
            break
        assert status == "-9"
        killed += 1
    assert killed >= 5
    assert states == {True, False}  # kills came before the change and after it
    clean(writers.pool)
    writers.verify()


def newest(writers):
    """The number of the newest checkpoint, which is whole, and none newer than it is damaged."""
    kept = Checkpoints(f"{writers.pool.path}.checkpoints")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = kept.load(value(0))
    same(jax.tree.map(np.asarray, state), value(kept.latest))
    return kept


def test_checkpoints_killed_at_random_moments(writers):
    random.seed(1)
    finished, cut, most, last, seen = 0, 0, 0.4, None, 0
    for kill in range(KILLS):
        pid = writers.start(f"saves({(kill + 1) * 10_000})")
        time.sleep(random.uniform(0.1, 1) * most)
        os.kill(pid, signal.SIGKILL)
        assert writers.answer() == "-9"
        lines = [line.split() for line in writers.log.read_text().splitlines()]
        begun, done = ([int(n) for what, n in lines[seen:] if what == verb] for verb in ("begin", "end"))
        seen, last = len(lines), done[-1] if done else last
        possible = {last, *begun[len(done) :]} - {None}
        if last is not None or os.path.exists(f"{writers.pool.path}.checkpoints/{begun[-1] if begun else 0}"):
            last = newest(writers).latest
            assert last in possible
        finished, cut = finished + len(done), cut + (len(begun) > len(done))
        most *= 1.5 if not done else 0.8 if len(done) > 2 else 1
    print(f"{KILLS} kills, {cut} during a save; {finished} saves finished, the newest always whole")
    assert finished >= KILLS / 4 and cut >= KILLS / 4
    newest(writers).save(10**9, value(10**9))
    assert len(os.listdir(f"{writers.pool.path}.checkpoints")) == 2
    assert newest(writers).latest == 10**9


def test_a_save_killed_before_every_single_step_leaves_the_newest_whole(writers):
    for serial in (1, 2):
        writers.start(f"Checkpoints(POOL + '.checkpoints').save({serial}, value({serial}))")
        assert writers.answer() == "0"
    latest, killed = [2], 0
    for step in itertools.count():
        writers.start(f"killed_before({step}, 'save', {step + 3})")
        status = writers.answer()
        assert newest(writers).latest in (latest[-1], step + 3)
        latest.append(newest(writers).latest)
        if status == "0":
            break
        assert status == "-9"
        killed += 1
    assert killed >= 5
    assert {b - a > 0 for a, b in itertools.pairwise(latest)} == {True, False}
    assert len(os.listdir(f"{writers.pool.path}.checkpoints")) == 2


def test_writers_at_once(writers):
    """Three writers; the module that they replace all the time is whole and there at every moment."""
    pool = writers.pool
    pool.add("shared", {"w": np.full((64, 64), 0)}, base=BASE, adapter="full")
    for who in "xyz":
        writers.start(f"shared({who!r}, 6)")
    seen = set()
    deadline = time.monotonic() + 60
    while writers.log.read_text().count("\n") < 18 and time.monotonic() < deadline:
        shared = pool.load("shared")["w"]
        assert (shared == shared[0, 0]).all()
        seen.add(int(shared[0, 0]))
        assert "shared" in pool.find()
        assert pool.check(["shared"]) == {}
        pool.clean()  # of those that live nothing is taken away
    writers.process.stdin.close()
    assert [writers.answer() for _ in range(3)] == ["0"] * 3
    lines = [line.split() for line in writers.log.read_text().splitlines()]
    assert len(seen) > 2
    assert pool.check() == {}
    for i in range(6):
        winners = [who for verdict, who, at in lines if verdict == "won" and at == str(i)]
        assert len(winners) == 1
        assert (pool.load(f"one{i}")["w"] == ord(winners[0])).all()
        for who in "xyz":
            same(pool.load(f"{who}{i}"), value(i))
    assert (hidden(pool), leftovers(pool)) == ([], [])


def test_what_a_writer_takes_away_while_check_looks_is_no_damage(tmp_path, monkeypatch):
    pool = ModulePool(tmp_path / "pool")
    pool.add("m", value(1), base=BASE, adapter="full", head=value(2))
    stale = pool.path / "m" / "module.4edfded5"
    for part, takes_away in (("head", shutil.rmtree), ("module", lambda path: path.rename(tmp_path / "old"))):
        shutil.copytree(next((pool.path / "m").glob(f"{part}.*")), stale)
        made_by_orbax = manifest.made_by_orbax

        def late(folder, takes_away=takes_away, made_by_orbax=made_by_orbax):
            if folder == stale and stale.exists():
                takes_away(folder)
            return made_by_orbax(folder)

        with monkeypatch.context() as patched:
            patched.setattr(manifest, "made_by_orbax", late)
            assert pool.check(["m"]) == {}
        assert not stale.exists()


def test_a_module_that_is_replaced_by_one_with_fewer_parts_is_no_damage(tmp_path, monkeypatch):
    pool = ModulePool(tmp_path / "pool")
    pool.add("m", value(1), base=BASE, adapter="full", head=value(2))
    check = storage.check

    def late(*at):
        check(*at)
        monkeypatch.setattr(storage, "check", check)
        pool.add("m", value(3), base=BASE, adapter="full", overwrite=True)

    for names in (None, ["m"]):
        monkeypatch.setattr(storage, "check", late)
        assert pool.check(names) == {}
        assert list(pool.manifest("m").parts) == ["module"]
        pool.attach("m", head=value(2))


def test_clean_takes_nothing_from_a_writer_that_lives(tmp_path):
    pool = ModulePool(tmp_path / "pool")
    assert pool.clean() == []
    pool.add("m", value(1), base=BASE, adapter="full")
    with changes.hidden(pool.path, "n") as living:
        for name in (".old.abcdefgh", ".young.abcdefgh", ".other"):
            (pool.path / name).mkdir()
        (pool.path / ".dead.abcdefgh" / "new").mkdir(parents=True)
        (pool.path / ".dead.abcdefgh" / ".lock").touch()
        os.utime(pool.path / ".old.abcdefgh", (time.time() - 4000,) * 2)
        (pool.path / "m" / "head.01234567").mkdir()
        (pool.path / "m" / "notes.0123").mkdir()
        assert pool.clean() == [".dead.abcdefgh", ".old.abcdefgh", "m/head.01234567"]
        assert living.is_dir()
        assert sorted(os.listdir(pool.path)) == sorted([living.name, ".other", ".young.abcdefgh", "m"])
    assert not living.exists()
    assert (pool.path / "m" / "notes.0123").is_dir()
    same(pool.load("m"), value(1))


def test_a_hidden_folder_that_is_cleaned_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock = files.lock

    def late(file):
        monkeypatch.setattr(files, "lock", lock)
        os.rmdir(file.parent)
        return lock(file)

    monkeypatch.setattr(files, "lock", late)
    pool = ModulePool(tmp_path / "pool")
    pool.add("m", value(1), base=BASE, adapter="full")
    same(pool.load("m"), value(1))
    assert os.listdir(pool.path) == ["m"]
