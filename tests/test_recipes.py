"""Recipes: what each tensor gets is what NumPy's formula says of it, or `merge` of its group; and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from file_cases import base_and_models
from jobs import main
from safetensors.numpy import load_file, save_file

from compo_jax.compose import merge, merge_recipe, read_recipe

SHAPES = {
    "embed": (5, 6),
    "layers.0.attn": (6, 6),
    "layers.0.mlp": (6, 8),
    "layers.0.mlp_bias": (8,),
    "layers.1.attn": (6, 6),
    "layers.1.mlp": (6, 8),
    "layers.1.mlp_bias": (8,),
    "layers.10.attn": (6, 6),
    "head": (6, 3),
}
ATTENTION = [name for name in SHAPES if "attn" in name]
REST = [name for name in SHAPES if "attn" not in name]


@pytest.fixture
def files(tmp_path):
    """(base, models) as arrays; base.safetensors, a.safetensors, ... in the folder."""
    return base_and_models(tmp_path, SHAPES)


def written(folder, text):
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def result(folder, text):
    merge_recipe(read_recipe(written(folder, text)), folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


def three(*parameters):
    """The models' part of a recipe, with the parameters of each."""
    each = [f"  - {{model: {name}.safetensors, parameters: {p}}}" for name, p in zip("abc", parameters, strict=False)]
    return "models:\n" + "\n".join(each) + "\n"


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-6, atol=2e-7, err_msg=name)


# -- mergekit's methods by their formulas -----------------------------------------------------------------------------
def test_linear_is_the_mean_with_weights_by_filter(tmp_path, files):
    _, models = files
    text = """
merge_method: linear
models:
  - model: a.safetensors
    parameters:
      weight:
        - filter: attn
          value: 3.0
        - pattern: "layers.0.*bias"
          value: 2e-1
        - value: 1
  - {model: b.safetensors, parameters: {weight: 1}}
  - model: c.safetensors
parameters: {weight: 0.5}
"""

    def weights(name):
        first = 3.0 if "attn" in name else 0.2 if name == "layers.0.mlp_bias" else 1.0
        return np.array([first, 1.0, 0.5])

    expected = {}
    for name in SHAPES:
        w = weights(name) / weights(name).sum()
        expected[name] = sum(w_t * model[name].astype(np.float64) for w_t, model in zip(w, models, strict=True))
    close(result(tmp_path, text), expected)
    expected = {name: x * weights(name).sum() for name, x in expected.items()}
    close(result(tmp_path, text.replace("{weight: 0.5}", "{weight: 0.5, normalize: false}")), expected)


def ties_of(base, models, weights, density, normalise=True, scale=1.0):
    deltas = [np.asarray(model, np.float64) - base for model in models]
    for delta, d in zip(deltas, density, strict=True):
        least = np.sort(np.abs(delta).ravel())[delta.size - max(1, int(d * delta.size))]
        delta[np.abs(delta) < least] = 0
    weighed = np.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    agree = np.sign(weighed) == np.where(weighed.sum(0) >= 0, 1, -1)
    shares = np.einsum("t...,t->...", agree, np.array(weights)) if normalise else np.ones_like(base)
    return base + scale * (weighed * agree).sum(0) / np.where(shares == 0, 1, shares)


def test_ties_trims_each_tensor_by_each_model_s_density(tmp_path, files):
    base, models = files
    text = "base_model: base.safetensors\nmerge_method: ties\n"
    text += three("{weight: 1.0, density: 0.5}", "{weight: 0.6, density: 0.25}", "{weight: 0.3}")
    expected = {n: ties_of(base[n], [m[n] for m in models], [1, 0.6, 0.3], [0.5, 0.25, 1]) for n in SHAPES}
    close(result(tmp_path, text), expected)
    text += "parameters: {lambda: 0.7, normalize: false, int8_mask: true}\n"
    expected = {n: ties_of(base[n], [m[n] for m in models], [1, 0.6, 0.3], [0.5, 0.25, 1], False, 0.7) for n in SHAPES}
    close(result(tmp_path, text), expected)


