"""Recipes of mergekit's methods beside mergekit itself, where it is installed."""

import numpy as np
import pytest
import yaml
from cases import normal
from safetensors.numpy import load_file, save_file

from compo_jax.compose import merge_recipe, read_recipe
from compo_jax.compose.mergekit import METHODS

main = pytest.importorskip("mergekit.scripts.merge_raw_pytorch").main

SHAPES = {"head": (7, 30), "layers.0.attn.w": (20, 25), "layers.1.mlp.w": (40, 11), "layers.1.mlp.b": (16,)}
WEIGHTS = [{"weight": 0.7}, {"weight": [{"filter": "mlp", "value": 0.4}, {"value": 1.1}]}, {"weight": -0.3}]
DENSITIES = [w | {"density": d} for w, d in zip(WEIGHTS, (0.5, 0.33, 1.0), strict=True)]
OUTLIERS = [w | {"gamma": 0.05} for w in DENSITIES]
CASES = [
    ("linear", WEIGHTS, {}),
    ("linear", WEIGHTS, {"normalize": False}),
    ("task_arithmetic", WEIGHTS, {"lambda": 0.6}),
    ("task_arithmetic", WEIGHTS, {"normalize": True}),
    ("ties", DENSITIES, {}),
    ("ties", DENSITIES, {"normalize": False, "lambda": 1.5, "int8_mask": True}),
    ("ties", DENSITIES, {"rescale": True}),
    ("dare_ties", WEIGHTS, {}),
    ("dare_linear", WEIGHTS, {"lambda": 0.3}),
    ("della", WEIGHTS, {}),
    ("della_linear", WEIGHTS, {"normalize": True}),
    ("breadcrumbs", OUTLIERS, {"lambda": 0.5}),
    ("breadcrumbs_ties", OUTLIERS, {"normalize": True}),
    ("sce", [{}, {}, {}], {"select_topk": 0.3}),
    ("sce", [{}, {}, {}], {}),
    ("model_stock", [{}, {}, {}], {}),
    ("karcher", [{}, {}, {}], {"max_iter": 50}),
    ("slerp", [{}], {"t": [{"filter": "attn", "value": 0.2}, {"value": 0.6}]}),
    ("nuslerp", [{"weight": 0.4}, {"weight": 0.8}], {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    base = {name: normal(i, *shape).astype(np.float32) for i, (name, shape) in enumerate(SHAPES.items())}
    shared = {name: normal((9, i), *shape) / 4 for i, (name, shape) in enumerate(SHAPES.items())}
    save_file(base, folder / "base.safetensors")
    for t in range(3):
        noise = {name: normal((t, i), *shape) / 4 for i, (name, shape) in enumerate(SHAPES.items())}
        save_file({n: (base[n] + shared[n] + noise[n]).astype(np.float32) for n in SHAPES}, folder / f"{t}.safetensors")
    return folder


@pytest.mark.parametrize("method, each, overall", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_recipe_is_what_mergekit_makes_of_it(method, each, overall, folder, tmp_path):
    models = [{"model": str(folder / f"{t}.safetensors"), "parameters": p} for t, p in enumerate(each)]
    recipe = {"merge_method": method, "models": models, "parameters": overall, "dtype": "float32"}
    if METHODS[method].base in ("needed", "first"):
        recipe["base_model"] = str(folder / "base.safetensors")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_recipe(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "out.safetensors")
    main([str(tmp_path / "recipe.yaml"), str(tmp_path / "theirs"), "--quiet"], standalone_mode=False)
    ours, theirs = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_method_is_compared():
    assert {case[0] for case in CASES} == set(METHODS)
