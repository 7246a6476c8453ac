"""Results as types: what is written is read back, and what doesn't fit is listed at once."""

import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float, Int

from compo_jax.train import read_result, write_result


class Outcome(NamedTuple):
    accuracy: Float[np.ndarray, "tasks tasks"]
    seconds: Float[np.ndarray, " tasks"]
    best: float | None
    classes: tuple[int, ...] = ()


class Run(NamedTuple):
    name: str
    methods: dict[str, Outcome]
    seeds: Int[np.ndarray, " seeds"]
    main: Outcome | None = None


def example() -> Run:
    one = Outcome(np.array([[1, np.nan], [0.5, 0.25]]), np.array([3.0, np.inf]), None, (2, 3))
    other = Outcome(np.eye(3), np.ones(3), np.float32(0.5))
    return Run("run", {"one": one, "other": other}, np.arange(4), other)


def test_what_is_written_is_read_back_with_nan_for_null(tmp_path):
    write_result(tmp_path / "x.json", example())
    json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON
    run = read_result(tmp_path / "x.json", Run)
    assert isinstance(run, Run) and isinstance(run.methods["one"], Outcome) and run.main is not None
    np.testing.assert_array_equal(run.methods["one"].accuracy, example().methods["one"].accuracy)
    np.testing.assert_array_equal(run.methods["one"].seconds, [3, np.nan])
    np.testing.assert_array_equal(run.seeds, np.arange(4))
    assert run.seeds.dtype == int and run.methods["one"].classes == (2, 3) and run.main.best == 0.5


def test_arrays_of_jax_are_written_as_lists(tmp_path):
    write_result(tmp_path / "x.json", Outcome(jnp.eye(1), jnp.ones(1), float(jnp.ones(()))))
    assert read_result(tmp_path / "x.json", Outcome).accuracy == [[1]]


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    write_result(tmp_path / "x.json", example())
    stored = json.loads((tmp_path / "x.json").read_text())
    del stored["seeds"]
    stored["methods"]["one"]["accuracy"] = [[1, 2], [3]]
    stored["methods"]["other"]["seconds"] = [1, 2]
    stored["main"]["best"] = "much"
    stored["main"]["worst"] = 0
    (tmp_path / "x.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="make the run again") as raised:
        read_result(tmp_path / "x.json", Run, "make the run again")
    for part in ("seeds is missing", "['one'].accuracy", "the sizes of seconds", "main.best", "worst", "x.json"):
        assert part in str(raised.value)


@pytest.mark.parametrize("stored", [[], None, 3, {"name": 3}])
def test_a_file_of_another_kind_is_refused(tmp_path, stored):
    (tmp_path / "x.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="doesn't hold what was expected"):
        read_result(tmp_path / "x.json", Run)


def test_arrays_of_nothing_are_read_back(tmp_path):
    empty = Outcome(np.zeros((0, 3)), np.zeros(0), 1.0)
    write_result(tmp_path / "x.json", empty)
    found = read_result(tmp_path / "x.json", Outcome)
    assert found.accuracy.ndim == 2 and found.accuracy.size == 0 and found.seconds.shape == (0,)
