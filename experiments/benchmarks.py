"""The benchmarks of Porrello et al. (2025): what each is made of, how the paper trains on it, and what it reached.

`incremental.py --benchmark NAME` takes all that the command line leaves open from here. The paper and its release state
α, β and the pulls for CIFAR-100, and ITA's for CropDisease; the others are trained with CIFAR-100's. They state LoRA's
learning rate; those of (IA)³ and of full deltas stay ours. Where a set has no split of its own a fifth of each class is
held out: the paper's very images are not published.
"""

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from incremental_options import Stream

Pull = tuple[float, float]


class Benchmark(NamedTuple):
    """A row of the paper's tables.

    Attributes:
      data: TFDS set, or `folder:PATH` under --data-dir.
      classes: of each task.
      epochs: passes over a task's images.
      layout: how to lay out what TFDS doesn't hold.
      train_split, test_fraction: of what has no test split of its own.
      alpha, beta: weights of ITA's and IEL's penalty, in the paper's units.
      pull, iel_pull: λ_F and λ_I of ITA and of IEL.
      probe_epochs: passes of the linear probe.
    """

    data: str
    classes: tuple[int, ...]
    epochs: int
    layout: str = ""
    train_split: str | None = None
    test_fraction: float | None = None
    alpha: float = 0.02
    beta: float = 20.0
    pull: Pull = (0.025, 0.001)
    iel_pull: Pull = (0.1, 0.001)
    probe_epochs: int = 3

    def wanted(self) -> dict[str, dict[str, object]]:
        """The values of the options, by their groups."""
        return {
            "stream": {
                "data": self.data, "tasks": len(self.classes), "train_split": self.train_split,
                "test_fraction": self.test_fraction, "crop": 0.875, "augment": "original",
            },
            "training": {
                "epochs": self.epochs, "batch": 128, "rank": 16, "learning_rate": 3e-4,
                "probe_epochs": self.probe_epochs,
            },
            "penalties": {
                "alpha": self.alpha, "beta": self.beta, "pull": self.pull, "iel_pull": self.iel_pull,
                "fisher": "low_rank", "fisher_images": 0,
            },
        }  # fmt: skip


_FOLDER = (
    "{0} in DATA_DIR/{0}/train/CLASS/... and DATA_DIR/{0}/test/CLASS/...; or --train-split PART alone, of which a "
)
_FOLDER += "fifth is held out; or --data folder:PATH. "
BENCHMARKS = {
    "imagenet_r-10x20": Benchmark("imagenet_r", (20,) * 10, 50, train_split="test", test_fraction=0.2),
    "cifar100-10x10": Benchmark("cifar100", (10,) * 10, 20),
    "cub-10x20": Benchmark("caltech_birds2011", (20,) * 10, 50),
    "caltech256-10": Benchmark(
        "folder:caltech256", (26,) * 6 + (25,) * 4, 20, test_fraction=0.2,
        layout=_FOLDER.format("caltech256") + "Its 256 classes, 257.clutter left out",
    ),
    "mit67-10": Benchmark(
        "folder:mit67", (7,) * 7 + (6,) * 3, 50, test_fraction=0.2,
        layout=_FOLDER.format("mit67") + "Or its Images with its TrainImages.txt and TestImages.txt inside, called "
        "train.txt and test.txt: 67 classes",
    ),
    "resisc45-9x5": Benchmark("resisc45", (5,) * 9, 30, train_split="train", test_fraction=0.2),
    "cropdisease-7x5": Benchmark(
        "folder:cropdisease", (5,) * 7, 5, alpha=5.0, pull=(0.1, 0.01), probe_epochs=1, test_fraction=0.2,
        layout=_FOLDER.format("cropdisease") + "35 of PlantVillage's 38 classes: without Apple___Cedar_apple_rust, "
        "Peach___healthy and Potato___healthy",
    ),
}  # fmt: skip

WEIGHED = ("ita", "iel")  # whose weights are the paper's, in its units

# Final accuracy (FA, %), in the order of the benchmarks: tables 1, 2 and 4, and those of baselines on CIFAR-100
_EVERYWHERE = {
    "ita-full": (76.43, 89.38, 84.80, 92.32, 85.35, 80.50, 91.81),
    "ita-lora": (77.79, 89.96, 85.55, 92.65, 86.60, 82.00, 95.85),
    "ita-ia3": (77.04, 90.66, 85.67, 92.67, 84.74, 83.73, 95.41),
    "iel-full": (80.09, 89.38, 84.89, 92.23, 82.79, 81.42, 95.83),
    "iel-lora": (79.93, 89.53, 84.95, 92.19, 84.49, 82.53, 95.88),
    "iel-ia3": (77.86, 89.72, 84.57, 92.70, 85.54, 81.50, 95.68),
    "none-lora": (50.17, 66.58, 60.58, 74.87, 52.74, 37.59, 55.86),
    "pull-lora": (77.33, 90.03, 85.55, 92.59, 84.86, 80.64, 96.22),
    "none-full": (8.61, 17.59, 10.47, 12.76, 12.01, 17.17, 20.64),
    "pull-full": (76.00, 87.60, 83.54, 91.04, 81.45, 75.26, 77.00),
}
_ON_CIFAR = {
    "joint-full": 91.74,
    "sequential-full": 21.57,
    "ewc-full": 73.49,
    "lwf-full": 72.16,
    "tmc-full": 78.42,
    "inflora-lora": 87.17,
}


def published(name: str) -> dict[str, float]:
    """The paper's final accuracy of methods on a benchmark, in [0, 1]."""
    place = list(BENCHMARKS).index(name)
    percents = {method: row[place] for method, row in _EVERYWHERE.items()}
    percents |= _ON_CIFAR if name.startswith("cifar100") else {}
    return {method: round(percent / 100, 4) for method, percent in percents.items()}


def differs(name: str, stream: "Stream", classes: tuple[int, ...]) -> str:
    """In words that the tasks, or the images, are not those of the benchmark, whose numbers are of these alone; ""
    where they are. `stream` is what is opened, and `classes` how many its tasks have."""
    benchmark = BENCHMARKS[name]
    if classes == benchmark.classes:
        folder, parts = stream.data.startswith("folder:"), (stream.train_split, stream.test_split)
        if benchmark.test_fraction is None:
            same = parts in ((None, None), (None, "test"), ("train", "test"))
        else:  # a part is held out, unless a folder has its own
            same = stream.test_fraction == benchmark.test_fraction
            same &= folder or parts == (benchmark.train_split, None)
        same &= stream.images is None and (folder or stream.data == benchmark.data)
        return "" if same else f"these are other images than {name}'s: the paper's numbers are left out"
    theirs, these = (
        " + ".join(f"{len(list(same))} x {count}" for count, same in groupby(each))
        for each in (benchmark.classes, classes)
    )
    more = f" ({benchmark.layout})" * bool(benchmark.layout)
    return f"{name} has tasks of {theirs} classes, and these are {these}: the paper's numbers are left out{more}"
