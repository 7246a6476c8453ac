"""What the arrays of a PEFT folder are in ours: a module's entries, and full deltas."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.peft import settings
from compo_jax.adapters.peft.layouts import PREFIX, Place
from compo_jax.adapters.peft.settings import Config

_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector", "l": "ia3_l"}


def key(module: str, array: str) -> str:
    """PEFT's name of a module's array: its `weight` or `bias`, LoRA's `a` and `b`, DoRA's `m` or (IA)³'s `l`."""
    return f"{PREFIX}{module}.{_NAMES.get(array, array)}"


class Layer(NamedTuple):
    """An adapted linear layer.

    Attributes:
      rank, scale: of LoRA, whose product is multiplied by `scale`; 0 and 0.0 for (IA)³.
      inputs: whether (IA)³ scales the layer's inputs, and not its outputs.
    """

    place: Place
    rank: int = 0
    scale: float = 0.0
    inputs: bool = False


class Folder(NamedTuple):
    """A folder's contents beside the base that it is read for.

    Attributes:
      config: its settings.
      arrays: by PEFT's names.
      places: of the base's modules, by PyTorch's names.
      layers: those of them that are adapted.
      leaves: the base's, by path.
    """

    config: Config
    arrays: Mapping[str, np.ndarray]
    places: Mapping[str, Place]
    layers: Mapping[str, Layer]
    leaves: Mapping[str, Any]

    def dtype(self, path: str) -> np.dtype:
        """Of what is read for this leaf: its type, or the arrays' where that is wider."""
        return jnp.result_type(self.leaves[path].dtype, *{array.dtype for array in self.arrays.values()})


def adapted_layers(config: Config, places: Mapping[str, Place]) -> dict[str, Layer]:
    """The layers that PEFT adapts, by PyTorch's names; re.error for a pattern that is no regular expression."""

    def layer(name: str, place: Place) -> Layer:
        if config["peft_type"] == "IA3":
            return Layer(place, inputs=settings.scales_inputs(config, name))
        return Layer(place, *settings.rank_and_scale(config, name))

    linear = {name: place for name, place in places.items() if place.linear}
    return {name: layer(name, place) for name, place in linear.items() if settings.targeted(config, name, place.block)}


def expected(folder: Folder) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that a folder with these settings holds, for this base.

    A bias that the folder lacks is expected where the base's isn't zero: else the original layer has none.
    """
    config, arrays, places, layers, leaves = folder
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (place, rank, _, inputs) in layers.items():
        fan_in, fan_out = place.shape
        if config["peft_type"] == "IA3":
            shapes[key(name, "l")] = (1, fan_in) if inputs else (fan_out, 1)
            continue
        shapes |= {key(name, "a"): (rank, fan_in), key(name, "b"): (fan_out, rank)}
        if config["use_dora"]:
            shapes[key(name, "m")] = (fan_out,)
    for name, place in places.items():
        whole = settings.saved(config, name)
        if whole:
            shapes[key(name, "weight")] = place.torch_shape
        trained = whole or config["bias"] == "all" or (config["bias"] == "lora_only" and name in layers)
        bias = key(name, "bias")
        if place.bias and trained and (bias in arrays or np.any(place.part(np.asarray(leaves[place.bias])))):
            shapes[bias] = place.shape[-1:]
    return shapes


def entries(folder: Folder) -> dict[str, dict[str, np.ndarray]]:
    """By path the entries of LoRA or of (IA)³ on outputs, which say the change of any base."""
    if folder.config["use_dora"]:
        return {}
    make = _ia3_entry if folder.config["peft_type"] == "IA3" else _lora_entry
    layers = {name: layer for name, layer in folder.layers.items() if not layer.inputs}
    paths = dict.fromkeys(layer.place.path for layer in layers.values())
    return {
        path: make(folder, path, {name: layer for name, layer in layers.items() if layer.place.path == path})
        for path in paths
    }


def _lora_entry(folder: Folder, path: str, layers: Mapping[str, Layer]) -> dict[str, np.ndarray]:
    """`{"a", "b"}` of all adapted layers of a leaf: those side by side in one kernel have factors of their own, so that
    their ranks add up and rows of `b` are zero outside of a layer's columns. A layer of the stack with a lower rank, or
    none, is filled up with zeros."""
    ranks: Counter = Counter()
    for layer in layers.values():
        ranks[layer.place.at] += layer.rank
    *stack, fan_in, fan_out = folder.leaves[path].shape
    width, dtype = max(ranks.values()), folder.dtype(path)
    a, b = np.zeros((*stack, fan_in, width), dtype), np.zeros((*stack, width, fan_out), dtype)
    start: Counter = Counter()
    for name, (place, rank, scale, _) in layers.items():
        rows = slice(start[place.at], start[place.at] + rank)
        start[place.at] += rank
        right = folder.arrays[key(name, "b")].T
        a[(*place.at, slice(None), rows)] = folder.arrays[key(name, "a")].T
        b[(*place.at, rows, place.columns)] = right.astype(tree.wide_type(right)) * scale
    return {"a": a, "b": b}


def _ia3_entry(folder: Folder, path: str, layers: Mapping[str, Layer]) -> dict[str, np.ndarray]:
    """`{"l"}` of all adapted layers of a leaf; ones where there is none."""
    *stack, _, fan_out = folder.leaves[path].shape
    scales = np.ones((*stack, fan_out), folder.dtype(path))
    for name, layer in layers.items():
        layer.place.part(scales)[...] = folder.arrays[key(name, "l")][:, 0]
    return {"l": scales}


def full_deltas(folder: Folder) -> dict[str, np.ndarray]:
    """By path what the arrays change that no entry says: weights and biases that the folder holds themselves, and
    layers of DoRA and of (IA)³ on inputs, whose change depends on the base."""
    deltas: dict[str, np.ndarray] = {}

    def change(place: Place, path: str, of: Callable[[np.ndarray], np.ndarray]) -> None:
        leaf = np.asarray(folder.leaves[path])
        if path not in deltas:
            deltas[path] = np.zeros(leaf.shape, folder.dtype(path))
        place.part(deltas[path])[...] = of(place.part(leaf).astype(np.float64))

    for name, place in folder.places.items():
        named = {short: folder.arrays.get(key(name, short)) for short in (*_NAMES, "weight", "bias")}
        held = {short: array.astype(np.float64) for short, array in named.items() if array is not None}
        if "weight" in held:
            change(place, place.path, lambda weight: place.ours(held["weight"]) - weight)  # noqa: B023
        if place.bias and "bias" in held:
            change(place, place.bias, lambda bias: held["bias"] - bias)  # noqa: B023
        if "m" in held:
            change(place, place.path, lambda weight: _dora(held, folder.layers[name].scale, weight))  # noqa: B023
        if name in folder.layers and folder.layers[name].inputs:
            change(place, place.path, lambda weight: weight * (held["l"].T - 1))  # noqa: B023
    return deltas


def _dora(held: Mapping[str, np.ndarray], scale: float, weight: np.ndarray) -> np.ndarray:
    """What DoRA (Liu et al., 2024, arXiv 2402.09353) adds to a weight (in, out): the sum of it and LoRA's product gets
    the length `m` for each output."""
    moved = weight + scale * (held["b"] @ held["a"]).T
    with np.errstate(divide="ignore", invalid="ignore"):  # an output of zeros is NaN in PEFT as well
        return moved * (held["m"] / np.linalg.norm(moved, axis=0)) - weight
