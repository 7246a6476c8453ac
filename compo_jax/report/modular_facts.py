"""What all reports on modular networks say: settings and sizes of a run, best scores, and paired differences."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from compo_jax.modular import Settings
from compo_jax.modular.comparison import Paired
from compo_jax.modular.results import Job
from compo_jax.report.table import Cell, column, run_facts, score
from compo_jax.report.text import ABSENT, counted, decimal, signed


def paired_text(pair: Paired, *, won: bool = True) -> str:
    """The mean difference in points ± its standard error, then the pairs won, as "+1.2 ± 0.4 (5/6)"."""
    if not pair.pairs:
        return ABSENT
    error = "" if np.isnan(pair.error) else f"\u00a0±\u00a0{decimal(100 * pair.error)}"
    tied = f",\u00a0{pair.tied}\u00a0tied" if pair.tied else ""
    return f"{signed(pair.mean)}{error}" + f" ({pair.won}/{pair.pairs}{tied})" * won


def accuracy_cells(accuracies: Sequence[Float[np.ndarray, " seeds"]], images: int) -> list[Cell]:
    """A column of accuracies on so many test images, with emphasis on the clear best."""
    scores = [score(accuracy, images) for accuracy in accuracies]
    return column(
        [score.text() for score in scores], [score.mean for score in scores], [score.error for score in scores]
    )


STARTS = {
    "shared": "the same in all tasks",
    "one_hot": "a template a layer in all tasks",
    "distinct": "others in each task",
}


def hardening_text(settings: Settings) -> str:
    """How hard routes are learned."""
    begin, end = settings.phases
    return f"{settings.relaxation} until then, hardening from {begin:.0%} and fixed from {end:.0%} of the steps"


def training_text(settings: Settings, of_what: str = "each task", route: str = "", start: str = "") -> str:
    """Steps, batch and rate of a training, and of what kind the routes are that it learns, and how they start."""
    kind = f"; {route} routes, at first {STARTS.get(start, start)}, at {settings.route_rate:g} times that rate"
    learned = kind + f", {hardening_text(settings)}" * (route == "hard") if route else ""
    images = f"{counted(settings.steps, 'step')} of {counted(settings.batch, 'image')} of {of_what}"
    return f"{images} at rate {settings.learning_rate:g}" + learned


def facts(job: Job, pairs: str, tested: Sequence[Sequence[str]] | None = None, **more: str) -> dict[str, str]:
    """What stands below a page's lead; `more` are further facts.

    Args:
      pairs: what a difference is taken over.
      tested: names of the tasks or domains that accuracies are of, for each seed; default all.
    """
    net, images = job.net, list(job.train_images.values())
    trained = f"{min(images):,}" if min(images) == max(images) else f"{min(images):,} to {max(images):,}"
    groups = f" in {net.groups} groups with coefficients of their own" * (net.groups > 1)
    names = tested or [list(job.test_images)] * len(job.seeds)
    return {
        **run_facts(job.seeds, [[job.test_images[name] for name in of_seed] for of_seed in names]),
        "differences": f"mean ± standard error over {pairs}, and the pairs won",
        "trained on": f"{trained} images of each task",
        **({"test images": f"{job.validation:.0%} of the training images, to choose by"} if job.validation else {}),
        "network": f"{counted(net.layers, 'layer')}, {counted(net.templates, 'template')}, {net.block} blocks of "
        f"{counted(net.width, 'channel')}{groups}, batch norm of each {net.bn}, images of {net.size} pixels in patches "
        f"of {net.patch}",
        "training": training_text(job.training, route=net.route, start=net.start),
        **more,
        "whole job": f"{decimal(job.seconds, 0)} s",
    }
