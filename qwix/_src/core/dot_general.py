"""`jax.lax.dot_general` on arrays and QArrays.

    >>> dims = (((1,), (0,)), ((), ()))
    >>> how = get_how_to_quantize(
    ...     dimension_numbers=dims, ndims=(2, 2), for_lhs=False, tile_size=128, qtype=jnp.int8
    ... )
    >>> w = qarray.quantize(jnp.ones((256, 3)), how)
    >>> w.scale.shape
    (2, 3)
    >>> dot_general(jnp.ones((4, 256)), w, dims).shape
    (4, 3)

How a dot_general runs, first match:
- both operands are arrays: as it is;
- both are block-scaled (mxfp8, nvfp4) on hardware that multiplies those: `mxfp_dot`;
- an operand is an array (weight-only), or its format is no number (nf4), or a contracting axis is
  tiled finer than `MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT`: dequantized first, then in float;
- else on stored elements, scaled on the output. A contracting axis in tiles is split into (tiles,
  tile size), the tiles become a batch axis, and are summed after they are scaled.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src.core import mxfp_dot, operands, qarray
from qwix._src.core.qarray import HowToQuantize, QArray

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

# Scaling costs one pass over an output for each tile of the contracting axes. With tiles smaller
# than this, that is dearer than dequantizing the operands.
MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT = 128

# How many elements the outputs of all tiles may have together before they are added up one by one.
_MAX_BATCHED_OUTPUTS = 2**20


def get_how_to_quantize(
    *,
    dimension_numbers: DimensionNumbers,
    ndims: tuple[int, int],
    for_lhs: bool,
    tile_size: Mapping[int, int | float] | int | float | None,
    **kwargs: Any,
) -> HowToQuantize:
    """How to quantize an operand: a scale for each index of every axis that is not contracted.

    Args:
      dimension_numbers: of the dot_general.
      ndims: ranks of lhs and rhs.
      for_lhs: which operand.
      tile_size: the tile size of the last contracting axis (a float f: 1 / number of tiles), or a
        mapping axis -> tile size for axes of this operand, or None. It is an error if there is no
        contracting axis to tile.
      **kwargs: the other fields of `HowToQuantize`, such as `qtype` and `calibration_method`.

    >>> dims = (((2,), (1,)), ((0,), (0,)))
    >>> how = get_how_to_quantize(
    ...     dimension_numbers=dims, ndims=(3, 3), for_lhs=False, tile_size=32, qtype=jnp.int4
    ... )
    >>> how.channelwise_axes, how.tiled_axes
    ((0, 2), {1: 32})
    """
    dims = operands.canonical_dimension_numbers(dimension_numbers, ndims)
    side = 0 if for_lhs else 1
    contracting = dims[0][side]
    if tile_size is None:
        tiled_axes: dict[int, int | float] = {}
    elif isinstance(tile_size, Mapping):
        tiled_axes = {axis % ndims[side]: tile for axis, tile in tile_size.items()}
    elif contracting:
        tiled_axes = {contracting[-1]: tile_size}
    else:
        raise ValueError(f"tile_size={tile_size}, but {dimension_numbers} contracts no axis.")
    channelwise = [a for a in range(ndims[side]) if a not in contracting and a not in tiled_axes]
    return HowToQuantize(channelwise_axes=channelwise, tiled_axes=tiled_axes, **kwargs)


def dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    dimension_numbers: DimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.dot_general` that takes QArrays: sum_k lhs[b, m, k] rhs[b, k, n].

    Args:
      lhs: an array or a QArray of any granularity.
      rhs: likewise.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), any number of
        each.
      precision: of float arithmetic; sums of integers are exact whatever it says.
      preferred_element_type: the result's dtype. Default: the promotion of the (dequantized)
        operands' dtypes.
      **kwargs: `out_sharding`, of the result.

    Returns:
      A float array: batch axes, remaining axes of lhs, remaining axes of rhs. Integers are summed
      in int32 (in float32 if that could overflow), 8- and 4-bit floats in float32; scales are
      applied in float32.

    Raises:
      ValueError: both operands are asymmetric and none of them has to be dequantized first, or
        `preferred_element_type` is no float.

    >>> x = qarray.quantize_api(jnp.array([[1.0, -2.0]]), jnp.int8)
    >>> y = qarray.quantize_api(jnp.array([[1.0], [2.0]]), jnp.int8)
    >>> dot_general(x, y, (((1,), (0,)), ((), ()))).round(1)
    Array([[-3.]], dtype=float32)
    """
    lhs, rhs = operands.unwrap(lhs, rhs)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **kwargs)
    if (own := operands.own_ops(lhs, rhs)) is not None:
        return own.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **kwargs)
    dims = operands.canonical_dimension_numbers(dimension_numbers, (lhs.ndim, rhs.ndim))
    if mxfp_dot.is_native(lhs, rhs, dims) and precision is None and kwargs.get("out_sharding") is None:
        return mxfp_dot.mxfp_dot_general(lhs, rhs, dims, preferred_element_type)
    min_tile, one_device = MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT, jax.device_count() == 1
    return _dot_general(lhs, rhs, dims, precision, preferred_element_type, min_tile, one_device, **kwargs)


