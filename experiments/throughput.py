"""Speed of a LoRA or a modular training step, of curvature, of a whole accelerator, or of everything beside PyTorch.

    python experiments/throughput.py                                  # the embedded size
    python experiments/throughput.py --curvature --batch 32           # products and Fisher, in gradients
    python experiments/throughput.py --modular --batch 8              # over tasks and templates; images of each task
    python experiments/throughput.py --model s16 --batch 16
    python experiments/throughput.py --model b16 --batch 128 --dtype bfloat16 --peak 989    # on a GPU; TFLOP/s
    python experiments/throughput.py --device --peak 989              # on a GPU: all that matters, in 8 minutes
    python experiments/throughput.py --loader DIR --batch 128         # images/s of reading alone, at 224 px
    python experiments/throughput.py --peers                          # on a CPU, beside PyTorch and curvlinops

Takes a minute or two, `--peers` 15 minutes. `--loader` makes JPEGs in DIR where it is empty. FLOPs are those of the
unrolled model (XLA counts the body of a scan once); the time is the median of the steps of the scanned one. `--peers`
wants `pip install torch curvlinops-for-pytorch`; each piece of work runs in a process a side, and the two are asked in
turn. Expected numbers: README.md beside this file.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import job
import options as line
from job import closing
from options import OPEN, Count, OpenCount, OpenPath, OpenRate, Rate, names
from timing import WORK, Sizes, compare

MODELS = {"embedded": (32, 8, 96, 4, 3), "s16": (224, 16, 384, 12, 6), "b16": (224, 16, 768, 12, 12)}
TOUR = [
    "lora-bfloat16", "lora-float32", "full-bfloat16", "full-float32", "iel-1", "iel-50", "hvp", "ggn", "fisher",
    "parallel", "merging",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    curvature: bool = False
    """the embedded model with a head of 100 trained classes"""
    modular: bool = False
    """a modular network of 5 to 100 tasks and 8 to 128 templates"""
    peers: bool = False
    """ours and PyTorch's time and memory on the same work"""
    device: bool = False
    """one run through all of it for an accelerator"""
    loader: OpenPath = None
    """reading alone, of a folder with train/CLASS/... and test/CLASS/..., made where there is none"""
    model: Annotated[str | None, names(list(MODELS), None), OPEN] = None
    """embedded, s16 or b16 (default: embedded, and b16 with --device)"""
    batch: OpenCount = None
    """images in a step (default: 64, 32 with --peers and 128 with --device)"""
    rank: Count = 16
    """of LoRA modules"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype"""
    steps: OpenCount = None
    """timed, after the first (default: 10, 5 with --peers)"""
    peak: OpenRate = None
    """the device's matrix peak in TFLOP/s, for the fraction reached; of 16 bits"""
    threads: Count = 1
    """of each side with --peers"""
    minutes: Rate = 8.0
    """that --device takes at most"""
    only: Annotated[tuple[str, ...], names([*WORK, *TOUR]), OPEN] = ()
    """rows of --peers or of --device (default: all)"""


def parse(arguments: list[str] | None = None) -> Options:
    options = line.parse(Options, __doc__, arguments)
    _refuse(options)
    wanted = {"model": "embedded", "batch": 64, "steps": 10}
    wanted |= {"batch": 32, "steps": 5} if options.peers else {"model": "b16", "batch": 128} if options.device else {}
    return line.filled(options, wanted)


def _refuse(options: Options) -> None:
    """ValueError for options that play no part in what is asked for."""
    kinds = [key for key in ("curvature", "modular", "peers", "device", "loader") if getattr(options, key)]
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(map(line.flag, kinds))} are two kinds of run: name one of them")
    if options.curvature:
        weights = "with --curvature, which is of all the embedded model's weights"
        line.refuse(options, weights, "model", "rank", "dtype", "peak")
    if options.modular:
        line.refuse(options, "with --modular, which has sizes of its own", "model", "rank", "dtype", "peak")
    if options.loader:
        line.refuse(options, "with --loader, behind which is no network", "model", "rank", "dtype", "peak")
    if options.peers:
        line.refuse(options, "with --peers, which is of one ViT in float32 on a CPU", "model", "dtype", "peak")
    if options.device:
        line.refuse(options, "with --device, which has rows of both", "dtype")
    else:
        line.refuse(options, "without --device", "minutes")
    if not options.peers:
        line.refuse(options, "without --peers", "threads")
    if not (options.peers or options.device):
        line.refuse(options, "without --peers or --device, which have rows", "only")
    rows = WORK if options.peers else TOUR
    if unknown := [name for name in options.only if name not in rows]:
        kind = "--peers" if options.peers else "--device"
        raise ValueError(f"--only {' '.join(unknown)}: the rows of {kind} are {', '.join(rows)}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.peers:
        sizes = Sizes(options.batch, rank=options.rank)
        if 3 * options.rank > (width := sizes.net[2]):
            raise ValueError(
                f"--rank {options.rank} is too large: the joint qkv of the ViT, {width} wide, has it thrice"
            )
        return compare(options.only or list(WORK), sizes, options.steps, options.threads)

    if options.loader:
        import loading

        return loading.loader_speed(options.loader, options.batch, options.steps)
    import speed  # JAX with it, which takes seconds

    if options.curvature:
        return speed.curvature_speed(options.batch, options.steps)
    if options.modular:
        return speed.modular_speed(options.batch, options.steps)
    sizes = Sizes(options.batch, MODELS[options.model], rank=options.rank, dtype=options.dtype)
    if options.device:
        job.divisible(options.batch, "--batch")
        tour = speed.Tour(sizes, options.steps, options.peak)
        return speed.device_speed(options.model, tour, options.only or TOUR, options.minutes)
    job.divisible(options.batch, "--batch")
    speed.lora_speed(options.model, sizes, options.steps, options.peak)


if __name__ == "__main__":
    closing(main, "nothing is kept")
