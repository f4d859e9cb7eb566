"""`jax.lax.conv_general_dilated` on arrays and QArrays.

    >>> import jax.numpy as jnp
    >>> dims = ("NHWC", "HWIO", "NHWC")
    >>> how = get_how_to_quantize(dimension_numbers=dims, for_lhs=False, qtype=jnp.int8)
    >>> kernel = qarray.quantize(jnp.ones((3, 3, 4, 8)), how)
    >>> kernel.scale.shape
    (1, 1, 1, 8)
    >>> image = jnp.ones((2, 5, 5, 4))
    >>> conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dims).shape
    (2, 5, 5, 8)

An output element sums over windows, so that only the batch axis of the input and the out-feature
axis of the kernel may have scales of their own on the output. With any other granularity, or one
array among the operands, both are dequantized first.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qwix._src.core import operands, qarray
from qwix._src.core.qarray import HowToQuantize, QArray


def get_how_to_quantize(*, dimension_numbers: lax.ConvDimensionNumbers, for_lhs: bool, **kwargs: Any) -> HowToQuantize:
    """How to quantize an operand: a scale for each batch index, or for each out-feature.

    Args:
      dimension_numbers: `lax.ConvDimensionNumbers` (of `lax.conv_dimension_numbers`) or the three
        strings.
      for_lhs: the input (batch) or the kernel (out-features).
      **kwargs: the other fields of `HowToQuantize`, such as `qtype` and `calibration_method`.

    >>> get_how_to_quantize(
    ...     dimension_numbers=("NCW", "OIW", "NCW"), for_lhs=True, qtype="int8"
    ... ).channelwise_axes
    (0,)
    """
    dims = _specs(dimension_numbers)
    spec = dims.lhs_spec if for_lhs else dims.rhs_spec
    return HowToQuantize(channelwise_axes=[spec[0]], **kwargs)


def get_transpose(dimension_numbers: lax.ConvDimensionNumbers, for_lhs: bool) -> list[int | None]:
    """For each axis of the output, which axis of the operand's scale lies on it (None: size 1).

    >>> get_transpose(("NHWC", "HWIO", "NHWC"), for_lhs=False)
    [None, None, None, 3]
    """
    dims = _specs(dimension_numbers)
    transpose: list[int | None] = [None] * len(dims.out_spec)
    if for_lhs:
        transpose[dims.out_spec[0]] = dims.lhs_spec[0]
    else:
        transpose[dims.out_spec[1]] = dims.rhs_spec[0]
    return transpose


def conv_general_dilated(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` that takes QArrays; its arguments are the same.

    Args:
      lhs: the input, an array or a QArray of any granularity.
      rhs: the kernel, likewise.
      window_strides: one a spatial axis.
      padding: 'SAME', 'VALID', 'SAME_LOWER', or (low, high) a spatial axis. What is padded is the
        number 0, also in an asymmetric operand, where 0 is stored as the zero point.
      lhs_dilation: of the input.
      rhs_dilation: of the kernel.
      dimension_numbers: None, three strings, or `lax.ConvDimensionNumbers`.
      feature_group_count: number of groups of features.
      batch_group_count: number of groups of batches.
      precision: of float arithmetic; sums of integers are exact whatever it says.
      preferred_element_type: the result's dtype. Default: the promotion of the (dequantized)
        operands' dtypes.
      out_sharding: of the result.

    Returns:
      A float array. Two quantized operands are summed as stored, integers in int32 (in float32 if
      that could overflow), 8- and 4-bit floats in float32; then scaled in float32.

    Raises:
      ValueError: both operands are asymmetric and none of them has to be dequantized first, or
        `preferred_element_type` is no float.

    >>> import jax.numpy as jnp
    >>> x = qarray.quantize_api(jnp.array([[[1.0, 2.0, -3.0]]]), jnp.int8, calibration_method="minmax")
    >>> w = qarray.quantize_api(jnp.ones((1, 1, 3)), jnp.int8)
    >>> conv_general_dilated(x, w, (1,), "SAME").round(1)
    Array([[[ 3.,  0., -1.]]], dtype=float32)
    """
    lhs, rhs = operands.unwrap(lhs, rhs)
    arguments = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
    }
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return lax.conv_general_dilated(lhs, rhs, dimension_numbers=dimension_numbers, **arguments)
    dims = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if (own := operands.own_ops(lhs, rhs)) is not None:
        return own.conv_general_dilated(lhs, rhs, dimension_numbers=dims, **arguments)
    arguments = {name: _as_tuples(value) for name, value in arguments.items()}
    return _conv_general_dilated(lhs, rhs, dims, **arguments)


