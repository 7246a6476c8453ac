"""Rules where numbers cancel, tie, vanish or were rounded before: what rounding errors may not decide."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import enable_x64 as X64
from safetensors.numpy import load_file, save_file

from compo_jax import compose
from compo_jax.compose.numbers import count_of
from compo_jax.compose.recipes import parse_recipe

KEY = jax.random.key(0)


def low_rank(rng, shape, rank, dtype=np.float32):
    return (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))).astype(dtype)


def rank_of(x, part=1e-2):
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return int(np.sum(values > part * values[0]))


# -- what deltas were rounded to ---------------------------------------------------------------------------------------
ADD_ONS = {
    "dare": {"rate": 0.0, "key": KEY},
    "della": {"rate": 0.0, "window": 0.0, "key": KEY},
    "breadcrumbs": {"kept": 1.0, "largest": 0.0},
    "lines": {"when": "before", "beta": 0.0},
}
BY_MATRIX = ("iso", "tsv", "wudi", "iso_cts", "cart", "dc_merge")


@pytest.fixture
def rounded():
    """Two modules of rank 2 in bfloat16, whose rounding errors have all other directions."""
    rng = np.random.default_rng(0)
    base = {"blocks.0.weight": np.zeros((48, 32), jnp.bfloat16)}
    return base, [{"blocks.0.weight": low_rank(rng, (48, 32), 2, jnp.bfloat16)} for _ in range(2)]


@pytest.mark.parametrize("add_on", ADD_ONS)
def test_add_ons_that_leave_all_as_it_is_leave_the_rank_as_it_is(rounded, add_on):
    base, deltas = rounded
    for rule in (*BY_MATRIX, "knots", "subspace_boosting"):
        options = {"beta": 0.5} if rule == "subspace_boosting" and add_on != "lines" else {}
        plain = compose.merge(rule, base, deltas, **options)["blocks.0.weight"]
        behind = compose.merge(add_on, base, deltas, rule=rule, **(ADD_ONS[add_on] | options))["blocks.0.weight"]
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (behind, plain)), atol=0.02 * np.abs(plain).max()
        )
    assert rank_of(compose.merge(add_on, base, deltas, rule="iso", **ADD_ONS[add_on])["blocks.0.weight"], 0.1) == 4


def test_files_in_bfloat16_have_the_rank_that_they_have_whatever_is_written(tmp_path, rounded):
    base, deltas = rounded
    for t, model in enumerate([base, *deltas]):
        save_file(model, tmp_path / f"{t}.safetensors")
    files = [tmp_path / f"{t}.safetensors" for t in (1, 2)]
    for dtype in (None, "bfloat16", "float32"):
        out = tmp_path / "out.safetensors"
        compose.merge_files("iso", files, out, base=tmp_path / "0.safetensors", dtype=dtype)
        assert rank_of(load_file(out)["blocks.0.weight"], 0.1) == 4
        recipe = {
            "models": [{"model": str(file)} for file in files], "base_model": str(tmp_path / "0.safetensors"),
            "rule": "iso", "dtype": dtype or "bfloat16", "add_ons": [{"breadcrumbs": {"kept": 1.0, "largest": 0.0}}],
        }  # fmt: skip
        compose.merge_recipe(parse_recipe(recipe), out)
        assert rank_of(load_file(out)["blocks.0.weight"], 0.1) == 4


@pytest.mark.parametrize("shape", [(64, 4096), (4096, 64), (8, 20000)])
def test_a_weak_module_of_a_long_matrix_is_no_rounding_error(shape):
    rng = np.random.default_rng(0)
    strong, weak = low_rank(rng, shape, 2), low_rank(rng, shape, 2) * np.float32(3e-4)
    base = {"w": np.zeros(shape, np.float32)}

    def module(x):
        left, values, right = np.linalg.svd(x, full_matrices=False)
        return {"a": left * values, "b": right}

    for rule in ("knots", "core_space"):
        modules = [{"w": module(x) if rule == "core_space" else x} for x in (strong, weak)]
        merged = compose.merge(rule, base, modules, weights=[0.0, 1.0])["w"]  # inside it is the weighted sum
        np.testing.assert_allclose(merged, weak, atol=2e-2 * np.abs(weak).max())
    assert rank_of(compose.merge("iso", base, [{"w": strong}, {"w": weak}])["w"]) == 4


# -- numbers that cancel, agree or tie ---------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [None, [0.1, 0.1, 0.1], [0.7, 0.7, 0.7]])
def test_entries_that_cancel_have_no_sign(weights):
    rng = np.random.default_rng(0)
    y, e = rng.normal(size=600).astype(np.float32), np.zeros(600, np.float32)
    e[0] = 5
    base = {"w": 0 * y}
    for order in ([y, -y, e], [-y, e, y]):
        deltas = [{"w": x} for x in order]
        for merge in (compose.ties, jax.jit(compose.ties, static_argnames="density")):
            assert np.flatnonzero(merge(base, deltas, weights, density=1.0)["w"]).tolist() == [0]
    z = rng.normal(size=600).astype(np.float32)
    vector = compose.emr(base, [{"w": x} for x in (y, z, -(y + z))]).vector["w"]  # their sum is zero up to rounding
    np.testing.assert_array_equal(vector, 0 * y)


@pytest.mark.parametrize("tasks", [2, 3, 5, 30])
def test_entries_in_which_all_agree_do_not_vary(tasks):
    x = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    base = {"w": 0 * x}
    kept = compose.merge("sce", base, [{"w": x}] * tasks, density=0.5)["w"]
    np.testing.assert_allclose(kept, x, rtol=1e-6)
    varied = [{"w": np.where(np.arange(600).reshape(20, 30) < 300, x * (1 + t), x)} for t in range(tasks)]
    assert np.count_nonzero(compose.merge("sce", base, varied, density=0.5)["w"]) == 150


def test_pcb_counts_the_highest_scores_alone_where_these_are_one():
    rng = np.random.default_rng(0)
    base = {"w": np.zeros(400, np.float32)}
    deltas = [{"w": rng.normal(size=400).astype(np.float32)} for _ in range(2)]
    for density, changed in ((0.005, 4), (0.0025, 2), (0.001, 2)):  # in each task so many, at most
        assert 1 <= np.count_nonzero(compose.merge("pcb", base, deltas, density=density, clip=0.0)["w"]) <= changed
    alike = [{"w": rng.integers(-2, 3, 400).astype(np.float32)}]
    merged = compose.merge("pcb", base, alike, density=0.1, clip=0.0)["w"]
    np.testing.assert_array_equal(merged != 0, np.abs(alike[0]["w"]) == 2)
    few = [{"w": np.array([1, 2, 4], np.float32)}]  # whose outliers at the two ends would be more than all
    merged = compose.merge("pcb", {"w": np.zeros(3, np.float32)}, few, density=1.0, clip=0.4)["w"]
    assert np.all(np.diff(merged) >= 0)
    same = [{"w": np.ones(400, np.float32)}]
    np.testing.assert_array_equal(compose.merge("pcb", base, same)["w"], 1)
    assert compose.merge("pcb", {"w": np.zeros((0, 3))}, [{"w": np.zeros((0, 3))}])["w"].shape == (0, 3)


@pytest.mark.parametrize(
    "part, size, up, count",
    [
        (0.07, 100, True, 7),
        (0.14, 50, True, 7),
        (0.071, 100, True, 8),
        (1 / 49, 98, False, 2),
        (0.3, 10, False, 3),
        (0.29, 10, False, 2),
    ],
)
def test_parts_that_are_whole_numbers_are(part, size, up, count):
    assert count_of(part, size, up=up) == count


# -- scales ------------------------------------------------------------------------------------------------------------
SCALED = {
    **{rule: {} for rule in BY_MATRIX}, "wudi_damped": {"damping": 1e-3}, "knots": {}, "sce": {},
    "subspace_boosting": {"beta": 0.5}, "model_stock": {}, "ties": {}, "consensus": {}, "average": {},
    "breadcrumbs": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_a_rule_is_the_same_in_every_unit(name):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(12, 9))
    deltas = [(shared + rng.normal(size=(12, 9))).astype(np.float32) for _ in range(3)]
    base, rule = {"w": np.zeros((12, 9), np.float32)}, name.removesuffix("_damped")
    made = {}
    for power in (0, -66, 66):  # of two: 1e-20, 1e20
        unit = np.float32(2.0**power)
        made[power] = (
            np.asarray(compose.merge(rule, base, [{"w": unit * x} for x in deltas], **SCALED[name])["w"]) / unit
        )
        np.testing.assert_allclose(made[power], made[0], rtol=1e-4, atol=1e-5)
    assert np.abs(made[0]).max() > 0.1
    small = [{"w": np.float32(2.0**-66) * x} for x in deltas]
    assert np.count_nonzero(compose.emr(base, small).masks[0]["w"]) > 20


def test_a_module_that_is_zero_has_a_gradient():
    base = {"w": jnp.zeros((6, 4))}
    x = jax.random.normal(KEY, (6, 4))

    def size(y):
        return jnp.sum(compose.merge("model_stock", base, [{"w": x}, {"w": y}])["w"] ** 2)

    assert np.isfinite(jax.grad(size)(jnp.zeros((6, 4)))).all()


# -- where layers are --------------------------------------------------------------------------------------------------
def test_blocks_of_a_sequential_are_written_out_and_no_stack():
    rng = np.random.default_rng(0)
    deltas = [{f"blocks/layers/{i}/weight": rng.normal(size=(8, 8)).astype(np.float32) for i in range(2)} for _ in "ab"]
    base = jax.tree.map(np.zeros_like, deltas[0])
    for rule in ("iso", "tsv", "sce", "model_stock"):
        by_default, told = (compose.merge(rule, base, deltas, **o) for o in ({}, {"stacked": ()}))
        jax.tree.map(np.testing.assert_array_equal, by_default, told)
    for name in ("mlp/layers/0", "layer1", "sublayer1/dense", "block1"):  # parts of a scanned block
        deltas = [{f"blocks/{name}/kernel": rng.normal(size=(3, 8, 8)).astype(np.float32)} for _ in "ab"]
        base = jax.tree.map(np.zeros_like, deltas[0])
        by_default, told = (compose.merge("tsv", base, deltas, **o) for o in ({}, {"stacked": "kernel$"}))
        jax.tree.map(np.testing.assert_array_equal, by_default, told)
    stacked = [{"blocks": {"mlp": {"layers": {"0": {"weight": jnp.ones((3, 8, 8))}}}}}] * 2  # a stack of MLPs
    base = jax.tree.map(jnp.zeros_like, stacked[0])
    jax.tree.map(
        np.testing.assert_array_equal, *(compose.merge("iso", base, stacked, **o) for o in ({}, {"stacked": "w"}))
    )


def test_stages_of_a_resnet_are_its_depth():
    names = [f"layer{stage}.{block}.conv1.weight" for stage in (1, 2, 3, 4) for block in (0, 1)]
    base, ones = ({name: np.full((2, 2), x, np.float32) for name in names} for x in (0, 1))
    merged = compose.merge("lines", base, [ones], alpha=1.0, beta=9.0)
    assert [merged[name][0, 0] for name in names] == [1, 1, 4, 4, 7, 7, 10, 10]


def test_two_leaves_of_one_path_are_told():
    x = np.ones((3, 3), np.float32)
    base = {"a/b": x, "a": {"b": x}}
    for rule in ("knots", "iso", "subspace_boosting"):
        with pytest.raises(ValueError, match="two leaves have the path a/b: rename a key"):
            compose.merge(rule, base, [base])


def test_a_difference_that_is_too_large_for_its_type_is_told():
    with pytest.raises(ValueError, match=r"numbers too large for their type come out in w \(float16\)"):
        compose.task_vector({"w": np.full(3, 6e4, np.float16)}, {"w": np.full(3, -6e4, np.float16)})


# -- files that would be lost ------------------------------------------------------------------------------------------
def test_nothing_that_is_read_is_written_over(tmp_path):
    rng = np.random.default_rng(0)
    model = lambda: {f"w{i}": rng.normal(size=(4, 4)).astype(np.float32) for i in range(3)}
    for name in "ABC":
        (tmp_path / name).mkdir()
        save_file(model(), tmp_path / name / "model.safetensors")
    for name in "AB":  # in shards
        one = tmp_path / name / "model.safetensors"
        compose.merge_files("average", [one], tmp_path / f"{name}s", max_shard_size=64)
    shards = [tmp_path / "As", tmp_path / "Bs"]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    index = tmp_path / "As" / "model.safetensors.index.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: linear\nmodels:\n- {{model: {shards[0]}, parameters: {{weight: 1}}}}\n")
    before[recipe] = recipe.read_bytes()
    out, linked = tmp_path / "out.safetensors", tmp_path / "linked"
    linked.symlink_to(tmp_path / "As")
    for arguments, told in (
        ({"out": index}, "part of one of the checkpoints"),
        ({"out": linked / index.name}, "part of one of the checkpoints"),
        ({"out": tmp_path / "As" / "model.safetensors"}, "would be read in its place"),
        ({"out": out, "card": index}, "part of one of the checkpoints"),
        ({"out": out, "card": tmp_path / "As" / ".." / "out.safetensors"}, "is the checkpoint: give the card's file"),
    ):
        with pytest.raises(ValueError, match=told):
            compose.merge_files("average", shards, **arguments)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        compose.merge_files("average", shards, out, card=out / "README.md")
    for arguments, told in (
        ({"out": recipe}, "is the recipe, and would be lost"),
        ({"out": out, "card": recipe}, "is the recipe: give the card's file"),
    ):
        with pytest.raises(ValueError, match=told):
            compose.merge_recipe(compose.read_recipe(recipe), **arguments)
    assert not out.exists()
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    folder, link = tmp_path / "new", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    compose.merge_files("average", shards, link, max_shard_size=64)
    assert link.is_symlink() and (folder / "model.safetensors.index.json").exists()


def test_a_card_tells_in_a_line_what_was_beside(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.safetensors")
        save_file({"attn.weight": rng.normal(size=(4, 4)).astype(np.float32)}, files[-1])
    fishers = [{"attn.weight": np.ones((4, 4), np.float32)}] * 2
    for name, options in (("fisher", {"fishers": fishers}), ("iso", {"outputs_first": r"(attn|mlp)\.weight$"})):
        card = tmp_path / "README.md"
        compose.merge_files(name, files[1:] * 2, tmp_path / "out.safetensors", base=files[0], card=card, **options)
        (row,) = [line for line in card.read_text().splitlines() if line.startswith(f"| {name} |")]
        assert len(re.split(r"(?<!\\)\|", row)) == 5 and len(row) < 120


def test_a_value_that_comes_too_late_and_a_recipe_in_another_encoding_are_told(tmp_path):
    rng, files = np.random.default_rng(0), []
    for name in "ab":
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file({"attn": rng.normal(size=(4, 4)).astype(np.float32), "mlp": np.ones(3, np.float32)}, files[-1])
    for weights, told in (
        ([{"value": 0.5}, {"filter": "attn", "value": 0.7}], r"models\[0\], weight: 'attn' comes too late"),
        ([{"filter": "attn", "value": 0.7}, {"filter": "mlp", "value": 0.7}, {"value": 0.5}], None),
    ):
        models = [
            {"model": files[0], "parameters": {"weight": weights}},
            {"model": files[1], "parameters": {"weight": 0.5}},
        ]
        recipe = parse_recipe({"merge_method": "linear", "models": models})
        if told is None:
            compose.merge_recipe(recipe, tmp_path / "out.safetensors")
            continue
        with pytest.raises(ValueError, match=told):
            compose.merge_recipe(recipe, tmp_path / "out.safetensors")
    (tmp_path / "latin.yaml").write_bytes("# modèle\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.yaml is no text in UTF-8"):
        compose.read_recipe(tmp_path / "latin.yaml")


# -- differences of large numbers --------------------------------------------------------------------------------------
def weights_and_models(dtype, ratio, shape=(96, 160), rank=4):
    """Weights, and two models that differ from them by a matrix of this rank, of entries smaller by the ratio."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape).astype(dtype)
    size = lambda x: x / x.std() / ratio
    return w, [(w.astype(np.float32) + size(low_rank(rng, shape, rank))).astype(dtype) for _ in range(2)]


