"""How ours.py and peers.py are timed beside each other: a process for each side and piece of work, asked in turn."""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

Work = Callable[[], Any]  #: does the work once, and waits for it
Rows = dict[str, Callable[["Sizes"], Work]]
HERE = Path(__file__).parent


class Sizes(NamedTuple):
    """What the work is done on.

    Attributes:
      batch: images of a step or a product.
      net, large: image side and patch in pixels, width, depth and heads of the ViT, and of a larger one.
      large_batch, eval_batch, fisher_images, kfac_images: images of the larger one's gradient, and of what it says.
      rank: of LoRA.
      classes: of the head that curvature is taken through; a training step has 10.
      composed: modules that are composed.
      tasks, task_batch, layers, templates, channels: of the modular network; images of a task in a step.
      dtype: of our ViT's computation, `float32` or `bfloat16`.
    """

    batch: int = 32
    net: Sequence[int] = (32, 4, 192, 6, 3)
    large: Sequence[int] = (224, 16, 384, 12, 6)
    large_batch: int = 4
    eval_batch: int = 128
    fisher_images: int = 2
    kfac_images: int = 128
    rank: int = 16
    classes: int = 100
    composed: int = 20
    tasks: int = 20
    task_batch: int = 16
    layers: int = 8
    templates: int = 8
    channels: int = 16
    dtype: str = "float32"


#: The work by its name: (what it is, what else but PyTorch the peer's side needs).
WORK = {
    "forward": ("forward, {batch} images", None),
    "gradient": ("gradient, {batch} images", None),
    "large-gradient": ("gradient of ViT-S/16 at 224 px, {large_batch} images", None),
    "hvp": ("Hessian product", "curvlinops"),
    "hvp8": ("8 Hessian products", "curvlinops"),
    "ggn": ("Gauss-Newton product", "curvlinops"),
    "lora": ("LoRA step, rank {rank}, no penalty", None),
    "ita-lora": ("ITA-LoRA step, rank {rank}", None),
    "ita-ia3": ("ITA-(IA)³ step", None),
    "ita-full": ("ITA step, full", None),
    "iel-1": ("IEL-LoRA step at T = 1", None),
    "iel-5": ("IEL-LoRA step at T = 5", None),
    "iel-20": ("IEL-LoRA step at T = 20", None),
    "iel-20-summed": ("the same, PyTorch's deltas summed into one weight first", None),
    "evaluation": ("evaluation, {eval_batch} images", None),
    "composed": ("evaluation of {composed} composed modules, {batch} images", None),
    "fisher": ("exact Fisher diagonal, {classes} classes, {fisher_images} images", None),
    "kfac": ("K-FAC factors, Monte-Carlo, {kfac_images} images", "curvlinops"),
    "multitask": ("modular step, {tasks} tasks of {task_batch} images", None),
}
_PACKAGES = {"torch": "torch", "curvlinops": "curvlinops-for-pytorch"}


class Measured(NamedTuple):
    """Of one side: the medians of wall and processor time in ms, and the highest memory of the whole process in MB."""

    wall: float
    processor: float
    memory: float


def serve(rows: Rows) -> None:
    """A worker: makes the work that its command line names, does it at each line of the input, tells what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    name, sizes = json.loads(sys.argv[1])
    work = rows[name](Sizes(*sizes))
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        work()
        took = time.perf_counter() - wall, time.process_time() - processor
        print(json.dumps([*took, _peak()]), file=answers, flush=True)


def _peak() -> int:
    """The highest memory of this process so far, in bytes. Linux's getrusage counts its parent's, too, from before it
    became another program."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Worker:
    def __init__(self, side: str, name: str, sizes: Sizes, threads: int):
        serial = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1 {serial}".strip()
        settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        settings |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        settings["PYTHONWARNINGS"] = "ignore::FutureWarning"  # PyTorch's and curvlinops' of each other
        self.what = f"{name} in {side}.py"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / f"{side}.py"), json.dumps([name, sizes])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings,
        )  # fmt: skip
        self.question: Any = self.process.stdin
        self.answer: Any = self.process.stdout

    def __call__(self) -> tuple[float, float, float]:
        """(wall seconds, processor seconds, bytes)."""
        with contextlib.suppress(BrokenPipeError):
            print(file=self.question, flush=True)
        if not (line := self.answer.readline()):
            raise OSError(
                f"{self.what} ended with code {self.process.wait()} before it was done: see the traceback above; where "
                "there is none (code -9), memory ran out"
            )
        return tuple(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def _cores(threads: int) -> Iterator[None]:
    """This process and those that it starts run on as many cores, where the system lets them be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if threads > len(before):
        raise ValueError(f"--threads {threads} is more than the {len(before)} cores that this process may run on")
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def missing() -> dict[str, str]:
    """What has to be installed for the peer's side, by the name that it is imported under."""
    return {module: package for module, package in _PACKAGES.items() if find_spec(module) is None}


def measure(name: str, sizes: Sizes, sides: Sequence[str], repeats: int, threads: int) -> dict[str, Measured]:
    """The work of this name on each side (`ours`, `peers`), alternated `repeats` times behind a first time that isn't
    counted: there a side compiles, or fills its caches."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for side in sides:
            workers[side] = worker = _Worker(side, name, sizes, threads)
            stack.callback(worker.close)
            worker()
        taken = {side: [] for side in sides}
        for _ in range(repeats):
            for side, worker in workers.items():
                taken[side].append(worker())

    def medians(answers):
        wall, processor, memory = zip(*answers, strict=True)
        return Measured(1e3 * statistics.median(wall), 1e3 * statistics.median(processor), max(memory) / 1e6)

    return {side: medians(answers) for side, answers in taken.items()}


def compare(names: Sequence[str], sizes: Sizes, repeats: int, threads: int) -> None:
    """Prints a table in Markdown, line by line, of our time and memory beside PyTorch's (or curvlinops')."""
    with _cores(threads):
        absent = missing()
        if absent:
            print(
                f"{' and '.join(absent)} not installed, and so the rows that need it show our side alone: "
                f"pip install {' '.join(absent.values())}",
                flush=True,
            )
        image, patch, width, depth, heads = sizes.net
        tokens = (image // patch) ** 2 + 1
        print(f"ViT of width {width}, depth {depth}, {heads} heads, {tokens} tokens; batch {sizes.batch}; float32;")
        print(f"{threads} thread(s) a side; medians of {repeats} in turn; peak memory of the whole process")
        print("| work | peer | peer, ms | ours, ms | ratio | in CPU time | peer, MB | ours, MB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for name in names:
            title, needs = WORK[name]
            sides = ["ours"] if {"torch", needs} & set(absent) else ["ours", "peers"]
            found = measure(name, sizes, sides, repeats, threads)
            print(f"| {title.format(**sizes._asdict())} | {_cells(found, needs or 'PyTorch')} |", flush=True)


def _cells(found: dict[str, Measured], peer: str) -> str:
    ours, theirs = found["ours"], found.get("peers")
    if theirs is None:
        return f"– | – | {_number(ours.wall)} | – | – | – | {ours.memory:,.0f}"
    ratios = f"{theirs.wall / ours.wall:.2f} | {theirs.processor / ours.processor:.2f}"
    times = f"{_number(theirs.wall)} | {_number(ours.wall)}"
    return f"{peer} | {times} | {ratios} | {theirs.memory:,.0f} | {ours.memory:,.0f}"


def _number(milliseconds: float) -> str:
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1}f}"
