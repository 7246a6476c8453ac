"""Checkpoints as files, as folders with their description, and from Hugging Face's hub."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from compo_jax.files import INDEX, json_object, local_path, replaced, safetensors_file, weight_files, weight_map
from compo_jax.models.descriptions import CLIP_PIXELS, Pixels, pixels
from compo_jax.models.layouts import LAYOUTS, OPENAI_CLIP, TIMM, Layout, likely
from compo_jax.models.pretrained import read, write
from compo_jax.models.transformer import ACTIVATIONS
from compo_jax.models.vit import POOLS, ViT
from compo_jax.tree import Tree

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")
_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")
# What `save` writes of a model into a file's metadata, as no array tells it, and how each is read again.
_STATED = {
    "heads": int,
    "activation": {name: name for name in ACTIVATIONS}.__getitem__,
    "epsilon": float,
    "pool": {name: name for name in POOLS}.__getitem__,
    "unit": {"False": False, "True": True}.__getitem__,
}


class Checkpoint(NamedTuple):
    """What a file or a folder holds.

    Attributes:
      config: of the folder, see `descriptions.described`; None without one.
      stated: of `_STATED`, what the file's metadata says.
      pixels: None where nothing says them.
    """

    arrays: Mapping[str, np.ndarray]
    config: Mapping[str, Any] | None = None
    stated: Mapping[str, Any] = {}
    pixels: Pixels | None = None


class Loaded(NamedTuple):
    """A model with its parameters, and the pixels it was trained with: as the checkpoint says, or those of CLIP."""

    model: ViT
    params: Tree
    pixels: Pixels | None


def load(
    path: str | Path,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    activation: str | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """The model and its parameters from a checkpoint of timm, Hugging Face, AugReg or OpenAI's CLIP, by its names.

    Args:
      path: a .safetensors file; an .npz file; a folder with config.json and model.safetensors, or the index of several
        files (`model.safetensors.index.json`), which can be given itself; or `hf:owner/name` or
        `hf:owner/name@revision`, a repository of Hugging Face's hub (needs huggingface_hub: the extra `hub`).
      heads: default: what the file's metadata or config.json says, or the published architecture of its shape has.
      image_size, activation, dtype, check_finite: see `from_timm`.
    Raises:
      FileNotFoundError, and ValueError where it is another kind of file or doesn't fit.
    """
    model, params, _ = load_all(
        path, heads=heads, image_size=image_size, activation=activation, dtype=dtype, check_finite=check_finite
    )
    return model, params


def load_all(path: str | Path, *, heads: int | None = None, **options: Any) -> Loaded:
    """`load`, with the pixels that the checkpoint describes."""
    checkpoint = opened(path)
    stated = {key: value for key, value in checkpoint.stated.items() if key != "heads"}
    heads = checkpoint.stated.get("heads") if heads is None else heads
    try:
        model, params = read(checkpoint.arrays, config=checkpoint.config, stated=stated, heads=heads, **options)
    except ValueError as error:
        if _SHARD.search(str(path)):
            raise ValueError(f"{path} is one of a checkpoint's several files: give the folder, or {INDEX}") from error
        raise ValueError(f"{path}: {error}") from error
    return Loaded(model, params, checkpoint.pixels or (CLIP_PIXELS if model.pre_norm else None))


def hub_folder(name: str) -> Path:
    """The folder with a copy of the repository `hf:owner/name[@revision]`: weights and descriptions.

    ValueError where huggingface_hub isn't there or `name` is none; ConnectionError and FileNotFoundError with what to
    do where the repository can't be reached or has no such revision.
    """
    parts = _HUB.fullmatch(name)
    if not parts:
        raise ValueError(f"{name!r} is no repository of the hub: hf:owner/name, or hf:owner/name@revision")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(f"{name} needs huggingface_hub: pip install compo-jax[hub]") from error
    patterns = ["config.json", "preprocessor_config.json", "tokenizer.json", "model*.safetensors", INDEX]
    try:
        folder = huggingface_hub.snapshot_download(parts["name"], revision=parts["revision"], allow_patterns=patterns)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is not on the hub, or not for you: check the name and the revision; a private or gated one needs "
            "HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{name} can't be fetched and is in no cache ({_cause(error)}): look at the network, or bring the folder "
            "here and give its path"
        ) from error
    return Path(folder)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


def place(path: str | Path) -> Path:
    """Where a file or a folder lies on this machine; `hf:owner/name` is brought here first."""
    return hub_folder(str(path)) if str(path).startswith("hf:") else local_path(path)


def opened(path: str | Path, layouts: Sequence[Layout] = LAYOUTS) -> Checkpoint:
    """What `load` takes, read: the arrays whose names the likeliest of `layouts` doesn't leave out."""
    path = place(path)
    if path.is_dir():
        return _folder(path, layouts)
    if path.name.endswith(".index.json"):
        config, preprocessor = (json_object(path.with_name(name)) for name in _DESCRIPTIONS)
        return Checkpoint(_sharded(path, layouts), config, pixels=pixels(config, preprocessor))
    if path.suffix == ".npz":
        return Checkpoint(_archive(path, layouts))
    arrays, stated = _file(path, layouts)
    return Checkpoint(arrays, stated=stated)


