"""A new task on the templates of others: which parts of its network learn."""

from collections.abc import Callable

from compo_jax.data.stream import Augmentation
from compo_jax.modular.losses import Prepare
from compo_jax.modular.net import ModularNet
from compo_jax.modular.settings import Settings
from compo_jax.modular.training import Learner, learner

PARTS: dict[str, tuple[str, ...]] = {
    "head": ("^head",),
    "head+route": ("^head", "^route$"),
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
    isn't learned, the hard route of its logits is taken as given. Batch statistics are those of the new task's images,
    or with `settings.statistics="stored"` those it began with.
    """
    if part not in PARTS:
        raise ValueError(f"no part of a network is called {part!r}; there are {', '.join(PARTS)}")
    if part in ("head", "head+bn"):
        settings = settings._replace(phases=(0.0, 0.0))
    more = {} if runner is None else {"runner": runner}
    return learner(net, prepare, settings, augment, trained=PARTS[part], **more)