@pytest.mark.parametrize("rule", ["iso", "iso_cts", "tsv", "knots", "subspace_boosting"])
@pytest.mark.parametrize("ratio", [10, 1000, 8000])
def test_rounding_errors_of_the_weights_are_no_directions_of_their_difference(rule, ratio):
    w, models = weights_and_models(np.float32, ratio)
    deltas = [{"w": model - w} for model in models]
    options = {"rule": "iso"} if rule == "knots" else {"beta": 0.5} if rule == "subspace_boosting" else {}
    merged = jax.jit(lambda w, deltas: compose.merge(rule, {"w": w}, deltas, **options))
    with X64(True):
        base = {"w": w.astype(np.float64)}  # not to round the result
        assert rank_of(compose.merge(rule, base, deltas, **options)["w"] - w, 0.05) == 8
    assert merged(w, deltas)["w"].shape == w.shape


def test_infinities_of_the_base_hide_nothing():
    rng = np.random.default_rng(0)
    base = {"w": np.where(np.eye(12, 9) > 0, -np.inf, rng.normal(size=(12, 9))).astype(np.float32)}
    delta = {"w": (low_rank(rng, (12, 9), 2) * (np.eye(12, 9) == 0)).astype(np.float32)}
    merged = compose.merge("tsv", base, [delta])["w"]
    np.testing.assert_allclose(merged, base["w"] + delta["w"], atol=1e-5)


