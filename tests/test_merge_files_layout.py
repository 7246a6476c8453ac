"""Files of PyTorch models, whose matrices are (out, in): rules that go by matrices see them as (in, out)."""

import jax
import numpy as np
import pytest
from cases import normal
from file_cases import base_and_models
from safetensors.numpy import load_file, save_file

from compo_jax.compose import merge, merge_files, merge_recipe, read_recipe, task_vector

SHAPES = {
    "patch_embed.proj.weight": (6, 3, 2, 2),
    "conv_embed.weight": (6, 3, 2, 2),
    "patch_embedding.weight": (6, 4),
    "blocks.0.qkv.weight": (12, 5),
    "class_embed.weight": (4, 7),  # DETR's head
    "embeddings_project.weight": (6, 4),  # ELECTRA's
    "blocks.0.norm.weight": (5,),
    "tokens.embedding.weight": (9, 4),  # one row a token, so that it is (in, out) already
    "transformer.wte.weight": (8, 3),  # the same in GPT-2, and in T5
    "shared.weight": (7, 3),
    "pos_embed": (1, 4, 6),
}
MATRICES = ("patch_embed.proj.weight", "conv_embed.weight", "patch_embedding.weight", "blocks.0.qkv.weight",
            "class_embed.weight", "embeddings_project.weight")  # fmt: skip


def turned(params, axis=0, to=-1):
    return {name: np.moveaxis(np.asarray(x), axis, to) if name in MATRICES else x for name, x in params.items()}


@pytest.fixture
def files(tmp_path):
    """(files of the base and of three models, and their arrays)."""
    arrays = base_and_models(tmp_path, SHAPES)
    return [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b", "c")], *arrays


@pytest.mark.parametrize(
    "name, options",
    [*((name, {}) for name in ("tsv", "iso", "iso_cts", "wudi", "dc_merge", "cart", "average", "ties")),
     ("lines", {"rule": "wudi", "beta": 0.0}), ("dare", {"rule": "wudi", "key": jax.random.key(0), "rate": 0.0})],
)  # fmt: skip
def test_a_rule_merges_a_file_as_it_merges_the_same_model_with_its_inputs_first(files, tmp_path, name, options):
    (start, *paths), base, models = files
    merge_files(name, paths, tmp_path / "out.safetensors", base=start, **options)
    deltas = [task_vector(turned(model), turned(base)) for model in models]
    expected = turned(merge(name, turned(base), deltas, **options), -1, 0)
    made = load_file(tmp_path / "out.safetensors")
    for leaf, x in expected.items():
        np.testing.assert_allclose(made[leaf], x, rtol=1e-5, atol=1e-6, err_msg=leaf)


def test_tasks_that_listen_to_other_inputs_add_up_in_a_file(tmp_path):
    base = {"layer.weight": np.zeros((4, 6), np.float32)}
    models = [{"layer.weight": np.zeros((4, 6), np.float32)} for _ in range(2)]
    models[0]["layer.weight"][:, :3] = normal(0, 4, 3)  # inputs 0 to 2, all outputs
    models[1]["layer.weight"][:, 3:] = normal(1, 4, 3)
    for name, arrays in zip(("base", "a", "b"), [base, *models], strict=True):
        save_file(arrays, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "base")]
    merge_files("wudi", paths[:2], tmp_path / "out.safetensors", base=paths[2])
    summed = models[0]["layer.weight"] + models[1]["layer.weight"]
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")["layer.weight"], summed, atol=1e-5)

    models = "base_model: base.safetensors\nmodels:\n  - model: a.safetensors\n  - model: b.safetensors\n"
    for way in ("rule: wudi\n", "rule: dare\nparameters: {rule: wudi, rate: 0}\n"):
        (tmp_path / "recipe.yaml").write_text(way + models)
        merge_recipe(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "again.safetensors")
        np.testing.assert_allclose(load_file(tmp_path / "again.safetensors")["layer.weight"], summed, atol=1e-5)


def test_a_file_says_otherwise_where_its_layers_are_inputs_first(tmp_path):
    """GPT-2's, which are called as PyTorch's are."""
    shapes = {"h.0.mlp.c_fc.weight": (5, 12), "h.0.ln_1.weight": (5,)}
    base, models = base_and_models(tmp_path, shapes)
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    deltas = [task_vector(model, base) for model in models]
    expected = merge("wudi", base, deltas)["h.0.mlp.c_fc.weight"]
    merge_files("wudi", files, tmp_path / "out.safetensors", base=tmp_path / "base.safetensors", outputs_first=())
    recipe = "rule: wudi\noutputs_first: []\nbase_model: base.safetensors\nmodels:\n"
    (tmp_path / "r.yaml").write_text(recipe + "".join(f"  - model: {name}.safetensors\n" for name in "abc"))
    merge_recipe(read_recipe(tmp_path / "r.yaml"), tmp_path / "again.safetensors")
    for name in ("out", "again"):
        made = load_file(tmp_path / f"{name}.safetensors")["h.0.mlp.c_fc.weight"]
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
    merge_files("wudi", files, tmp_path / "out.safetensors", base=tmp_path / "base.safetensors")
    turned_ones = load_file(tmp_path / "out.safetensors")["h.0.mlp.c_fc.weight"]
    assert not np.allclose(turned_ones, expected, atol=1e-3)


def test_a_recipe_says_once_for_all_its_groups_which_tensors_have_their_outputs_first(tmp_path):
    base, models = base_and_models(tmp_path, {"attn.w": (5, 3), "mlp.w": (4, 6), "other.w": (4, 6), "norm.w": (5,)})
    text = """
rule: average
outputs_first: [attn.w, mlp.w]
groups:
  - {filter: attn, rule: wudi}
  - {filter: [mlp, norm, other], rule: wudi, parameters: {scale: [{filter: norm, value: 0.5}, {value: 1}]}}
base_model: base.safetensors
models: [{model: a.safetensors}, {model: b.safetensors}, {model: c.safetensors}]
"""
    (tmp_path / "r.yaml").write_text(text)
    merge_recipe(read_recipe(tmp_path / "r.yaml"), tmp_path / "out.safetensors")
    made, deltas = load_file(tmp_path / "out.safetensors"), [task_vector(model, base) for model in models]
    for name in ("attn.w", "mlp.w", "other.w"):
        turn = np.transpose if name != "other.w" else np.asarray
        expected = merge("wudi", {"x": turn(base[name])}, [{"x": turn(delta[name])} for delta in deltas])["x"]
        np.testing.assert_allclose(turn(made[name]), expected, rtol=1e-4, atol=1e-5, err_msg=name)
    (tmp_path / "r.yaml").write_text(text.replace("[attn.w, mlp.w]", "[attn.w, nothing]"))
    with pytest.raises(ValueError, match="outputs_first='nothing' matches no matrix; these are attn.w, mlp.w, other.w"):
        merge_recipe(read_recipe(tmp_path / "r.yaml"), tmp_path / "out.safetensors")
