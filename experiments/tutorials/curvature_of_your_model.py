"""Curvature of a model of your own, in plain JAX, Equinox and Flax NNX: the functions ask for a pytree and a loss.

python experiments/tutorials/curvature_of_your_model.py        # a few seconds on a CPU; Equinox is optional
"""

import importlib.util

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from compo_jax import curvature

pixels, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)

# -- plain JAX: any function of any pytree -----------------------------------------------------------------------------
keys = jax.random.split(jax.random.key(0))
params = {"in": jax.random.normal(keys[0], (64, 32)) / 8, "out": jax.random.normal(keys[1], (32, 10)) / 6}


def apply(params, images):
    return jnp.tanh(images @ params["in"]) @ params["out"]


def loss(params, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()


step = jax.jit(lambda p: jax.tree.map(lambda w, g: w - 0.5 * g, p, jax.grad(loss)(p, images, labels)))
for _ in range(100):
    params = step(params)
print(f"loss after 100 steps: {loss(params, images, labels):.3f}")

# One product of the Hessian with a vector, exactly: forward over reverse, about two gradients.
direction = jax.grad(loss)(params, images, labels)
product = curvature.hvp(loss, params, direction, images, labels)
print("the Hessian times the gradient:", jax.tree.map(lambda x: x.shape, product))

# The operator of a whole data set, in batches; what asks for many products linearises once a batch.
hessian = curvature.hessian(loss, params, [(images[i : i + 600], labels[i : i + 600]) for i in range(0, 1797, 600)])
trace, error = curvature.trace(hessian, params, jax.random.key(1), 32)
print(f"its trace: {trace:.1f} ± {error:.1f} (Hutchinson, 32 probes)")
print("its largest eigenvalues:", curvature.top_eigenvalues(hessian, params, jax.random.key(2), 3).values)

# The Fisher's diagonal: exact (all classes of every image), or a cheap estimate where there are many classes.
exact = curvature.fisher_diagonal(apply, params, images[:256])
drawn = curvature.fisher_diagonal(apply, params, images[:256], method="monte_carlo", key=jax.random.key(3))
print(f"Fisher, summed: {exact.trace():.2f} exact, ", end="")
print(f"{drawn.trace():.2f} from one drawn label an image")

# -- Flax NNX: split the model into what is differentiated and the rest ------------------------------------------------
from flax import nnx

network = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(32, 10, rngs=nnx.Rngs(1)))
graph, state = nnx.split(network, nnx.Param)
fisher = curvature.fisher_diagonal(lambda state, x: nnx.merge(graph, state)(x), state, images[:256])
print("NNX:", fisher.trace())

# -- Equinox: the same with partition and combine ----------------------------------------------------------------------
if importlib.util.find_spec("equinox"):
    import equinox as eqx

    mlp = eqx.nn.MLP(64, 10, 32, 1, key=jax.random.key(0))
    weights, rest = eqx.partition(mlp, eqx.is_inexact_array)
    fisher = curvature.fisher_diagonal(lambda w, x: jax.vmap(eqx.combine(w, rest))(x), weights, images[:256])
    print("Equinox:", fisher.trace())
