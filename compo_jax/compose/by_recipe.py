"""What a recipe says, done."""

import inspect
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Key

from compo_jax.adapters.adapter import STACKED, is_stacked
from compo_jax.compose.cards import Step, card_target, write_card
from compo_jax.compose.checkpoints import Sources, open_sources, require_dtype
from compo_jax.compose.depth import layer_scales, moved_by_layer, scaled_by_layer, widened
from compo_jax.compose.leaves import assembled
from compo_jax.compose.mergekit import METHODS, Tensor
from compo_jax.compose.parts import Part, divided, layer_places, require_base
from compo_jax.compose.recipes import Recipe
from compo_jax.compose.rules import dare, lines, merge
from compo_jax.compose.shards import Plan, Progress, target, write
from compo_jax.compose.sparse import drop_each
from compo_jax.compose.tails import breadcrumbs, della
from compo_jax.compose.turned import PYTORCH, turned
from compo_jax.tree import Tree


def merge_recipe(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    check_finite: bool = True,
    progress: Progress | None = None,
    card: str | os.PathLike | None = None,
    max_shard_size: int | None = None,
) -> list[Step]:
    """Merges the checkpoints of a recipe (`read_recipe`) into the safetensors file `out`, as `merge_files` does.

    What was done comes back: by which rule how many tensors were merged, with which options. The other arguments, the
    memory and the errors are those of `merge_files`; ValueError as well for a filter or pattern that is in no tensor's
    name, a tensor that nothing says how to merge, a parameter that a method doesn't have, and a weight that is missing.
    """
    out, kind = target(out, max_shard_size), require_dtype(recipe.out_dtype or recipe.dtype)
    card = card_target(card, out, folder=max_shard_size is not None, recipe=recipe.file)
    if recipe.file is not None and out.resolve() == recipe.file.resolve():
        raise ValueError(f"{out} is the recipe, and would be lost: give another name")
    files, base = recipe.checkpoints()
    require_base(recipe)
    also = [base] if base is not None and base not in files else []  # SLERP's first model
    sources = open_sources([*files, *also], base, kind, check_finite, [out, card])
    names = list(sources.like.floats())
    with sources.precision():
        matrices = turned(sources.origin(names, sources.base is not None), recipe.outputs_first, STACKED).axes
        parts = divided(recipe, names, layer_places(sources, names))
        params: dict[str, Any] = {}
        for number, part in enumerate(parts):
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            if part.way.ours:
                mine = [name for name in matrices if name in part.names]
                outputs_first = [p for p in recipe.outputs_first if p == PYTORCH or any(is_stacked(n, p) for n in mine)]
                params |= _by_rule(part, sources, names, outputs_first, key)
            else:
                params |= _by_method(part, sources, key)
        steps = [part.step() for part in parts]
        with write_card(card, steps, sources.base, sources.models[: len(files)], recipe.text or None):
            write(out, Plan(sources.like, kind, check_finite, progress, max_shard_size), params)
    return steps


def _by_method(part: Part, sources: Sources, key: Key[Array, ""]) -> Tree:
    sources = sources._replace(wide=True)
    base = sources.origin(part.names, part.base)
    deltas = sources.deltas(part.names, part.base, part.models)
    method = METHODS[part.way.name]

    def leaf(name, b, rows, _):
        draws = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return method.run(Tensor(b, rows, part.each[name], part.overall[name], draws))

    return assembled(base, deltas, leaf, check_finite=sources.check_finite)


def _by_rule(part: Part, sources: Sources, names: list[str], outputs_first: Sequence[str], key: Key[Array, ""]) -> Tree:
    """`names` are all tensors of the checkpoint, for LiNeS counts the layers of the network."""
    base = sources.origin(part.names, part.base)
    deltas = sources.deltas(part.names, part.base, part.models)
    name, options = part.way.name, dict(part.overall[part.names[0]])
    options |= {"weights": part.each[part.names[0]].get("weight"), "check_finite": sources.check_finite}
    options["outputs_first"] = outputs_first
    options = sources.with_eps(name, options, part.names)
    after = None
    for add_on in part.way.add_ons:
        ((what, chosen),) = add_on.items()
        if what == "lines":
            factors = _by_depth(sources.origin(names, part.base), chosen)
            if chosen.get("when", "after") == "after":
                after = factors
            else:
                deltas = scaled_by_layer(deltas, factors)
        else:
            deltas, key = _changed(what, base, deltas, key, chosen), jax.random.fold_in(key, 1)
    if after is None:
        return merge(name, base, deltas, key=key, **options)
    merged = merge(name, widened(base), deltas, key=key, **options)  # unrounded
    return moved_by_layer(base, merged, after, check_finite=sources.check_finite)


def _by_depth(network: Tree, options: Mapping[str, Any]) -> dict[str, Any]:
    """LiNeS' factors of all tensors."""
    defaults = {name: p.default for name, p in inspect.signature(lines).parameters.items()}
    scales = [options.get(name, defaults[name]) for name in ("alpha", "beta", "stacked")]
    return layer_scales(network, network, *scales)


def _changed(what: str, base: Tree, deltas: list, key: Key[Array, ""], options: Mapping[str, Any]) -> list:
    """The deltas after an add-on that drops entries."""
    if what == "dare":
        rate = options.get("rate", inspect.signature(dare).parameters["rate"].default)
        return drop_each(key, deltas, rate, deferred=True)
    if what == "della":
        return della(base, deltas, key=key, deferred=True, **options)
    return breadcrumbs(base, deltas, deferred=True, **options)