def test_the_base_among_the_models_is_no_model(tmp_path, files):
    base, models = files
    text = "base_model: base.safetensors\nmerge_method: task_arithmetic\n" + three("{weight: 0.5}", "{weight: -0.2}")
    text += "  - model: base.safetensors\n"
    expected = {n: x + 0.5 * (models[0][n] - x) - 0.2 * (models[1][n] - x) for n, x in base.items()}
    close(result(tmp_path, text), expected)


def test_a_gradient_goes_over_the_layers(tmp_path, files):
    """Layers 0, 1 and 10 of 0 to 10."""
    base, models = files
    text = "base_model: base.safetensors\nmerge_method: slerp\nmodels: [{model: a.safetensors}]\nparameters:\n  t:\n"
    text += "    - {filter: attn, value: [0, 1, 0]}\n    - value: [0, 0]\n"
    found = result(tmp_path, text)
    for name in [*REST, "layers.0.attn", "layers.10.attn"]:
        np.testing.assert_allclose(found[name], base[name], rtol=1e-6)
    b, a = base["layers.1.attn"].ravel(), models[0]["layers.1.attn"].ravel()
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    expected = (np.sin(0.8 * angle) * b + np.sin(0.2 * angle) * a) / np.sin(angle)
    np.testing.assert_allclose(found["layers.1.attn"].ravel(), expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_over_one_layer_is_at_its_end(tmp_path):
    """As in mergekit's plan, where the place is 1 if there is one layer."""
    save_file({"layers.0.w": np.zeros((3, 4), np.float32)}, tmp_path / "base.safetensors")
    save_file({"layers.0.w": np.ones((3, 4), np.float32)}, tmp_path / "a.safetensors")
    text = "base_model: base.safetensors\nmerge_method: task_arithmetic\n"
    text += "models: [{model: a.safetensors, parameters: {weight: [0, 0.75]}}]\n"
    np.testing.assert_array_equal(result(tmp_path, text)["layers.0.w"], 0.75)


def test_a_filter_is_a_text_and_a_pattern_is_an_expression(tmp_path, files):
    base, models = files
    text = "base_model: base.safetensors\nmerge_method: task_arithmetic\nmodels:\n  - model: a.safetensors\n"
    for condition, mine in (
        ("filter: layers.1.", ["layers.1.attn", "layers.1.mlp", "layers.1.mlp_bias"]),
        ("pattern: layers.1.", [name for name in SHAPES if name.startswith("layers.1")]),
    ):
        weight = f"    parameters: {{weight: [{{{condition}, value: 1}}, {{value: 0}}]}}\n"
        found = result(tmp_path, text + weight)
        for name in SHAPES:
            expected = models[0][name] if name in mine else base[name]
            np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)


# -- our rules, by groups ---------------------------------------------------------------------------------------------
def parts(files, names, models=(0, 1, 2)):
    base, trained = files
    start = {name: base[name] for name in names}
    return start, [{name: trained[t][name] - base[name] for name in names} for t in models]


def same_bits(found, expected):
    for name, x in expected.items():
        assert found[name].tobytes() == np.asarray(x).tobytes(), name


def test_each_group_is_merged_by_its_rule_as_a_whole(tmp_path, files):
    """TIES has one threshold for all tensors of the group; the weights are those of the models."""
    text = "base_model: base.safetensors\nrule: ties\nparameters: {density: 0.3}\n"
    text += three("{weight: 1}", "{weight: 2}", "{weight: 3}")
    text += """
groups:
  - filter: [attn]
    rule: task_arithmetic
    parameters: {scale: 0.4}
  - pattern: ["^head$", embed]
    rule: dare
    parameters: {rule: ties, density: 0.5, rate: 0.25}
seed: 7
"""
    found, weights = result(tmp_path, text), [1, 2, 3]
    start, deltas = parts(files, ATTENTION)
    same_bits(found, merge("task_arithmetic", start, deltas, weights=weights, scale=0.4))
    start, deltas = parts(files, ["embed", "head"])
    key = jax.random.fold_in(jax.random.key(7), 1)
    same_bits(found, merge("dare", start, deltas, weights=weights, key=key, rule="ties", density=0.5, rate=0.25))
    start, deltas = parts(files, [name for name in REST if name not in ("embed", "head")])
    same_bits(found, merge("ties", start, deltas, weights=weights, density=0.3))


