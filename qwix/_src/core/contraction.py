"""The three contractions, dot_general, conv_general_dilated and ragged_dot_general, seen as one.

A `Contraction` is an op of two operands that is linear in each, with everything but the operands fixed. It
knows how to run on arrays and QArrays, how its operands are quantized, how an operand's scale lies on its
output, and which contractions its derivatives are:

    >>> import jax.numpy as jnp
    >>> op = DotGeneral((((1,), (0,)), ((), ())))
    >>> dlhs = transpose(op, True, jnp.ones((2, 3)), jnp.ones((3, 4)))     # g rhs^T
    >>> dlhs.contraction.dimension_numbers
    (((1,), (1,)), ((), ()))

The derivatives are not written down here. JAX knows the transpose of each contraction with all of its strides,
paddings, groups and dimension numbers, as a small program: layout changes of the operands, one contraction, layout
changes of the result. `transpose` reads it, and `Transposed.run` runs it on QArrays, with the operands of a dot_general
in the order that is faster.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
from jax import lax

from qwix._src.core import conv_general, dot_general, operands, ragged_dot
from qwix._src.core.qarray import HowToQuantize, QArray


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`jax.lax.dot_general`; attributes are its arguments."""

    dimension_numbers: operands.DotDimensionNumbers
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def run(self, lhs: Any, rhs: Any) -> jax.Array:
        """The op on arrays or QArrays."""
        sharding = {} if self.out_sharding is None else {"out_sharding": self.out_sharding}
        return dot_general.dot_general(
            lhs, rhs, self.dimension_numbers, self.precision, self.preferred_element_type, **sharding
        )

    def how(self, for_lhs: bool, ndims: tuple[int, int], tile_size: Any = None, **kwargs: Any) -> HowToQuantize:
        """How to quantize an operand; see `dot_general.get_how_to_quantize`."""
        return dot_general.get_how_to_quantize(
            dimension_numbers=self.dimension_numbers, ndims=ndims, for_lhs=for_lhs, tile_size=tile_size, **kwargs
        )

    def scale_on_output(self, scale: jax.Array, for_lhs: bool, lhs_shape: Any, rhs_shape: Any) -> jax.Array:
        """An operand's scale, of size 1 along contracting axes, with the axes of the output."""
        places = operands.scale_transposes(self.dimension_numbers, (len(lhs_shape), len(rhs_shape)))
        return operands.place(scale, places[0 if for_lhs else 1])


@dataclasses.dataclass(frozen=True)
class ConvGeneral:
    """`jax.lax.conv_general_dilated`; attributes are its arguments."""

    window_strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = None
    preferred_element_type: Any = None
    out_sharding: Any = None

    def run(self, lhs: Any, rhs: Any) -> jax.Array:
        """The op on arrays or QArrays."""
        return conv_general.conv_general_dilated(
            lhs, rhs, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        )

    def how(self, for_lhs: bool, ndims: tuple[int, int], tile_size: Any = None, **kwargs: Any) -> HowToQuantize:
        """How to quantize an operand; see `conv_general.get_how_to_quantize`."""
        del ndims
        if tile_size is not None:
            raise ValueError(f"tile_size={tile_size} is not supported for a convolution: leave it out of its rule.")
        return conv_general.get_how_to_quantize(dimension_numbers=self.dimension_numbers, for_lhs=for_lhs, **kwargs)

    def scale_on_output(self, scale: jax.Array, for_lhs: bool, lhs_shape: Any, rhs_shape: Any) -> jax.Array:
        """An operand's scale, of size 1 but for the batch or the out-feature axis, with the axes of the output."""
        del rhs_shape
        dims = self.dimension_numbers
        if for_lhs:
            return conv_general.place_batch(scale, dims, lhs_shape[dims.lhs_spec[0]], self.batch_group_count)
        return operands.place(scale, conv_general.get_transpose(dims, for_lhs=False))


