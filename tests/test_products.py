"""Hessian and Gauss-Newton products against dense matrices in float64, over trees, batches and devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, close, cross_entropy, dense_hessian, dense_jacobian, matrix, mlp, normal
from jax.flatten_util import ravel_pytree

from compo_jax.curvature import ggn, ggnvp, hessian, hvp
from compo_jax.curvature.batches import each, mean, stack
from compo_jax.mesh import DATA, data_mesh
from compo_jax.models import ViT

X64 = jax.enable_x64
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def random_like(params, seed=0):
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [normal((seed, i), *x.shape).astype(x.dtype) for i, x in enumerate(leaves)])


def probabilities(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def cross_entropy_ggn(case: Case):
    """Jᵀ H J of the mean over the whole data set, with H written in closed form."""
    inputs, _ = case.whole
    logits = np.asarray(jax.jit(case.apply)(case.params, inputs))
    p = probabilities(logits.reshape(-1, logits.shape[-1]))
    jacobian = dense_jacobian(case.apply, case.params, inputs).reshape(*p.shape, -1)
    curvature = np.einsum("nc,cd->ncd", p, np.eye(p.shape[1])) - p[:, :, None] * p[:, None, :]
    return np.einsum("nci,ncd,ndj->ij", jacobian, curvature, jacobian, optimize=True) / len(p)


def hessian_of(case: Case):
    return dense_hessian(cross_entropy(case.apply), case.params, *case.whole)


PRODUCTS = {
    "hessian": lambda case, **how: hessian(cross_entropy(case.apply), case.params, case.batches, **how),
    "ggn": lambda case, **how: ggn(case.apply, case.params, case.batches, **how),
}
DENSE = {"hessian": hessian_of, "ggn": cross_entropy_ggn}
kinds = pytest.mark.parametrize("kind", PRODUCTS)


@cache
def dense(kind, name):
    """The dense matrix of a row of the table, made once."""
    return DENSE[kind](next(case for case in CASES if case.name == name))


# --------------------------------------------------------------------------- against dense matrices


@cases
@kinds
def test_operators_equal_their_dense_matrices_over_uneven_batches(case, kind):
    with X64(True):
        found = matrix(PRODUCTS[kind](case), case.params)
        close(found, dense(kind, case.name))
        close(found, found.T)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_one_product_equals_the_dense_matrix_times_the_vector(case):
    with X64(True):
        vector = random_like(case.params)
        v = ravel_pytree(vector)[0]
        loss = cross_entropy(case.apply)
        found = jax.jit(lambda p, v, *batch: hvp(loss, p, v, *batch))(case.params, vector, *case.whole)
        close(ravel_pytree(found)[0], dense("hessian", case.name) @ v)
        found = jax.jit(lambda p, v, x: ggnvp(case.apply, p, v, x))(case.params, vector, case.whole[0])
        close(ravel_pytree(found)[0], dense("ggn", case.name) @ v)
        assert jax.tree.structure(found) == jax.tree.structure(case.params)


@pytest.mark.parametrize("kind, row", [("hessian", 0), ("hessian", 2), ("ggn", 0), ("ggn", 3)])
def test_float32(kind, row):
    case = CASES[row]
    with X64(True):
        expected = dense(kind, case.name)
    small = case.cast(np.float32)
    vector = random_like(small.params)
    found = jax.jit(PRODUCTS[kind](small))(vector)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}
    close(ravel_pytree(found)[0], expected @ np.asarray(ravel_pytree(vector)[0], np.float64), 1e-5)


def test_hvp_equals_central_differences_of_the_gradient():
    with X64(True):
        case = mlp()
        vector, gradient = random_like(case.params), jax.jit(jax.grad(cross_entropy(case.apply)))
        step = 1e-5  # balances a truncation of step² with a rounding of 1e-16 / step
        ahead, behind = (
            gradient(jax.tree.map(lambda p, v: p + sign * step * v, case.params, vector), *case.whole)  # noqa: B023
            for sign in (1, -1)
        )
        expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
        close(jax.jit(hessian(cross_entropy(case.apply), case.params, [case.whole]))(vector), expected, 1e-8)


def test_the_ggn_of_the_cross_entropy_is_the_fisher():
    with X64(True):
        case = mlp()
        inputs, _ = case.whole
        scores = dense_jacobian(lambda p, x: jax.nn.log_softmax(case.apply(p, x)), case.params, inputs)
        p = probabilities(np.asarray(case.apply(case.params, inputs)))
        fisher = np.einsum("nc,nci,ncj->ij", p, scores, scores) / len(p)
        close(matrix(ggn(case.apply, case.params, case.batches), case.params), fisher)


def test_a_linear_model_has_its_hessian_for_ggn():
    with X64(True):
        apply, params = lambda p, x: x @ p, normal(0, 4, 3)
        data = [(normal(1, 5, 4), np.array([0, 1, 2, 0, 1])), (normal(2, 2, 4), np.array([2, 2]))]
        close(
            matrix(ggn(apply, params, data), params),
            matrix(hessian(cross_entropy(apply), params, data), params),
        )


def squared_error(z, y):
    return jnp.sum((z - y) ** 2, axis=-1).mean()


def waves(z, y):  # neither convex nor a sum over outputs of one kind
    return jnp.mean(y[:, 0] * jnp.cos(z[:, 0]) + z[:, 1] ** 3 + z[:, 2] * z[:, 3])


def curvature_of_waves(z, y):
    h = np.zeros((*z.shape, z.shape[1]))
    h[:, 0, 0], h[:, 1, 1] = -y[:, 0] * np.cos(z[:, 0]), 6 * z[:, 1]
    h[:, 2, 3] = h[:, 3, 2] = 1
    return h


@pytest.mark.parametrize(
    "output_loss, curvature",
    [(squared_error, lambda z, y: np.broadcast_to(2 * np.eye(5), (len(z), 5, 5))), (waves, curvature_of_waves)],
)
def test_ggn_of_a_given_output_loss(output_loss, curvature):
    with X64(True):
        case = mlp()
        data = [(x, normal(len(y), len(y), 5)) for x, y in case.batches]
        inputs, targets = case._replace(batches=data).whole
        jacobian = dense_jacobian(case.apply, case.params, inputs)
        h = curvature(np.asarray(case.apply(case.params, inputs)), targets)
        expected = np.einsum("nci,ncd,ndj->ij", jacobian, h, jacobian) / len(targets)
        close(matrix(ggn(case.apply, case.params, data, output_loss=output_loss), case.params), expected)
        vector = random_like(case.params)
        found = ggnvp(case.apply, case.params, vector, inputs, targets, output_loss=output_loss)
        close(ravel_pytree(found)[0], expected @ ravel_pytree(vector)[0])


def test_an_output_loss_over_a_tree_of_outputs():
    with X64(True):
        case = mlp()
        inputs, labels = case.whole
        apply = lambda p, x: {"logits": case.apply(p, x), "norm": jnp.sum(p["in"] ** 2)[None]}
        output_loss = lambda z, y: cross_entropy(lambda p, x: p)(z["logits"], None, y) + z["norm"][0] ** 2
        found = matrix(lambda v: ggnvp(apply, case.params, v, inputs, labels, output_loss=output_loss), case.params)
        slope = np.concatenate([2 * case.params["in"].ravel(), np.zeros(len(found) - 18)])  # H is 2 for z²
        close(found, cross_entropy_ggn(case) + 2 * np.outer(slope, slope))


def test_logits_at_many_positions_are_summed_over_and_images_averaged():
    with X64(True):
        apply = lambda p, x: jnp.tanh(x @ p[0]) @ p[1]  # (batch, positions, classes)
        params = (normal(0, 3, 4), normal(1, 4, 3))
        labels = np.array([[0, 1], [2, 2], [1, 0]])
        case = Case("positions", apply, params, [(normal(2, 2, 2, 3), labels[:2]), (normal(3, 1, 2, 3), labels[2:])])
        close(matrix(ggn(apply, params, case.batches), params), 2 * cross_entropy_ggn(case))  # it takes the mean of 6


@pytest.mark.parametrize("hide", ["where", "add"])
def test_a_class_with_logit_minus_infinity_takes_no_part(hide):
    with X64(True):
        case = mlp()
        absent = jnp.array([False, False, False, True, True])
        if hide == "where":
            hidden = lambda p, x: jnp.where(absent, -jnp.inf, case.apply(p, x))
        else:
            hidden = lambda p, x: case.apply(p, x) + jnp.where(absent, -jnp.inf, 0)
        shown = case._replace(apply=lambda p, x: case.apply(p, x)[:, :3])
        expected = cross_entropy_ggn(shown)
        assert np.all(np.isfinite(expected)) and np.any(expected)
        close(matrix(ggn(hidden, case.params, case.batches), case.params), expected)


# --------------------------------------------------------------------------- ways of computing the same


@kinds
@pytest.mark.parametrize("how", ["1 device", "8 devices", "rematerialise"])
def test_devices_and_rematerialisation_change_nothing(kind, how):
    with X64(True):
        case = mlp(sizes=(8, 8, 3))
        vector = random_like(case.params)
        settings = {"rematerialise": True} if how == "rematerialise" else {"mesh": data_mesh(int(how.split()[0]))}
        found = jax.jit(PRODUCTS[kind](case, **settings))(vector)
        close(ravel_pytree(found)[0], DENSE[kind](case) @ ravel_pytree(vector)[0])


def test_batches_are_split_over_the_devices_unless_they_cannot_be():
    case = mlp(sizes=(8, 8, 3))
    data = stack(case.batches, data_mesh())
    assert [x["left"].shape for x, _ in data.groups] == [(2, 8, 3), (1, 3, 3)]
    eight, three = (x["left"].sharding for x, _ in data.groups)
    assert tuple(eight.spec) == (None, DATA) and three.is_fully_replicated
    assert eight.shard_shape((2, 8, 3)) == (2, 1, 3)
    assert data.counts == (8, 3)


def test_rematerialisation_recomputes():
    case = mlp().cast(np.float32)
    names = [
        str(jax.make_jaxpr(hessian(cross_entropy(case.apply), case.params, case.batches, rematerialise=r))(case.params))
        for r in (False, True)
    ]
    assert ["remat" in n or "checkpoint" in n for n in names] == [False, True]


@kinds
def test_many_vectors_jit_and_holes(kind):
    with X64(True):
        case = CASES[0]
        operator, expected = PRODUCTS[kind](case), dense(kind, case.name)
        vectors = jax.tree.map(lambda *x: np.stack(x), *[random_like(case.params, seed) for seed in range(3)])
        rows = lambda many: np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(many)], axis=1)
        several = jax.jit(lambda operator, v: jax.vmap(operator)(v))(operator, vectors)  # the operator is an argument
        close(rows(several), rows(vectors) @ expected)
        stacked = jax.jit(lambda operator, v: operator(v, stacked=True))(operator, vectors)
        close(rows(stacked), rows(vectors) @ expected)
        some = {"in": None, "out": vectors["out"]}
        close(rows(operator(some, stacked=True)), rows(jax.vmap(operator)(some)))

        vector, multiply = random_like(case.params), jax.jit(operator)
        nothing = jax.tree.map(np.zeros_like, vector)
        for holes, filled in (
            ({"in": None, "out": vector["out"]}, {"in": nothing["in"], "out": vector["out"]}),
            ({"in": vector["in"], "out": None}, {"in": vector["in"], "out": nothing["out"]}),  # of a whole subtree
            ({"in": None, "out": [None, None]}, nothing),
        ):
            found = multiply(holes)
            close(ravel_pytree(found)[0], expected @ ravel_pytree(filled)[0])
            assert jax.tree.structure(found) == jax.tree.structure(case.params)


def test_products_take_the_dtype_of_the_parameters():
    for dtype in (jnp.bfloat16, np.float32):
        case = mlp().cast(dtype)
        loss, vector = cross_entropy(case.apply), random_like(mlp().params)
        for product in (
            lambda v: hvp(loss, case.params, v, *case.whole),  # noqa: B023
            lambda v: ggnvp(case.apply, case.params, v, case.whole[0]),  # noqa: B023
            hessian(loss, case.params, case.batches),
            ggn(case.apply, case.params, case.batches),
        ):
            assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(product, vector))} == {np.dtype(dtype)}


def test_a_parameter_that_is_a_python_number():
    with X64(True):
        apply = lambda p, x: x * p["scale"] ** 2
        x, y = np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([[0.3, 0.1], [0.0, 2.0]])
        loss = lambda p, x, y: squared_error(apply(p, x), y)
        # With s the scale: d²/ds² of mean (s² x - y)² is mean of 12 s² x² - 4 x y, and J² H is mean of 8 s² x².
        expected = np.sum(12 * 9 * x**2 - 4 * x * y, axis=1).mean()
        close(hvp(loss, {"scale": 3.0}, {"scale": 2.0}, x, y)["scale"], 2 * expected)
        found = ggnvp(apply, {"scale": 3.0}, {"scale": 2.0}, x, y, output_loss=squared_error)["scale"]
        close(found, 2 * np.sum(8 * 9 * x**2, axis=1).mean())


def test_operators_are_made_under_jit_and_from_an_iterator():
    with X64(True):
        case = mlp()
        loss, vector = cross_entropy(case.apply), random_like(case.params)
        found = jax.jit(lambda p, b, v: hessian(loss, p, b)(v))(case.params, case.batches, vector)
        close(found, jax.jit(hessian(loss, case.params, iter(case.batches)))(vector))


def test_means_and_values_of_batches():
    batches = stack([(np.array([1.0, 3.0]),), (np.array([2.0]),), (np.array([5.0, 7.0]),)])
    moments = lambda x: {"square": (x**2).mean(), "value": x.mean()}
    close(mean(moments, batches), {"square": np.float32(88 / 5), "value": np.float32(18 / 5)}, 1e-6)
    values, fractions = each(moments, batches)
    found = sorted(zip(values["value"], values["square"], fractions, strict=True))
    np.testing.assert_allclose(sorted(found, key=lambda v: v[1]), [(2, 4, 0.2), (2, 5, 0.4), (6, 37, 0.4)], rtol=1e-6)


# --------------------------------------------------------------------------- cost


def flops(function, *args):
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def test_products_cost_few_gradients():
    # Written out, because XLA counts the body of a scan once.
    model = ViT(image_size=32, patch=8, width=96, depth=2, heads=3, classes=10, unroll=True)
    images, labels = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    eight = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), params)
    apply = lambda p, x: model.apply({"params": p}, x)
    loss = cross_entropy(apply)
    of_hessian = lambda v, p, x, y: hvp(loss, p, v, x, y)
    of_ggn = lambda v, p, x, y: ggnvp(apply, p, v, x)
    gradient = flops(jax.grad(loss), params, images, labels)
    for product, alone, of_eight in ((of_hessian, 2.8, 2.2), (of_ggn, 2.0, 1.5)):
        assert flops(product, params, params, images, labels) <= alone * gradient
        many = jax.vmap(product, (0, None, None, None))
        assert flops(many, eight, params, images, labels) <= 8 * of_eight * gradient


@pytest.mark.parametrize("wrap", [hvp, ggnvp])
def test_stacked_vectors_are_linearised_for_once_and_hold_no_more_than_one(wrap):
    case = mlp(sizes=(64, 64)).cast(np.float32)
    function, args = (cross_entropy(case.apply), case.whole) if wrap is hvp else (case.apply, case.whole[:1])

    def compiled(count):
        vectors = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), case.params)
        lowered = jax.jit(lambda v: wrap(function, case.params, v, *args, stacked=True)).lower(vectors)
        return lowered.compile()

    two, nine = compiled(2).memory_analysis(), compiled(9).memory_analysis()
    assert nine.temp_size_in_bytes <= 1.01 * two.temp_size_in_bytes + 4096


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({"w": np.zeros((2, 3)), "b": np.zeros((3, 1))}, "stacked vectors share the length of axis 0"),
        ({"w": np.zeros((0, 3)), "b": np.zeros((0, 1))}, "stacked vectors share the length of axis 0"),
        ({"w": np.zeros((2, 4)), "b": np.zeros((2, 1))}, r"each of the vectors doesn't fit .*w is \(4,\) .* \(3,\)"),
    ],
)
def test_stacked_vectors_that_do_not_fit_are_refused(vectors, message):
    params = {"w": np.zeros(3), "b": np.zeros(1)}
    with pytest.raises(ValueError, match=message):
        hvp(lambda p: jnp.sum(p["w"] ** 2) + p["b"][0] ** 2, params, vectors, stacked=True)


@kinds
def test_memory_does_not_grow_with_the_number_of_batches(kind):
    case = mlp(sizes=(64,)).cast(np.float32)
    temporary = []
    for count in (2, 8, 32):
        operator = PRODUCTS[kind](case._replace(batches=case.batches * count), check=False)
        compiled = jax.jit(lambda operator, v: operator(v)).lower(operator, case.params).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[0] > 0
    assert temporary == [temporary[0]] * 3


# --------------------------------------------------------------------------- refusals


def test_a_loss_that_draws_is_refused():
    case = mlp().cast(np.float32)
    numpy_generator = np.random.default_rng(0)
    keys = [jax.random.key(0)]

    def dropout_by_numpy(p, x):
        keep = numpy_generator.random(5) < 0.5
        return case.apply(p, x) * keep * 2

    def dropout_by_key(p, x):
        keys[0], key = jax.random.split(keys[0])
        return case.apply(p, x) * jax.random.bernoulli(key, 0.5, (5,)) * 2

    def fixed_key(p, x):
        return case.apply(p, x) * jax.random.bernoulli(jax.random.key(0), 0.5, (5,)) * 2

    def shuffled(p, x, y):
        return cross_entropy(case.apply)(p, x, y[numpy_generator.permutation(len(y))])

    for apply in (dropout_by_numpy, dropout_by_key):
        for make in (
            lambda **how: hessian(cross_entropy(apply), case.params, case.batches, **how),  # noqa: B023
            lambda **how: ggn(apply, case.params, case.batches, **how),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"two values at the same parameters.*deterministic=True"):
                make()
            make(check=False)
            keys[0] = jax.random.key(0)
    with pytest.raises(ValueError, match="don't shuffle"):
        hessian(shuffled, case.params, mlp(sizes=(32,)).batches)
    hessian(shuffled, case.params, case.batches, check=False)
    ggn(fixed_key, case.params, case.batches)
    hessian(cross_entropy(fixed_key), case.params, case.batches)


def test_an_output_loss_that_draws_is_refused():
    case = mlp().cast(np.float32)
    generator = np.random.default_rng(0)
    smoothed = lambda z, y: cross_entropy(lambda p, x: p)(z, None, y) * generator.random()
    with pytest.raises(ValueError, match="two values at the same parameters"):
        ggn(case.apply, case.params, case.batches, output_loss=smoothed)
    ggn(case.apply, case.params, case.batches, output_loss=smoothed, check=False)


def test_a_deterministic_loss_that_is_nan_or_infinite_is_not_taken_for_a_draw():
    case = mlp().cast(np.float32)
    hessian(lambda p, x, y: jnp.nan * jnp.sum(p["in"]), case.params, case.batches)
    hessian(lambda p, x, y: jnp.inf + jnp.sum(p["in"]), case.params, case.batches)


VECTORS = [
    ({"in": np.zeros((6, 3)), "out": [np.zeros((6, 5)), np.zeros(5)]}, r"in is \(6, 3\) and should be \(3, 6\)"),
    ({"in": np.zeros((3, 6)), "out": [np.zeros((6, 5))]}, "out/1 is missing"),
    ({"in": np.zeros((3, 6)), "out": [np.zeros((6, 5)), np.zeros(5)], "b": np.zeros(1)}, "b is unknown"),
    (
        {"in": np.zeros(3), "out": {"0": np.zeros((6, 5))}, "more": np.zeros(1)},
        r"the vector doesn't fit.*out/1 is missing; more is unknown; in is \(3,\) and should be \(3, 6\)",
    ),
]


@pytest.mark.parametrize("vector, message", VECTORS)
def test_a_vector_that_does_not_fit_is_refused_with_all_its_mismatches(vector, message):
    case = mlp().cast(np.float32)
    loss = cross_entropy(case.apply)
    for product in (
        lambda v: hvp(loss, case.params, v, *case.whole),
        lambda v: ggnvp(case.apply, case.params, v, case.whole[0]),
        hessian(loss, case.params, case.batches),
        ggn(case.apply, case.params, case.batches),
    ):
        with pytest.raises(ValueError, match=message):
            product(vector)


def test_parameters_that_cannot_be_differentiated_are_refused():
    case = mlp().cast(np.float32)
    params = {**case.params, "step": {"count": np.array(3)}}
    for make in (
        lambda p: hvp(cross_entropy(case.apply), p, p, *case.whole),
        lambda p: ggnvp(case.apply, p, p, case.whole[0]),
        lambda p: hessian(cross_entropy(case.apply), p, case.batches),
        lambda p: ggn(case.apply, p, case.batches),
    ):
        with pytest.raises(ValueError, match="params has a leaf step/count of type int32.*close over the others"):
            make(params)
        with pytest.raises(ValueError, match="params has no leaves"):
            make({"in": None})


x, y = np.ones((4, 3), np.float32), np.array([0, 1, 0, 1])
BATCHES = [
    ([], "there are no batches: an iterator that has been used up"),
    ([(x, y), (x[:0], y[:0])], "a batch without examples"),
    ([(x, y[:3])], r"must share the length of axis 0.*\(4, 3\), \(3,\)"),
    ([(x, np.array(1))], r"must share the length of axis 0.*\(4, 3\), \(\)"),
    ([()], "no arrays in a batch"),
    (
        [{"image": x, "label": y}],
        r"the tuple of what follows the parameters, \(images, labels\) say, not <class 'dict'>",
    ),
    ([[x, y]], "not <class 'list'>"),
    ([x], "not <class 'numpy.ndarray'>"),
]


@pytest.mark.parametrize("data, message", BATCHES)
def test_batches_that_make_no_data_set_are_refused(data, message):
    apply, params = lambda p, x: x @ p, np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=message):
        hessian(cross_entropy(apply), params, iter(data))
    with pytest.raises(ValueError, match=message):
        ggn(apply, params, iter(data))


def test_an_iterator_is_used_once():
    apply, params, data = lambda p, x: x @ p, np.ones((3, 2), np.float32), iter([(x, y)])
    ggn(apply, params, data)
    with pytest.raises(ValueError, match="used up"):
        ggn(apply, params, data)


def test_many_batches_in_16_bits_are_summed_in_32():
    loss = lambda p, x: jnp.mean(x) * p**2
    batches = [(np.ones(2, np.float32),)] * 3000
    product = hessian(loss, jnp.array(1, jnp.bfloat16), batches)(jnp.array(1, jnp.bfloat16))
    assert product.dtype == jnp.bfloat16
    assert product == 2


def test_empty_batches_and_other_containers_are_named():
    loss = lambda p, x: jnp.mean(x @ p["w"][0])
    params = {"w": [jnp.ones(3)]}
    with pytest.raises(ValueError, match="a batch without examples"):
        hvp(loss, params, params, jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="the vector has other containers than the parameters"):
        hvp(loss, params, {"w": (jnp.ones(3),)}, jnp.ones((2, 3)))


def test_an_operator_can_be_differentiated_in_what_its_loss_closes_over():
    def curvature(s):
        return hessian(lambda p, x: s * jnp.mean(x * p**2), jnp.array(1.0), [(np.full(4, 3.0, np.float32),)])(1.0)

    np.testing.assert_allclose(jax.grad(curvature)(2.0), 6.0)


@jax.custom_vjp
def layer(x, w):
    return jnp.tanh(x @ w)


layer.defvjp(lambda x, w: (layer(x, w), (x, w)), lambda xw, g: jax.vjp(lambda x, w: jnp.tanh(x @ w), *xw)[1](g))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
@kinds
def test_a_custom_reverse_derivative_changes_no_product(kind, wrap):
    with X64(True):
        params = (normal(0, 3, 4), normal(1, 4, 3))
        data = [(normal(2, 5, 3), np.array([0, 1, 2, 0, 1]))]
        custom = Case("custom", lambda p, x: wrap(layer)(x, p[0]) @ p[1], params, data)
        plain = custom._replace(apply=lambda p, x: jnp.tanh(x @ p[0]) @ p[1])
        vector = random_like(params)
        expected = PRODUCTS[kind](plain)(vector)
        close(PRODUCTS[kind](custom, check=False)(vector), expected)  # eager
        close(jax.jit(PRODUCTS[kind](custom))(vector), expected)
        close(
            hvp(cross_entropy(custom.apply), params, vector, *data[0]),
            hvp(cross_entropy(plain.apply), params, vector, *data[0]),
        )


@pytest.mark.parametrize(
    "shape, message", [((4, 1), "softmax of one logit is 1"), ((4,), "without an axis of classes")]
)
def test_logits_that_softmax_can_not_be_taken_of_are_refused(shape, message):
    apply = lambda p, x: (x @ p).reshape(shape)
    p = jnp.ones((3, 1))
    with pytest.raises(ValueError, match=message):
        ggnvp(apply, p, p, x)
    with pytest.raises(ValueError, match=message):
        ggn(apply, p, [(x, y)])(p)


def test_a_loss_that_is_no_single_number_is_refused():
    p = jnp.ones((3, 2))
    for product in (
        lambda: hvp(lambda p, x: (x @ p)[:, 0], p, p, x),
        lambda: hessian(lambda p, x: (x @ p)[:, 0], p, [(x,)])(p),
        lambda: ggnvp(lambda p, x: x @ p, p, p, x, output_loss=lambda z: z[:, 0]),
    ):
        with pytest.raises(ValueError, match=r"the loss is an array of shape \(4,\) .* the mean over the batch"):
            product()
