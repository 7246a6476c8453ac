"""What throughput.py tells of reading training images alone: a folder's JPEGs, decoded ahead, no network behind."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from compo_jax import data
from compo_jax.data import reading

CLASSES, IMAGES = 4, 32  # of each class, in train and in test
WIDTH, HEIGHT = 500, 375  # as ImageNet's are on average


class Loaded(NamedTuple):
    """Images read in a second, and in a second of one core's time."""

    rate: float
    core_rate: float


def make_images(folder: Path) -> None:
    """Writes JPEGs of about 90 kB with shapes and grain, in train/ and test/."""
    for k, part in enumerate(("train", "test")):
        for c in range(CLASSES):
            place = folder / part / f"class{c}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(IMAGES):
                draw = np.random.default_rng([k, c, i])
                shapes = Image.fromarray(draw.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
                grained = np.asarray(shapes) + draw.normal(0, 6, (HEIGHT, WIDTH, 1))
                Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=90)


def load(stream: data.TaskStream, batch: int, steps: int) -> Loaded:
    """The speed of `steps` training batches."""
    clock, cores = time.perf_counter(), time.process_time()
    for _ in data.train_batches(data.pooled(stream).train, batch, 0, steps=steps):
        pass
    return Loaded(batch * steps / (time.perf_counter() - clock), batch * steps / (time.process_time() - cores))


def loader_speed(folder: Path, batch: int, steps: int, size: int = 224) -> None:
    """Prints the speed of reading what is in the folder; where nothing is, JPEGs are made there first."""
    if not folder.is_dir() or not any(folder.iterdir()):
        make_images(folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{folder}: {size} px, batch {batch}, {steps} steps, {cores} cores; a core's: by processor time")
    kinds: tuple[tuple[reading.Augment, str], ...] = (
        ("original", "crops of the stored images"), ("default", "central squares, to be cropped"),
    )  # fmt: skip
    for augment, told in kinds:
        stream = data.folder_stream(folder, size=size, tasks=1, augment=augment, memory=0)
        load(stream, batch, 1)  # imports, and the files' first reading
        rate, core_rate = load(stream, batch, steps)
        print(f"{told:32} {rate:8,.0f} images/s   {core_rate:8,.0f} images/s of a core")
