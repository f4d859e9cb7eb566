"""The ops of `core/` on packed weights: what `PackedQArray.own_ops` is.

    y = x W,  W packed, x float, or int8 with a scale for each row, or to be quantized so within the kernel

A convolution is such a product as well: each window of the input is a row.

An op that the kernels do not do (two packed operands, an axis of the matrix in the batch, groups of features, float64,
...) runs on the unpacked weight, as does every op on a platform other than the CPU, or without the native library: the
same numbers, to float rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src.core import calibration, operands, qarray
from qwix._src.core import conv_general as core_conv
from qwix._src.core import dot_general as core_dot_general
from qwix._src.core.qarray import HowToQuantize, QArray
from qwix.cpu import native, packed, partition
from qwix.cpu.packed import PackedQArray

_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(jnp.bfloat16)
_INT8 = np.dtype(np.int8)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What is static in a product of rows with a packed weight."""

    mode: int  # of `native`
    method: str  # calibration of mode DYNAMIC
    dtype: np.dtype  # of the result
    activation: str | None = None


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`core.dot_general.dot_general` where an operand is a `PackedQArray`."""
    dims = operands.canonical_dimension_numbers(dimension_numbers, (lhs.ndim, rhs.ndim))
    is_rhs = isinstance(rhs, PackedQArray)
    weight, x = (rhs, lhs) if is_rhs else (lhs, rhs)
    x_dims, w_dims = ([side[i] for side in dims] for i in ((0, 1) if is_rhs else (1, 0)))
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    if out_sharding is not None or not _fits(x, weight, w_dims, dtype):
        plain = (qarray.unwrap(lhs), qarray.unwrap(rhs))
        kwargs = {} if out_sharding is None else {"out_sharding": out_sharding}
        return core_dot_general.dot_general(*plain, dims, precision, preferred_element_type, **kwargs)
    out = _dot(x, weight, x_dims, w_dims, dtype)
    if is_rhs:
        return out
    # (batch, x, weight) -> (batch, weight, x)
    batch, x_rest = len(x_dims[1]), x.ndim - len(x_dims[0]) - len(x_dims[1])
    order = [*range(batch), *range(batch + x_rest, out.ndim), *range(batch, batch + x_rest)]
    return lax.transpose(out, order)


def matmul(
    x: Any,
    weight: PackedQArray,
    bias: jax.Array | None = None,
    preferred_element_type: Any = None,
    *,
    activation: str | None = None,
) -> jax.Array:
    """f(x W + b), where b and f come before a result in bfloat16 is rounded, and in the kernel on a CPU.

    Args:
      x: (..., K), an array or a QArray.
      weight: packed, of shape (K, N).
      bias: (N,), or None.
      preferred_element_type: the result's dtype. Default: the promotion of those of x and of the weight.
      activation: f: None, 'relu', 'silu', 'gelu' (the exact one) or 'gelu_tanh'.

    Returns:
      (..., N).

    Raises:
      ValueError: the shapes do not fit, or there is no such activation function.

    >>> w = packed.pack(qarray.quantize_api(jnp.eye(8), jnp.int8, channelwise_axes=(1,)))
    >>> matmul(jnp.arange(8.0) - 4, w, jnp.ones(8), activation="relu").round(1)
    Array([0., 0., 0., 0., 1., 2., 3., 4.], dtype=float32)
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[0] or (bias is not None and bias.shape != weight.shape[1:]):
        raise ValueError(
            f"x {tuple(x.shape)} times a weight {weight.shape}, with a bias of {None if bias is None else bias.shape}: "
            "they have to be (..., K), (K, N) and (N,)"
        )
    _check_activation(activation)
    x_dims, w_dims = [(x.ndim - 1,), ()], [(0,), ()]
    dtype = operands.result_dtype(x, weight, preferred_element_type=preferred_element_type)
    if _fits(x, weight, w_dims, dtype):
        return _dot(x, weight, x_dims, w_dims, dtype, bias, activation)
    dims = ((x_dims[0], w_dims[0]), ((), ()))
    out = core_dot_general.dot_general(qarray.unwrap(x), weight.plain(), dims, None, dtype)
    return native.activate(out if bias is None else out + bias, activation).astype(dtype)


