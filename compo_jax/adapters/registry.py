"""Adapters by name, as they are stored beside their modules: ours, and those that a user adds."""

from typing import Any, Protocol, runtime_checkable

from compo_jax.adapters.adapter import Adapter
from compo_jax.adapters.low_rank import lora
from compo_jax.adapters.rescaling import ia3
from compo_jax.adapters.whole import full


@runtime_checkable
class Make(Protocol):
    """Makes an adapter of plain settings, which JSON can hold."""

    def __call__(self, **settings: Any) -> Adapter:
        """The adapter whose `settings` these are."""
        ...


_KINDS: dict[str, Make] = {"full": full, "ia3": ia3, "lora": lora}


def register(name: str, make: Make) -> None:
    """Makes an adapter of your own known by `name`, so that pools store its modules and build it again.

    `make(**settings)` returns an `Adapter` with this name and these settings. Register it in each process that reads
    such modules, where `make` is defined. ValueError for a name that is taken by another.
    """
    if _KINDS.get(name, make) is not make:
        raise ValueError(
            f"{name!r} is another adapter's name already: choose one that isn't {', '.join(sorted(_KINDS))}"
        )
    _KINDS[name] = make


def build(name: str, settings: dict[str, Any]) -> Adapter:
    """The adapter that has this `name` and these `settings` (as stored beside a module in a pool)."""
    if name not in _KINDS:
        raise ValueError(
            f"unknown adapter {name!r}; known are {', '.join(sorted(_KINDS))}, and others once adapters.register has "
            "named them"
        )
    return _KINDS[name](**settings)
