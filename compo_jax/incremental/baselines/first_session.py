"""First-session adaptation: a classifier of frozen features, on those of a model that has learned the first task."""

from functools import partial

import numpy as np

from compo_jax.incremental.evaluate import Classifier
from compo_jax.incremental.extraction import SplitFeatures, made_once
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Composition, Method, Mode, Snapshot, each_task
from compo_jax.incremental.settings import Setup


def adapted_first(setup: Setup, method: Method, frozen: Mode, *, beside_base: bool = False) -> Mode:
    """The mode `frozen`, which classifies by `Snapshot.base_features`, with one module trained on the first task alone.

    What it classifies by are the features of the base with this module. `frozen` itself where the method has no
    adapter: so `ranpac` trains nothing, and `ranpac-lora` adapts first.

    Args:
      beside_base: a feature vector is the base's, followed by the adapted model's.
    """
    if method.adapter is None:
        return frozen
    made: dict[str, SplitFeatures] = {}  # the module stays as it is, and so do its features

    def adapted(snapshot: Snapshot) -> SplitFeatures:
        pool = str(snapshot.pool.path)
        if pool not in made:
            params = snapshot.pool.compose(setup.base, snapshot.composition.modules)
            made[pool] = made_once(partial(snapshot.extract, params))
        return made[pool]

    def classify(snapshot: Snapshot) -> Classifier:
        base, tuned = snapshot.base_features, adapted(snapshot)
        both = lambda split: np.concatenate([base(split), tuned(split)], axis=1)
        return frozen.classify(snapshot._replace(base_features=both if beside_base else tuned))

    return task_arithmetic(setup, method)._replace(
        lesson=lambda stream, task: each_task(stream, 0) if task == 0 else None,
        at_once=False,
        compose=lambda names, task: Composition(names[:1], names[:1]),
        classify=classify,
    )