@dataclasses.dataclass(frozen=True)
class RaggedDotGeneral:
    """`jax.lax.ragged_dot_general`; attributes are its arguments but for `group_sizes`, which are an operand."""

    dimension_numbers: lax.RaggedDotDimensionNumbers
    precision: Any = None
    preferred_element_type: Any = None

    def run(self, lhs: Any, rhs: Any, group_sizes: jax.Array) -> jax.Array:
        """The op on arrays or QArrays."""
        return ragged_dot.ragged_dot_general(
            lhs, rhs, group_sizes, self.dimension_numbers, self.precision, self.preferred_element_type
        )

    def how(self, for_lhs: bool, ndims: tuple[int, int], tile_size: Any = None, **kwargs: Any) -> HowToQuantize:
        """How to quantize an operand: like that of a dot_general."""
        return dot_general.get_how_to_quantize(
            dimension_numbers=self.dimension_numbers.dot_dimension_numbers,
            ndims=ndims,
            for_lhs=for_lhs,
            tile_size=tile_size,
            **kwargs,
        )

    def scale_on_output(
        self, scale: jax.Array, for_lhs: bool, lhs_shape: Any, rhs_shape: Any, group_sizes: jax.Array
    ) -> jax.Array:
        """An operand's scale, of size 1 along contracting axes, with the axes of the output."""
        return ragged_dot.scale_on_output(scale, for_lhs, lhs_shape, rhs_shape, group_sizes, self.dimension_numbers)


Contraction = DotGeneral | ConvGeneral | RaggedDotGeneral


def ragged_dot_general_of(numbers: lax.RaggedDotDimensionNumbers, **kwargs: Any) -> RaggedDotGeneral:
    """A `RaggedDotGeneral` whose dimension numbers are tuples throughout, so that it can be hashed."""
    dot: Any = tuple(tuple(map(tuple, pair)) for pair in numbers.dot_dimension_numbers)
    canonical = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=dot,
        lhs_ragged_dimensions=tuple(numbers.lhs_ragged_dimensions),
        rhs_group_dimensions=tuple(numbers.rhs_group_dimensions),
    )
    return RaggedDotGeneral(canonical, **kwargs)


# ---------------------------------------------------------------- derivatives

