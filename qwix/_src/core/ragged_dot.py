"""`jax.lax.ragged_dot` and `ragged_dot_general` on arrays and QArrays.

    >>> experts = qarray.quantize_api(jnp.ones((2, 4, 3)), jnp.int8, channelwise_axes=(0, 2))
    >>> ragged_dot(jnp.ones((5, 4)), experts, jnp.array([2, 1])).shape
    (5, 3)

The kind of the ragged axis of lhs decides what a group is, g the number of groups:
- a remaining axis: rows m of lhs meet the matrix of their group; rhs has an axis g, whose scales
  are gathered by row;
- a contracting axis: each group is a sum of its own; the output has a leading axis g;
- a batch axis: a dot_general, whatever the groups are (as in `jax.lax`).
Rows beyond the sum of `group_sizes` are zero.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src.core import operands, qarray
from qwix._src.core.qarray import QArray

RAGGED_DOT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def ragged_dot(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    group_sizes: jax.Array,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` that takes QArrays: row i of lhs times the matrix of row i's group.

    Args:
      lhs: (m, k), rows sorted by group; an array or a QArray.
      rhs: (g, k, n), likewise.
      group_sizes: (g,) integers: how many rows each group has.
      precision: of float arithmetic.
      preferred_element_type: the result's dtype. Default: the promotion of the (dequantized)
        operands' dtypes.
      group_offset: (1,) integer: rhs holds the groups of `group_sizes` from this one on; rows of
        others are zero.

    Returns:
      (m, n), float; rows beyond the sum of `group_sizes` are zero.

    >>> w = qarray.quantize_api(jnp.array([[[1.0]], [[2.0]]]), jnp.int8, channelwise_axes=(0,))
    >>> ragged_dot(jnp.ones((4, 1)), w, jnp.array([2, 1])).round(1).ravel()
    Array([1., 1., 2., 0.], dtype=float32)
    """
    return ragged_dot_general(lhs, rhs, group_sizes, RAGGED_DOT, precision, preferred_element_type, group_offset)


