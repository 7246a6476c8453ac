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
      fisher_images: images of a task that its curvature is taken over, at most; 0 for all.
      fisher_method, fisher_tolerance: see `curvature.fisher_diagonal`.
      epsilon: added to the mean Fisher diagonal; Kronecker factors are used as they are.
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
      alpha: weight of the penalty: α of incremental task arithmetic, β of incremental ensemble learning, λ of elastic
        weight consolidation, the weight of the distillation of learning without forgetting; 0 for none.
      units: of `alpha` where it weighs a curvature. `relative`: the curvature is divided by its mean over the adapted
        weights and the tasks so far, so that one value serves backbones whose Fishers differ by orders of magnitude;
        `paper`: the curvature as it is.
      pull: (λ_F, λ_I), the pull of a task's head to its aligned reference.
      mode: how the tasks meet in training, a name in `modes.MODES`.
      curvature: that the penalty is taken in. `kronecker` is TAK's penalty (arXiv 2602.17385) in the Fisher's factors,
        merged as a mean over images, where TAK takes the Jacobian's and sums over tasks.
      coupled: whether the penalty is added to the loss, or takes a step of its own; None as Porrello et al. (2025) do,
        coupled for full deltas only.
    """

    name: str
    adapter: Adapter
    learning_rate: float
    alpha: float = 0.0
    pull: tuple[float, float] = (0.0, 0.0)
    mode: Literal["independent", "ensemble", "tangent", "sequential", "ewc", "lwf", "joint"] = "independent"
    curvature: Literal["diagonal", "kronecker"] = "diagonal"
    coupled: bool | None = None
    units: Literal["relative", "paper"] = "relative"