def _check_activation(activation: str | None) -> None:
    if activation not in native.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(map(repr, native.ACTIVATIONS))}")


def linear(x: jax.Array, kernel: Any, bias: Any = None, *, activation: str | None = None) -> jax.Array:
    """f(x W + b) of a layer: in one kernel where W is packed, its rule followed as for any `dot_general` of a model.

    In a quantized model this is one op, which counts as the module's `dot_general`; a layer that calls it with its
    kernel and bias runs as it would with `nnx.Linear`'s, but without the passes over memory for b and f.

    Args:
      x: (..., K) float.
      kernel: (K, N), an array or what a quantized model has in the place of one.
      bias: (N,), or None.
      activation: f, see `matmul`.

    Returns:
      (..., N).

    Raises:
      ValueError: there is no such activation function.

    >>> linear(jnp.ones((1, 2)), jnp.eye(2), jnp.array([1.0, -2.0]), activation="relu")
    Array([[2., 0.]], dtype=float32)
    """
    _check_activation(activation)
    return _linear(x, kernel, bias, activation)


def _linear(x: jax.Array, kernel: Any, bias: Any, activation: str | None) -> jax.Array:
    return unfused_linear(x, kernel, bias, activation)  # or what the provider of a running model has for it


def unfused_linear(x: jax.Array, kernel: Any, bias: Any, activation: str | None) -> jax.Array:
    """What `linear` is without a packed kernel: a `dot_general`, and the rest."""
    out = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return native.activate(out if bias is None else out + bias, activation)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, by a kernel on a CPU: softmax(scale query . key + bias) value.

    The kernel goes over parts of the keys with what it has of the softmax so far (FlashAttention, arXiv 2205.14135,
    algorithm 1), and reads queries, keys and values as linear layers write them. It is for inference: there are no
    gradients. On other platforms, without the library, for float64, and for heads wider than 256 it is JAX's own.

    Args:
      query: (..., T, N, H).
      key: (..., S, K, H), where K divides N; N / K heads of the queries share one of the keys.
      value: as the keys.
      bias: (..., N or 1, T or 1, S), added to the scores.
      mask: bool, of such a shape, true where a query sees a key.
      scale: of the products. Default: 1 / sqrt(H).

    Returns:
      (..., T, N, H), in the dtype of the query.

    Raises:
      ValueError: the shapes do not fit.

    >>> x = jnp.linspace(-1, 1, 24).reshape(1, 3, 2, 4)
    >>> bool(jnp.allclose(dot_product_attention(x, x, x), jax.nn.dot_product_attention(x, x, x), atol=1e-6))
    True
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    operands_ = (query, key, value, bias, mask)
    if 0 in query.shape:
        return jnp.zeros_like(query)
    if not native.is_available() or query.shape[-1] > native.MOST_DENSE_WIDTH or query.dtype.itemsize > 4:
        return _attention_on_xla(scale, *operands_)
    return _attention(scale, *operands_)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(scale: float, *operands: jax.Array | None) -> jax.Array:
    cpu, default = (functools.partial(f, scale) for f in (_attention_by_kernel, _attention_on_xla))
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


@_attention.defjvp
def _no_gradient_of_attention(scale: float, primals: Any, tangents: Any) -> Any:
    del scale, primals, tangents
    raise NotImplementedError(
        "qwix.cpu.dot_product_attention has no gradients: differentiate jax.nn.dot_product_attention, or a model that "
        "is not optimized for inference."
    )


def _attention_by_kernel(scale: float, query: Any, key: Any, value: Any, bias: Any, mask: Any) -> jax.Array:
    if bias is not None:
        bias = bias.astype(jnp.float32)
    if mask is not None:  # as jax.nn has it: finite, so that a row that sees nothing has a mean
        bias = jnp.where(mask, 0.0 if bias is None else bias, 0.7 * jnp.finfo(jnp.float32).min)
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    return native.attend_densely(q, k, v, bias, scale=scale).astype(query.dtype)


