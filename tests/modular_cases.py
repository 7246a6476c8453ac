"""A small modular network, its variables away from their start, and tasks that it can learn."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.data import Task, TaskStream
from compo_jax.data.splits import ArraySplit
from compo_jax.mesh import data_mesh
from compo_jax.modular import ModularNet, Network
from compo_jax.train import jit_runner

ONE_DEVICE = partial(jit_runner, mesh=data_mesh(1))


def images(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moved(variables, seed=0):
    """The variables with noise, so that no scale is 1, no mean 0, and every route has a clear argmax."""
    random = np.random.default_rng(seed)

    def move(name, x):
        noise = random.normal(size=x.shape).astype(np.float32)
        if name.endswith(("var", "scale")):
            noise = 0.3 * np.abs(noise)
        else:
            noise *= 2.0 if name.endswith("route") else 0.1
        return jnp.array(np.asarray(x) + noise)

    return tree.map_with_name(move, variables)


def start(net, seed=0):
    """Variables as `net.init` makes them but for the very numbers, without compiling a forward pass."""
    random = np.random.default_rng([seed, 1])
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((len(net.classes), 2, 4, 4, 3)))

    def make(name, x):
        if name.endswith(("scale", "var")):
            return jnp.ones(x.shape)
        if name.endswith(("bias", "mean")):
            return jnp.zeros(x.shape)
        fan_in = np.prod(x.shape[-4:-1]) if len(x.shape) > 3 else x.shape[0]
        deviation = 0.01 if name.endswith("route") else np.sqrt(2 / fan_in)
        return jnp.array(deviation * random.normal(size=x.shape), jnp.float32)

    return tree.map_with_name(make, shapes)


@cache
def small(classes=(3, 2), **options):
    """A network with moved variables."""
    net = ModularNet(classes, **{"layers": 3, "templates": 3, "width": 8, "patch": 2, "route": "hard"} | options)
    return Network(net, moved(start(net)))


@cache
def stream(tasks=2, classes=3, count=24, size=4, names=None):
    """Tasks whose classes are noisy copies of random pictures; the test images are others."""
    random = np.random.default_rng(3)
    made = []
    for t in range(tasks):
        pictures = random.integers(0, 255, (classes, size, size, 3))
        splits = []
        for part in (count, 8):
            labels = np.tile(np.arange(classes), part)
            noisy = pictures[labels] + random.normal(0, 40, (len(labels), size, size, 3))
            splits.append(ArraySplit(np.clip(noisy, 0, 255).astype(np.uint8), labels))
        made.append(Task(f"task-{t}", names or tuple(f"{t}{c}" for c in range(classes)), *splits))
    return TaskStream("pictures", tuple(made), size)


def trains(made):
    return [task.train for task in made.tasks]


def held_out(made):
    return [task.test for task in made.tasks]


def identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def changed(before, after):
    """The paths of the leaves that differ by a bit or more."""
    leaves = zip(tree.names(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {name for name, x, y in leaves if not np.array_equal(x, y)}