def test_what_cancels_leaves_no_directions():
    rng = np.random.default_rng(0)
    a = 0.01 * low_rank(rng, (96, 160), 60)
    deltas = [{"w": a + 1e-5 * low_rank(rng, a.shape, 4)}, {"w": a}]
    merged = compose.merge("iso", {"w": 0 * a}, deltas, weights=[1, -1])
    assert rank_of(merged["w"], 0.1) == 4


@pytest.mark.parametrize("ratio", [2, 5, 10])
def test_files_in_bfloat16_merge_what_was_learned_and_not_their_rounding(tmp_path, ratio):
    w, models = weights_and_models(jnp.bfloat16, ratio)
    for name, x in zip("wab", (w, *models), strict=True):
        save_file({"w": x}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for rule in ("iso", "tsv"):
        out = tmp_path / "out.safetensors"
        compose.merge_files(rule, files, out, base=tmp_path / "w.safetensors", dtype="float32")
        assert rank_of(load_file(out)["w"] - w.astype(np.float32), 0.1) == 8


def test_eps_is_a_number_that_is_not_negative():
    x = {"w": np.ones((4, 3), np.float32)}
    for wrong in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="eps is a finite number that isn't negative"):
            compose.merge("iso", x, [x], eps=wrong)
    compose.merge("iso", x, [x], eps=jnp.float32(1e-3))