def _attention_on_xla(scale: float, query: Any, key: Any, value: Any, bias: Any, mask: Any) -> jax.Array:
    lead = query.shape[:-3]
    if len(lead) == 1:
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)
    flat = [
        None if x is None else jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(math.prod(lead), *x.shape[-3:])
        for x in (query, key, value, bias, mask)
    ]
    out = jax.nn.dot_product_attention(*flat, scale=scale)  # type: ignore[arg-type]
    return out.reshape(*lead, *out.shape[1:])


def _fits(x: Any, weight: PackedQArray, w_dims: list[tuple[int, ...]], dtype: np.dtype) -> bool:
    """Whether the kernels do such a product."""
    contracted, batch = w_dims
    lead = len(weight.lead)
    return (
        _fits_dtypes(x, weight, dtype)
        and sorted(contracted) == sorted(lead + axis for axis in weight.layout.k_axes)
        and all(axis < lead for axis in batch)
    )


def _fits_dtypes(x: Any, weight: PackedQArray, dtype: np.dtype) -> bool:
    """Whether the kernels read such operands, and there is anything to do."""
    return (
        not isinstance(x, PackedQArray)
        and jnp.issubdtype(x.dtype, jnp.floating)
        and jnp.issubdtype(dtype, jnp.floating)
        and all(np.dtype(d).itemsize <= 4 for d in (x.dtype, weight.dtype, dtype))
        and weight.scale.dtype.itemsize <= 4
        and math.prod(x.shape) > 0
        # Where a sharding is part of an array's type, an op has to say that of its result.
        and not any(
            any(jax.typeof(leaf).sharding.spec) for leaf in (x.qvalue if isinstance(x, QArray) else x, weight.qvalue)
        )
    )


def _dot(
    x: Any,
    weight: PackedQArray,
    x_dims: list[tuple[int, ...]],
    w_dims: list[tuple[int, ...]],
    dtype: np.dtype,
    bias: jax.Array | None = None,
    activation: str | None = None,
) -> jax.Array:
    """(batch axes, other axes of x, other axes of the weight)."""
    layout, lead = weight.layout, len(weight.lead)
    # The contracted axes of x in the order that makes K.
    x_contracted = [x_dims[0][w_dims[0].index(lead + axis)] for axis in layout.k_axes]
    x_batch, w_batch = list(x_dims[1]), list(w_dims[1])
    x_rest = [axis for axis in range(x.ndim) if axis not in (*x_contracted, *x_batch)]
    order = [*x_batch, *x_rest, *x_contracted]
    mode, values, scale, method = _activations(x, order, len(x_contracted), weight)
    rest_shape = tuple(x.shape[axis] for axis in x_rest)
    product = _Product(mode, method, dtype, activation)

    def rows(values: jax.Array, scale: jax.Array | None, weight: PackedQArray) -> jax.Array:
        values = values.reshape(-1, layout.k)
        if scale is not None:
            scale = jnp.broadcast_to(scale, (*rest_shape, scale.shape[-1])).reshape(-1, scale.shape[-1])
        remaining = weight.lead
        out = multiply(values, scale, weight, bias, product)
        columns = [layout.shape[axis] for axis in layout.n_axes]
        out = out.reshape(*rest_shape, *remaining, *columns)
        places = np.argsort(np.asarray(layout.n_axes))
        start = len(rest_shape) + len(remaining)
        return out.transpose(*range(start), *(start + int(i) for i in places))

    # Each batch axis of the weight is a leading axis of its leaves; vmap takes the last one first.
    for i in reversed(range(len(w_batch))):
        axis = w_batch[i] - sum(other < w_batch[i] for other in w_batch[:i])
        rows = jax.vmap(rows, in_axes=(0, None if scale is None else 0, axis))
    return rows(values, scale, weight)


