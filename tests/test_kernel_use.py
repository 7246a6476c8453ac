"""Kernels that a Linen model uses otherwise than a dense layer does: the fast pass is base + delta, or says that it
can't be."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import adapters

X = jax.random.normal(jax.random.key(0), (4, 6))


class Shared(nn.Module):
    """Its decoder is tied, and used where it is asked for."""

    @nn.compact
    def __call__(self, x, reconstruct=False):
        encoder = nn.Dense(5, use_bias=False)
        h = encoder(x)
        return h @ encoder.variables["params"]["kernel"].T if reconstruct else h


def standardised(variables):
    return jax.tree.map(lambda w: (w - w.mean(0)) / (w.std(0) + 1e-5) if w.ndim == 2 else w, variables)


class Standardised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.map_variables(nn.Dense, "params", standardised, init=True, mutable=False)(3)(x)


class Transposed(nn.Module):
    """Its layer gets the kernel on its side."""

    @nn.compact
    def __call__(self, x):
        turn = lambda variables: jax.tree.map(jnp.transpose, variables)
        layer = nn.map_variables(nn.Dense, "params", turn, turn, init=True, mutable=True)
        return layer(6, use_bias=False)(x)


@dataclasses.dataclass
class Product:
    """Has no hash."""

    scale: float = 1.0

    def __call__(self, a, b, dimensions, precision=None, preferred_element_type=None):
        return self.scale * jax.lax.dot_general(a, b, dimensions)


def halved(a, b, dimensions, precision=None, preferred_element_type=None):
    return jax.lax.dot_general(a, b / 2, dimensions)


def in_two_steps(a, b, dimensions, precision=None, preferred_element_type=None):
    return jax.lax.dot_general(a, b / 2, dimensions) * 2


class OwnProduct(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dot_general=halved)(x)


class Cached(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6)(jnp.tanh(nn.Dense(8)(x)))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(x)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6)(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(inputs=x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.remat(nn.Dense)(6)(jnp.tanh(nn.Dense(6, dtype=jnp.float32)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "adapter": 0}
        return nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "adapter": 0}
        return nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=3)(5)(x)


class Branched(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5)
        layer(x)
        return nn.cond(x.sum() > 0, lambda _, x: layer(x), lambda _, x: 2 * layer(x), self, x)


def made(model):
    """(the adapter, the model's variables, a module that changes them)."""
    stacked = "kernel" if isinstance(model, Scanned | Mapped) else ()
    variables, adapter = model.init(jax.random.key(1), X), adapters.lora(2, "kernel", stacked=stacked)
    module = adapter.init(jax.random.key(2), variables["params"])
    noise = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)
    return adapter, variables, jax.tree.map(noise, module)


IN_TWO_STEPS = nn.Dense(3, dot_general=in_two_steps)


@pytest.mark.parametrize("model", [Shared(), IN_TWO_STEPS, Normalised(), Scanned(), Mapped(), Branched()])
def test_the_fast_pass_is_base_and_delta(model):
    adapter, variables, module = made(model)
    others = {name: x for name, x in variables.items() if name != "params"}
    whole = variables | {"params": adapters.merged(lambda params: params, adapter)(variables["params"], module)}
    for wrap in (lambda f: f, jax.jit):
        fast = wrap(partial(adapters.adapted(model, adapter), variables=others))
        np.testing.assert_allclose(fast(variables["params"], module, X), model.apply(whole, X), atol=1e-5)
    by_sum, delta = adapters.adapted(model, adapters.full("kernel")), adapter.delta(module, variables["params"])
    summed = by_sum(variables["params"], delta, X, variables=others)
    np.testing.assert_allclose(summed, model.apply(whole, X), atol=1e-5)


@pytest.mark.parametrize("model, told", [
    (Standardised(), "changes .*/kernel before a layer gets it, as nn.map_variables does"),
    (Transposed(), "changes .*/kernel before a layer gets it"),
    (nn.Dense(3, dot_general=Product()), "not kernels of nn.Dense layers with the usual product"),
    (OwnProduct(), "not kernels of nn.Dense layers with the usual product"),
    (Cached(), "nn.jit answers from its cache"),
    (Boxed(), "boxes of nn.with_partitioning: take them out by flax.linen.meta.unbox"),
])  # fmt: skip
def test_a_pass_that_would_be_another_is_refused(model, told):
    adapter, variables, module = made(nn.Dense(6) if isinstance(model, Boxed) else model)
    if isinstance(model, Boxed):
        variables = model.init(jax.random.key(1), X)
    with pytest.raises(ValueError, match=told):
        adapters.adapted(model, adapter)(variables["params"], module, X)


def test_every_way_through_a_model_is_looked_at():
    adapter, variables, module = made(Shared())
    forward = adapters.adapted(Shared(), adapter)
    forward(variables["params"], module, X)
    for _ in range(2):
        with pytest.raises(ValueError, match="reads Dense_0/kernel outside of nn.Dense layers, too"):
            forward(variables["params"], module, X, reconstruct=True)
    forward(variables["params"], module, X[:2], reconstruct=False)
