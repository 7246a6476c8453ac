"""What all methods of a run share: the model, the stream of tasks and the settings, with the paper's values."""

from typing import Any, NamedTuple

import jax

from compo_jax.data import TaskStream
from compo_jax.tree import Tree


class Settings(NamedTuple):
    """What all methods of a run share.

    Attributes:
      epochs, batch: of a task's training.
      components: Gaussians in a class's mixture.
      probe_epochs: passes of the linear probe over a task's features.
      align_epochs: (a, b), the alignment at task t makes a + b·t passes.
      align_samples: features drawn for each class and pass.
      fisher_images: images of a task that its curvature is taken over, at most; 0 for all.
      fisher_method, fisher_tolerance: see `curvature.fisher_diagonal`.
      epsilon: added to the mean Fisher diagonal; Kronecker factors are used as they are.
      eval_batch: images in a forward pass without gradients.
      features_batch: images in a forward pass that makes features for a classifier: enough for a GPU, and of a small
        model a CPU's cache holds it.
    """

    epochs: int = 20
    batch: int = 128
    components: int = 5
    probe_epochs: int = 3
    align_epochs: tuple[int, int] = (10, 5)
    align_samples: int = 256
    fisher_images: int = 0
    fisher_method: str = "low_rank"
    fisher_tolerance: float = 1e-3
    epsilon: float = 1e-5
    eval_batch: int = 256
    features_batch: int = 128


class Keys(NamedTuple):
    """The random keys of one task's training."""

    module: jax.Array
    augmentation: jax.Array
    memory: jax.Array


class Setup(NamedTuple):
    """What is learned, and from where: every method of a run gets the same.

    Attributes:
      model, base: the network without its head, and its parameters, which stay as they are.
      stream: the tasks in their order.
      seed: of everything that is drawn.
    """

    model: Any
    base: Tree
    stream: TaskStream
    settings: Settings
    seed: int

    def keys(self, first: int) -> Keys:
        """Those of the task whose first class is number `first`."""
        module, augmentation = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), first))
        return Keys(module, augmentation, jax.random.fold_in(module, 1))
