"""Pre-trains the small ViT that ships with the package, on characters that no task of the glyph stream uses.

    python experiments/pretrain.py

338 classes (Latin letters and their extensions, the phonetic alphabet, Old Italic, Lisu), images rendered afresh for
every batch, cross-entropy with smoothed labels, AdamW. About 10 minutes on 2 CPU cores. Expected: accuracy on 4,096
held-out images about 0.895. Writes `compo_jax/models/embedded.safetensors` (float16, timm's names, 1 MB) and the
sidecar `embedded.json` with the command, the seed and that accuracy. A killed run goes on where it was.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax import models
from compo_jax.data import glyphs
from compo_jax.models import ViT
from compo_jax.train import Checkpoints, fit, init_state, jit_runner, open_run, progress_bar

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--width", type=int, default=96)
parser.add_argument("--depth", type=int, default=4)
parser.add_argument("--heads", type=int, default=3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--run", type=Path, default=Path("runs/pretrain"), help="folder for the log and the checkpoints")
parser.add_argument("--out", type=Path, default=Path(models.__file__).parent / "embedded.safetensors")


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


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)

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
    config = {k: v for k, v in vars(options).items() if k not in ("run", "out")}
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

    # -- the shipped file and its sidecar ------------------------------------------------------------------------------
    models.save(options.out, state.params, {"heads": options.heads})
    model, params = models.load(options.out)
    accuracy = held_out_accuracy(model, params)
    sidecar = {
        "command": shlex.join(["python", "experiments/pretrain.py", *(arguments or sys.argv[1:])]),
        **config,
        "characters": {name: len(characters) for name, characters in glyphs.PRETRAINING.items()},
        "held_out_images": 4096,
        "held_out_accuracy": accuracy,
        "seconds": round(time.perf_counter() - started),
        "jax": jax.__version__,
    }
    options.out.with_suffix(".json").write_text(json.dumps(sidecar, indent=2) + "\n")
    print(f"held-out accuracy {accuracy:.4f}; wrote {options.out} and {options.out.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
