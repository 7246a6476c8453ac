"""No rule gives a wrong result in silence: whatever the types, holes, ranks, containers and bad numbers, what comes out
is what the same rule makes in float64, in the base's types, or a sentence says why not."""

import collections
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import tree
from compo_jax.compose import (
    RULES,
    Unlabelled,
    conjugate_gradients,
    drop,
    fisher_merge,
    karcher_mean,
    merge,
    slerp,
    solve_merge,
    task_vector,
    trim,
)
from compo_jax.compose.rules import options_of
from compo_jax.curvature import Kronecker, Landscape
from compo_jax.curvature.layers import Dense

LAYOUT = (("blocks/w", Dense((2,), (0,), (1,), (4, 3), 1)), ("m", Dense((), (0,), (1,), (5, 4), 1)))
SHAPES = {
    "blocks/w": (2, 4, 3), "blocks/b": (2, 3), "m": (5, 4), "conv": (2, 1, 4, 3), "v": (3,),
    "s": (), "none": (0, 3),
}  # fmt: skip
HOLES = ("conv", "v")
OPTIONS = {
    "kronecker": {"damping": 0.3},
    "regmean": {"damping": 0.1},
    "ggn": {"damping": 0.3},
    "ties": {"density": 0.6},
    "pcb": {"density": 0.6},
    "sce": {"density": 0.6},
    "adamerging": {"steps": 3},
}
BY_STEPS = ("best_weights", "adamerging", "layer_weights", "regmean_plus")  # not under jit
TYPES = {  # of the base and the modules
    "a narrow base": ["bfloat16", "float32", "float16"],
    "unequal modules": ["float16", "float16", "bfloat16"],
}
FEW = ("blocks/w", "m")


def tensor(seed, shape, dtype, scale=1.0):
    """Numbers of float16 and bfloat16 alike, so that the same ones are there in every type."""
    values = scale * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(jnp.asarray(jnp.asarray(values, jnp.bfloat16), jnp.float16), dtype)


def nest(flat):
    blocks = {name.split("/")[1]: x for name, x in flat.items() if "/" in name}
    return {"blocks": blocks} | {name: x for name, x in flat.items() if "/" not in name}


def plain(seed, dtype, scale=1.0, names=tuple(SHAPES)):
    return {name: tensor(seed + i, SHAPES[name], dtype, scale) for i, name in enumerate(names)}


def trees(dtypes, count=2, names=tuple(SHAPES)):
    """(base, deltas); all modules but the first have the holes."""
    deltas = [plain(100 * (t + 1), dtypes[t + 1], 0.5, names) for t in range(count)]
    holed = [nest({n: None if t and n in HOLES else x for n, x in d.items()}) for t, d in enumerate(deltas)]
    return nest(plain(0, dtypes[0], names=names)), holed


def quadratic(slope, count):
    """A landscape without what it was checked with."""
    none, gram = np.zeros((0, count)), np.eye(count) + 0.1
    arrays = [
        np.zeros(()),
        np.full(count, slope) * np.arange(1, count + 1),
        gram,
        np.zeros(count),
        none,
        none[:, 0],
        none,
    ]
    return Landscape(*map(jnp.asarray, arrays), strata=())


def scaled(v, by):
    return jax.tree.map(lambda x: x * jnp.asarray(by, x.dtype), v)


def outputs(params, x, by):
    """Logits of three classes that depend on every parameter, on `m` as the weight of a dense layer."""
    rest = jax.tree.leaves({name: x for name, x in params.items() if name != "m"})
    summed = sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in rest)
    rows = x * jnp.sin(jnp.arange(10.0, dtype=jnp.float32)).reshape(2, 5)
    summed += jnp.sum(jnp.sin(rows @ params["m"].astype(jnp.float32)))
    return x * jnp.stack([summed, by * jnp.cos(summed), by])[None]


def squares(params, x):
    """A loss that is a quadratic in every parameter."""
    return sum(jnp.mean(x) * jnp.sum((leaf.astype(jnp.float32) - 0.3) ** 2) for leaf in jax.tree.leaves(params))


def gram(seed, *shape):
    x = tensor(seed, (*shape, shape[-1]), "float32")
    return x @ jnp.swapaxes(x, -1, -2)