# Tracing a call again costs a fifth of tracing its operations (jax 0.10), and models repeat their shapes.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6), static_argnames="out_sharding", inline=True)
def _dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    dims: operands.DotDimensionNumbers,
    precision: Any,
    preferred_element_type: Any,
    min_tile: int,
    one_device: bool,
    out_sharding: Any = None,
) -> jax.Array:
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    counts = _tile_counts(lhs, rhs, dims, min_tile)
    if counts is None:
        lhs, rhs = operands.float_operands(lhs, rhs)
        return lax.dot_general(lhs, rhs, dims, precision, preferred_element_type, out_sharding=out_sharding)
    assert isinstance(lhs, QArray) and isinstance(rhs, QArray)  # or there were no counts
    tiled = sum(count != 1 for count in counts)
    if not tiled:
        out = _contract(lhs, rhs, dims, precision, out_sharding=out_sharding)
    elif one_device and out_sharding is None and _is_faster_in_loop(lhs, rhs, dims, counts):
        product = functools.partial(_contract, dims=dims, precision=precision)
        out = _sum_of_tiles(product, lhs, rhs, dims, counts, unroll=False)
    else:
        lhs, rhs, dims = _split_tiles(lhs, rhs, dims, counts)
        before = out_sharding and _sharding_of_tiles(out_sharding, lhs, dims, tiled)
        out = _contract(lhs, rhs, dims, precision, out_sharding=before)
        out = lax.reduce_sum(out, tuple(range(tiled)))
        if out_sharding is not None:
            out = jax.sharding.reshard(out, out_sharding)
    return lax.convert_element_type(out, dtype)