def _activations(
    x: Any, order: list[int], contracted: int, weight: PackedQArray
) -> tuple[int, jax.Array, jax.Array | None, str]:
    """(mode, values, scales or None, calibration method): x with its axes in `order`, as the kernels take it."""
    format_ = packed.format_of(weight.qtype)
    assert format_ is not None
    tiles = weight.layout.tiles
    if isinstance(x, qarray.UnquantizedQArray) and format_.is_integer and _is_dynamic(x, order, contracted, weight):
        return native.DYNAMIC, _supported(x.qvalue.transpose(order)), None, x.how.calibration_method
    x = qarray.unwrap(x)
    if isinstance(x, QArray) and format_.is_integer and x.zero_point is None:
        is_int = jnp.issubdtype(x.qvalue.dtype, jnp.signedinteger) and jax.dtypes.itemsize_bits(x.qvalue.dtype) <= 8
        scale = x.scale.transpose(order)
        counts = scale.shape[scale.ndim - contracted :]
        whole = all(n == 1 for n in counts)
        if is_int and x.scale.dtype.itemsize <= 4 and (whole or _flat_counts(counts, x, order) == tiles):
            scale = scale.reshape(*scale.shape[: scale.ndim - contracted], 1 if whole else tiles)
            batched = [x.shape[axis] for axis in order[: scale.ndim - 1]]
            scale = jnp.broadcast_to(scale, (*batched, scale.shape[-1])).astype(jnp.float32)
            return native.QUANTIZED, x.qvalue.astype(jnp.int8).transpose(order), scale, ""
    values = qarray.dequantize(x) if isinstance(x, QArray) else x
    return native.FLOAT, _supported(values.transpose(order)), None, ""


def _flat_counts(counts: tuple[int, ...], x: QArray, order: list[int]) -> int:
    """How many tiles of equal length a row falls into; 0 if those of its axes do not lie one after the other."""
    shape = [x.shape[axis] for axis in order[len(order) - len(counts) :]]
    tiled = [i for i, n in enumerate(counts) if n != 1]
    # Before the last axis that is tiled, each index has scales of its own; after it, none has.
    if any(counts[i] != shape[i] for i in range(tiled[-1])):
        return 0
    return math.prod(counts)


def _is_dynamic(x: qarray.UnquantizedQArray, order: list[int], contracted: int, weight: PackedQArray) -> bool:
    """Whether the kernel quantizes x as `x.how` says: to int8 by absmax, a scale for each row and tile."""
    how, layout = x.how, weight.layout
    if how.qtype != _INT8 or how.noise_fn is not None or x.dtype not in (_FLOAT32, _BFLOAT16):
        return False
    if calibration.parse_calibration_method(how.calibration_method)[0] != "absmax":
        return False
    shape = x.module.get_scale_shape(x.shape, how)
    counts = tuple(shape[axis] for axis in order)
    rows = order[: len(order) - contracted]
    if any(shape[axis] != x.shape[axis] for axis in rows):
        return False
    columns = counts[len(rows) :]
    if layout.tiles == 1:
        return all(n == 1 for n in columns)
    return any(n != 1 for n in columns) and _flat_counts(columns, x, order) == layout.tiles


def _supported(x: jax.Array) -> jax.Array:
    """Floats in a dtype that the kernels read."""
    return x if x.dtype in (_FLOAT32, _BFLOAT16) else x.astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _multiply(
    x: jax.Array, scale: jax.Array | None, weight: PackedQArray, bias: jax.Array | None, product: Any
) -> jax.Array:
    """(M, K) times a packed (leads, K, N), and a bias (leads * N,): (M, leads * N)."""
    bias = None if bias is None else bias.astype(jnp.float32)
    if not native.is_available():
        return _reference(x, scale, weight, bias, product)
    return lax.platform_dependent(
        x,
        scale,
        weight,
        bias,
        cpu=functools.partial(_native, product=product),
        default=functools.partial(_reference, product=product),
    )