@pytest.mark.parametrize("rule", ["iso", "tsv", "knots", "subspace_boosting", "dare"])
def test_eps_of_a_path_that_is_not_there_is_told(rule):
    rng = np.random.default_rng(0)
    base, delta = ({"w": rng.normal(size=(4, 3)).astype(np.float32)} for _ in range(2))
    how = {"rule": "tsv", "key": jax.random.key(0)} if rule == "dare" else {}
    with pytest.raises(ValueError, match="eps names weight, and the paths are: w"):
        compose.merge(rule, base, [delta, delta], eps={"weight": 0.1}, **how)
    compose.merge(rule, base, [delta, delta], eps={"w": 0.1}, **how)


def test_eps_may_be_of_a_branch_that_no_module_changes():
    x = {"a": {"w": np.ones((4, 3), np.float32)}, "b": {"w": np.ones((4, 3), np.float32)}}
    holed = x | {"a": None}
    boosted = compose.boost(holed, eps={"b/w": 0.1})
    jax.tree.map(np.testing.assert_array_equal, compose.boost(holed, eps={"a/w": 0.1, "b/w": 0.1}), boosted)
    merged = compose.merge("iso", x, [holed])
    jax.tree.map(np.testing.assert_array_equal, compose.merge("iso", x, [holed], eps={"a/w": 0.1}), merged)