@functools.cache
def given(count=2):
    """What rules need beside the deltas."""
    return {
        "key": jax.random.key(0),
        "fishers": [nest(jax.tree.map(jnp.square, plain(500 + 20 * t, "float32"))) for t in range(count)],
        "factors": [
            Kronecker(
                {"blocks/w": gram(600 + t, 2, 4), "m": gram(610 + t, 5)},
                {"blocks/w": gram(620 + t, 2, 3), "m": gram(630 + t, 4)},
                jnp.array(5), LAYOUT,
            )
            for t in range(count)
        ],
        "matvecs": [functools.partial(scaled, by=1.0 + t) for t in range(count)],
        "landscape": quadratic(-0.3, count),
        "task": 0,
        "unlabelled": [Unlabelled(functools.partial(outputs, by=1.0 + t), [1.0, 2.0]) for t in range(count)],
        "loss": squares,
        "batches": [(np.array([x], np.float32),) for x in (1.0, 2.0)],
    }  # fmt: skip


def run(rule, base, deltas, more=None, **options):
    more = given(len(deltas)) if more is None else more
    return merge(rule, base, deltas, **{key: more[key] for key in RULES[rule].needs}, **options)


def compiled(rule, base, deltas, fishers, factors, **options):
    """The rule as one program, which takes less time than its operations one by one."""
    more = given(len(deltas)) | {"fishers": fishers, "factors": factors}
    function = lambda b, d, f, k: run(rule, b, d, more | {"fishers": f, "factors": k}, **options)
    if rule not in BY_STEPS:
        function = jax.jit(function)
    return function(base, deltas, fishers, factors)


def like(found, wanted, base, what, slack=1.0):
    """Equal to one rounding of the base's type, and to float32's in what was computed; of the base's types."""
    assert jax.tree.structure(found) == jax.tree.structure(base), what
    for name, x, y, b in zip(tree.names(base), *map(jax.tree.leaves, (found, wanted, base)), strict=True):
        assert x.dtype == b.dtype, f"{what}: {name} is {x.dtype}"
        assert x.shape == b.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        largest = max(np.abs(y).max(initial=0), 1.0)
        atol, rtol = slack * 3e-5 * largest, slack * float(jnp.finfo(b.dtype).eps) / 1.9
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=f"{what}: {name}")


def told(function, match):
    """The function raises a sentence of ours."""
    with pytest.raises((ValueError, TypeError)) as error:
        function()
    text = str(error.value)
    assert not isinstance(error.value, jax.errors.JAXTypeError) and "Traceback" not in text
    assert any(part in text for part in ([match] if isinstance(match, str) else match)), text


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_the_one_in_float64_whatever_the_types(rule):
    options = OPTIONS.get(rule, {})
    fishers, factors = given()["fishers"], given()["factors"]
    reference = ["float32"] * 3
    if rule in ("dare", "della"):  # whose draws in float64 are others
        wanted = compiled(rule, *trees(reference), fishers, factors)
    else:
        with jax.enable_x64(True):
            wide = functools.partial(jax.tree.map, lambda x: jnp.asarray(np.asarray(x, np.float64)))
            grams = [Kronecker(wide(f.inputs), wide(f.outputs), f.count, LAYOUT) for f in factors]
            wanted = compiled(rule, *wide(trees(reference)), wide(fishers), grams, **options)
            wanted = jax.tree.map(np.asarray, wanted)
    for what, dtypes in list(TYPES.items())[: 2 if rule in ("average", "ties", "karcher", "iso", "fisher") else 1]:
        base, deltas = trees(dtypes)
        slack = 30.0 if rule == "layer_weights" else 1.0  # whose weights come from the loss of rounded parameters
        like(compiled(rule, base, deltas, fishers, factors, **options), wanted, base, f"{rule}, {what}", slack)


@pytest.mark.parametrize("rule", ["average", "tsv", "karcher", "fisher"])
def test_one_module_alone_is_kept(rule):
    base, (delta,) = trees(["float32"] * 2, 1, FEW)
    like(run(rule, base, [delta]), tree.add(base, delta), base, rule)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_what_is_kept_is_divided_by_one_less_the_rate(dtype, rate):
    one = {"w": jnp.ones((40, 1000), dtype)}
    kept = np.unique(np.asarray(drop(jax.random.key(0), one, rate)["w"], np.float64))
    wanted = np.asarray(jnp.asarray(1 / (1 - rate), dtype), np.float64)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(kept, [0, wanted] if rate else [1], rtol=eps)
    base = {"w": jnp.zeros((40, 1000), dtype)}
    merged = merge("dare", base, [one, one], key=jax.random.key(0), rate=rate)["w"]
    assert merged.dtype == dtype
    values = np.unique(np.asarray(merged, np.float64))
    halves = np.asarray(jnp.asarray([0.5 / (1 - rate), 1 / (1 - rate)], dtype), np.float64)
    for value in values[values > 0]:
        assert np.min(np.abs(halves / value - 1)) <= eps