@_multiply.defjvp
def _no_gradient(product: Any, primals: Any, tangents: Any) -> Any:
    del product, primals, tangents
    raise NotImplementedError(
        "A weight packed for inference (qwix.optimize_for_inference) has no gradients, neither of it nor through it: "
        "differentiate the model before it is packed, or qwix.cpu.restore(model)."
    )


# Traced and lowered once for products of equal shapes, such as those of a model's layers.
multiply = jax.jit(_multiply, static_argnums=4)


def _native(
    x: jax.Array, scale: jax.Array | None, weight: PackedQArray, bias: jax.Array | None, product: _Product
) -> jax.Array:
    format_, layout = packed.format_of(weight.qtype), weight.layout
    assert format_ is not None
    merge = lambda leaf: leaf.reshape(-1, *leaf.shape[-2:])  # noqa: E731
    _, args = calibration.parse_calibration_method(product.method) if product.method else ("", ())
    call = partition.Call(
        format_number=format_.number,
        mode=product.mode,
        columns=layout.n,
        tile=layout.tile,
        factor=args[0] if args else 1.0,
        activation=product.activation,
        dtype=_BFLOAT16 if product.dtype == _BFLOAT16 else _FLOAT32,
    )
    zeros = None if weight.zero_point is None else merge(weight.zero_point)
    out = partition.matmul(call, x, scale, merge(weight.qvalue), merge(weight.scale), zeros, bias)
    # Within `jax.shard_map`, the result of a custom call does not know by itself which mesh axes it varies over.
    varying = frozenset().union(*map(_varying_axes, jax.tree.leaves((x, scale, weight, bias))))
    missing = tuple(sorted(varying - _varying_axes(out)))
    out = lax.pcast(out, missing, to="varying") if missing else out
    return out.astype(product.dtype)


def _varying_axes(x: jax.Array) -> frozenset:
    """The manual mesh axes over which an array varies."""
    aval: Any = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # jax 0.10 and 0.9


def _reference(
    x: jax.Array, scale: jax.Array | None, weight: PackedQArray, bias: jax.Array | None, product: _Product
) -> jax.Array:
    """The same product by the ops of `core/`, on the unpacked weight."""
    layout, w = weight.layout, packed.matrix(weight)
    lead = len(weight.lead)
    x = jnp.pad(x, ((0, 0), (0, layout.padded_k - layout.k)))
    lhs: Any = x
    if product.mode == native.DYNAMIC:
        tiles = {} if layout.tiles == 1 else {1: layout.tile}
        how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes=tiles, calibration_method=product.method)
        lhs = qarray.quantize(x, how)
    elif product.mode == native.QUANTIZED:
        assert scale is not None
        lhs = QArray(x, scale)
    dims = (((1,), (lead,)), ((), ()))
    is_plain = bias is None and product.activation is None
    dtype = product.dtype if is_plain else np.promote_types(product.dtype, _FLOAT32)
    out = core_dot_general.dot_general(lhs, w, dims, preferred_element_type=dtype)
    out = out.reshape(x.shape[0], math.prod(out.shape[1:]))
    return native.activate(out if bias is None else out + bias, product.activation).astype(product.dtype)


