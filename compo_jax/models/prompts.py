"""What CLIP's text tower is asked about each class: prompt templates of the field, and texts as token ids.

Token ids come from a file, made once anywhere, or from the checkpoint's tokenizer.json by the `tokenizers` library.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from compo_jax.files import local_path, replaced
from compo_jax.models.loading import place

_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_NUMBER = ('a photo of the number: "{}".',)
_CIFAR = tuple(
    text
    for article in ("a", "the")
    for text in (
        *(f"a {kind}photo of {article} {{}}." for kind in _KINDS),
        *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
    )
)

#: By data set, `{}` for the class: CLIP's own for CIFAR (Radford et al., 2021, arXiv 2103.00020, their repository's
#: data/prompts.md), and those of the eight vision tasks of task arithmetic (Ilharco et al., 2023, arXiv 2212.04089).
TEMPLATES: dict[str, tuple[str, ...]] = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
    ),
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "gtsrb": tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
    "mnist": _NUMBER,
    "resisc45": tuple(
        f"{source} {kind} of {article}{{}}."
        for article in ("", "a ", "the ")
        for kind in ("imagery", "photo", "view")
        for source in ("satellite", "aerial")
    ),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "svhn": _NUMBER,
}


def token_ids(
    tokenizer: str | Path, classes: Sequence[str], templates: Sequence[str], context: int = 77
) -> Int[np.ndarray, "classes templates context"]:
    """The ids of every template with every class's name in the place of `{}`, filled up with the end-of-text id.

    Args:
      tokenizer: a tokenizer.json, or the checkpoint that holds one: a folder, or `hf:owner/name`.
      classes: names as a person would write them: "aquarium fish", not "aquarium_fish".
      templates: `TEMPLATES[...]`, or others.
      context: tokens that the model reads at most; CLIP's is 77.

    Raises FileNotFoundError without the file; ValueError without the `tokenizers` library, where the file is no
    tokenizer or none that marks start and end, a template has no `{}`, or texts are too long, all of them listed.
    """
    if not classes or not templates:
        raise ValueError(f"{len(classes)} classes and {len(templates)} templates make no text: one of each is needed")
    if without := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"{', '.join(map(repr, without))}: a template has one {{}}, where the class's name goes")
    encode = _encoder(place(tokenizer))
    texts = [template.replace("{}", name) for name in classes for template in templates]
    rows = encode(texts)
    if long := [f"{text!r} ({len(row)})" for text, row in zip(texts, rows, strict=True) if len(row) > context]:
        raise ValueError(f"longer than {context} tokens: {', '.join(long)}. Shorten the class's name or the template")
    filled = [row + row[-1:] * (context - len(row)) for row in rows]
    return np.asarray(filled, np.int32).reshape(len(classes), len(templates), context)


def _encoder(path: Path):
    """A function from texts to lists of ids, start and end of text included, nothing cut or filled up."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(
            "token ids are made by the tokenizers library: pip install compo-jax[text]. Or make them where it is, and "
            "read them from a file with read_token_ids"
        ) from error
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer {path}: download tokenizer.json with the checkpoint")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no file of the tokenizers library ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if len(set(tokenizer.encode("").ids)) != 2:
        raise ValueError(
            f"{path} puts no start and end around a text, as CLIP's does, and CLIP's feature is the one at the end: "
            "take the tokenizer.json of the checkpoint"
        )
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def read_token_ids(path: str | Path) -> Int[np.ndarray, "classes templates context"]:
    """The array `ids` of an .npz file, or the nested lists under "ids" of a .json file.

    Raises FileNotFoundError, and ValueError where the file or the array is none of these.
    """
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of token ids {path}")
    form = f'{path} holds no token ids (classes, templates, tokens): np.savez(path, ids=ids) or {{"ids": [[[...]]]}}'
    try:
        if path.suffix == ".json":
            ids = np.asarray(json.loads(path.read_text())["ids"])
        else:
            with np.load(path, allow_pickle=False) as arrays:
                ids = arrays["ids"]
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{form} ({error})") from error
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(f"{form}; this is {ids.shape} of {ids.dtype}")
    return ids.astype(np.int32)


def save_token_ids(path: str | Path, ids: Int[np.ndarray, "classes templates context"]) -> None:
    """Writes an .npz file for `read_token_ids`, whole or not at all."""
    path = local_path(path)
    with replaced(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, ids=ids)
