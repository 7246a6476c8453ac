"""A new task on the templates of others: which parts of its network learn."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from compo_jax.data.splits import Split
from compo_jax.data.stream import Augmentation
from compo_jax.modular.edit import take_tasks, without_heads
from compo_jax.modular.losses import Prepare
from compo_jax.modular.net import ModularNet, Network
from compo_jax.modular.settings import Settings
from compo_jax.modular.training import Learner, learner
from compo_jax.tree import Tree

PARTS: dict[str, tuple[str, ...]] = {
    "head": ("^head",),
    "head+route": ("^head", "^route$"),
    "head+gain": ("^head", "^gain$"),
    "head+route+gain": ("^head", "^(route|gain)$"),
    "head+bn": ("^head", "^norm/"),
    "head+bn+route": ("^head", "^norm/", "^route$"),
    "all": ("",),
}


def transfer(
    net: ModularNet,
    prepare: Prepare,
    settings: Settings,
    part: str,
    augment: Augmentation | None = None,
    *,
    runner: Callable | None = None,
) -> Learner:
    """A `learner` of these parts of a new task (see `edit.new_task`).

    But for `all`, stem and templates stay as they are to the bit. `head+route` learns by order only. Where the route
    isn't learned, it is taken as given. Batch statistics are those of the new task's images, or with
    `settings.statistics="stored"` those it began with. ValueError for a gain that the network doesn't have.
    """
    if part not in PARTS:
        raise ValueError(f"no part of a network is called {part!r}; there are {', '.join(PARTS)}")
    if "gain" in part and not net.gain:
        raise ValueError(f"{part!r} learns a gain, and this network has none: make it with gain=True")
    more = {} if runner is None else {"runner": runner}
    return learner(net, prepare, settings, augment, trained=PARTS[part], **more)


def nearest_source(network: Network, prepare: Prepare, split: Split, images: int = 250) -> int:
    """The task whose route tells the classes of these labelled images apart best, and so is a new one's start.

    By the accuracy of nearest centroids on the features, cross-validated in at most five folds, on about as many images
    in all; batch statistics are those of the images, of each task's network alone. ValueError where a class has fewer
    than two images.
    """
    counts = np.bincount(split.labels)
    if counts.min() < 2:
        raise ValueError(f"a class has {counts.min()} images, and the nearest source is told by two of each or more")
    rows = np.concatenate(
        [np.flatnonzero(split.labels == c)[: max(images // len(counts), 2)] for c in range(len(counts))]
    )
    labels, pixels = split.labels[rows], prepare(split.images(rows))[None]
    folds = int(min(5, np.bincount(labels).min()))

    def accuracy(task: int) -> float:
        net, variables = without_heads(take_tasks(network, [task]))
        features = _features(net.clone(classes=(2,)), variables, pixels)  # one program, however many classes
        return _centroid_accuracy(np.asarray(features[0]), labels, folds)

    return int(np.argmax([accuracy(task) for task in range(len(network.net.classes))]))


@functools.partial(jax.jit, static_argnums=0)
def _features(net: ModularNet, variables: Tree, images: Array) -> Float[Array, "tasks images features"]:
    return net.apply(variables, images, None, True, method="features", mutable=["batch_stats"])[0]


def _centroid_accuracy(features: np.ndarray, labels: np.ndarray, folds: int) -> float:
    """Cross-validated, of nearest centroids; one image of a class is enough to learn from.

    scikit-learn's NearestCentroid divides by the images that are more than classes, of which there may be none.
    """
    from sklearn.metrics import pairwise_distances_argmin
    from sklearn.model_selection import StratifiedKFold

    scores = []
    for train, test in StratifiedKFold(folds).split(features, labels):
        centroids = [features[train][labels[train] == c].mean(0) for c in range(labels.max() + 1)]
        scores.append(np.mean(pairwise_distances_argmin(features[test], np.stack(centroids)) == labels[test]))
    return float(np.mean(scores))
