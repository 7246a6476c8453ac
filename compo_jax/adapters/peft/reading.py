"""PEFT's folders in: an adapter and a module for our base, and the head that was trained beside them."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import Adapter
from compo_jax.adapters.low_rank import lora
from compo_jax.adapters.peft import arrays as meaning
from compo_jax.adapters.peft import files
from compo_jax.adapters.peft.arrays import Folder, key
from compo_jax.adapters.peft.layouts import HEAD, POOLING, Modules, head_of, listed, places, recognised
from compo_jax.adapters.peft.settings import Config
from compo_jax.adapters.rescaling import ia3
from compo_jax.adapters.whole import full
from compo_jax.files import local_path
from compo_jax.tree import Tree


def load_peft(
    folder: str | os.PathLike,
    base: Tree,
    *,
    modules: Modules | None = None,
    check_finite: bool = True,
) -> tuple[Adapter, Tree]:
    """`(adapter, module)` of a PEFT folder, for `base`: LoRA and (IA)³ as such, the inverse of `save_peft`; DoRA and
    (IA)³ on the inputs of layers as full deltas, which hold for this base alone.

    LoRA's scale, `lora_alpha / r` or with `use_rslora` `lora_alpha / √r`, is folded into the second factor. Query, key
    and value are adapted each with factors of their own: the module of our joint qkv has the sum of their ranks. Where
    the layers of a stacked kernel have several ranks, or some aren't adapted, they are filled up with zeros, (IA)³'s
    with ones: that changes nothing. Biases and modules that were trained as a whole (`bias`, `modules_to_save`) become
    full deltas beside LoRA's factors; beside (IA)³'s all becomes full deltas. Arrays of a type narrower than the base's
    take the base's.

    A classifier is such a module: where the base has no head, it is left out, and `peft_head` returns it. So are layers
    that pool the tokens (of ViTModel and SigLIP) where the base has none: classifiers of transformers go without.

    Args:
      modules: the names of PyTorch's modules, as for `save_peft`. Default: timm's or a Hugging Face model's, whichever
        the folder's arrays have.

    Raises:
      FileNotFoundError: a file isn't there.
      ValueError: a file is damaged, the arrays are a pickle, the kind of adapter or a feature isn't supported, names
        or shapes don't fit the base, all of them listed, or arrays hold NaN or infinities, unless `check_finite` is
        False.
    """
    path = local_path(folder)
    config, arrays = files.read(path)
    modules = modules or recognised(arrays)
    contents = _beside(path, config, arrays, base, modules)
    if problems := _problems(contents, head_of(modules)):
        first = f"the arrays in {path} aren't those that its settings ask for on this base:"
        raise ValueError("\n".join([first, *problems]))
    if check_finite:
        tree.require_finite(arrays, str(path / files.WEIGHTS))
    adapter, module = _together(meaning.entries(contents), meaning.full_deltas(contents), base, contents)
    if check_finite:
        tree.require_finite(module, f"the module of {path}")  # DoRA divides by the lengths of a weight's columns
    return adapter, module


def _beside(path: Path, config: Config, arrays: Mapping[str, np.ndarray], base: Tree, modules: Modules) -> Folder:
    """The contents of the folder `path` beside the base, without a trained head and pooling that the base has not."""
    leaves = tree.by_name(base)
    pooling = [names for place, names in modules.items() if place.startswith(POOLING) and place not in leaves]
    left_out = [key(name, "") for names in pooling for name in listed(names)]
    if (head := head_of(modules)) and HEAD not in leaves:
        left_out += [key(head, "weight"), key(head, "bias")]
    arrays = {name: array for name, array in arrays.items() if not name.startswith(tuple(left_out))}
    places_of = places(base, modules)
    try:
        layers = meaning.adapted_layers(config, places_of)
    except re.error as error:
        raise ValueError(f"{path / files.CONFIG}: {error.pattern!r} is no regular expression ({error})") from error
    return Folder(config, arrays, places_of, layers, leaves)


def _problems(contents: Folder, head: str | None) -> list[str]:
    """A line for each way in which the arrays don't fit settings and base."""
    config, arrays, _, layers, leaves = contents
    expected = meaning.expected(contents)
    shapes = {name: array.shape for name, array in arrays.items()}
    lines = tree.mismatches(shapes, expected)
    if not layers:
        lines.append("no layer of the base is adapted: give modules= the names of its layers in PyTorch")
    biases = {name for name in expected if name.endswith(".bias")}
    if config["bias"] == "lora_only" and biases and not biases & shapes.keys():
        lines.append(
            "PEFT before version 0.21 left the biases that it trained with bias='lora_only' out of its files: they are "
            f'lost. To take the module without them, write "bias": "none" into {files.CONFIG}'
        )
    weight = key(head or "", "weight")
    if weight in shapes and shapes[weight] != expected.get(weight, shapes[weight]):
        width = leaves[HEAD].shape[0]
        twice = shapes[weight][-1] == 2 * width
        lines.append(
            f"the folder's classifier isn't of the shape of the base's head ({width} features)"
            + (
                ", but takes the class token and the mean of the patches side by side, as DINOv2's does"
                if twice
                else ""
            )
            + ": take the head out of the base, and read it with adapters.peft_head"
        )
    return lines


