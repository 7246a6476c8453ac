"""The settings of an incremental run, with the values of the paper where it gives one."""

from typing import Literal, NamedTuple

from compo_jax.adapters import Adapter


class Settings(NamedTuple):
    """What all methods of a run share.

    Attributes:
      epochs, batch: of a task's training.
      components: Gaussians in a class's mixture.
      probe_epochs: passes of the linear probe over a task's features.
      align_epochs: (a, b), the alignment at task t makes a + b·t passes.
      align_samples: features drawn for each class and pass.
      fisher_images: images of a task that its Fisher is taken over, at most; 0 for all.
      fisher_method, fisher_tolerance: see `curvature.fisher_diagonal`.
      epsilon: added to the mean Fisher.
      eval_batch: images in a forward pass without gradients.
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


class Method(NamedTuple):
    """One way to learn a stream of tasks.

    Attributes:
      name: under which it is reported.
      adapter: the form of its modules.
      learning_rate: of AdamW at the first epoch.
      alpha: weight of the Fisher penalty on the task vector; 0 for none.
      pull: (λ_F, λ_I), the pull of a task's head to its aligned reference.
      mode: `independent`, a module for each task, trained alone from the base and composed by averaging (incremental
        task arithmetic); `sequential`, one module trained on and on; `joint`, one module trained on all tasks at once.
    """

    name: str
    adapter: Adapter
    learning_rate: float
    alpha: float = 0.0
    pull: tuple[float, float] = (0.0, 0.0)
    mode: Literal["independent", "sequential", "joint"] = "independent"