def test_tensors_with_one_parameter_are_merged_together(tmp_path, files):
    text = "base_model: base.safetensors\nrule: ties\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"
    text += "parameters: {density: [{filter: attn, value: 0.2}, {value: 0.6}]}\n"
    found = result(tmp_path, text)
    for names, density in ((ATTENTION, 0.2), (REST, 0.6)):
        start, deltas = parts(files, names, (0, 1))
        same_bits(found, merge("ties", start, deltas, density=density))


def test_add_ons_go_before_and_after_a_rule_in_their_order(tmp_path, files):
    text = "base_model: base.safetensors\nrule: average\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"
    text += "add_ons:\n  - dare: {rate: 0.5}\n  - breadcrumbs: {kept: 0.5}\n  - lines: {beta: 0.5}\n"
    found = result(tmp_path, text)
    start, deltas = parts(files, SHAPES, (0, 1))
    key = jax.random.fold_in(jax.random.key(0), 0)
    inner = dict(key=key, rate=0.5, rule="breadcrumbs", kept=0.5)  # whose rule behind is task_arithmetic
    expected = merge("dare", start, deltas, **inner, scale=0.5)
    factors = {name: 1.0 for name in SHAPES} | {n: 1 + 0.5 * 0.1 for n in SHAPES if "layers.1." in n}
    factors["layers.10.attn"] = 1.5
    close(found, {n: start[n] + factors[n] * (np.asarray(expected[n]) - start[n]) for n in SHAPES})


def test_the_other_order_of_add_ons_is_another_merge(tmp_path, files):
    text = "base_model: base.safetensors\nrule: average\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"
    one, other = "  - dare: {rate: 0.5}\n", "  - breadcrumbs: {kept: 0.5}\n"
    first, second = (
        result(tmp_path, text + "add_ons:\n" + one + other),
        result(tmp_path, text + "add_ons:\n" + other + one),
    )
    assert any(not np.array_equal(first[name], second[name]) for name in SHAPES)


def test_lines_before_a_rule_scales_each_model(tmp_path, files):
    text = "base_model: base.safetensors\nrule: ties\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"
    found = result(tmp_path, text + "add_ons: [{lines: {beta: 0.5, when: before}}]\n")
    start, deltas = parts(files, SHAPES, (0, 1))
    same_bits(found, merge("lines", start, deltas, beta=0.5, when="before", rule="ties"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lines_counts_the_layers_of_the_network_whatever_parts_it_is_merged_in(tmp_path, files, when):
    text = "base_model: base.safetensors\nrule: task_arithmetic\nmodels: [{model: a.safetensors}]\n"
    text += "parameters: {scale: [{filter: head, value: 0.7}, {value: [1.0, 0.9]}]}\n"
    text += f"add_ons: [{{lines: {{alpha: 0.1, beta: 0.9, when: {when}}}}}]\n"
    text += "groups: [{filter: layers.1., rule: average, add_ons: [{lines: {alpha: 0.1, beta: 0.9}}]}]\n"
    found = result(tmp_path, text)
    start, (delta,) = parts(files, SHAPES, (0,))
    at = lambda name: int(name.split(".")[1]) / 10 if "layers" in name else 0.0  # of layers 0 to 10
    scale = lambda name: 0.7 if name == "head" else 1.0 if "layers.1." in name else 1 - 0.1 * at(name)
    expected = {name: start[name] + (0.1 + 0.9 * at(name)) * scale(name) * delta[name] for name in SHAPES}
    close({n: x for n, x in found.items() if n != "embed"}, {n: x for n, x in expected.items() if n != "embed"})


@pytest.mark.parametrize("base", ["base.safetensors", "./base.safetensors", "sub/../base.safetensors"])
def test_the_base_among_the_models_is_no_model_however_it_is_written(tmp_path, files, base):
    (tmp_path / "sub").mkdir()
    text = f"base_model: {base}\nrule: average\nmodels: [{{model: base.safetensors}}, {{model: a.safetensors}}]\n"
    same_bits(result(tmp_path, text), files[1][0])


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_rounded_once_to_its_type(dtype, key, tmp_path, files):
    text = f"base_model: base.safetensors\nrule: average\n{key}: {dtype}\n" + three("{}", "{}", "{}")
    found = result(tmp_path, text)
    start, deltas = parts(files, SHAPES)
    same_bits(found, {n: np.asarray(x).astype(jnp.dtype(dtype)) for n, x in merge("average", start, deltas).items()})
    assert all(x.dtype == jnp.dtype(dtype) for x in found.values())


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\n" + three("{weight: [{filter: attn, value: 3}, {value: 1}]}", "{weight: 1}"),
        "merge_method: task_arithmetic\nbase_model: base.safetensors\nmodels:\n  - model: base.safetensors\n"
        "  - {model: a.safetensors, parameters: {weight: 1}}\n  - {model: b.safetensors, parameters: {weight: 0.5}}\n",
    ],
)
def test_a_card_is_written_where_weights_are_by_tensor_or_the_base_is_among_the_models(tmp_path, files, text):
    merge_recipe(read_recipe(written(tmp_path, text)), tmp_path / "o", card=tmp_path / "README.md")
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert any("a.safetensors" in line and line.startswith("| model") for line in lines)


