"""The model card of a merge, as Hugging Face's hub has it: what was merged of which files, and how."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

import compo_jax
from compo_jax.compose.shards import Checkpoint
from compo_jax.files import local_path, replaced, require_ordinary


class Step(NamedTuple):
    """One rule, and what it merged.

    Attributes:
      tensors: how many.
      options: of the rule, `weights` among them.
    """

    rule: str
    tensors: int
    options: Mapping[str, Any]

    def __str__(self) -> str:
        options = ", ".join(f"{name} {_text(value)}" for name, value in self.options.items() if value is not None)
        return f"{self.tensors} tensors by {self.rule}" + f" ({options})" * bool(options)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | dict) and any(np.ndim(x) for x in jax.tree.leaves(value)):
        kinds = {type(x).__name__ for x in (value.values() if isinstance(value, dict) else value) if x is not None}
        return f"{len(value)} of {', '.join(sorted(kinds))}"  # arrays by the module
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"of {jax.random.key_data(value).tolist()}"
    if isinstance(value, jax.Array | np.ndarray):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def card_target(card: str | os.PathLike | None, out: Path, *, folder: bool, recipe: Path | None = None) -> Path | None:
    """The path of the card; FileNotFoundError where there is no folder for it, and `out` makes none (`folder`)."""
    if card is None:
        return None
    card = local_path(card)
    taken = {out.resolve(): "the checkpoint"} | ({} if recipe is None else {recipe.resolve(): "the recipe"})
    if what := "a folder" if card.is_dir() else taken.get(card.resolve()):
        raise ValueError(f"{card} is {what}: give the card's file")
    require_ordinary(card)
    if not card.parent.is_dir() and not (folder and card.parent.resolve() == out.resolve()):
        raise FileNotFoundError(f"there is no folder {card.parent} to write {card.name} to: make it first")
    return card


@contextlib.contextmanager
def write_card(
    path: Path | None,
    steps: Sequence[Step],
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    recipe: str | None = None,
) -> Iterator[None]:
    """Writes the card after what is done within."""
    yield
    if path is not None:
        with replaced(path) as aside:
            aside.write_text(card_text(steps, base, models, recipe))


def card_text(
    steps: Sequence[Step], base: Checkpoint | None, models: Sequence[Checkpoint], recipe: str | None = None
) -> str:
    """The card: a YAML head, the rules with their options, the checkpoints' fingerprints, and the recipe."""
    head: dict[str, Any] = {"library_name": "compo_jax", "tags": ["merge", "model-merging", "safetensors"]}
    parents = [hub_name(checkpoint.path) for checkpoint in ([base] if base else []) + list(models)]
    if None not in parents:  # the hub links them, and knows no folders of this machine
        head["base_model"] = list(dict.fromkeys(parents))
    rows = [("base", base)] * (base is not None) + [(f"model {t}", model) for t, model in enumerate(models)]
    weights = steps[0].options.get("weights") if len(steps) == 1 else None
    known = np.shape(weights) == (len(models),)  # in a recipe each tensor may have others, and the base none
    shares = [""] * (base is not None) + [_text(float(x)) if known else "" for x in (weights if known else models)]
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "# A merged model", "",
        f"{len(models)} checkpoints merged by compo_jax {compo_jax.__version__}.", "",
        "| rule | tensors | options |", "|---|---|---|",
        *(f"| {step.rule} | {step.tensors} | {_options(step)} |" for step in steps), "",
        "| part | checkpoint | weight | SHA-256 |", "|---|---|---|---|",
        *(
            f"| {role} | {file.name} | {share} | `{_fingerprint(file)}` |"
            for (role, checkpoint), share in zip(rows, shares, strict=True)
            for file in checkpoint.files
        ),
    ]  # fmt: skip
    if recipe is not None:
        lines += ["", "The recipe:", "", "```yaml", recipe.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def hub_name(path: Path) -> str | None:
    """OWNER/NAME of what huggingface_hub downloaded; None of other files."""
    folder = next((part for part in path.parts if part.startswith("models--")), "")
    return "/".join(folder.split("--")[1:]) or None


def _options(step: Step) -> str:
    shown = {name: value for name, value in step.options.items() if value is not None}
    told = ", ".join(f"{name} = {_text(value)}" for name, value in shown.items()) or "defaults"
    return " ".join(told.split()).replace("|", "\\|")


def _fingerprint(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