def loop_dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    dimension_numbers: DimensionNumbers,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`dot_general` that takes one tile of the contracting axes after the other and adds up the
    results.

    Lean where `dot_general` is not: no array of (tiles, output), and never more than one tile of an
    operand dequantized. Tiles of any size are multiplied in their stored format. The loop is
    unrolled, with static slices only, so that it also works within Pallas kernels; tracing takes
    time in proportion to the number of tiles.

    Args:
      lhs: as of `dot_general`, as are the others.
      rhs: an array or a QArray.
      dimension_numbers: of the dot_general.
      preferred_element_type: the result's dtype.
      **kwargs: `precision` and `out_sharding`.
    """
    lhs, rhs = qarray.unwrap(lhs), qarray.unwrap(rhs)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type, **kwargs)
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    dims = operands.canonical_dimension_numbers(dimension_numbers, (lhs.ndim, rhs.ndim))
    in_storage = operands.keeps_storage(lhs, rhs)
    counts = _merged_counts(lhs, rhs, dims)

    def product(lhs: Any, rhs: Any) -> jax.Array:
        if in_storage:
            return _contract(lhs, rhs, dims, **kwargs)
        lhs, rhs = operands.float_operands(lhs, rhs)
        accumulator = jnp.promote_types(dtype, jnp.float32)
        return lax.dot_general(lhs, rhs, dims, preferred_element_type=accumulator, **kwargs)

    total = _sum_of_tiles(product, lhs, rhs, dims, counts, unroll=True)
    return lax.convert_element_type(total, dtype)


def _tile_counts(lhs: Any, rhs: Any, dims: operands.DotDimensionNumbers, min_tile: int) -> list[int] | None:
    """The number of tiles of each pair of contracting axes; None: dequantize first."""
    if not operands.keeps_storage(lhs, rhs):
        return None
    counts = _merged_counts(lhs, rhs, dims)
    for axis, count in zip(dims[0][0], counts, strict=True):
        if count > 1 and lhs.shape[axis] // count < min_tile:
            return None
    return counts


def _merged_counts(lhs: Any, rhs: Any, dims: operands.DotDimensionNumbers) -> list[int]:
    """The number of tiles, of each pair of contracting axes, on which both scales are constant."""
    counts = []
    for lhs_axis, rhs_axis in zip(*dims[0], strict=True):
        lhs_count = operands.tile_count(lhs, lhs_axis) if isinstance(lhs, QArray) else 1
        rhs_count = operands.tile_count(rhs, rhs_axis) if isinstance(rhs, QArray) else 1
        counts.append(operands.merged_tile_count(lhs.shape[lhs_axis], lhs_count, rhs_count))
    return counts


def _contract(
    lhs: QArray,
    rhs: QArray,
    dims: operands.DotDimensionNumbers,
    precision: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """The uncast product of operands with one scale along each contracting axis."""
    lhs_transpose, rhs_transpose = operands.scale_transposes(dims, (lhs.ndim, rhs.ndim))

    def op(lhs: jax.Array, rhs: jax.Array, accumulator: np.dtype) -> jax.Array:
        # Sums of integers are exact, and a DotAlgorithm for floats would be an error.
        applied = None if accumulator == np.int32 else precision
        return lax.dot_general(lhs, rhs, dims, applied, accumulator, **kwargs)

    return operands.contract(
        lhs,
        rhs,
        op,
        terms=int(np.prod([lhs.shape[a] for a in dims[0][0]])),
        lhs_to_out=lambda x: operands.place(x, lhs_transpose),
        rhs_to_out=lambda x: operands.place(x, rhs_transpose),
        sum_lhs=lambda x: operands.place(operands.keepdims_sum(x, dims[0][0]), lhs_transpose),
        sum_rhs=lambda x: operands.place(operands.keepdims_sum(x, dims[0][1]), rhs_transpose),
    )


def _split_tiles(
    lhs: QArray, rhs: QArray, dims: operands.DotDimensionNumbers, counts: list[int]
) -> tuple[QArray, QArray, operands.DotDimensionNumbers]:
    """Splits each tiled contracting axis into a batch axis, before all others, and its rest."""
    new_ca, new_ba = [], []
    arrays: list[QArray] = []
    for array, ca, ba in ((lhs, dims[0][0], dims[1][0]), (rhs, dims[0][1], dims[1][1])):
        tiled = {axis: count for axis, count in zip(ca, counts, strict=True) if count != 1}
        shift = [sum(t < axis for t in tiled) for axis in range(array.ndim)]
        new_ca.append(tuple(axis + shift[axis] + (axis in tiled) for axis in ca))
        new_ba.append(tuple(a + shift[a] for a in (*tiled, *ba)))
        arrays.append(_split_array(array, tiled))
    return arrays[0], arrays[1], ((new_ca[0], new_ca[1]), (new_ba[0], new_ba[1]))


def _split_array(array: QArray, tiled: dict[int, int]) -> QArray:
    def split(leaf: jax.Array, is_shared: bool) -> jax.Array:
        full = list(leaf.shape)
        shape: list[int] = []
        for axis, size in enumerate(leaf.shape):
            count = tiled.get(axis)
            if count is None:
                shape.append(size)
            elif not is_shared:
                shape += [count, size // count]
            else:
                # A tiling coarser than the other operand's is repeated; one scale for all is not.
                full[axis] = 1 if size == 1 else count
                shape += [full[axis], 1]
        if tuple(full) != leaf.shape:
            leaf = qarray.broadcast_to(leaf, tuple(full))
        return lax.reshape(leaf, tuple(shape))

    return array.replace(
        qvalue=split(array.qvalue, False),
        scale=split(array.scale, True),
        zero_point=None if array.zero_point is None else split(array.zero_point, True),
    )


def _is_faster_in_loop(lhs: QArray, rhs: QArray, dims: operands.DotDimensionNumbers, counts: list[int]) -> bool:
    """Whether one device takes one tile after the other faster than all of them as a batch.

    An output once for each tile is slow if large, a GPU wants parallel work if it is small. XLA's CPU
    backend is 2 to 5 times faster with a loop at any size. (With several devices it is a batch: a
    loop over a sharded axis would gather it.)
    """
    shared = math.prod(lhs.shape[axis] for axis in (*dims[0][0], *dims[1][0], *dims[0][0]))
    outputs = math.prod(counts) * lhs.size * rhs.size // max(shared, 1)
    return outputs > _MAX_BATCHED_OUTPUTS or jax.default_backend() == "cpu"


def _sum_of_tiles(
    product: Callable[[Any, Any], jax.Array],
    lhs: Any,
    rhs: Any,
    dims: operands.DotDimensionNumbers,
    counts: list[int],
    *,
    unroll: bool,
) -> jax.Array:
    """The sum over all tiles of the contracting axes of a product of one tile."""

    def part(number: Any) -> jax.Array:
        tile = []
        for count in counts:
            tile.append(number % count)
            number = number // count
        lhs_tile = _take_tile(lhs, dims[0][0], counts, tile)
        return product(lhs_tile, _take_tile(rhs, dims[0][1], counts, tile))

    tiles = math.prod(counts)
    if unroll:
        return functools.reduce(lax.add, map(part, range(tiles)))
    return lax.fori_loop(1, tiles, lambda number, total: lax.add(total, part(number)), part(0))


def _take_tile(array: Any, axes: tuple[int, ...], counts: list[int], tile: list[Any]) -> Any:
    """One tile of each contracting axis of an array or QArray; indices are static or traced."""

    def take(leaf: jax.Array) -> jax.Array:
        for axis, count, index in zip(axes, counts, tile, strict=True):
            size = leaf.shape[axis]
            if count == 1 or size == 1:
                continue
            # A scale that is tiled more coarsely than the other operand's covers several tiles.
            length = max(size // count, 1)
            start = index * length // max(count // size, 1)
            if isinstance(start, int):
                leaf = lax.slice_in_dim(leaf, start, start + length, axis=axis)
            else:
                leaf = lax.dynamic_slice_in_dim(leaf, start, length, axis=axis)
        return leaf

    if not isinstance(array, QArray):
        return take(array)
    return array.replace(
        qvalue=take(array.qvalue),
        scale=take(array.scale),
        zero_point=None if array.zero_point is None else take(array.zero_point),
    )


def _sharding_of_tiles(out_sharding: Any, lhs: QArray, dims: operands.DotDimensionNumbers, tiled: int) -> Any:
    """A sharding of the output before its first axes, the tiles, are summed.

    The tiles stay sharded as the contracting axes were, on mesh axes that the output then lacks.
    """
    is_named = isinstance(out_sharding, jax.NamedSharding)
    spec = out_sharding.spec if is_named else out_sharding
    lhs_spec = jax.typeof(lhs.qvalue).sharding.spec
    tiles = [lhs_spec[axis] for axis in dims[1][0][:tiled]]
    taken = {name for names in tiles for name in _mesh_axes(names)}
    rest = [None if taken & {*_mesh_axes(names)} else names for names in spec]
    before = jax.P(*tiles, *rest)
    return jax.NamedSharding(out_sharding.mesh, before) if is_named else before


def _mesh_axes(names: Any) -> tuple:
    """The mesh axes of one entry of a PartitionSpec."""
    return names if isinstance(names, tuple) else () if names is None else (names,)
