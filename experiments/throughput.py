"""Speed of a LoRA training step, of curvature, of a whole accelerator, or of everything beside PyTorch.

    python experiments/throughput.py                                  # the embedded size
    python experiments/throughput.py --curvature --batch 32           # products and Fisher, in gradients
    python experiments/throughput.py --model s16 --batch 16
    python experiments/throughput.py --model b16 --batch 128 --dtype bfloat16 --peak 989    # on a GPU; TFLOP/s
    python experiments/throughput.py --device --peak 989              # on a GPU: all that matters, in 8 minutes
    python experiments/throughput.py --peers                          # on a CPU, beside PyTorch and curvlinops

Takes a minute or two, `--peers` 15 minutes. FLOPs are those of the unrolled model (XLA counts the body of a scan once);
the time is the median of the steps of the scanned one. `--peers` wants `pip install torch curvlinops-for-pytorch`; each
piece of work runs in a process a side, and the two are asked in turn. Expected numbers: README.md beside this file.
"""

import argparse

import job
from job import closing
from timing import WORK, Sizes, compare

MODELS = {"embedded": (32, 8, 96, 4, 3), "s16": (224, 16, 384, 12, 6), "b16": (224, 16, 768, 12, 12)}
TOUR = [
    "lora-bfloat16", "lora-float32", "full-bfloat16", "full-float32", "iel-1", "iel-50", "hvp", "ggn", "fisher",
    "parallel", "merging",
]  # fmt: skip
PEERS, DEVICE = "--peers", "--device"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = job.Parser(__doc__)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--curvature", action="store_true", help="the embedded model with a head of 100 trained classes")
    kinds.add_argument(PEERS, action="store_true", help="ours and PyTorch's time and memory on the same work")
    kinds.add_argument(DEVICE, action="store_true", help="one run through all of it for an accelerator")
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: embedded, and b16 with --device")
    add("--batch", type=job.count, help="default: 64, 32 with --peers and 128 with --device")
    add("--rank", type=job.count, default=16)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--steps", type=job.count, help="timed, after the first; default: 10, 5 with --peers")
    add("--peak", type=job.rate, help="the device's matrix peak in TFLOP/s, for the fraction reached; of 16 bits")
    add("--threads", type=job.count, default=1, help="of each side with --peers")
    add("--minutes", type=job.rate, default=8, help="that --device takes at most")
    add("--only", nargs="+", metavar="ROW", help=f"of --peers: {', '.join(WORK)}; of --device: {', '.join(TOUR)}")
    options = parser.parse_args(arguments)
    _refuse(parser, options)
    given = {"model": "embedded", "batch": 64, "steps": 10}
    given |= {"batch": 32, "steps": 5} if options.peers else {"model": "b16", "batch": 128} if options.device else {}
    for key, value in given.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def _refuse(parser: job.Parser, options: argparse.Namespace) -> None:
    """ValueError for options that play no part in what is asked for."""
    if options.curvature:
        parser.refuse(
            "with --curvature, which is of all the embedded model's weights", "model", "rank", "dtype", "peak"
        )
    if options.peers:
        parser.refuse("with --peers, which is of one ViT in float32 on a CPU", "model", "dtype", "peak")
    if options.device:
        parser.refuse("with --device, which has rows of both", "dtype")
    else:
        parser.refuse("without --device", "minutes")
    if not options.peers:
        parser.refuse("without --peers", "threads")
    if not (options.peers or options.device):
        parser.refuse("without --peers or --device, which have rows", "only")
    rows = WORK if options.peers else TOUR
    if unknown := [name for name in options.only or [] if name not in rows]:
        raise ValueError(
            f"--only {' '.join(unknown)}: the rows of {PEERS if options.peers else DEVICE} are {', '.join(rows)}"
        )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.peers:
        sizes = Sizes(options.batch, rank=options.rank)
        if 3 * options.rank > (width := sizes.net[2]):
            raise ValueError(
                f"--rank {options.rank} is too large: the joint qkv of the ViT, {width} wide, has it thrice"
            )
        return compare(options.only or list(WORK), sizes, options.steps, options.threads)

    import speed  # JAX with it, which takes seconds

    if options.curvature:
        return speed.curvature_speed(options.batch, options.steps)
    sizes = Sizes(options.batch, MODELS[options.model], rank=options.rank, dtype=options.dtype)
    if options.device:
        job.divisible(options.batch, "--batch")
        tour = speed.Tour(sizes, options.steps, options.peak)
        return speed.device_speed(options.model, tour, options.only or TOUR, options.minutes)
    job.divisible(options.batch, "--batch")
    speed.lora_speed(options.model, sizes, options.steps, options.peak)


if __name__ == "__main__":
    closing(main, "nothing is kept")