# Traced once for operands and arguments that repeat; as in `dot_general`.
@functools.partial(
    jax.jit,
    static_argnums=2,
    static_argnames=(
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "feature_group_count",
        "batch_group_count",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
    inline=True,
)
def _conv_general_dilated(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    dims: lax.ConvDimensionNumbers,
    *,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
    **arguments: Any,
) -> jax.Array:
    conv: Any = functools.partial(lax.conv_general_dilated, dimension_numbers=dims, **arguments)
    feature_groups, batch_groups = arguments["feature_group_count"], arguments["batch_group_count"]
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    lhs_batch, rhs_features = dims.lhs_spec[0], dims.rhs_spec[0]
    if not (
        operands.keeps_storage(lhs, rhs)
        and operands.is_untiled(lhs, set(range(lhs.ndim)) - {lhs_batch})
        and operands.is_untiled(rhs, set(range(rhs.ndim)) - {rhs_features})
    ):
        return conv(
            *operands.float_operands(lhs, rhs),
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    def op(lhs: jax.Array, rhs: jax.Array, accumulator: np.dtype) -> jax.Array:
        return conv(
            lhs,
            rhs,
            precision=None if accumulator == np.int32 else precision,
            preferred_element_type=accumulator,
            out_sharding=out_sharding,
        )

    # A padded element is in no window's sum, so that sums of one operand are convs with ones. One
    # output suffices for all batches, or for all features of a group, whose sums are the same.
    def sum_lhs(values: jax.Array) -> jax.Array:
        ones = _ones_like(rhs, rhs_features, feature_groups * batch_groups, values.dtype)
        return conv(values, ones, preferred_element_type=np.int32)

    def sum_rhs(values: jax.Array) -> jax.Array:
        ones = _ones_like(lhs, lhs_batch, batch_groups, values.dtype)
        return conv(ones, values, preferred_element_type=np.int32)

    assert isinstance(lhs, QArray) and isinstance(rhs, QArray)  # keeps_storage says so
    out = operands.contract(
        lhs,
        rhs,
        op,
        terms=math.prod(n for axis, n in enumerate(rhs.shape) if axis != rhs_features),
        lhs_to_out=lambda x: place_batch(x, dims, lhs.shape[lhs_batch], batch_groups),
        rhs_to_out=lambda x: operands.place(x, get_transpose(dims, for_lhs=False)),
        sum_lhs=sum_lhs,
        sum_rhs=sum_rhs,
        same_dtype=True,
    )
    return lax.convert_element_type(out, dtype)


def _as_tuples(value: Any) -> Any:
    """Lists within an argument as tuples, which are hashable."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _specs(dimension_numbers: Any) -> lax.ConvDimensionNumbers:
    if isinstance(dimension_numbers, lax.ConvDimensionNumbers):
        return dimension_numbers
    if dimension_numbers is None:
        raise ValueError(
            "dimension_numbers=None says nothing about the rank of the conv: "
            "use jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, None)."
        )
    lhs, rhs, _ = dimension_numbers
    return lax.conv_dimension_numbers((1,) * len(lhs), (1,) * len(rhs), dimension_numbers)


def _ones_like(array: operands.MaybeQArray, axis: int, size: int, dtype: Any) -> jax.Array:
    return lax.full(tuple(size if a == axis else n for a, n in enumerate(array.shape)), 1, dtype)


def place_batch(leaf: jax.Array, dims: lax.ConvDimensionNumbers, batch: int, batch_group_count: int) -> jax.Array:
    """Lays a scale of the input, of size 1 but for its batch axis, on the output."""
    lhs_batch = dims.lhs_spec[0]
    if batch_group_count == 1 or leaf.shape[lhs_batch] == 1:
        return operands.place(leaf, get_transpose(dims, for_lhs=True))
    # Group i of the batches makes group i of the output's features.
    shape = tuple(batch if axis == lhs_batch else 1 for axis in range(leaf.ndim))
    leaf = lax.reshape(qarray.broadcast_to(leaf, shape), (batch_group_count, batch // batch_group_count))
    out_batch, out_features = dims.out_spec[:2]
    placed = [1] * len(dims.out_spec)
    placed[out_batch], placed[out_features] = batch // batch_group_count, batch_group_count
    return lax.reshape(leaf.T if out_batch < out_features else leaf, tuple(placed))