def ragged_dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    group_sizes: jax.Array,
    dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot_general` that takes QArrays.

    Two quantized operands without tiles on contracting axes are multiplied as stored, integers
    summed in int32, and scaled in float32; any others are dequantized first.

    Args:
      lhs: an array or a QArray.
      rhs: likewise.
      group_sizes: integers, (g,), or with leading axes: see `jax.lax.ragged_dot_general`.
      dimension_numbers: which axes are contracting, batch, ragged and group axes.
      precision: of float arithmetic; sums of integers are exact whatever it says.
      preferred_element_type: the result's dtype. Default: the promotion of the (dequantized)
        operands' dtypes.
      group_offset: as of `ragged_dot`.

    Raises:
      ValueError: both operands are asymmetric and none of them has to be dequantized first, or
        `preferred_element_type` is no float.
      NotImplementedError: `group_offset` with a ragged contracting or batch axis, or with more than
        one list of group sizes.
    """
    lhs, rhs = qarray.unwrap(lhs), qarray.unwrap(rhs)
    if group_offset is not None:
        return _with_offset(lhs, rhs, group_sizes, dimension_numbers, precision, preferred_element_type, group_offset)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return lax.ragged_dot_general(lhs, rhs, group_sizes, dimension_numbers, precision, preferred_element_type)
    return _ragged_dot_general(lhs, rhs, group_sizes, dimension_numbers, precision, preferred_element_type)


# Traced once for operands and arguments that repeat; as in `dot_general`.
@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _ragged_dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    group_sizes: jax.Array,
    dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    op = functools.partial(
        lax.ragged_dot_general,
        group_sizes=group_sizes,
        ragged_dot_dimension_numbers=dimension_numbers,
    )
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    dims = operands.canonical_dimension_numbers(dimension_numbers.dot_dimension_numbers, (lhs.ndim, rhs.ndim))
    contracting, _ = dims
    if not (
        operands.keeps_storage(lhs, rhs)
        and operands.is_untiled(lhs, contracting[0])
        and operands.is_untiled(rhs, contracting[1])
    ):
        lhs, rhs = operands.float_operands(lhs, rhs)
        return op(lhs, rhs, precision=precision, preferred_element_type=preferred_element_type)
    assert isinstance(lhs, QArray) and isinstance(rhs, QArray)  # keeps_storage says so
    out = _contract(lhs, rhs, op, group_sizes, dims, dimension_numbers, precision)
    return lax.convert_element_type(out, dtype)


def _contract(
    lhs: QArray,
    rhs: QArray,
    ragged_dot: Any,
    group_sizes: jax.Array,
    dims: operands.DotDimensionNumbers,
    ragged_dims: lax.RaggedDotDimensionNumbers,
    precision: Any,
) -> jax.Array:
    (lhs_ca, rhs_ca), (lhs_ba, _) = dims
    axes = _Axes.of(ragged_dims, lhs.ndim, rhs.ndim)
    ragged, lhs_ra, rhs_ra, lhs_transpose = axes.ragged, axes.lhs_ra, axes.rhs_ra, axes.lhs_transpose
    lhs_to_out, rhs_to_out = (
        functools.partial(
            scale_on_output,
            for_lhs=for_lhs,
            lhs_shape=lhs.shape,
            rhs_shape=rhs.shape,
            group_sizes=group_sizes,
            dimension_numbers=ragged_dims,
        )
        for for_lhs in (True, False)
    )

    def op(lhs: jax.Array, rhs: jax.Array, accumulator: np.dtype) -> jax.Array:
        applied = None if accumulator == np.int32 else precision
        return ragged_dot(lhs, rhs, precision=applied, preferred_element_type=accumulator)

    def sum_lhs(values: jax.Array) -> jax.Array:
        if ragged in lhs_ca:  # sums of a group: a product with ones
            ones = lax.full([1 if a in rhs_ra else n for a, n in enumerate(rhs.shape)], 1, values.dtype)
            return op(values, ones, np.dtype(np.int32))
        return lhs_to_out(operands.keepdims_sum(values, lhs_ca))

    def sum_rhs(values: jax.Array) -> jax.Array:
        if ragged in lhs_ca:
            ones = lax.full([1 if a in lhs_ra else n for a, n in enumerate(lhs.shape)], 1, values.dtype)
            return op(ones, values, np.dtype(np.int32))
        return rhs_to_out(operands.keepdims_sum(values, rhs_ca))

    out = operands.contract(
        lhs,
        rhs,
        op,
        terms=math.prod(lhs.shape[axis] for axis in lhs_ca),
        lhs_to_out=lhs_to_out,
        rhs_to_out=rhs_to_out,
        sum_lhs=sum_lhs,
        sum_rhs=sum_rhs,
        same_dtype=True,
    )
    if ragged in (*lhs_ca, *lhs_ba):
        return out
    # Beyond the groups a zero point leaves a remainder, and a NaN scale a NaN.
    axis = lhs_transpose.index(ragged)
    position = lax.iota(group_sizes.dtype, lhs.shape[ragged])
    inside = position < jnp.sum(group_sizes, -1, keepdims=True)
    shape = (1,) * (axis + 1 - inside.ndim) + inside.shape + (1,) * (out.ndim - axis - 1)
    inside = jnp.broadcast_to(lax.reshape(inside, shape), out.shape)
    return lax.select(inside, out, lax.full_like(out, 0))


class _Axes(NamedTuple):
    """Axes of the operands, all counted from the start, and where they lie on the output (None: of size 1)."""

    ragged: int
    groups: list[int]
    rhs_ba: list[int]
    lhs_ra: list[int]
    rhs_ra: list[int]
    lhs_transpose: list[int | None]
    rhs_transpose: list[int | None]

    @classmethod
    def of(cls, ragged_dims: lax.RaggedDotDimensionNumbers, lhs_ndim: int, rhs_ndim: int) -> "_Axes":
        dims = operands.canonical_dimension_numbers(ragged_dims.dot_dimension_numbers, (lhs_ndim, rhs_ndim))
        (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = dims
        ragged = ragged_dims.lhs_ragged_dimensions[0] % lhs_ndim
        groups = [axis % rhs_ndim for axis in ragged_dims.rhs_group_dimensions]
        lhs_ra = [a for a in range(lhs_ndim) if a not in (*lhs_ca, *lhs_ba)]
        rhs_ra = [a for a in range(rhs_ndim) if a not in (*rhs_ca, *rhs_ba, *groups)]
        lead = [None] if ragged in lhs_ca else []
        lhs_transpose = [*lead, *lhs_ba, *lhs_ra, *[None] * len(rhs_ra)]
        rhs_transpose = [*lead, *rhs_ba, *[None] * len(lhs_ra), *rhs_ra]
        return cls(ragged, groups, list(rhs_ba), lhs_ra, rhs_ra, lhs_transpose, rhs_transpose)


def scale_on_output(
    scale: jax.Array,
    for_lhs: bool,
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    group_sizes: jax.Array,
    dimension_numbers: lax.RaggedDotDimensionNumbers,
) -> jax.Array:
    """Lays an operand's scale on the output; where groups have scales of their own, each row gets its group's.

    Args:
      scale: of the operand's rank, of size 1 along contracting axes.
      for_lhs: which operand's.
      lhs_shape, rhs_shape: of the operands.
      group_sizes: as of `ragged_dot_general`.
      dimension_numbers: likewise.

    >>> by_group = jnp.array([1.0, 2.0]).reshape(2, 1, 1)
    >>> scale_on_output(by_group, False, (3, 4), (2, 4, 5), jnp.array([2, 1]), RAGGED_DOT).ravel()
    Array([1., 1., 2.], dtype=float32)
    """
    axes = _Axes.of(dimension_numbers, len(lhs_shape), len(rhs_shape))
    if for_lhs:
        return operands.place(scale, axes.lhs_transpose)
    if not axes.groups or scale.shape[axes.groups[0]] == 1:
        return operands.place(scale, axes.rhs_transpose)
    # One matrix of scales (batch..., n...) a group, and from those one a row.
    full = [n if a in (*axes.groups, *axes.rhs_ba) else scale.shape[a] for a, n in enumerate(rhs_shape)]
    order = [*axes.groups, *axes.rhs_ba, *axes.rhs_ra]
    by_group = qarray.transpose_array(qarray.broadcast_to(scale, tuple(full)), order)
    before = axes.lhs_transpose.index(axes.ragged)
    rows = _group_of_rows(group_sizes, lhs_shape[axes.ragged])
    rows = lax.reshape(rows, (1,) * (before + 1 - rows.ndim) + rows.shape)
    batches = [
        lax.broadcasted_iota(np.int32, [n if a == i else 1 for a in range(rows.ndim)], i)
        for i, n in enumerate(by_group.shape[1 : 1 + len(axes.rhs_ba)])
    ]
    by_row = by_group.at[(rows, *batches)].get(mode="fill", fill_value=0)
    inner = len(axes.rhs_ba) + len(axes.lhs_ra) - rows.ndim
    shape = (*by_row.shape[: rows.ndim], *(1,) * inner, *by_row.shape[rows.ndim :])
    return lax.reshape(by_row, shape)


def _group_of_rows(group_sizes: jax.Array, rows: int) -> jax.Array:
    """(..., g) sizes -> (..., rows): the group of each row, g for those beyond."""
    ends = jnp.cumsum(group_sizes, axis=-1)
    return jnp.sum(jnp.arange(rows)[:, None] >= ends[..., None, :], axis=-1)


def window_of_groups(group_sizes: jax.Array, groups: int, group_offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sizes of `groups` groups from `group_offset` on, and the row that the first of them starts at.

    >>> window_of_groups(jnp.array([3, 2, 4]), 2, jnp.array([1]))
    (Array([2, 4], dtype=int32), Array(3, dtype=int32))
    """
    offset = jnp.asarray(group_offset).reshape(())
    # Padded, for a slice that reaches beyond the end would be moved.
    padded = jnp.pad(group_sizes, (0, groups))
    sizes = lax.dynamic_slice_in_dim(padded, offset, groups)
    start = jnp.sum(jnp.where(jnp.arange(group_sizes.size) < offset, group_sizes, 0))
    return sizes, start


def _with_offset(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    group_sizes: jax.Array,
    ragged_dims: lax.RaggedDotDimensionNumbers,
    precision: Any,
    preferred_element_type: Any,
    group_offset: jax.Array,
) -> jax.Array:
    """Rotates the rows of rhs's first group to the front, and the result back.

    `jax.lax` (0.10) takes a `group_offset` but has no implementation of it.
    """
    (lhs_ca, _), (lhs_ba, _) = ragged_dims.dot_dimension_numbers
    (ragged,) = ragged_dims.lhs_ragged_dimensions
    if ragged in (*lhs_ca, *lhs_ba) or group_sizes.ndim != 1:
        raise NotImplementedError(
            "group_offset needs a ragged axis that is neither contracting nor batch, and group_sizes of "
            f"one axis; got lhs_ragged_dimensions={ragged_dims.lhs_ragged_dimensions}, "
            f"dot_dimension_numbers={ragged_dims.dot_dimension_numbers}, group_sizes of shape {group_sizes.shape}."
        )
    groups = rhs.shape[ragged_dims.rhs_group_dimensions[0]]
    sizes, start = window_of_groups(group_sizes, groups, group_offset)

    def roll(leaf: jax.Array) -> jax.Array:
        if leaf.shape[ragged] not in (1, lhs.shape[ragged]):
            shape = [lhs.shape[a] if a == ragged else n for a, n in enumerate(leaf.shape)]
            leaf = qarray.broadcast_to(leaf, shape)
        return jnp.roll(leaf, -start, axis=ragged)

    rolled = jax.tree.map(roll, lhs)
    out = ragged_dot_general(rolled, rhs, sizes, ragged_dims, precision, preferred_element_type)
    remaining = [a for a in range(lhs.ndim) if a not in (*lhs_ca, *lhs_ba)]
    return jnp.roll(out, start, axis=len(lhs_ba) + remaining.index(ragged))