def _folder(path: Path, layouts: Sequence[Layout]) -> Checkpoint:
    config, preprocessor = (json_object(path / name) for name in _DESCRIPTIONS)
    files, stated = weight_files(path), {}
    if files == [path / "model.safetensors"]:
        arrays, stated = _file(files[0], layouts)
    else:
        arrays = _sharded(path / INDEX, layouts)
    if config is None:
        raise ValueError(f"{path} has no config.json, which describes a checkpoint: give the .safetensors file itself")
    return Checkpoint(arrays, config, stated, pixels(config, preprocessor))


def _file(path: Path, layouts: Sequence[Layout]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays that a model may need (of a CLIP one half), and what of `_STATED` the metadata says."""
    with safetensors_file(path) as file:
        names = file.offset_keys()
        kept = likely(layouts, names).kept(names)
        metadata, stated = file.metadata() or {}, {}
        for key in _STATED.keys() & metadata.keys():
            try:
                stated[key] = _STATED[key](metadata[key])
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}: the metadata's {key} is {metadata[key]!r}, which no ViT has: write the file again, by "
                    "models.save(..., model=model)"
                ) from error
        return {name: file.get_tensor(name) for name in kept.values()}, stated


def _sharded(index: Path, layouts: Sequence[Layout]) -> dict[str, np.ndarray]:
    """The arrays of the files that an index lists, each of which has to be there."""
    weights = weight_map(index)
    kept = set(likely(layouts, weights).kept(weights).values())
    arrays = {}
    for path in sorted(set(weights.values())):
        with safetensors_file(path) as file:
            there = set(file.offset_keys())
            mine = {key for key in kept if weights[key] == path}
            if lacking := sorted(mine - there):
                others = " and others" * (len(lacking) > 5)
                raise ValueError(
                    f"{index} says that {path.name} holds {', '.join(lacking[:5])}{others}, which it lacks: bring the "
                    "checkpoint again from where it came"
                )
            arrays |= {key: file.get_tensor(key) for key in mine}
    return arrays


def _archive(path: Path, layouts: Sequence[Layout]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}: check the path, or download the file first")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in likely(layouts, archive).kept(archive).values()}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no whole .npz file ({error}): download it again") from error
    # NumPy stores bfloat16 as two bytes of no type
    return {name: x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x for name, x in arrays.items()}


def save(
    path: str | Path,
    params: Tree,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = np.float16,
    *,
    model: ViT | None = None,
) -> None:
    """Writes a .safetensors file for `load`, `to_timm(params)` as `dtype`; either the whole file is there or none.

    Args:
      params: with a projection, which timm's ViTs don't have, they are written under OpenAI's names.
      metadata: stored as text.
      dtype: float16 holds weights to 3 digits and loses values below 6e-8 (a Fisher's, say).
      model: its heads, activation, epsilon, pool and unit, which no array tells, are stored in the metadata, and
        `load` gives the same model again; without it `load` takes the layout's usual ones.
    Raises:
      ValueError: a projection and a head at once, values too big for `dtype`, or one without fractions; OSError: the
        file can't be written, the disk is full say.
    """
    path = local_path(path)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={np.dtype(dtype).name} holds no fractions: save with dtype=np.float32")
    if {"projection", "head"} <= set(params):
        raise ValueError(
            "no layout of files has both a projection and a head: save the parameters without the head (classes=0), "
            "and the head by itself"
        )
    arrays = write(params, OPENAI_CLIP if "projection" in params else TIMM)
    with np.errstate(over="ignore"):
        cast = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in arrays.items()}
    if lost := [name for name in cast if np.isinf(cast[name]).any() and not np.isinf(arrays[name]).any()]:
        raise ValueError(f"{', '.join(lost)}: values beyond the range of {np.dtype(dtype)}; save with dtype=np.float32")
    stated = {} if model is None else {key: getattr(model, key) for key in _STATED}
    texts = {str(key): str(value) for key, value in (stated | dict(metadata or {})).items()}
    try:
        with replaced(path) as aside:
            safetensors.numpy.save_file(cast, aside, texts)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} is not written ({error}): look at the space left on its disk") from error
