"""What a pool of tasks' modules adds up to: one head, and one set of weights by any merge rule."""

from collections.abc import Collection, Sequence
from typing import Any

from compo_jax import compose, tree
from compo_jax.incremental.classifier import Head
from compo_jax.incremental.evaluate import stream_head
from compo_jax.pool import ModulePool
from compo_jax.tree import Tree


def pool_head(pool: ModulePool, names: Sequence[str], reference: Head, *, without: Collection[str] = ()) -> Head:
    """The head over the classes of the modules `names`, in the order of the stream from its first task on.

    Args:
      reference: the newest aligned head; see `stream_head`.
      without: modules whose training of the head is undone: their classes' columns are the reference's, which has seen
        no module. To unlearn a module is to leave out its delta and this.

    ValueError where two modules have a class in common: its logit would stand twice in the head.
    """
    names = pool.chosen(names)
    if missing := [name for name in without if name not in names]:
        raise ValueError(f"{', '.join(missing)} can't be left out of a head that is made of {', '.join(names)}")
    owner: dict[str, str] = {}
    for name in names:
        for label in pool.manifest(name).classes:
            if label in owner:
                raise ValueError(
                    f"the modules {owner[label]!r} and {name!r} of {pool.path} both have the class {label!r}, and "
                    "a head over both would have it twice: leave one of them out, or name the classes apart"
                )
            owner[label] = name
    started = [pool.load(name, "start") for name in names]
    trained = [
        start if name in without else pool.load(name, "head") for name, start in zip(names, started, strict=True)
    ]
    return stream_head(trained, started, reference)


def merge_pool(
    rule: str,
    pool: ModulePool,
    base: Tree,
    names: Sequence[str] | None = None,
    *,
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """The composed parameters of the modules `names` (default: all) by the rule of that name in `compose.RULES`.

    What the rule needs of curvature is taken from `options` (see `compose.merge`), else from what is kept beside the
    modules: Fisher diagonals, Kronecker factors. All deltas are in memory at once; `pool.compose`, a weighted sum,
    holds one module at a time.

    ValueError as of `compose.merge` (an unknown rule or option lists the known), for modules of another base, for
    curvature that a rule needs and a module lacks, and for a module that isn't finite (`check_finite`).
    """
    chosen = compose.find_rule(rule)
    made = {"weights", *compose.rules.MADE_BY}
    compose.rules.require_options(rule, {key: value for key, value in options.items() if key not in made})
    names = pool.chosen(names)
    for what, kind in (("fishers", "diagonal"), ("factors", "kronecker")):
        needed = what in chosen.needs
        if what in options or not (needed or what in chosen.takes):
            continue
        missing = [name for name in names if kind not in pool.manifest(name).curvature]
        if missing and needed:
            raise ValueError(
                f"the rule {rule!r} needs {what}, and {', '.join(missing)} of {pool.path} keep no {kind} curvature: "
                "make it once by compo_jax.curvature and keep it there: pool.attach(name, curvature=...)"
            )
        if not missing:
            options[what] = [pool.curvature(name, kind=kind) for name in names]
    deltas = list(pool.deltas(base, names))
    try:
        return compose.merge(rule, base, deltas, check_finite=check_finite, **options)
    except ValueError:
        for name, delta in zip(names, deltas if check_finite else [], strict=check_finite):
            tree.require_finite(delta, f"the module {name!r} of {pool.path}")
        raise
