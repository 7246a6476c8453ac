"""The dense layers of any function: what goes into each, and the gradient that comes back out of it.

A weight's gradient for one image is `xᵀ δ`, with x (tokens, in) the layer's inputs and δ (tokens, out) the gradient of
its outputs: both are far smaller than the gradients of all images, and Kronecker factors are made of nothing else. The
layers are found in the function's jaxpr, so that no framework has to be known.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.tree import Tree


class Dense(NamedTuple):
    """How one weight is laid out, and how many vectors it multiplies for one image.

    Attributes:
      stack: leading axes of the leaf that scans run over, such as (depth,).
      contracted, free: the other axes that meet the input, and those that make the output.
      shape: the leaf's shape without the stack.
      tokens: input vectors of an image and a layer.
    """

    stack: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    shape: tuple[int, ...]
    tokens: int

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)."""
        return tuple(math.prod(self.shape[i] for i in axes) for axes in (self.contracted, self.free))

    def matrix(self, leaf: Array) -> Float[Array, "*stack in out"]:
        """The leaf as the matrix that input vectors are multiplied by from the left."""
        at = len(self.stack)
        order = (*range(at), *(at + i for i in self.contracted + self.free))
        return leaf.transpose(order).reshape(*self.stack, *self.sizes)

    def leaf(self, matrix: Float[Array, "*stack in out"]) -> Array:
        """The inverse of `matrix`."""
        at, axes = len(self.stack), self.contracted + self.free
        moved = matrix.reshape(*self.stack, *(self.shape[i] for i in axes))
        return moved.transpose(*range(at), *(at + axes.index(i) for i in range(len(axes))))


class Taps(NamedTuple):
    """A function with its dense layers tapped.

    Attributes:
      layers: for each leaf, named by its path, that is the weight of exactly one dense layer.
      probes: shapes to be added to the layers' outputs, `(*stack, tokens, out)`; the gradient with respect to zeros
        there is δ.
      forward: `(probes, params, *args) -> (output, inputs)`, with inputs `(*stack, tokens, in)` for each layer.
    """

    layers: dict[str, Dense]
    probes: dict[str, jax.ShapeDtypeStruct]
    forward: Callable


class _Weight(NamedTuple):
    """A value in the jaxpr that is a parameter, or a slice of one that scans have made; transposed or not.

    Attributes:
      axes: of each of the value's axes, which it is of the leaf's, behind the stack.
    """

    value: Any
    name: str
    stack: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def of(cls, value: Any, name: str, stack: tuple[int, ...] = ()) -> "_Weight":
        """A value that isn't transposed."""
        return cls(value, name, stack, tuple(range(np.ndim(value))))

    @property
    def as_it_lies(self) -> bool:
        return self.axes == tuple(sorted(self.axes))


def _opened(jaxpr) -> tuple[Jaxpr, Any]:
    """(jaxpr, constants) of an equation's inner jaxpr, which some versions of JAX close and others don't."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _parts_of_scan(settings: dict) -> tuple[int, int]:
    """Where a scan's carry begins and ends among its arguments."""
    if "num_carry" in settings:  # JAX before 0.12
        return settings["num_consts"], settings["num_consts"] + settings["num_carry"]
    consts, carry, _ = settings["ft_in"].unpack()
    return len(consts), len(consts) + len(carry)


