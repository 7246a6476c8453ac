"""What a run reached, as a type: NamedTuples to JSON and back."""

import os
import typing
from typing import Any, TypeVar

import cattrs
import jax
import jaxtyping
import numpy as np
from cattrs.cols import is_namedtuple, namedtuple_dict_structure_factory, namedtuple_dict_unstructure_factory

from compo_jax.train.run import read_json, write_json

Result = TypeVar("Result", bound=tuple)


def write_result(path: str | os.PathLike, result: tuple) -> None:
    """Writes a NamedTuple as a JSON object, whole or not at all; of several processes, process 0 does.

    Its fields may be numbers, texts, None, arrays, NamedTuples, and lists, tuples and dictionaries of them. Arrays
    become lists; nan and infinities, which JSON lacks, become null. OSError where the file can't be written.
    """
    write_json(path, unstructured(result))


def unstructured(result: tuple) -> Any:
    """What `write_result` writes: a NamedTuple as dictionaries, lists, numbers and texts."""
    return _converter.unstructure(result)


def read_result(path: str | os.PathLike, kind: type[Result], mend: str = "remove it, and start again") -> Result:
    """The NamedTuple of type `kind` that `write_result` wrote.

    Null in an array is nan. An array's dimensions that have one name in the annotations (`Float[np.ndarray, "tasks
    tasks"]`) must be of one size in each NamedTuple. ValueError, with all that doesn't fit and what mends it, where the
    file is damaged or of another type.
    """
    return structured(read_json(path, mend), kind, str(path), mend)


def structured(value: Any, kind: type[Result], where: str, mend: str = "remove it, and start again") -> Result:
    """The NamedTuple of type `kind` with the fields of a dictionary; errors as of `read_result`."""
    try:
        return _converter.structure(value, kind)
    except Exception as error:
        wrong = "; ".join(cattrs.transform_error(error, path=kind.__name__, format_exception=_sentence))
        raise ValueError(f"{where} doesn't hold what was expected ({wrong}): {mend}") from error


def _sentence(error: BaseException, kind: Any) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error) if isinstance(error, ValueError) else cattrs.v.format_exception(error, kind)


def _is_array(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractArray)


def _array(value: Any, kind: Any) -> np.ndarray:
    dtype = float if any(name.startswith("float") for name in kind.dtypes) else None
    try:
        array = np.array(value, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no array of {kind.dim_str or 'one number'}: {error}") from error
    if array.shape == (0,) and not isinstance(array, kind):  # nothing, whose other axes a list doesn't tell
        array = array.reshape((0,) * len(kind.dims))
    if not isinstance(array, kind):
        raise ValueError(f"shape {array.shape} and dtype {array.dtype} where {kind.dim_str!r} was expected")
    return array


def _namedtuple_from(kind: type, converter: cattrs.Converter):
    fields = namedtuple_dict_structure_factory(kind, converter, "from_converter", True)
    arrays = {name: hint for name, hint in typing.get_type_hints(kind).items() if _is_array(hint)}

    def structure(value: Any, _) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} where an object with the fields of {kind.__name__} was expected")
        result = fields(value, kind)
        with jaxtyping.jaxtyped("context"):  # one name, one size
            wrong = {name: hint for name, hint in arrays.items() if not isinstance(getattr(result, name), hint)}
        if wrong:
            of = ", ".join(
                f"{name} {getattr(result, name).shape} for {hint.dim_str!r}" for name, hint in arrays.items()
            )
            raise ValueError(f"the sizes of {' and '.join(wrong)} don't fit those of the others: {of}")
        return result

    return structure


def _number(value: float | np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


_converter = cattrs.Converter()
_converter.register_unstructure_hook_factory(is_namedtuple, namedtuple_dict_unstructure_factory)
_converter.register_structure_hook_factory(is_namedtuple, _namedtuple_from)
_converter.register_structure_hook_func(_is_array, _array)
_converter.register_unstructure_hook(float, _number)
_converter.register_unstructure_hook(np.floating, _number)
_converter.register_unstructure_hook(np.integer, int)
_converter.register_unstructure_hook_func(
    lambda kind: _is_array(kind) or (isinstance(kind, type) and issubclass(kind, np.ndarray | jax.Array)),
    lambda array: _converter.unstructure(np.asarray(array).tolist()),
)
