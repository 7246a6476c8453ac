"""Every estimator under every output loss, against dense matrices in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, dense_jacobian, matrix, normal

from compo_jax import tree
from compo_jax.curvature import (
    FisherDiagonal,
    bernoulli_loss,
    eigenvalue_corrected,
    fisher_diagonal,
    ggn,
    ggnvp,
    kronecker,
    merge_kronecker,
    softmax_loss,
    squared_loss,
)
from compo_jax.curvature.columns import ranks

X64 = jax.enable_x64
N, CLASSES = 6, 4
WEIGHTS = [0.5, 2.0, 1.0, 0.0]
LOSSES = {
    "softmax": softmax_loss(),
    "smoothed": softmax_loss(smoothing=0.2),
    "weighted": softmax_loss(WEIGHTS),
    "weighted and smoothed": softmax_loss(np.array(WEIGHTS), 0.1),
    "bernoulli": bernoulli_loss(),
    "squares": squared_loss(),
}
losses = pytest.mark.parametrize("name", LOSSES)
tokens = pytest.mark.parametrize("tokens", [(), (3,)], ids=["one prediction", "tokens"])
METHODS = ("exact", "low_rank", "monte_carlo", "empirical")


def model(tokens):
    """(apply, params, inputs (N, *tokens, 3)): a weight that is one dense layer, and another that is not."""
    params = {"first": normal(0, 3, 2), "second": normal(1, 2, CLASSES)}
    return lambda p, x: jnp.tanh(x @ p["first"]) @ (2 * p["second"]), params, normal(2, N, *tokens, 3)


def targets_of(name, tokens):
    if LOSSES[name].classes:
        return jnp.asarray(np.random.default_rng(3).integers(CLASSES, size=(N, *tokens)))
    return jnp.asarray(np.random.default_rng(3).uniform(size=(N, *tokens, CLASSES)))


def dense(name, tokens):
    """(Jᵀ H J (images, params, params), scores (images, params)), H by `jax.hessian` of the loss written out here."""
    apply, params, x = model(tokens)
    y = targets_of(name, tokens)

    def value(z, y):  # one prediction
        if name == "squares":
            return 0.5 * jnp.sum((z - y) ** 2)
        if name == "bernoulli":
            return -jnp.sum(y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z))
        w = jnp.asarray(WEIGHTS if "weighted" in name else [1.0] * CLASSES)
        s = {"smoothed": 0.2, "weighted and smoothed": 0.1}.get(name, 0.0)
        log_p = jax.nn.log_softmax(z)
        return -(1 - s) * w[y] * log_p[y] - s / CLASSES * jnp.sum(w * log_p)

    z = np.asarray(apply(params, x)).reshape(-1, CLASSES)
    y = y.reshape(len(z), *y.shape[1 + len(tokens) :])
    jacobian = dense_jacobian(apply, params, x).reshape(*z.shape, -1)
    h = jax.vmap(jax.hessian(value))(z, y)
    gradient = jax.vmap(jax.grad(value))(z, y)
    each = np.einsum("nci,ncd,ndj->nij", jacobian, h, jacobian).reshape(N, -1, *jacobian.shape[2:] * 2).sum(axis=1)
    return each, np.einsum("nci,nc->ni", jacobian, gradient).reshape(N, -1, jacobian.shape[2]).sum(axis=1)


def flat(found):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])


@losses
@tokens
def test_the_diagonal_is_that_of_the_dense_gauss_newton_matrix(name, tokens):
    with X64(True):
        apply, params, x = model(tokens)
        each, scores = dense(name, tokens)
        options = {"output_loss": LOSSES[name], "labels": targets_of(name, tokens)}
        expected = np.diag(each.sum(axis=0))
        for method in ("exact", "low_rank"):
            found = fisher_diagonal(apply, params, x, method=method, tolerance=0.0, chunk=4, **options)
            close(flat(found.total), expected)
            np.testing.assert_allclose(found.captured, 1, atol=1e-12)
        close(flat(fisher_diagonal(apply, params, x, method="empirical", **options).total), (scores**2).sum(axis=0))
        if tokens == ():
            part = fisher_diagonal(apply, params, x, method="low_rank", tolerance=0.4, **options)
            assert 0.6 <= part.captured < 1 and np.all(flat(part.total) <= expected + 1e-12)
            return
        draw = lambda key: fisher_diagonal(apply, params, x, method="monte_carlo", key=key, **options).total
        draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
        draws = np.concatenate([np.reshape(d, (4000, -1)) for d in jax.tree.leaves(draws)], axis=1)
        error = (draws.mean(axis=0) - expected) / (draws.std(axis=0) / np.sqrt(4000))
        assert np.abs(error).max() < 4


@losses
@tokens
def test_the_product_is_that_with_the_dense_gauss_newton_matrix(name, tokens):
    with X64(True):
        apply, params, x = model(tokens)
        expected, y = dense(name, tokens)[0].mean(axis=0), targets_of(name, tokens)
        close(matrix(lambda v: ggnvp(apply, params, v, x, y, output_loss=LOSSES[name]), params), expected)
        vector = jax.tree.map(lambda p: normal(7, *p.shape), params)
        operator = ggn(apply, params, [(x[:4], y[:4]), (x[4:], y[4:])], output_loss=LOSSES[name])
        close(flat(operator(vector)), expected @ flat(vector))


@losses
def test_kronecker_factors_are_exact_for_one_layer_and_image_and_corrected_ones_keep_the_trace(name):
    with X64(True):
        w, x, y = {"w": normal(0, 3, CLASSES)}, normal(1, 1, 3), targets_of(name, ())[:1]
        apply = lambda p, x: x @ p["w"]
        options = {"output_loss": LOSSES[name], "labels": y}
        exact = matrix(lambda v: ggnvp(apply, w, v, x, y, output_loss=LOSSES[name]), w)
        for method in ("exact", "low_rank"):
            found = kronecker(apply, w, x, method=method, tolerance=0.0, **options)
            close(matrix(found.matvec, w), exact)
        close(matrix(eigenvalue_corrected(found, apply, w, x, **options).matvec, w), exact)
        score = jax.grad(lambda p: LOSSES[name].value(apply(p, x)[0], y[0]))(w)["w"].ravel()
        close(matrix(kronecker(apply, w, x, method="empirical", **options).matvec, w), np.outer(score, score))


def test_a_sigmoid_is_a_softmax_of_two_classes_whatever_the_shape_of_its_logit():
    with X64(True):
        w, x = normal(0, 3), normal(1, N, 3)
        two = fisher_diagonal(lambda p, x: jnp.stack([x @ p, jnp.zeros(len(x))], axis=1), w, x).total
        z = x @ w
        close(two, np.sum((x**2).T / (2 + np.exp(z) + np.exp(-z)), axis=1))
        for apply in (lambda p, x: x @ p, lambda p, x: (x @ p)[:, None]):
            for method in ("exact", "low_rank"):
                found = fisher_diagonal(apply, w, x, output_loss=bernoulli_loss(), method=method)
                close(found.total, two)


@pytest.mark.parametrize("loss", [softmax_loss(), softmax_loss(WEIGHTS, 0.1)], ids=["plain", "weighted"])
@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_is_not_there_takes_no_part(loss, method):
    with X64(True):
        apply, params, x = model(())
        labels = jnp.array([0, 1, 2, 0, 1, 2])
        hidden = lambda p, x: jnp.where(jnp.arange(CLASSES) < 3, apply(p, x), -jnp.inf)
        shown = loss if loss.weight is None else softmax_loss(WEIGHTS[:3], 0.1)
        options = {"method": method, "labels": labels, "key": jax.random.key(0), "tolerance": 0.0}
        found = fisher_diagonal(hidden, params, x, output_loss=loss, **options)
        if method == "monte_carlo":  # other numbers are drawn for three
            assert np.all(np.isfinite(flat(found.total)))
            return
        expected = fisher_diagonal(lambda p, x: apply(p, x)[:, :3], params, x, output_loss=shown, **options)
        close(found.total, expected.total)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compiled", [False, True])
def test_ignored_labels_take_no_part_and_are_not_counted(method, compiled):
    with X64(True):
        apply, params, x = model(())
        labels = jnp.array([-100, 1, 2, -100, 0, 3])
        keep = np.array([1, 2, 4, 5])
        how = {"method": method, "tolerance": 0.0, "chunk": 2}
        of = lambda p, x, y, **more: fisher_diagonal(apply, p, x, labels=y, **how, **more)
        ignoring = partial(of, ignore=-100, key=jax.random.key(0))
        found = (jax.jit(ignoring) if compiled else ignoring)(params, x, labels)
        assert found.count == 4
        if method != "monte_carlo":
            close(found.total, of(params, x[keep], labels[keep]).total)
        w = {"first": params["first"]}
        only = lambda p, x: apply({**params, **p}, x)
        factors = kronecker(only, w, x, labels=labels, ignore=-100, key=jax.random.key(0), **how)
        assert factors.count == 4
        close(factors.inputs["first"], x[keep].T @ x[keep] / 4)


def test_ignored_tokens_take_no_part_and_images_without_others_are_not_counted():
    with X64(True):
        apply, params, x = model((3,))
        labels = np.array(targets_of("softmax", (3,)))
        labels[0, 1:], labels[2] = -1, -1
        shorter = fisher_diagonal(apply, params, x[:1, :1]).total
        whole = fisher_diagonal(apply, params, x[[1, 3, 4, 5]]).total
        for method in ("exact", "low_rank"):
            found = fisher_diagonal(apply, params, x, labels=labels, ignore=-1, method=method, tolerance=0.0)
            assert found.count == 5
            close(found.total, jax.tree.map(jnp.add, shorter, whole))
        batches = [(x[:2], labels[:2]), (x[2:3], labels[2:3]), (x[3:], labels[3:])]  # of the second nothing takes part
        operator = ggn(apply, params, batches, ignore=-1)
        assert operator.count == 5
        close(operator.diagonal(), found.mean)
        close(ggnvp(apply, params, params, x, labels, ignore=-1), operator(params))
        with pytest.raises(ValueError, match="ignore=-1 is one of the labels: give labels after the inputs"):
            ggnvp(apply, params, params, x, ignore=-1)
        with pytest.raises(ValueError, match="ignore=-1 is for softmax_loss"):
            ggnvp(apply, params, params, x, labels, ignore=-1, output_loss=lambda z, y: jnp.mean(z))


BAD = [
    ({"labels": [0, 1, -1, 2, 0, 1]}, ValueError, r"labels\[2\] is -1, and 1 of 6 are out of range.* 0 to 3.*ignore="),
    ({"labels": [1, 2, 3, 4, 1, 4]}, ValueError, r"labels\[3\] is 4, and 2 of 6 .*: classes count from 0"),
    ({"labels": [-100] * 6}, ValueError, r"labels\[0\] is -100, and 6 of 6"),
    ({"labels": [-100] * 6, "ignore": -100}, ValueError, "all labels are -100, which ignore= leaves out"),
    ({"labels": [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]}, ValueError, "labels are float64: they must be integers"),
    ({"labels": [[0]] * 6}, ValueError, r"labels of shape \(6, 1\); they must be \(6,\)"),
    (
        {"labels": [0] * 6, "output_loss": softmax_loss([1.0, 2.0])},
        ValueError,
        "2 class weights were given, .* 4 classes",
    ),
    ({"labels": [[2.0] * 4] * 6, "output_loss": bernoulli_loss()}, ValueError, r"targets\[0, 0\] is 2.0.*0.0 to 1.0"),
    ({"labels": [[np.nan] * 4] * 6, "output_loss": squared_loss()}, ValueError, r"targets\[0, 0\] is nan"),
    ({"labels": [[1.0] * 4] * 6, "output_loss": squared_loss(), "ignore": 1}, ValueError, "not classes"),
    ({"method": "exact", "output_loss": softmax_loss(WEIGHTS)}, ValueError, "weighs examples .*: give labels"),
    ({"method": "exact", "ignore": -1}, ValueError, "no labels are given"),
    ({"method": "exact", "output_loss": lambda z, y: 0.0}, TypeError, "must be softmax_loss.*ggn and ggnvp take any"),
    ({"method": "monte_carlo", "key": 0}, ValueError, "needs a key: key=jax.random.key"),
    ({"method": "low_rank", "tolerance": np.nan}, ValueError, "tolerance, .* is nan"),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_bad_labels_losses_and_options_are_refused_by_name(options, error, message):
    with X64(True):
        apply, params, x = model(())
        with pytest.raises(error, match=message):
            fisher_diagonal(apply, params, x, **{"method": "empirical", **options})
        w = {"first": params["first"]}
        with pytest.raises(error, match=message):
            kronecker(lambda p, x: apply({**params, **p}, x), w, x, **{"method": "empirical", **options})


def test_traced_labels_out_of_range_make_the_total_nan():
    of = lambda y: fisher_diagonal(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((2, 3)), method="empirical", labels=y)
    for wrong in (-1, 2):
        assert np.isnan(jax.jit(of)(jnp.array([0, wrong])).total).all()
    assert np.isfinite(jax.jit(of)(jnp.array([0, 1])).total).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape, message", [((4, 1), "softmax of one logit is 1"), ((4,), "without an axis of classes")]
)
def test_logits_of_one_class_or_none_are_refused(method, shape, message):
    w, x, options = {"w": jnp.ones((3, 1))}, jnp.ones((4, 3)), {"method": method, "key": jax.random.key(0)}
    apply = lambda p, x: (x @ p["w"]).reshape(-1, *shape[1:])
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(apply, w, x, labels=np.zeros(4, int), **options)
    with pytest.raises(ValueError, match=message):
        kronecker(apply, w, x, labels=np.zeros(4, int), **options)


def test_models_that_put_out_something_else_are_refused():
    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    for apply, message in (
        (lambda p, x: {"logits": x @ p}, "apply returns <class 'dict'>: the predictions must be one array"),
        (lambda p, x: (x @ p).astype(int), "apply returns int32"),
        (lambda p, x: (x @ p).sum(axis=0), r"shape \(2,\) for 4 images"),
        (lambda p, x: (x @ p)[:, :0], "no predictions in it"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher_diagonal(apply, w, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_function_whose_rows_depend_on_each_other_is_refused(dtype):
    with X64(True):
        w, x = jnp.asarray(normal(0, 3, 4), dtype), jnp.asarray(normal(1, 5, 3), dtype)

        def normalised(p, x):
            y = x @ p
            return (y - y.mean(axis=0)) / jnp.sqrt(y.var(axis=0) + 1e-3)

        with pytest.raises(ValueError, match="depend on the others in the batch.*BatchNorm in training mode"):
            fisher_diagonal(normalised, w, x)
        with pytest.raises(ValueError, match="depend on the others in the batch"):
            kronecker(lambda p, x: normalised(p["w"], x), {"w": w}, x)
        fisher_diagonal(normalised, w, x[:1])
        deep = lambda p, x: jnp.tanh(100 * jnp.tanh(x @ p) @ p.T) @ p
        fisher_diagonal(deep, w, x)


def test_a_mean_of_fishers_and_of_factors_counts_images_rightly():
    with X64(True):
        apply, params, x = model(())
        whole, a, b = (fisher_diagonal(apply, params, part) for part in (x, x[:2], x[2:]))
        average = tree.weighted_sum([a, b], [0.5, 0.5])
        assert average.count == 3
        close(average.mean, whole.mean)
        with pytest.raises(ValueError, match="the mean of a Fisher over 0 images"):
            _ = FisherDiagonal(a.total, jnp.array(0), a.captured).mean
        w = {"first": params["first"]}
        of = lambda x: kronecker(lambda p, x: apply({**params, **p}, x), w, x)
        merged = merge_kronecker([of(x[:2]), of(x[2:])])
        close((merged.inputs, merged.outputs), (of(x).inputs, of(x).outputs))
        for weights in ([np.nan, 1.0], [-1.0, 2.0]):
            with pytest.raises(ValueError, match="weights must be finite and not negative"):
                merge_kronecker([of(x), of(x)], weights)


def test_factors_and_traces_of_16_bits_grow_in_32():
    w = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    found = kronecker(lambda p, x: x @ p["w"], w, jnp.ones((3000, 2), jnp.bfloat16), chunk=1)
    np.testing.assert_allclose(found.inputs["w"], np.ones((2, 2)), rtol=1e-6)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), found)
    assert stored.trace().dtype == stored.eigen().trace().dtype == jnp.float32


def test_losses_that_make_no_sense_are_refused():
    for weights in ([-1.0, 1.0], [np.nan, 1.0], np.array([[1.0]])):
        with pytest.raises(ValueError, match="class weights are one number for each class"):
            softmax_loss(weights)
    for smoothing in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="smoothing"):
            softmax_loss(smoothing=smoothing)


def test_traced_class_weights_weigh_as_others():
    z, label, weights = jnp.array([0.5, -1.0, 2.0]), jnp.array(1), jnp.array([1.0, 2.0, 3.0])
    traced = jax.jit(lambda w: softmax_loss(w).value(z, label))(weights)
    np.testing.assert_allclose(traced, softmax_loss(weights).value(z, label), rtol=1e-6)
    with pytest.raises(ValueError, match="class weights are one number for each class"):
        jax.jit(lambda w: softmax_loss(w).value(z, label))(weights[:, None])


def test_an_image_that_is_all_but_certain_needs_no_more_columns_in_float32():
    logits = np.zeros((1, 1, 1000), np.float32)
    logits[..., 0], logits[..., 1:11] = 30, 10
    part, needed = jnp.ones((1, 1), bool), {}
    for wide in (False, True):
        with X64(wide):
            needed[wide] = int(ranks(softmax_loss(), jnp.asarray(logits, float), part, 1e-2)[0][0, 0])
    assert needed[False] == needed[True] == 10
    p = np.exp(logits[0, 0].astype(np.float64) - 30)
    p /= p.sum()
    others = p.sum() - p  # of the largest: what is left of it
    others[0] = p[1:].sum()
    np.testing.assert_allclose(softmax_loss().pivoted(jnp.asarray(logits[0, 0])).left[0], p @ others, rtol=1e-5)
