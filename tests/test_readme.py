"""What the README promises to the letter."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    names = {}
    exec(example, names)
    assert names["logits"].shape == (1, 338)
    # New modules change nothing yet, so the composition is the base.
    plain = names["model"].apply({"params": names["base"]}, jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_array_equal(names["logits"], plain)


def test_ci_runs_the_second_shell_block():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert "experiments/incremental.py" in blocks[0]
    assert "pytest" in blocks[1]
    assert all(block.count("\n") == 1 for block in blocks[:2])
