"""Pre-trains the small ViT that ships with the package, on characters that no task of the glyph stream uses.

    python experiments/pretrain.py

338 classes (Latin letters and their extensions, the phonetic alphabet, Old Italic, Lisu), images rendered afresh for
every batch, cross-entropy with smoothed labels, AdamW. About 10 minutes on 2 CPU cores. Expected: accuracy on 4,096
held-out images about 0.895. Writes `runs/pretrain/embedded.safetensors` (float16, timm's names, 1 MB) and the sidecar
`embedded.json` with the command, the seed and that accuracy, or both where `--out` says; never over a file of another
run. A killed run goes on where it was.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import job
import options as line
from job import closing, console
from options import Count, LocalPath, OpenPath, Rate, Seed


@dataclass(frozen=True)
class Options:
    steps: Count = 4000
    """of training"""
    batch: Count = 128
    """images in a step"""
    learning_rate: Rate = 2e-3
    """at its highest"""
    width: Count = 96
    """of the ViT"""
    depth: Count = 4
    """its blocks"""
    heads: Count = 3
    """of its attention"""
    seed: Seed = 0
    """of the weights and the images"""
    run: LocalPath = Path("runs/pretrain")
    """folder for log and checkpoints"""
    out: OpenPath = None
    """the .safetensors file (default: embedded.safetensors in that folder)"""


def parse(arguments: list[str] | None = None) -> Options:
    return line.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax import models
from compo_jax.data import glyphs
from compo_jax.models import ViT
from compo_jax.train import Checkpoints, fit, init_state, jit_runner, open_run, progress_bar, read_json, write_json


def prepare(images):
    """Grey images in [0, 1] as the model's input: three equal channels in [-1, 1]."""
    return jnp.repeat(2 * images[..., None] - 1, 3, axis=-1)


def held_out_accuracy(model, params, images: int = 4096, seed: int = 1) -> float:
    """Accuracy on images that no training step has seen: another root key."""
    shapes = glyphs.masters("".join(glyphs.PRETRAINING.values()))
    predict = jax.jit(lambda params, x: model.apply({"params": params}, prepare(x)).argmax(axis=-1))
    labels = np.arange(images) % len(shapes)
    pictures = glyphs.images(jax.random.key(1000 + seed), shapes, labels)[..., 0] / np.float32(255)
    return float(
        np.mean(
            [
                predict(params, x) == y
                for x, y in zip(np.split(pictures, images // 512), np.split(labels, images // 512), strict=True)
            ]
        )
    )


def is_written(out: Path, sidecar: Path, config: dict) -> bool:
    """Whether a run with these settings has written both; ValueError where what is there isn't its own."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"--out {out}: name a file that ends in .safetensors")
    if not (out.exists() or sidecar.exists()):
        return False
    made = read_json(sidecar, "take it away with the file beside it") if sidecar.exists() else {}
    if differing := [key for key in config if made.get(key) != config[key]]:
        told = ", ".join(f"{key}: {made.get(key)!r} there, {config[key]!r} now" for key in differing)
        raise ValueError(
            f"{out} or {sidecar.name} beside it is of another run ({told}) and stays: name another file with --out, "
            "or take those away"
        )
    return out.exists()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    job.divisible(options.batch, "--batch")
    if options.width % options.heads:
        raise ValueError(f"--heads {options.heads} don't divide --width {options.width}")
    out = options.out or options.run / "embedded.safetensors"
    sidecar, config = out.with_suffix(".json"), {k: v for k, v in line.flat(options).items() if k not in ("run", "out")}
    if is_written(out, sidecar, config):
        console.print(f"{out} is finished, by a run with these settings: take it away to start over")
        return

    # -- model and data ------------------------------------------------------------------------------------------------
    shapes = jnp.asarray(glyphs.masters("".join(glyphs.PRETRAINING.values())))
    model = ViT(32, 8, options.width, options.depth, options.heads, classes=len(shapes))
    params = model.init(jax.random.key(options.seed), jnp.zeros((1, 32, 32, 3)))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0, options.learning_rate, options.steps // 20, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))

    def loss(params, context, batch, step):
        images = glyphs.render(jax.random.fold_in(context["key"], step), context["shapes"], batch["label"])
        logits = model.apply({"params": params}, prepare(images))
        smoothed = optax.smooth_labels(jax.nn.one_hot(batch["label"], len(shapes)), 0.1)
        accuracy = jnp.mean(logits.argmax(axis=-1) == batch["label"])
        return optax.softmax_cross_entropy(logits, smoothed).mean(), {"accuracy": accuracy}

    def batches(start):
        for step in range(start, options.steps):
            random = np.random.default_rng([options.seed, step])
            yield {"label": random.integers(len(shapes), size=options.batch, dtype=np.int32)}

    # -- training ------------------------------------------------------------------------------------------------------
    started = time.perf_counter()
    with open_run(options.run, config) as run, progress_bar() as progress:
        context = {"shapes": shapes, "key": jax.random.key(options.seed + 1)}
        state = fit(
            jit_runner(loss, optimizer),
            init_state(params, optimizer),
            context,
            batches,
            options.steps,
            log=run.log,
            record={"run": "pretrain"},
            checkpoints=Checkpoints(run.folder / "checkpoints"),
            progress=progress,
            every=50,
        )

    store(out, sidecar, state.params, config, arguments or sys.argv[1:], started)


def store(out: Path, sidecar: Path, params, config: dict, arguments: Sequence[str], started: float) -> None:
    """The shipped file and its sidecar: a file is there with its sidecar, or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{os.getpid()}-{out.name}")
    models.save(aside, params, {"heads": config["heads"]})
    accuracy = held_out_accuracy(*models.load(aside))
    made = {
        "command": shlex.join(["python", "experiments/pretrain.py", *arguments]),
        **config,
        "characters": {name: len(characters) for name, characters in glyphs.PRETRAINING.items()},
        "held_out_images": 4096,
        "held_out_accuracy": accuracy,
        "seconds": round(time.perf_counter() - started),
        "jax": jax.__version__,
    }
    write_json(sidecar, made)
    os.replace(aside, out)
    console.print(f"held-out accuracy {accuracy:.4f}; wrote {out} and {sidecar.name}")


if __name__ == "__main__":
    closing(main)