Pair = collections.namedtuple("Pair", ["w", "m"])


class Tables(collections.OrderedDict):
    """A mapping of another library's."""


jax.tree_util.register_pytree_with_keys(
    Tables,
    lambda x: ([(jax.tree_util.DictKey(k), v) for k, v in x.items()], tuple(x)),
    lambda keys, values: Tables(zip(keys, values, strict=True)),
)

CONTAINERS = {
    "list": lambda w, m: [w, {"m": m}],
    "tuple": lambda w, m: (w, [m]),
    "NamedTuple": Pair,
    "mapping": lambda w, m: Tables(w=w, m=m),
    "leaf": lambda w, m: w,
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_are_kept_and_others_are_told(kind):
    make = CONTAINERS[kind]
    parts = [[tensor(s + t, shape, "float32") for s, shape in ((0, (4, 3)), (9, (5,)))] for t in range(3)]
    base, *deltas = (make(*pair) for pair in parts)
    flat = [{"w": w, "m": m} for w, m in parts] if kind != "leaf" else [{"w": w} for w, _ in parts]
    for rule in ("average", "ties", "slerp", "iso", "fisher"):
        squares = lambda models: [jax.tree.map(jnp.square, d) for d in models]
        found = merge(rule, base, deltas, fishers=squares(deltas))
        wanted = merge(rule, flat[0], flat[1:], fishers=squares(flat[1:]))
        assert jax.tree.structure(found) == jax.tree.structure(base)
        by_size = lambda models: sorted(jax.tree.leaves(models), key=np.size)
        for x, y in zip(by_size(found), by_size(wanted), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        if kind != "leaf":
            told(functools.partial(merge, rule, base, flat[1:], fishers=squares(flat[1:])), "the parameters")


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_named_wherever_it_is(rule):
    base, deltas = trees(["float32"] * 3, 2, FEW)
    more, options = given(), OPTIONS.get(rule, {})

    def spoilt(x, name, bad):
        return tree.map_with_name(lambda n, y: y.at[(-1,) * y.ndim].set(bad) if n == name else y, x)

    for i, (name, bad) in enumerate([("m", np.nan), ("blocks/w", np.inf), ("m", -np.inf)]):
        wrong = list(deltas)
        wrong[i % 2] = spoilt(deltas[i % 2], name, bad)
        call = functools.partial(run, rule, base, wrong, more, **options)
        told(call, f"delta {i % 2} holds NaN or infinite numbers in {name}:")
        # On purpose it goes through, and no factorisation waits for ever. Some rules may drop it.
        if bad != np.inf:
            continue
        if "loss" in RULES[rule].needs:  # it comes to the solver, which has no weights to give
            told(functools.partial(call, check_finite=False), "a quadratic with numbers that aren't finite")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            through = call(check_finite=False)
        assert jax.tree.structure(through) == jax.tree.structure(base)
        if rule not in ("dare", "della", "breadcrumbs"):
            assert not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(through)), (rule, name)
    told(functools.partial(run, rule, spoilt(base, "m", np.nan), deltas, more, **options), "the base holds NaN")
    needs = RULES[rule].needs
    if "fishers" in needs:
        for bad, text in ((np.inf, "NaN or infinite numbers in m"), (-1.0, "an entry in m that is negative")):
            wrong = more | {"fishers": [more["fishers"][0], spoilt(more["fishers"][1], "m", bad)]}
            told(
                functools.partial(run, rule, base, deltas, wrong), f"Fisher 1 {'has' if bad == -1 else 'holds'} {text}"
            )
    if "factors" in needs:
        gram = more["factors"][1].inputs | {"m": more["factors"][1].inputs["m"].at[0, 0].set(np.nan)}
        wrong = more | {
            "factors": [more["factors"][0], Kronecker(gram, more["factors"][1].outputs, jnp.array(5), LAYOUT)]
        }
        told(
            functools.partial(run, rule, base, deltas, wrong, **options),
            "task 1's Kronecker factor of the inputs holds NaN",
        )
    if "matvecs" in needs:
        wrong = more | {"matvecs": [more["matvecs"][0], functools.partial(scaled, by=np.nan)]}
        told(
            functools.partial(run, rule, base, deltas, wrong, **options), "the curvature product of module 1 holds NaN"
        )
    if "landscape" in needs:
        told(
            functools.partial(run, rule, base, deltas, more | {"landscape": quadratic(np.nan, 2)}),
            "the landscape holds NaN",
        )
        told(  # let through, it comes to the solver, which has no weights to give
            functools.partial(run, rule, base, deltas, more | {"landscape": quadratic(np.nan, 2)}, check_finite=False),
            "a quadratic with numbers that aren't finite has no minimum",
        )


@pytest.mark.parametrize("rule", ["tsv", "iso", "karcher", "regmean", "wudi", "iso_cts", "dc_merge", "core_space"])
def test_a_traced_infinity_ends_in_nan_and_not_in_a_wait_for_ever(rule):
    base, more = {"m": jnp.zeros((5, 4))}, {"factors": given()["factors"]}
    if rule == "regmean":
        more["factors"] = [
            Kronecker({"m": f.inputs["m"]}, {"m": f.outputs["m"]}, f.count, LAYOUT[1:]) for f in more["factors"]
        ]
    one = {"m": tensor(0, (5, 4), "float32")}
    for bad in BAD[:2]:
        found = jax.jit(lambda d, r=rule: merge(r, base, [d, one], **more))({"m": one["m"].at[1, 2].set(bad)})
        assert np.any(np.isnan(found["m"]))


@pytest.mark.parametrize("rule", RULES)
def test_no_modules_empty_ones_and_other_trees_are_told(rule):
    base, deltas = trees(["float32"] * 3)
    more, options = given(), OPTIONS.get(rule, {})
    call = lambda b, d: lambda: run(rule, b, d, more, **options)
    told(call(base, []), "0 modules were given")
    nothing = jax.tree.map(lambda x: None, base)
    told(call(base, [deltas[0], nothing]), "delta 1 changes nothing")
    told(call({}, [{}, {}]), "delta 0 changes nothing")
    told(call(base, [deltas[0], {}]), "delta 1 doesn't fit the parameters: ")
    told(call(base, [deltas[0], deltas[1] | {"m": jnp.ones((4, 5))}]), "m is (4, 5) and should be (5, 4)")
    told(call(base, [deltas[0], deltas[1] | {"x": jnp.ones(3)}]), "x is unknown")
    told(call(base, [deltas[0] | {"v": jnp.arange(3)}, deltas[1]]), "delta 0 has a leaf v of type int32")
    told(call(base, [deltas[0] | {"s": "text"}, deltas[1]]), "delta 0 has a leaf s of type str")
    told(call(base | {"v": jnp.arange(3)}, deltas), "what the deltas are added to has a leaf v of type int32")
    told(call(base | {"v": jnp.ones(3, jnp.float8_e4m3fn)}, deltas), "leaf v of type float8")
    if RULES[rule].weighted:
        for weights, text in (([1.0], "1 weights were given for 2"), ([np.nan, 1], "finite"), (["a", 1], "one number"),
                              ([[1.0, 2.0], [3.0, 4.0]], "one number a module")):  # fmt: skip
            told(lambda w=weights: run(rule, base, deltas, more, weights=w, **options), text)
    else:
        told(lambda: run(rule, base, deltas, more, weights=[1.0, 1.0]), "takes no weights")


@pytest.mark.parametrize("rule", RULES)
def test_options_that_there_are_not_and_numbers_out_of_range_are_told(rule):
    base, deltas = {"m": tensor(0, (5, 4), "float32")}, [{"m": tensor(s, (5, 4), "float32")} for s in (1, 2)]
    more = given()
    more = {key: value for key, value in more.items() if key in RULES[rule].needs}
    call = lambda **options: lambda: merge(rule, base, deltas, **more, **options)
    told(call(densty=0.5), [f"the rule {rule!r} has no option densty; its options are "])
    ranges = {
        "scale": [np.nan, np.inf, "a", np.ones(3)], "density": [np.nan, 0.0, 1.5, -1], "rate": [np.nan, 1.0, -0.1],
        "damping": [-1.0, np.nan, np.inf, np.ones(2)], "t": [np.nan, np.inf, None], "tolerance": [np.nan, -1.0],
        "max_iterations": [-1, 2.5, np.nan], "scaling": [np.nan, -0.1, 1.1], "rule": ["mean"],
        "stacked": ["(", "nowhere", r"[m"], "anchor": [[1.0], [np.nan, 0.0]], "coordinates": ["rank"],
    }  # fmt: skip
    for option in options_of(rule):
        for value in ranges.get(option, []):
            told(
                call(**{option: value}), [option, "finite", "weights were given", "unknown rule", "regular expression"]
            )


def test_the_functions_beside_the_rules_are_right_in_narrow_types_and_tell_what_is_bad():
    with jax.enable_x64(True):
        wide = [{"m": np.asarray(tensor(s, (5, 4), "float32"), np.float64)} for s in (1, 2)]
        fishers = [{"m": np.asarray(tensor(s, (5, 4), "float32"), np.float64) ** 2} for s in (3, 4)]
        wanted = {
            "slerp": slerp(*wide, 0.3), "karcher": karcher_mean(wide, [1.0, 2.0]), "trim": trim(wide[0], 0.4),
            "fisher": fisher_merge(wide, fishers), "vector": task_vector(*wide),
            "cg": conjugate_gradients(lambda v: scaled(v, 3.0), wide[0]).x,
        }  # fmt: skip
        wanted = jax.tree.map(np.asarray, wanted)
    for dtype in ("float16", "bfloat16"):
        a, b = ({"m": jnp.asarray(x["m"], dtype)} for x in wide)
        found = {
            "slerp": slerp(a, b, 0.3), "karcher": karcher_mean([a, b], [1.0, 2.0]), "trim": trim(a, 0.4),
            "fisher": fisher_merge([a, b], [{"m": jnp.asarray(f["m"], "float32")} for f in fishers]),
            "vector": task_vector(a, b), "cg": conjugate_gradients(lambda v: scaled(v, 3.0), a).x,
        }  # fmt: skip
        for name, x in found.items():
            like(x, wanted[name], a, f"{name}, {dtype}")
        for bad in BAD[:1] if dtype == "float16" else BAD[1:]:
            wrong = {"m": a["m"].at[0, 0].set(bad)}
            key, same = jax.random.key(0), lambda v: v
            calls = [
                (slerp, a, wrong, 0.3), (karcher_mean, [a, wrong]), (trim, wrong, 0.4), (drop, key, wrong, 0.4),
                (fisher_merge, [a, wrong], [jax.tree.map(jnp.square, a)] * 2), (task_vector, wrong, b),
                (conjugate_gradients, same, wrong), (solve_merge, a, [wrong], [same]),
            ]  # fmt: skip
            for function, *arguments in calls:
                told(functools.partial(function, *arguments), "holds NaN or infinite numbers in m")
    told(
        lambda: drop(jax.random.key(0), {"m": jnp.full(9, 6e4, jnp.float16)}, 0.5),
        "numbers too large for their type come out in m (float16)",
    )
    told(lambda: slerp({}, {}, 0.5), "nothing to merge")
    told(lambda: conjugate_gradients(lambda v: {"m": v["m"][0]}, a), "the curvature product doesn't fit")
    big = {"m": jnp.full(3, 6e4, jnp.float16)}
    told(lambda: merge("task_arithmetic", big, [big], scale=1.0), "numbers too large for their type come out in m")


def factorised(jaxpr):
    """The ranks of all arrays that LAPACK gets."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("svd", "eigh", "lu", "cholesky", "qr", "geqrf", "triangular_solve"):
            yield equation.invars[0].aval.ndim
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from factorised(inner)


SINGULAR = ["tsv", "iso", "wudi", "iso_cts", "dc_merge", "cart", "knots", "core_space", "subspace_boosting", "esm"]


@pytest.mark.parametrize("rule", [*SINGULAR, "regmean", "kronecker", "ggn"])
def test_factorisations_are_of_one_matrix_at_a_time(rule):
    options = OPTIONS.get(rule, {}) | ({"coordinates": "modules"} if rule == "ggn" else {})
    traced = jax.make_jaxpr(functools.partial(run, rule, **options))(*trees(["float32"] * 3, 2, FEW))
    assert set(factorised(traced.jaxpr)) == {2}