def test_bfloat16_models_are_subtracted_in_float32_and_rounded_once(tmp_path):
    base = {"w": np.asarray(normal(0, 40, 8) + 3).astype(jnp.bfloat16)}
    models = [{"w": np.asarray(normal(t, 40, 8)).astype(jnp.bfloat16)} for t in (1, 2)]
    for name, arrays in zip(("base", "a", "b"), [base, *models], strict=True):
        save_file(arrays, tmp_path / f"{name}.safetensors")
    text = "merge_method: task_arithmetic\nbase_model: base.safetensors\nmodels:\n"
    text += "".join(f"  - {{model: {name}.safetensors, parameters: {{weight: 0.3}}}}\n" for name in "ab")
    wide = lambda x: np.asarray(x["w"], np.float64)
    expected = wide(base) + 0.3 * sum(wide(model) - wide(base) for model in models)
    made = result(tmp_path, text)["w"]
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, expected.astype(np.float32).astype(jnp.bfloat16))


def test_lines_after_a_rule_that_has_another_behind_it_is_refused(tmp_path, files):
    text = "base_model: base.safetensors\nrule: breadcrumbs\nparameters: {rule: ties}\nadd_ons: [{lines: {beta: 0}}]\n"
    with pytest.raises(ValueError, match="lines goes after a rule, and breadcrumbs has ties behind it"):
        read_recipe(written(tmp_path, text + three("{}", "{}")))


def test_what_was_done_comes_back_and_stands_on_the_card(tmp_path, files):
    text = "base_model: base.safetensors\nmerge_method: ties\n" + three(
        "{weight: 1}", "{weight: [{filter: attn, value: 2}, {value: 3}]}"
    )
    text += "groups: [{filter: head, rule: average, add_ons: [{dare: {rate: 0.5}}]}]\n"
    recipe = read_recipe(written(tmp_path, text))
    seen = []
    steps = merge_recipe(
        recipe, tmp_path / "o", card=tmp_path / "README.md", progress=lambda done, total: seen.append((done, total))
    )
    assert [step.tensors for step in steps] == [1, len(SHAPES) - 1]
    assert str(steps[0]).startswith("1 tensors by average with dare(rate=0.5)")
    assert "ties of each tensor (weights by tensor, density [1, 1]" in str(steps[1])
    size = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    assert seen[-1] == (size, size) and len(seen) == len(SHAPES) and seen == sorted(seen)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: compo_jax\n") and text.strip() in card and "| base |" in card