# How to read a contraction off the parameters of an equation of a jaxpr.
_OF_PARAMS: Mapping[str, Callable[[Mapping[str, Any]], Contraction]] = {
    "dot_general": lambda params: DotGeneral(
        **{field.name: params[field.name] for field in dataclasses.fields(DotGeneral)}
    ),
    "conv_general_dilated": lambda params: ConvGeneral(
        **{field.name: params.get(field.name) for field in dataclasses.fields(ConvGeneral)}  # type: ignore[arg-type]
    ),
    "ragged_dot_general": lambda params: ragged_dot_general_of(
        params["ragged_dot_dimension_numbers"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    ),
}

# What JAX does to an operand on its way to the contraction: elements move, and stay what they are.
_LAYOUT = frozenset({"transpose", "reshape", "rev", "squeeze", "expand_dims"})


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The derivative of a contraction with respect to one operand, as a program with one contraction in it.

    Attributes:
      jaxpr: (cotangent of the output, the other operand, group sizes if any) -> cotangent of the operand.
      contraction: the one in it.
      g_is_lhs: whether the cotangent is its first operand.
      permutation: if not None, `contraction` is the one in `jaxpr` with its operands exchanged, and its result is to
        be transposed so.
    """

    jaxpr: Any
    contraction: Contraction
    g_is_lhs: bool
    permutation: tuple[int, ...] | None = None

    def run(
        self,
        g: jax.Array,
        residual: jax.Array | QArray,
        extra: Sequence[jax.Array] = (),
        prepare: Callable[[Any, bool, tuple[int, int]], Any] = lambda operand, is_g, ndims: operand,
    ) -> jax.Array:
        """Runs it.

        Args:
          g: cotangent of the output.
          residual: the other operand; a QArray has one scale for all of it.
          extra: group sizes, if any.
          prepare: (operand of the contraction, whether it is the cotangent, ranks of both) -> what is contracted.
        """
        env: dict[Any, Any] = dict(zip(self.jaxpr.invars, (g, residual, *extra), strict=True))
        for eqn in self.jaxpr.eqns:
            values = [v.val if isinstance(v, jax.extend.core.Literal) else env[v] for v in eqn.invars]
            if eqn.primitive.name in _OF_PARAMS:
                left, right = values[:2] if self.permutation is None else values[1::-1]
                ndims = (left.ndim, right.ndim)
                lhs = prepare(left, self.g_is_lhs, ndims)
                rhs = prepare(right, not self.g_is_lhs, ndims)
                result = self.contraction.run(lhs, rhs, *values[2:])
                env[eqn.outvars[0]] = result if self.permutation is None else lax.transpose(result, self.permutation)
            elif isinstance(values[0], QArray):
                env[eqn.outvars[0]] = _move(eqn, values[0])
            else:
                # Not `bind(*values, **eqn.params)` of the recorded dtype: a cotangent may come in a wider one.
                env[eqn.outvars[0]] = eqn.primitive.bind(*values, **eqn.params)
        return env[self.jaxpr.outvars[0]]


def _move(eqn: Any, array: QArray) -> QArray:
    """A layout change of a QArray with one scale."""
    if eqn.primitive.name not in _LAYOUT:
        raise NotImplementedError(
            f"The derivative of a contraction applies {eqn.primitive.name} to an operand, which is not known to keep "
            "quantized elements as they are: set use_original_residuals=True."
        )
    qvalue = eqn.primitive.bind(array.qvalue, **eqn.params)
    return array.replace(qvalue=qvalue, scale=lax.reshape(array.scale, (1,) * qvalue.ndim))


def transpose(op: Contraction, for_lhs: bool, lhs: Any, rhs: Any, *extra: Any) -> Transposed:
    """The derivative of `op` with respect to its first or second operand.

    Args:
      op: the contraction.
      for_lhs: with respect to which operand.
      lhs, rhs: the operands, or anything else with a shape and a float dtype.
      *extra: group sizes, if any.

    >>> import jax.numpy as jnp
    >>> conv = ConvGeneral((2,), ((1, 1),), (1,), (1,), lax.conv_dimension_numbers((1, 1, 8), (1, 1, 3), None))
    >>> transpose(conv, True, jnp.ones((1, 1, 8)), jnp.ones((1, 1, 3))).contraction.lhs_dilation
    (2,)
    """
    return _transpose(op, for_lhs, *(_abstract(x) for x in (lhs, rhs, *extra)))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = jax.typeof(x.qvalue if isinstance(x, QArray) else x).sharding
    # Which sharding an array has is part of its type where the mesh is explicit, and of no interest elsewhere.
    explicit = any(axis is not None for axis in sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if explicit else None)


@functools.cache
def _transpose(op: Contraction, for_lhs: bool, lhs: Any, rhs: Any, *extra: Any) -> Transposed:
    out = jax.eval_shape(op.run, lhs, rhs, *extra)
    operand, other = (lhs, rhs) if for_lhs else (rhs, lhs)

    def cotangent(g: Any, residual: Any, *extra: Any) -> Any:
        def of_operand(x: Any) -> Any:
            return op.run(x, residual, *extra) if for_lhs else op.run(residual, x, *extra)

        return jax.linear_transpose(of_operand, operand)(g)[0]

    jaxpr = jax.make_jaxpr(cotangent)(out, other, *extra).jaxpr
    contractions = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in _OF_PARAMS]
    if len(contractions) != 1:
        raise NotImplementedError(f"The derivative of {op} is not one contraction, but {jaxpr}")
    (eqn,) = contractions
    g_vars = {jaxpr.invars[0]}
    for other_eqn in jaxpr.eqns:
        if not isinstance(other_eqn.invars[0], jax.extend.core.Literal) and other_eqn.invars[0] in g_vars:
            g_vars.update(other_eqn.outvars)
    contraction = _OF_PARAMS[eqn.primitive.name](eqn.params)
    g_is_lhs = eqn.invars[0] in g_vars
    shapes = [tuple(v.aval.shape) for v in eqn.invars[:2]]
    if isinstance(contraction, DotGeneral) and not for_lhs and _is_better_exchanged(contraction, shapes):
        return Transposed(jaxpr, *_exchanged(contraction, shapes, g_is_lhs))
    return Transposed(jaxpr, contraction, g_is_lhs)


def _is_better_exchanged(op: DotGeneral, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the derivative for rhs had better contract its operands in the other order.

    It sums over axes that are the first ones of both, such as tokens, while XLA's CPU backend (jaxlib 0.10.2) wants
    them last in its first operand, and moves that one in memory. So this should be the smaller of the two.
    """
    is_plain = op.out_sharding is None and (op.precision is None or isinstance(op.precision, tuple))
    return is_plain and math.prod(shapes[0]) >= math.prod(shapes[1])


def _exchanged(op: DotGeneral, shapes: Sequence[tuple[int, ...]], g_is_lhs: bool) -> tuple[DotGeneral, bool, Any]:
    """The contraction of (rhs, lhs), whether the cotangent is first in it, and the permutation of its result."""
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = op.dimension_numbers
    precision = None if op.precision is None else op.precision[::-1]
    numbers = ((rhs_ca, lhs_ca), (rhs_ba, lhs_ba))
    batch = len(lhs_ba)
    lhs_rest, rhs_rest = (len(shape) - batch - len(lhs_ca) for shape in shapes)
    end = batch + rhs_rest
    permutation = (*range(batch), *range(end, end + lhs_rest), *range(batch, end))
    return dataclasses.replace(op, dimension_numbers=numbers, precision=precision), not g_is_lhs, permutation