def _together(
    held: dict[str, Tree], deltas: dict[str, np.ndarray], base: Tree, contents: Folder
) -> tuple[Adapter, Tree]:
    """The adapter whose modules have these entries and these full deltas, and that module."""
    held, deltas = jax.tree.map(jnp.asarray, (held, deltas))
    stacks = {layer.place.path for layer in contents.layers.values() if layer.place.at}
    stacked = [_exactly(path) for path in held if path in stacks]
    if contents.config["peft_type"] == "IA3":
        adapter = ia3([_exactly(path) for path in held], bias=True, stacked=stacked)
    elif held:
        widths = {path: entry["a"].shape[-1] for path, entry in held.items()}
        common = math.gcd(*widths.values())
        adapter = lora(common, [(_exactly(path), width // common) for path, width in widths.items()], stacked=stacked)
        if not held.keys() & deltas.keys():
            return adapter, tree.place(held | deltas, base)
    module = tree.place(held, base)
    if not deltas:
        return adapter, module
    parts = [tree.place(deltas, base), *([adapter.delta(module, base)] if held else [])]
    delta = tree.weighted_sum(parts, [1] * len(parts))
    return full([_exactly(path) for path in tree.names(delta)]), delta


def _exactly(path: str) -> str:
    """The pattern of this path alone."""
    return f"^{re.escape(path)}$"


def peft_head(
    folder: str | os.PathLike, *, modules: Modules | None = None, check_finite: bool = True
) -> dict[str, jax.Array]:
    """The classifier that was trained beside an adapter and saved with it (`modules_to_save`), as the `head` of our
    models: `{"kernel": (features, classes), "bias": (classes,)}`. With `model.clone(classes=…)` and
    `base | {"head": adapters.peft_head(folder)}` the whole classifier is there.

    It is handed over as it is: that of a Hugging Face DINOv2 (Dinov2ForImageClassification) takes twice the width, the
    class token and the mean of the patches side by side. 16-bit arrays become float32.

    Args:
      modules: as for `load_peft`; the head is that of `head/kernel`.

    Raises FileNotFoundError and ValueError as `load_peft` does, and ValueError where the folder holds no head.
    """
    path = local_path(folder)
    _, arrays = files.read(path)
    head = head_of(modules or recognised(arrays))
    weight = arrays.get(key(head, "weight")) if head else None
    if not head or weight is None or weight.ndim != 2:
        raise ValueError(
            f"{path} holds no trained head: there is no {key(head or 'head', 'weight')} in it with two axes. A head is "
            "saved where modules_to_save names it; one that LoRA adapted is read by load_peft"
        )
    arrays = {"kernel": weight.T} | ({"bias": arrays[key(head, "bias")]} if key(head, "bias") in arrays else {})
    if check_finite:
        tree.require_finite(arrays, f"the head in {path / files.WEIGHTS}")
    return {name: jnp.asarray(array, tree.wide_type(array)) for name, array in arrays.items()}