# -- bad input --------------------------------------------------------------------------------------------------------
TWO = "base_model: base.safetensors\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"
WEIGHED = "base_model: base.safetensors\nmodels: [{model: a.safetensors, parameters: {weight: 1, density: %s}}]\n"
REFUSED = [
    (WEIGHED % 1 + "rule: ties", r"models\[0\] has a parameter density that ties doesn't take for one model: there are "
     "weight; those of the whole merge stand under the recipe's own parameters:"),
    (WEIGHED.replace("density", "lambda") % 1 + "merge_method: task_arithmetic", "has a parameter lambda that task_"),
    (WEIGHED % 0.5 + "merge_method: task_arithmetic", "has a parameter density that task_arithmetic doesn't take"),
    ("[1, 2]", "has no keys such as merge_method"),
    ("a: [", "is no YAML"),
    (TWO + "rule: ties\nrule: average", "the key rule is there twice"),
    (TWO + "rule: ties\nslices: []", "has slices: layers of several models aren't stacked"),
    (TWO + "rule: ties\ntokenizer_source: base", "has tokenizer_source: what belongs to a tokenizer"),
    (TWO + "rule: ties\nmethod: x", "no key method is known .there are merge_method, rule, parameters"),
    ("models: [{model: a, wieght: 1}]\nrule: ties", r"no key wieght is known .*model, parameters. at models\[0\]"),
    ("models: [{parameters: {}}]\nrule: ties", r"required field missing at models\[0\].model"),
    ("models: [{model: 3}]\nrule: ties", r"3 is no text at models\[0\].model"),
    ("models: [{model: a, parameters: 3}]\nrule: ties", r"expected a mapping at models\[0\].parameters"),
    (TWO + "rule: ties\nparameters: {density: [[1]]}", r"is no number, .* at parameters\['density'\]"),
    (TWO + "rule: ties\nparameters: {density: [{filter: a}]}", "required field missing at parameters.*value"),
    (TWO + "rule: ties\nseed: x", "'x' is no whole number at seed"),
    ("rule: ties", "there are no models"),
    (TWO, "merge_method: or rule: says how to merge, and neither"),
    (TWO + "rule: ties\nmerge_method: ties", "one of merge_method: and rule:"),
    (TWO + "rule: tie", "no method is called 'tie': ours are"),
    (TWO + "merge_method: nearswap", "mergekit's nearswap is not there; these are: linear, slerp"),
    (TWO + "rule: ties\ndtype: int8", "dtype='int8' is none of float32"),
    (TWO + "rule: fisher", "'fisher' needs fishers .one Fisher diagonal a module, .*which checkpoints don't hold"),
    (TWO + "rule: best_weights", "needs landscape"),
    (TWO + "rule: adamerging", "'adamerging' takes all leaves at once, and needs unlabelled .images of the tasks"),
    (TWO + "rule: core_space", "'core_space' .*leaf by leaf"),
    (TWO + "rule: dare\nparameters: {rule: ggn}", "'ggn' takes all"),
    (TWO + "rule: ties\nadd_ons: [{knots: {}}]", r"add_ons\[0\] is one of dare, della, breadcrumbs, lines"),
    (TWO + "rule: ties\nadd_ons: [{dare: {density: 1}}]", "dare has no option density, but rate"),
    (TWO + "merge_method: ties\nadd_ons: [{dare: {}}]", "add_ons: go with a rule:"),
    (TWO + "groups: [{rule: ties}]", r"groups\[0\] wants filter: or pattern:"),
    (TWO + "rule: ties\nparameters: {density: [{filter: a, pattern: b, value: 1}]}", "has filter: and pattern:"),
    (TWO + "rule: ties\nparameters: {density: [{filter: atn, value: 1}]}", "'atn' matches no tensor.*near are attn"),
    (TWO + "rule: ties\nparameters: {density: [{pattern: '(', value: 1}]}", "is no regular expression"),
    (TWO + "rule: ties\ngroups: [{filter: [head, hed], rule: ties}]", r"groups\[0\]: the filter 'hed' .*near are head"),
    (TWO + "groups: [{filter: head, rule: ties}]", "no group takes embed, .*and others"),
    (TWO + "rule: ties\ngroups: [{filter: e, rule: ties}, {filter: head, rule: ties}]", r"groups\[1\] takes no tensor"),
    (TWO + "rule: average\nparameters: {density: 1}", "density that average doesn't take: there are weight"),
    (TWO + "merge_method: ties", "a.safetensors has no weight for embed"),
    (TWO + "merge_method: sce\nparameters: {weight: 1}", "weight that sce doesn't take"),
    (TWO + "rule: model_stock\nparameters: {weight: 1}", "weight that model_stock doesn't take"),
    ("models: [a.safetensors]\nrule: ties", r"keys and values are wanted there, model, parameters say at models\[0\]"),
    (WEIGHED % "1.5" + "merge_method: ties", "density of embed is the fraction"),
    (WEIGHED % "x" + "merge_method: ties", "density of embed is 'x', where ties wants a number"),
    (WEIGHED % "0.9" + "merge_method: della", "density - epsilon and density . epsilon are between 0 and 1"),
    (WEIGHED % "0.5" + "merge_method: ties\nparameters: {normalize: 1}", "normalize of embed is 1, where .* bool"),
    (TWO + "merge_method: slerp", "slerp merges 2 models, and there are 3"),
    (TWO.replace("base.", "a.") + "merge_method: slerp", "slerp wants parameters: t"),
    (TWO + "merge_method: linear\nparameters: {weight: 1}", "linear takes no base_model"),
    ("models: [{model: a.safetensors}]\nrule: ties", "ties wants a base_model:"),
    ("models: [{model: a.safetensors}]\nmerge_method: linear\nparameters: {weight: 0}", "weights of embed sum to zero"),
]  # fmt: skip


