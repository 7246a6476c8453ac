"""What the README promises to the letter."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jobs import ROOT

from compo_jax import curvature

README = (ROOT / "README.md").read_text()
EXAMPLE, PRODUCTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short_and_what_it_links_to_is_there():
    assert README.count("\n") <= 110
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 12
    lines, names = [], {"print": lambda *values: lines.append(values)}
    small = EXAMPLE.replace("images=40", "images=16").replace("epochs=4", "epochs=2")
    exec(small, names)
    assert len(lines) == 3 and min(lines[-1][0], lines[-1][2]) > 3 / 18  # three times chance
    assert len(names["pool"].names()) == 3 and (Path("runs/readme") / "pool").is_dir()
    np.testing.assert_equal(names["params"].keys(), names["base"].keys())


def test_the_curvature_example_runs_on_a_quadratic():
    centre = jnp.array([0.5, 0.25])
    names = {
        "curvature": curvature,
        "loss": lambda p, x: jnp.mean(x) * jnp.sum((p["w"] - centre) ** 2),
        "params": {"w": jnp.ones(2)},
        "base": {"w": jnp.zeros(2)},
        "deltas": [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}],
        "batches": [(jnp.ones(3),), (jnp.ones(2),)],
        "T": 2,
        "weights": [1.0, 0.0],
    }
    exec(PRODUCTS, names)
    np.testing.assert_allclose(names["H"](names["params"])["w"], [2, 2], rtol=1e-6)
    np.testing.assert_allclose(names["landscape"].predict(names["weights"]), 0.5**2 + 0.25**2, rtol=1e-6)
    np.testing.assert_allclose(names["landscape"].best_weights(), [0.625, 0.375], atol=1e-6)


def test_ci_runs_the_second_shell_block():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert "experiments/incremental.py" in blocks[0]
    assert "pytest" in blocks[1]
    assert all(block.count("\n") == 1 for block in blocks[:2])
