"""What the README promises to the letter."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import adapters, incremental, mesh, models, modular
from compo_jax.curvature import FisherDiagonal
from compo_jax.pool import ModulePool

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    names = {}
    exec(example, names)
    assert names["logits"].shape == (1, 338)
    # New modules change nothing yet, so the composition is the base.
    plain = names["model"].apply({"params": names["base"]}, jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_array_equal(names["logits"], plain)


def test_the_curvature_example_runs_on_a_quadratic():
    _, example, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    centre = jnp.array([0.5, 0.25])
    names = {
        "loss": lambda p, x: jnp.mean(x) * jnp.sum((p["w"] - centre) ** 2),
        "params": {"w": jnp.ones(2)},
        "base": {"w": jnp.zeros(2)},
        "deltas": [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}],
        "batches": [(jnp.ones(3),), (jnp.ones(2),)],
        "T": 2,
        "weights": [1.0, 0.0],
    }
    exec(example, names)
    np.testing.assert_allclose(names["H"](names["params"])["w"], [2, 2], rtol=1e-6)
    np.testing.assert_allclose(names["found"].predict(names["weights"]), 0.5**2 + 0.25**2, rtol=1e-6)
    np.testing.assert_allclose(names["found"].best_weights(), [0.625, 0.375], atol=1e-6)


def test_the_pools_example_runs(tmp_path):
    *_, example, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    _, base, _ = models.embedded()
    lora = adapters.lora(8)
    module = lora.init(jax.random.key(0), base)
    ones = jax.tree.map(jnp.ones_like, lora.delta(module, base))
    names = {
        "adapters": adapters, "incremental": incremental, "mesh": mesh, "base": base, "lora": lora, "module": module,
        "pool": ModulePool(tmp_path), "fisher": FisherDiagonal(ones, jnp.array(1), jnp.array(1.0)),
        "products": [lambda v: v],
    }  # fmt: skip
    exec(example, names)
    assert int(names["pool"].curvature("greek").count) == 1


def test_the_modular_example_runs():
    *_, example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(example.replace("steps=300", "steps=5"), names)
    assert names["order"].shape == (3, 4)
    images = jnp.zeros((3, 1, 16, 16, 3))
    logits = names["net"].apply(names["trained"], images, modular.hard)[0]
    np.testing.assert_allclose(names["resnet"].apply(names["weights"], images[0]), logits, atol=1e-5)
    assert names["one"].apply(names["begun"], images[:1]).shape == (1, 1, 5)


def test_ci_runs_the_second_shell_block():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert "experiments/incremental.py" in blocks[0]
    assert "pytest" in blocks[1]
    assert all(block.count("\n") == 1 for block in blocks[:2])