class _Interpreter:
    """Evaluates a jaxpr, following weights into jit, scan and checkpoint up to the products that they enter."""

    def __init__(self, probes: dict[str, Array] | None):
        self.probes = probes  # None while the layers are being looked for
        self.layers: dict[str, Dense] = {}
        self.outputs: dict[str, jax.ShapeDtypeStruct] = {}
        self.uses: dict[str, set] = {}  # call paths, of which scan may trace one more than once
        self.path: tuple[
            int, ...
        ] = ()  # calls of one function share its jaxpr: an equation alone does not tell them apart

    def plain(self, value):
        """The value itself, of a weight that is used otherwise than by a dense layer, too."""
        if isinstance(value, _Weight):
            self.uses.setdefault(value.name, set()).update((-1, -2))
            return value.value
        return value

    def bind(self, equation, arguments) -> list:
        settings = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            results = equation.primitive.bind(*map(self.plain, arguments), **settings)
        return results if equation.primitive.multiple_results else [results]

    def run(self, jaxpr: Jaxpr, consts, values, probes) -> tuple[list, dict[str, Array]]:
        """(outputs, inputs of the dense layers)."""
        values_of = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
        inputs: dict[str, Array] = {}
        for equation in jaxpr.eqns:
            arguments = [v.val if isinstance(v, Literal) else values_of[v] for v in equation.invars]
            rule = self.rules.get(equation.primitive)
            if rule is None or not any(isinstance(x, _Weight) for x in arguments):
                results = self.bind(equation, arguments)
            else:
                outside, self.path = self.path, (*self.path, id(equation))
                results, more = rule(self, equation, arguments, probes)
                self.path = outside
                inputs |= more
            values_of |= dict(zip(equation.outvars, results, strict=True))
        results = [v.val if isinstance(v, Literal) else values_of[v] for v in jaxpr.outvars]
        return [self.plain(x) for x in results], inputs

    def jit(self, equation, arguments, probes):
        return self.run(*_opened(equation.params["jaxpr"]), arguments, probes)

    def checkpoint(self, equation, arguments, probes):
        def run(plain):
            values = iter(plain)
            filled = [x if isinstance(x, _Weight) else next(values) for x in arguments]
            return self.run(*_opened(equation.params["jaxpr"]), filled, probes)

        again = jax.checkpoint(run, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"])
        return again([x for x in arguments if not isinstance(x, _Weight)])

    def scan(self, equation, arguments, probes):
        settings = equation.params
        first, last = _parts_of_scan(settings)
        consts, carry = ([self.plain(x) for x in part] for part in (arguments[:first], arguments[first:last]))
        scanned = arguments[last:]
        if not any(isinstance(x, _Weight) for x in scanned):
            return self.bind(equation, [*consts, *carry, *scanned]), {}
        weights = [x if isinstance(x, _Weight) and x.as_it_lies else None for x in scanned]
        slices = [self.plain(x) if w is None else x.value for w, x in zip(weights, scanned, strict=True)]
        slices_of_probes = {w.name: probes[w.name] for w in weights if w is not None and w.name in probes}

        def body(carry, step):
            slices, probes = step
            inner = [
                x if w is None else _Weight.of(x, w.name, (*w.stack, w.value.shape[0]))
                for w, x in zip(weights, slices, strict=True)
            ]
            results, inputs = self.run(*_opened(settings["jaxpr"]), [*consts, *carry, *inner], probes)
            return results[: len(carry)], (results[len(carry) :], inputs)

        carry, (stacked, inputs) = jax.lax.scan(
            body, carry, (slices, slices_of_probes), reverse=settings["reverse"], unroll=settings["unroll"]
        )
        return [*carry, *stacked], inputs

    def convert(self, equation, arguments, probes):
        weight = arguments[0]
        if not jnp.issubdtype(equation.params["new_dtype"], jnp.floating):  # no gradient goes through rounding
            return self.bind(equation, arguments), {}
        return [weight._replace(value=equation.primitive.bind(weight.value, **equation.params))], {}

    def transpose(self, equation, arguments, probes):
        weight = arguments[0]
        axes = tuple(weight.axes[i] for i in equation.params["permutation"])
        return [weight._replace(value=equation.primitive.bind(weight.value, **equation.params), axes=axes)], {}

    def dot(self, equation, arguments, probes):
        contracted, batch = equation.params["dimension_numbers"]
        right = isinstance(arguments[1], _Weight)
        weight, x = (arguments[1], arguments[0]) if right else arguments
        if isinstance(x, _Weight) or any(batch):
            return self.bind(equation, arguments), {}
        of_x, of_weight = contracted if right else contracted[::-1]
        rest = [i for i in range(x.ndim) if i not in of_x]
        rows = x.transpose(*rest, *of_x).reshape(*(math.prod(x.shape[i] for i in axes) for axes in (rest, of_x)))
        return self.tapped(
            equation, arguments, probes, weight, of_weight, rows, lambda y, d: (d if right else d.T).reshape(y.shape)
        )

    def convolve(self, equation, arguments, probes):
        x, weight = arguments
        settings = equation.params
        grouped = settings["feature_group_count"] > 1 or settings["batch_group_count"] > 1
        if isinstance(x, _Weight) or grouped:
            return self.bind(equation, arguments), {}
        dimensions = settings["dimension_numbers"]
        _, of_in, *spatial = dimensions.rhs_spec
        features = dimensions.out_spec[1]
        patches = jax.lax.conv_general_dilated_patches(
            x,
            [weight.value.shape[i] for i in spatial],
            settings["window_strides"],
            settings["padding"],
            settings["lhs_dilation"],
            settings["rhs_dilation"],
            dimensions,
            precision=jax.lax.Precision.HIGHEST,
        )
        patches = jnp.moveaxis(patches, features, -1)
        rows = patches.reshape(-1, patches.shape[-1])  # channels first, then the window, as the weight's axes below

        def place(y, d):
            return jnp.moveaxis(d.reshape(*patches.shape[:-1], -1), -1, features)

        return self.tapped(equation, arguments, probes, weight, (of_in, *spatial), rows, place)

    def tapped(self, equation, arguments, probes, weight, contracted, rows, place):
        """The output of a dense layer plus its probe, and its inputs `rows` (tokens, in)."""
        y = equation.primitive.bind(*(a.value if isinstance(a, _Weight) else a for a in arguments), **equation.params)
        free = [axis for i, axis in enumerate(weight.axes) if i not in contracted]
        shape = tuple(weight.value.shape[weight.axes.index(i)] for i in range(len(weight.axes)))
        layer = Dense(weight.stack, tuple(weight.axes[i] for i in contracted), tuple(free), shape, rows.shape[0])
        self.layers[weight.name] = layer
        self.outputs[weight.name] = jax.ShapeDtypeStruct((*weight.stack, layer.tokens, layer.sizes[1]), y.dtype)
        self.uses.setdefault(weight.name, set()).add(self.path)
        if self.probes is None:
            return [y], {}
        return [y + place(y, probes[weight.name])], {weight.name: rows}

    rules = {
        primitives.jit_p: jit,
        primitives.scan_p: scan,
        primitives.remat_p: checkpoint,
        primitives.convert_element_type_p: convert,
        primitives.transpose_p: transpose,
        primitives.dot_general_p: dot,
        primitives.conv_general_dilated_p: convolve,
    }


def tap(function: Callable[..., Any], params: Tree, *args: Any) -> Taps:
    """Finds the dense layers of `function(params, *args)`; only shapes are looked at.

    A leaf counts where all that uses it is one `dot_general` without batch axes or one convolution without groups (a
    dense layer of patches), of the leaf as it lies or transposed, possibly inside jit, checkpoint, or scans over the
    leaf's first axes. Weights that are shared or sliced do not, and are left to the caller; nor do those inside a
    custom derivative, a loop or a branch.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(params, *args)
    structure = jax.tree.structure(shape)
    names = tree.names(params)

    def interpret(interpreter, wanted, probes, params, *args):
        leaves = [
            _Weight.of(leaf, name) if name in wanted else leaf
            for name, leaf in zip(names, jax.tree.leaves(params), strict=True)
        ]
        outputs, inputs = interpreter.run(closed.jaxpr, closed.consts, [*leaves, *jax.tree.leaves(args)], probes)
        return jax.tree.unflatten(structure, outputs), inputs

    search = _Interpreter(None)
    jax.eval_shape(lambda *a: interpret(search, set(names), {}, *a), params, *args)
    layers = {name: layer for name, layer in search.layers.items() if len(search.uses[name]) == 1}
    probes = {name: search.outputs[name] for name in layers}

    def forward(probes, params, *args):
        return interpret(_Interpreter(probes), set(layers), probes, params, *args)

    return Taps(layers, probes, forward)


def zeros(probes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """The probes at which the tapped function is the function itself."""
    return {name: jnp.zeros(probe.shape, probe.dtype) for name, probe in probes.items()}
