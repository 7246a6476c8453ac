"""Merging from file to file: safetensors checkpoints in and one out, a leaf at a time."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax.compose.cards import Step, card_target, write_card
from compo_jax.compose.entries import Deferred
from compo_jax.compose.rules import MADE_BY, RULES, find_rule, merge, options_of
from compo_jax.compose.shards import DTYPES, FLOATS, Checkpoint, Plan, Progress, opened, require_alike, target, write
from compo_jax.compose.turned import PYTORCH

#: Rules that merge the models themselves where there is no base.
WITHOUT_BASE = ("average", "slerp", "karcher")


class _Row:
    """The entries of a checkpoint's tensor, or of its difference from the base's, see `Deferred`."""

    def __init__(self, checkpoint: Checkpoint, name: str, base: Checkpoint | None, dtype: Any, check_finite: bool):
        self.where, self.check_finite = f"{checkpoint.path} holds NaN or infinite numbers in {name}", check_finite
        self.row, self.base = checkpoint.row(name), None if base is None else base.row(name)
        self.dtype = dtype

    def __getitem__(self, place: slice) -> np.ndarray:
        x = self.row[place]
        with np.errstate(all="ignore"):
            if self.check_finite and not np.isfinite(np.sum(x, dtype=np.float32)) and not np.all(np.isfinite(x)):
                raise ValueError(
                    f"{self.where}: a training that diverged, say, or a damaged file. Leave it out, or let it through "
                    "on purpose with check_finite=False"
                )
            x = x.astype(self.dtype, copy=False)
            return x if self.base is None else x - self.base[place].astype(self.dtype, copy=False)


class _Zeros(NamedTuple):
    size: int
    dtype: np.dtype

    def __getitem__(self, place: slice) -> np.ndarray:
        return np.zeros(len(range(*place.indices(self.size))), self.dtype)


class Sources(NamedTuple):
    """Checkpoints with the same tensors, opened.

    Attributes:
      base: that all were trained from; None where there is none.
      wide: computed in float32 at least, as it is where the result has another type; else in the tensors' types.
    """

    base: Checkpoint | None
    models: list[Checkpoint]
    wide: bool = False
    check_finite: bool = True

    @property
    def like(self) -> Checkpoint:
        return self.models[0] if self.base is None else self.base

    def _deferred(self, names: Iterable[str], row: Callable[[str, np.dtype], Any]) -> dict[str, Deferred]:
        leaves = {}
        for name in names:
            tensor = self.like.tensors[name]
            dtype = np.dtype(FLOATS[tensor.dtype])
            dtype = np.promote_types(dtype, np.float32) if self.wide else dtype
            leaves[name] = Deferred(tensor.shape, dtype, lambda name=name, dtype=dtype: row(name, dtype))
        return leaves

    def origin(self, names: Iterable[str], base: bool) -> dict[str, Deferred]:
        """The base's tensors of these names; zeros without one."""
        if base:
            return self._deferred(names, lambda name, dtype: _Row(self.base, name, None, dtype, False))
        sizes = {name: int(np.prod(tensor.shape)) for name, tensor in self.like.tensors.items()}
        return self._deferred(names, lambda name, dtype: _Zeros(sizes[name], dtype))

    def deltas(self, names: Iterable[str], base: bool, models: Sequence[int] | None = None) -> list[dict]:
        """The models' differences from the base, or, without one, their parameters; of all models or of some."""
        names, start = list(names), self.base if base else None
        chosen = self.models if models is None else [self.models[t] for t in models]
        make = lambda model: lambda name, dtype: _Row(model, name, start, dtype, self.check_finite)
        return [self._deferred(names, make(model)) for model in chosen]

    def with_eps(self, rule: str, options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """The rule's options, `eps` among them where it has that: of the types that these tensors are in, which a wider
        type and add-ons hide."""
        if "eps" not in (options_of(rule, options.get("rule")) or ()):
            return options
        return {"eps": {n: float(jnp.finfo(FLOATS[self.like.tensors[n].dtype]).eps) for n in names}} | options

    def precision(self) -> contextlib.AbstractContextManager:
        """In which the merge is made: with float64 where a tensor has it."""
        double = any(tensor.dtype == "F64" for tensor in self.like.tensors.values())
        return jax.enable_x64(True) if double else contextlib.nullcontext()


def open_sources(
    paths: Sequence[str | os.PathLike],
    base: str | os.PathLike | None,
    dtype: str | None,
    check_finite: bool,
    outs: Sequence[Path | None],
) -> Sources:
    """The checkpoints; errors where one isn't whole or isn't there, or is what is written, and with all differences
    between them."""
    start = None if base is None else opened(base)
    sources = Sources(start, [opened(path) for path in paths], dtype is not None, check_finite)
    require_alike(sources.like, sources.models)
    read = [*sources.models, *([start] if start else [])]
    if lost := [out for out in outs if out is not None and any(one.lost_by(out) for one in read)]:
        raise ValueError(
            f"{lost[0]} is a part of one of the checkpoints that are merged, or would be read in its place: give "
            "another name"
        )
    return sources


def merge_files(
    name: str,
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | None = None,
    check_finite: bool = True,
    progress: Progress | None = None,
    card: str | os.PathLike | None = None,
    max_shard_size: int | None = None,
    outputs_first: str | Sequence[str] = PYTORCH,
    **options: Any,
) -> None:
    """`merge` of safetensors checkpoints into the safetensors file `out`, with no more than a leaf of each in memory.

    The deltas are the checkpoints' differences from the base's, `task_vector`, and each leaf comes out as `merge` of
    the whole trees makes it, bit by bit. Rules that need something of all leaves first (TIES its thresholds, SLERP the
    angle) read the files twice.

    Args:
      name: of `RULES`, of those that go leaf by leaf; not one that needs curvature, images or all leaves at once.
      paths: T checkpoints with the same tensors, in shapes and types, under the same names: files, indices of files
        (`model.safetensors.index.json`) or folders with one of both.
      out: either the whole file is there or, after an error, what was there before. Tensors and metadata are as in the
        base, or the first checkpoint.
      base: the checkpoint that all were trained from. Without one the parameters themselves are merged, in the rules
        average, slerp and karcher.
      dtype: float32, bfloat16 or float16: of what is merged in `out`; default the tensors' types. With it
        differences are taken in float32 at least, and the result is rounded once.
      check_finite: see `merge`; an error names the first tensor that isn't finite.
      progress: is called as `progress(bytes written, bytes in all)`.
      card: a file to write a model card to, Hugging Face's README.md: rule, options, fingerprints of the checkpoints.
      max_shard_size: the most bytes of a file: `out` is then a new folder of files with their index.
      outputs_first: see `merge`; default PyTorch's, tensors whose name ends in `weight`, but for embeddings. () is for
        none: GPT-2's layers are (in, out).
      options: of the rule, and what it needs, as in `merge`: `weights`, `key`, `density`, ...

    Tensors of whole numbers aren't merged: they are the same in all checkpoints.

    ValueError, before anything is written, for a file that is no complete safetensors file, for checkpoints that
    differ, with all differences, and for an `out` or a `card` that is a part of one of them; FileNotFoundError for one
    that isn't there, and for the folder of `out`; what else `merge` raises; OSError where the file can't be written,
    the disk is full say.
    """
    require_leafwise(name, options.get("rule"))
    if base is None and name not in WITHOUT_BASE:
        raise ValueError(f"the rule {name!r} merges differences from a base: say base=, the file of the model before")
    if not paths or isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths are the checkpoints to merge, a list of files, not {paths!r}")
    out, kind = target(out, max_shard_size), require_dtype(dtype)
    card = card_target(card, out, folder=max_shard_size is not None)
    sources = open_sources(paths, base, kind, check_finite, [out, card])
    names = list(sources.like.floats())
    with sources.precision():
        origin, deltas = sources.origin(names, base is not None), sources.deltas(names, base is not None)
        how = sources.with_eps(name, options, names)
        params = merge(name, origin, deltas, outputs_first=outputs_first, check_finite=check_finite, **how)
        plan = Plan(sources.like, kind, check_finite, progress, max_shard_size)
        told = options if outputs_first == PYTORCH else options | {"outputs_first": outputs_first}
        with write_card(card, [Step(name, len(names), told)], sources.base, sources.models):
            write(out, plan, params)


def require_dtype(dtype: str | None) -> str | None:
    """The type's name in safetensors; ValueError for one that nothing is merged in."""
    if dtype is not None and str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    return None if dtype is None else DTYPES[str(dtype)]


def require_leafwise(name: str, behind: str | None) -> None:
    """ValueError where the rule, or the one behind an add-on, doesn't go from leaf to leaf, with what to do instead."""
    last = (behind or find_rule(name).behind) if find_rule(name).behind else name
    if wrong := next((n for n in (name, last) if isinstance(n, str) and not find_rule(n).leafwise), None):
        able = ", ".join(other for other in RULES if RULES[other].leafwise)
        needs = [f"{what} ({MADE_BY[what]})" for what in find_rule(wrong).needs if what != "key"]
        beside = f", and needs {' and '.join(needs)}" if needs else ""
        raise ValueError(
            f"the rule {wrong!r} takes all leaves at once{beside}: it doesn't merge files leaf by leaf, as {able} "
            "do. Load the checkpoints, and call merge"
        )