@pytest.mark.parametrize("text, told", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_a_recipe_does_not_have_is_told_and_nothing_is_written(text, told, tmp_path, files):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=told):
        result(tmp_path, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, "recipe.yaml"]


def test_a_recipe_or_a_checkpoint_that_is_not_there_is_told(tmp_path, files):
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="no checkpoint file .*z.safetensors"):
        result(tmp_path, "models: [{model: z.safetensors}]\nrule: average\n")


# -- draws ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_is_dropped_by_chance_is_made_up_for(method, tmp_path):
    """About the density is left, more of the large entries where ranks count, and the magnitudes' sum is as before."""
    save_file({"w": np.zeros((50, 400), np.float32)}, tmp_path / "base.safetensors")
    delta = normal(0, 50, 400).astype(np.float32)
    save_file({"w": delta}, tmp_path / "a.safetensors")
    text = f"base_model: base.safetensors\nmerge_method: {method}\nmodels:\n  - model: a.safetensors\n"
    text += "    parameters: {weight: 1, density: 0.4}\n"
    found = result(tmp_path, text)["w"]
    kept = found != 0
    np.testing.assert_allclose(kept.mean(), 0.4, atol=0.02)
    np.testing.assert_allclose(np.abs(found).sum(), np.abs(delta).sum(), rtol=1e-5)
    np.testing.assert_allclose(found[kept] / delta[kept], (found[kept] / delta[kept])[0], rtol=1e-5)
    large = np.abs(delta) >= np.median(np.abs(delta), axis=1, keepdims=True)
    np.testing.assert_allclose(kept[large].mean() - kept[~large].mean(), 0.15 if "della" in method else 0, atol=0.03)
    plain = result(tmp_path, text + "parameters: {rescale: false}\n")["w"]
    np.testing.assert_allclose(plain[kept], delta[kept], rtol=1e-5)
    assert not plain[~kept].any()
    other = result(tmp_path, text + "seed: 1\n")["w"]
    assert ((other != 0) != kept).mean() > 0.3


# -- the command ------------------------------------------------------------------------------------------------------
def test_the_command_merges_and_tells_what_was_done(tmp_path, files, capsys):
    recipe = written(tmp_path, "merge_method: linear\n" + three("{weight: 1}", "{weight: 2}"))
    arguments = ["--recipe", recipe, "--out", tmp_path / "out.safetensors", "--card", tmp_path / "README.md"]
    main(*arguments, script="merging.py")
    printed = capsys.readouterr().out
    assert f"{len(SHAPES)} tensors by linear of each tensor (weights [1, 2], normalize True)" in printed
    assert "2 checkpoints merged into" in printed
    close(load_file(tmp_path / "out.safetensors"), {n: (files[1][0][n] + 2 * files[1][1][n]) / 3 for n in SHAPES})
    assert "library_name: compo_jax" in (tmp_path / "README.md").read_text()


def test_what_plays_no_part_on_the_command_line_is_refused(tmp_path):
    for arguments, told in (
        (["--recipe", "x"], "--recipe wants --out"),
        (["--recipe", "x", "--out", "y", "--images", 3, "--seed", 1], "--images and --seed play no part with --recipe"),
        (["--out", "y"], "--out plays no part without --recipe"),
        (["--recipe", tmp_path / "x", "--out", "y"], "there is no recipe"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            main(*arguments, script="merging.py")