# Of a convolution of floats, how many windows are cut out of the image to be rows. Of more, the copies cost more than
# to dequantize the weight for XLA's own convolution, which makes none; that of int8 is slow, whatever its size.
_MOST_FLOAT_WINDOWS = 512


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    *,
    dimension_numbers: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`core.conv_general.conv_general_dilated` where an operand is a `PackedQArray`.

    A kernel that is packed is a matrix of (window, features in) x (features out); the input becomes one of a row for
    each window, as slices of it: `_windows`.
    """
    dims: lax.ConvDimensionNumbers = dimension_numbers
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    dilation = tuple(lhs_dilation or (1,) * len(window_strides))
    fits = (
        isinstance(rhs, PackedQArray)
        and _fits_dtypes(lhs, rhs, dtype)
        and not rhs.lead
        and rhs.layout.n_axes == dims.rhs_spec[:1]
        and feature_group_count == batch_group_count == 1
        and out_sharding is None
        and (not isinstance(padding, str) or set(dilation) == {1})
    )

    def unpacked() -> jax.Array:
        return core_conv.conv_general_dilated(
            qarray.unwrap(lhs),
            qarray.unwrap(rhs),
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dims,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
            out_sharding,
        )

    if not fits:
        return unpacked()
    spatial = [rhs.shape[axis] for axis in dims.rhs_spec[2:]]
    rhs_dilation = tuple(rhs_dilation or (1,) * len(spatial))
    order = (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1])
    mode, values, scale = _image(lhs, rhs, order)
    extents = [(n - 1) * d + 1 for n, d in zip(spatial, rhs_dilation, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(values.shape[1:-1], extents, window_strides, padding)
    amounts = [(low, high, d - 1) for (low, high), d in zip(padding, dilation, strict=True)]
    values = lax.pad(values, np.zeros((), values.dtype), [(0, 0, 0), *amounts, (0, 0, 0)])
    places = [(n - e) // s + 1 for n, e, s in zip(values.shape[1:-1], extents, window_strides, strict=True)]
    is_float = mode == native.FLOAT and not isinstance(lhs, QArray)
    if is_float and math.prod(spatial) > 1 and values.shape[0] * math.prod(places) > _MOST_FLOAT_WINDOWS:
        return unpacked()
    values = _windows(values, spatial, window_strides, rhs_dilation)
    size = len(spatial)
    batch = values.shape[: 1 + size]
    # (batch, places, window, features) to the order of the axes that make K.
    at = {dims.rhs_spec[1]: 1 + 2 * size} | {axis: 1 + size + i for i, axis in enumerate(dims.rhs_spec[2:])}
    values = values.transpose(*range(1 + size), *(at[axis] for axis in rhs.layout.k_axes))
    if scale is not None:
        scale = jnp.broadcast_to(scale.reshape(-1, *(1,) * size), batch).reshape(-1, 1)
    values = values.reshape(math.prod(batch), rhs.layout.k)
    out = multiply(values, scale, rhs, None, _Product(mode, "", dtype))
    out = out.reshape(*batch, rhs.layout.n)
    return out.transpose(np.argsort((dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1])))


def _image(x: Any, weight: PackedQArray, order: tuple[int, ...]) -> tuple[int, jax.Array, jax.Array | None]:
    """(mode, values, a scale for each of the batch or None): the input of a convolution, with its axes in `order`."""
    format_ = packed.format_of(weight.qtype)
    assert format_ is not None
    x = qarray.unwrap(x)
    if isinstance(x, QArray) and format_.is_integer and x.zero_point is None:
        is_int8 = x.qvalue.dtype == _INT8
        if is_int8 and all(x.scale.shape[axis] == 1 for axis in order[1:]) and weight.layout.tiles == 1:
            scale = jnp.broadcast_to(x.scale.reshape(-1), (x.shape[order[0]],))
            return native.QUANTIZED, x.qvalue.transpose(order), scale.astype(jnp.float32)
    values = qarray.dequantize(x) if isinstance(x, QArray) else x
    return native.FLOAT, _supported(values.transpose(order)), None


def _windows(x: jax.Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> jax.Array:
    """What a convolution sums over: (batch, *spatial, features) -> (batch, *places, *window, features).

    Of one spatial axis after the other, so that a window of 16 x 16 takes 32 slices.

    >>> _windows(jnp.arange(4.0).reshape(1, 4, 1), (2,), (1,), (1,))[0, :, :, 0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    for axis, (size, stride, step) in enumerate(zip(window, strides, dilation, strict=True), 1):
        places = max(0, (x.shape[axis] - (size - 1) * step - 1) // stride + 1)
        end = max(0, (places - 1) * stride + 1)
        slices = [lax.slice_in_dim(x, i * step, i * step + end, stride, axis) for i in range(size)]
        x = jnp.stack(slices, -2)
    return x
