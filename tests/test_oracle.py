"""Against PyTorch and curvlinops (Dangel et al., 2025), where they are installed: the same weights, the same images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, cross_entropy, normal

torch = pytest.importorskip("torch")
curvlinops = pytest.importorskip("curvlinops")

from compo_jax import tree  # noqa: E402
from compo_jax.curvature import fisher_diagonal, ggn, hessian  # noqa: E402
from compo_jax.models import from_timm, to_timm  # noqa: E402

X64 = jax.enable_x64
nn = torch.nn


class Norm(nn.LayerNorm):
    """Written out: under vmap, PyTorch 2.13's own has wrong second derivatives (against finite differences)."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred**2).mean(-1, keepdim=True).add(self.eps).sqrt() * self.weight + self.bias


class Block(nn.Module):
    def __init__(self, width, heads, hidden, norm):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (norm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        n, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(n, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Transformer(nn.Module):
    """A Vision Transformer under timm's names, its attention written out so that PyTorch can differentiate it twice."""

    def __init__(self, size, patch, width, depth, heads, classes, norm=Norm):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*[Block(width, heads, 4 * width, norm) for _ in range(depth)])
        self.norm = norm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


def set_randomly(model, scale):
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.from_numpy(normal(i, *parameter.shape, scale=scale)))
    return model


def arrays_of(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def perceptron():
    """(PyTorch's model and images, `apply`, our parameters and images, from a tree of ours to theirs, back)."""
    model = set_randomly(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double(), 0.8)
    x = normal(9, 7, 4)
    apply = lambda p, x: jnp.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
    return model, torch.from_numpy(x), apply, arrays_of(model), x, dict, dict


def transformer():
    model = set_randomly(Transformer(8, 4, 6, 2, 2, 5).double(), 0.4)
    x = normal(9, 7, 8, 8, 3)
    ours, params = from_timm(arrays_of(model), heads=2)
    back = lambda arrays: from_timm(arrays, heads=2)[1]
    apply = lambda p, x: ours.apply({"params": p}, x)
    return model, torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), apply, params, x, to_timm, back


LABELS = np.array([0, 1, 2, 3, 4, 0, 3])
models = pytest.mark.parametrize("pair", [perceptron, transformer])


def batches(x, y):
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def arguments(model, images):
    """What curvlinops' operators take."""
    data = batches(images, torch.from_numpy(LABELS))
    return model, nn.CrossEntropyLoss(), list(model.parameters()), data


def same(found, expected, rtol=1e-9):
    """Two mappings from PyTorch's names, up to `rtol` of the largest entry of all."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=rtol * largest, err_msg=name)


@models
def test_the_models_are_the_same(pair):
    with X64(True):
        model, images, apply, params, x, _, _ = pair()
        close(jax.jit(apply)(params, x), model(images).detach().numpy(), 1e-12)


@models
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_equal_those_of_curvlinops(pair, kind):
    with X64(True):
        model, images, apply, params, x, theirs, ours = pair()
        vector = {name: normal((1, i), *p.shape) for i, (name, p) in enumerate(model.named_parameters())}
        operator = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[kind]
        operator = operator(*arguments(model, images))
        expected = operator @ [torch.from_numpy(v) for v in vector.values()]
        expected = {name: x.detach().numpy() for name, x in zip(vector, expected, strict=True)}
        if kind == "hessian":
            multiply = hessian(cross_entropy(apply), params, batches(x, LABELS))
        else:
            multiply = ggn(apply, params, batches(x, LABELS))
        same(theirs(jax.jit(multiply)(ours(vector))), expected)


def squared_scores(model, images):
    """For each parameter (images, classes, ...): the squares of the gradients of log p_c, by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_p(parameters, image):
        return torch.func.functional_call(model, parameters, image[None])[0].log_softmax(0)

    scores = torch.func.vmap(torch.func.jacrev(log_p), (None, 0))(parameters, images)
    return {name: (g**2).numpy() for name, g in scores.items()}


@models
def test_fisher_diagonals_equal_those_of_torch_func(pair):
    with X64(True):
        model, images, apply, params, x, theirs, _ = pair()
        squares, p = squared_scores(model, images), model(images).detach().softmax(1).numpy()
        found = jax.jit(lambda p, x: fisher_diagonal(apply, p, x))(params, x)
        same(theirs(found.total), {name: np.einsum("nc,nc...->...", p, g) for name, g in squares.items()})
        found = jax.jit(lambda p, x, y: fisher_diagonal(apply, p, x, method="empirical", labels=y))(params, x, LABELS)
        same(theirs(found.total), {name: g[np.arange(7), LABELS].sum(0) for name, g in squares.items()})


def test_fisher_diagonals_equal_those_of_the_dense_matrices_of_curvlinops():
    with X64(True):
        model, images, apply, params, x, _, _ = perceptron()
        identity = torch.eye(tree.size(params), dtype=torch.float64)
        for operator, method in ((curvlinops.GGNLinearOperator, "exact"), (curvlinops.EFLinearOperator, "empirical")):
            diagonal = (operator(*arguments(model, images)) @ identity).diagonal().numpy()
            found = jax.jit(lambda p, x, y: fisher_diagonal(apply, p, x, method=method, labels=y))  # noqa: B023
            found = found(params, x, LABELS).mean
            # Not jax.tree.leaves: a dictionary's are in the order of its sorted keys.
            close(np.concatenate([np.ravel(found[name]) for name, _ in model.named_parameters()]), diagonal, 1e-9)
