"""Tiles that do not divide the axis: the array is quantized as if padded with zeros.

A row of 10 elements in tiles of 4 is quantized as 12 elements, the last two of them 0, and so has 3
scales, the last one for 2 elements:

    >>> how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,), tiled_axes={0: 4})
    >>> w = quantize(jnp.ones((10, 6)), how)
    >>> w.shape, w.scale.shape, w.padded_shape
    ((10, 6), (3, 6), (12, 6))
    >>> dot_general(jnp.ones((2, 10)), w, (((1,), (0,)), ((), ()))).shape
    (2, 6)

How that is computed with:

- Two quantized operands are padded along the contracted axes, by elements that dequantize to exactly
  0, and so contribute nothing: the op runs on stored elements, tile by tile, like any other.
- An operand of a float op is dequantized at its own shape.
- Every other function of arrays gets `PaddedQArray.plain()`: an equal QArray of the original shape,
  whose tiles are small enough to divide it.

This module can be given to a provider, as `PaddedPtqProvider` does:
`PtqProvider(rules, _qarray_module=padded_ptq, _dot_general_fn=padded_ptq.dot_general,
_einsum_fn=padded_ptq.einsum)`.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src import nnx_nodes, qconfig
from qwix._src.core import dot_general as core_dot_general
from qwix._src.core import einsum as core_einsum
from qwix._src.core import einsum_info, numerics, operands, pytree, qarray, tiling
from qwix._src.core import ragged_dot as core_ragged_dot
from qwix._src.core.qarray import HowToQuantize, QArray
from qwix._src.providers import boxed_param, ptq

# Whether `quantize` keeps the padded elements, or only the scales that they led to. Without them the
# elements are sharded and stored like the float array; with them an op does not have to pad.
QARRAY_KEEP_PADDED_SHAPE = False

# See `qarray.UnquantizedQArray`.
QUANTIZES_ALIKE = True


@nnx_nodes.register
@pytree.array_structure
class PaddedQArray(QArray):
    """A QArray whose last tile along an axis may be cut short; see the module's docstring.

    The qvalue has the original shape, or the padded one where `QARRAY_KEEP_PADDED_SHAPE` was set. The
    scale has the shape that belongs to the padded one. `shape` is the original shape.

    The static shapes are those at quantization. Under `jax.vmap`, `jax.lax.scan` or stacking the leaves
    have axes less or more, and the shapes follow: leading axes come and go, unless the sizes show
    that it was another. Indexing, `reshape`, `transpose` and `swapaxes` carry the shapes along, and
    give a plain QArray where a padded axis is cut.

    Attributes:
      padded_shape: the shape with each tiled axis a multiple of its tile (static).
      original_shape: the shape of the float array (static).
    """

    padded_shape: tuple[int, ...] = pytree.static(default=())
    original_shape: tuple[int, ...] = pytree.static(default=())
    replace: ClassVar[Callable[..., "PaddedQArray"]]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "padded_shape", tuple(self.padded_shape))
        object.__setattr__(self, "original_shape", tuple(self.original_shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dequantized array."""
        return self._shapes()[0]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """How many elements share a scale along each axis, padded ones included."""
        return tiling.tile_shape(self._shapes()[1], self.scale.shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """How many elements share a zero point along each axis; None in symmetric quantization."""
        if self.zero_point is None:
            return None
        return tiling.tile_shape(self._shapes()[1], self.zero_point.shape)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(original shape, padded shape) of the leaves as they are now."""
        return _shapes_of_leaves(
            self.original_shape, self.padded_shape, tuple(self.qvalue.shape), tuple(self.scale.shape)
        )

    def padded_axes(self) -> tuple[int, ...]:
        """The axes whose last tile is cut short."""
        original, padded = self._shapes()
        return tuple(axis for axis in range(self.ndim) if original[axis] != padded[axis])

    def plain(self) -> QArray:
        """An equal QArray of the original shape: of smaller tiles, which divide it.

        >>> how = HowToQuantize(qtype=jnp.int8, tiled_axes={0: 4})
        >>> quantize(jnp.ones((10,)), how).plain().scale.shape
        (5,)
        """
        return _refined(pytree.unwrap(self), self.padded_axes())

    def astype(self, dtype: Any) -> "PaddedQArray":
        """Changes the dtype of the dequantized array; the qvalue stays as it is."""
        array = pytree.unwrap(self)
        return array.replace(scale=array.scale.astype(dtype))

    def transpose(self, *args: Any) -> "PaddedQArray":
        """Permutes the axes, as `jax.Array.transpose` does."""
        axes = args[0] if len(args) == 1 and (args[0] is None or isinstance(args[0], Sequence)) else args
        order = [axis % self.ndim for axis in axes] if axes else list(reversed(range(self.ndim)))
        original, padded = self._shapes()
        return self._with_layout(
            lambda leaf: leaf.transpose(order),
            lambda leaf: leaf.transpose(order),
            [original[axis] for axis in order],
            [padded[axis] for axis in order],
        )

    def swapaxes(self, axis1: int, axis2: int) -> "PaddedQArray":
        """Exchanges two axes."""
        order = list(range(self.ndim))
        order[axis1], order[axis2] = order[axis2], order[axis1]
        return self.transpose(order)

    def reshape(self, *new_shape: Any) -> QArray:
        """Reshapes; a padded axis that stays as it is remains padded, see `qarray.reshape`."""
        single = new_shape[0] if len(new_shape) == 1 else new_shape
        target = list(single if isinstance(single, Sequence) else new_shape)
        original, padded = self._shapes()
        if target.count(-1) == 1:
            target[target.index(-1)] = self.size // -math.prod(target)
        starts = {math.prod(target[:axis]): axis for axis in range(len(target)) if target[axis] != 1}
        new_padded = list(target)
        for axis in self.padded_axes():
            new_axis = starts.get(math.prod(original[:axis]))
            if new_axis is None or target[new_axis] != original[axis]:
                return self.plain().reshape(*new_shape)
            new_padded[new_axis] = padded[axis]

        def share(leaf: jax.Array) -> jax.Array:
            shape = tiling.reshaped_scale_shape(padded, leaf.shape, new_padded)
            if shape is None or math.prod(target) != self.size:
                raise ValueError(
                    f"Cannot reshape a PaddedQArray of shape {original} to {tuple(target)}: its scale or zero "
                    f"point of shape {leaf.shape} cannot follow. Dequantize it first."
                )
            return leaf.reshape(shape)

        stored = target if pytree.unwrap(self).qvalue.shape == original else new_padded
        return self._with_layout(lambda leaf: leaf.reshape(stored), share, target, new_padded)

    def __getitem__(self, idx: Any) -> QArray:
        original, padded = self._shapes()
        entries = tiling.expand_index(idx, original)
        is_static = all(isinstance(entry, int | slice) for entry in entries)
        if not is_static or any(entries[axis] != slice(None) for axis in self.padded_axes()):
            return self.plain()[idx]
        kept = [axis for axis, entry in enumerate(entries) if isinstance(entry, slice)]
        sizes = {axis: len(range(*entries[axis].indices(original[axis]))) for axis in kept}
        return self._with_layout(
            lambda leaf: leaf[entries],
            lambda leaf: tiling.take_shared(leaf, entries, padded),
            list(sizes.values()),
            [padded[axis] if original[axis] != padded[axis] else sizes[axis] for axis in kept],
        )

    def _with_layout(
        self,
        fn: Callable[[jax.Array], jax.Array],
        share: Callable[[jax.Array], jax.Array],
        original: Sequence[int],
        padded: Sequence[int],
    ) -> "PaddedQArray":
        array = pytree.unwrap(self)
        return array.replace(
            qvalue=fn(array.qvalue),
            scale=share(array.scale),
            zero_point=None if array.zero_point is None else share(array.zero_point),
            original_shape=tuple(original),
            padded_shape=tuple(padded),
        )


@functools.lru_cache(maxsize=4096)
def _shapes_of_leaves(
    original: tuple[int, ...], padded: tuple[int, ...], stored: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The static shapes of a PaddedQArray, for leaves that may have axes less or more.

    Each axis of the leaves is one of the static axes, in order, or new. A padded axis cannot go, for its
    elements and scales are not equally many. Of all assignments in which the sizes fit, the one that
    changes the leading axes is taken.
    """
    if original == padded:
        return stored, stored
    is_padded = [o != p for o, p in zip(original, padded, strict=True)]
    rank, extra = len(original), len(stored) - len(original)
    if extra >= 0:
        places = itertools.combinations(range(len(stored)), rank)
        assignments = [{leaf: axis for axis, leaf in enumerate(place)} for place in places]
    else:
        assignments = [dict(enumerate(kept)) for kept in itertools.combinations(range(rank), len(stored))]

    def fits(assignment: dict[int, int]) -> bool:
        if sum(is_padded[axis] for axis in assignment.values()) != sum(is_padded):
            return False
        for leaf, axis in assignment.items():
            if is_padded[axis]:
                tile, rest = divmod(padded[axis], scale[leaf])
                # The last tile has at least one element.
                if stored[leaf] not in (original[axis], padded[axis]) or rest or tile <= padded[axis] - original[axis]:
                    return False
            elif extra and stored[leaf] != original[axis]:
                return False
        return True

    for assignment in reversed(assignments):
        if fits(assignment):
            pads = {leaf: axis for leaf, axis in assignment.items() if is_padded[axis]}
            return (
                tuple(original[pads[i]] if i in pads else n for i, n in enumerate(stored)),
                tuple(padded[pads[i]] if i in pads else n for i, n in enumerate(stored)),
            )
    raise ValueError(
        f"A PaddedQArray of original_shape={original} and padded_shape={padded} has a qvalue of shape {stored} "
        f"and a scale of shape {scale}: a padded axis was cut or joined. Change its layout with its own methods, or "
        "call plain() first."
    )


def get_padded_shape(original_shape: Sequence[int], tiled_axes: Mapping[int, int | float]) -> tuple[int, ...]:
    """The shape in which each tiled axis is a multiple of its tile.

    Args:
      original_shape: of the array.
      tiled_axes: axis -> tile size; a float f means 1 / (number of tiles), as in `HowToQuantize`.

    Raises:
      ValueError: an axis does not exist, or a tile is not positive.

    >>> get_padded_shape((10, 6), {0: 4, 1: 0.5})
    (12, 6)
    """
    padded = list(original_shape)
    for key, tile in _tile_sizes(original_shape, tiled_axes).items():
        padded[key] = -(-padded[key] // tile) * tile
    return tuple(padded)


def _tile_sizes(shape: Sequence[int], tiled_axes: Mapping[int, int | float]) -> dict[int, int]:
    sizes = {}
    for key, tile in tiled_axes.items():
        axis = tiling.axis_index(shape, key)
        sizes[axis] = round(shape[axis] * tile) if isinstance(tile, float) else int(tile)
        if sizes[axis] <= 0:
            raise ValueError(f"Axis {axis} of shape {tuple(shape)} cannot be tiled by {tile}: use a positive tile.")
    return sizes


def get_scale_shape(array_shape: Sequence[int], how: HowToQuantize) -> tuple[int, ...]:
    """`qarray.get_scale_shape` of the padded array."""
    return qarray.get_scale_shape(get_padded_shape(array_shape, how.tiled_axes), how)


def pad_to_shape(array: jax.Array, target_shape: Sequence[int]) -> jax.Array:
    """The array with zeros after its elements, in each axis up to the size in `target_shape`.

    >>> pad_to_shape(jnp.ones((2,)), (4,))
    Array([1., 1., 0., 0.], dtype=float32)
    """
    if tuple(array.shape) == tuple(target_shape):
        return array
    if len(target_shape) != array.ndim or any(t < n for n, t in zip(array.shape, target_shape, strict=True)):
        raise ValueError(f"Cannot pad an array of shape {tuple(array.shape)} to {tuple(target_shape)}.")
    return jnp.pad(array, [(0, t - n) for n, t in zip(array.shape, target_shape, strict=True)])


def quantize(array: jax.Array, how: HowToQuantize) -> PaddedQArray:
    """`qarray.quantize` of the array padded with zeros, cut back to its shape.

    With the calibration method "rms" the zeros count as elements of their tile.

    >>> quantize(jnp.ones((10,)), HowToQuantize(qtype="int4", tiled_axes={0: 8})).scale.shape
    (2,)
    """
    array = pytree.unwrap(array)
    padded_array, how = _padded_for(array, how)
    quantized = _padded_qarray(qarray.quantize(padded_array, how), array.shape)
    return quantized if QARRAY_KEEP_PADDED_SHAPE else _cut_back(quantized)


def quantize_act(array: jax.Array, how: HowToQuantize, rule: qconfig.QuantizationRule, act_name: str) -> PaddedQArray:
    """`boxed_param.quantize_act` of the activation padded with zeros; the padded elements are kept."""
    padded_array, how = _padded_for(array, how)
    return _padded_qarray(boxed_param.quantize_act(padded_array, how, rule, act_name), array.shape)


def _padded_for(array: jax.Array, how: HowToQuantize) -> tuple[jax.Array, HowToQuantize]:
    """The padded array, and the same `how` with tile sizes in elements."""
    tiles = _tile_sizes(array.shape, how.tiled_axes)
    padded = get_padded_shape(array.shape, tiles)
    return pad_to_shape(array, padded), dataclasses.replace(how, tiled_axes=tiles)


def _padded_qarray(array: QArray, original_shape: Sequence[int]) -> PaddedQArray:
    return PaddedQArray(
        array.qvalue,
        array.scale,
        array.zero_point,
        array.qtype,
        padded_shape=array.shape,
        original_shape=tuple(original_shape),
    )


def _cut_back(array: PaddedQArray) -> PaddedQArray:
    if array.original_shape == array.padded_shape:
        return array
    cut, qvalue = tuple(map(slice, array.original_shape)), array.qvalue
    if qarray._views_instead_of_narrowing(qvalue, array.qtype):
        # The backend that converts 4-bit elements one by one slices them likewise.
        device = qvalue.sharding if qvalue.committed else None
        return array.replace(qvalue=jax.device_put(np.asarray(qvalue)[cut], device))
    return array.replace(qvalue=qvalue[cut])


def dequantize(array: QArray) -> jax.Array:
    """`qarray.dequantize`, at the original shape.

    >>> q = quantize(jnp.ones((10,)), HowToQuantize(qtype=jnp.int8, tiled_axes={0: 4}))
    >>> dequantize(q).shape
    (10,)
    """
    array = pytree.unwrap(array)
    if not isinstance(array, PaddedQArray) or not array.padded_axes():
        return qarray.dequantize(array)
    return _dequantize(array)


@functools.partial(jax.jit, inline=True)
def _dequantize(array: PaddedQArray) -> jax.Array:
    # Padded and cut again in one fused loop, against the array of finer scales that `plain` makes.
    original, padded = array._shapes()
    sizes = {axis: padded[axis] for axis in array.padded_axes()}
    return lax.slice(qarray.dequantize(_extended(array, sizes)), (0,) * len(original), original)


def create_quantized_param(name: str, value: jax.Array, how: HowToQuantize) -> ptq.WithAux[QArray]:
    """`boxed_param.create_quantized_param` with a PaddedQArray."""
    return boxed_param.create_quantized_param(name, value, how, _qarray_module=_THIS_MODULE)


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = flax.core.FrozenDict({}),  # noqa: B008
    *,
    allow_extra_params: bool = False,
) -> Any:
    """`ptq.quantize_params` with PaddedQArrays."""
    return ptq.quantize_params(
        params,
        abstract_quantized_params,
        quant_stats,
        allow_extra_params=allow_extra_params,
        _qarray_module=_THIS_MODULE,
    )


class PaddedPtqProvider(ptq.PtqProvider):
    """PtqProvider for tile sizes that need not divide the axes that they tile.

    >>> import qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(10, 4, rngs=nnx.Rngs(0))
    >>> provider = PaddedPtqProvider([qwix.QuantizationRule(weight_qtype="int4", tile_size=8)])
    >>> qwix.quantize_model(model, provider, jnp.ones((1, 10))).kernel.array.scale.shape
    (2, 4)
    """

    def __init__(self, rules: Sequence[qconfig.QuantizationRule], *, disable_jit: bool = False):
        super().__init__(
            rules,
            disable_jit=disable_jit,
            _qarray_module=_THIS_MODULE,
            _dot_general_fn=dot_general,
            _einsum_fn=einsum,
        )

    @staticmethod
    def _ragged_dot_fn(lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        lhs, rhs = _contractible([lhs, rhs], [[(0, 1), (1, 1)]])
        return core_ragged_dot.ragged_dot(lhs, rhs, *args, **kwargs)


# ---------------------------------------------------------------- ops


def dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`core.dot_general.dot_general` that takes PaddedQArrays as well, at their original shapes."""
    dims = operands.canonical_dimension_numbers(dimension_numbers, (len(lhs.shape), len(rhs.shape)))
    groups = [[(0, lhs_axis), (1, rhs_axis)] for lhs_axis, rhs_axis in zip(*dims[0], strict=True)]
    lhs, rhs = _contractible([lhs, rhs], groups)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        lhs, rhs = operands.float_operands(lhs, rhs)
    return core_dot_general.dot_general(lhs, rhs, dims, precision, preferred_element_type, **kwargs)


def einsum(
    einsum_str: str,
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    *others: operands.MaybeQArray,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`core.einsum.einsum` that takes PaddedQArrays as well, at their original shapes."""
    arrays = [lhs, rhs, *others]
    labels, out = einsum_info.parse_subscripts(einsum_str, tuple(len(x.shape) for x in arrays))
    summed = sorted(set("".join(labels)) - set(out))
    groups = [[(i, axis) for i, ls in enumerate(labels) for axis, c in enumerate(ls) if c == s] for s in summed]
    arrays = _contractible(arrays, groups)
    return core_einsum.einsum(einsum_str, *arrays, preferred_element_type=preferred_element_type, **kwargs)


def _contractible(arrays: Iterable[Any], groups: Sequence[Sequence[tuple[int, int]]]) -> list[Any]:
    """Operands without PaddedQArrays among them, in which what is summed has the same sizes.

    Args:
      arrays: arrays, QArrays and PaddedQArrays.
      groups: for each index that is summed, the (operand, axis) pairs that it runs over.
    """
    arrays = [pytree.unwrap(x) for x in arrays]
    if operands.own_ops(*arrays) is not None or not any(isinstance(x, PaddedQArray) for x in arrays):
        return arrays
    if not all(isinstance(x, QArray) for x in arrays):
        return [dequantize(x) if isinstance(x, PaddedQArray) else x for x in arrays]
    sizes: list[dict[int, int]] = [{} for _ in arrays]
    for group in groups:
        size = max(arrays[i].shape[axis] for i, axis in group)
        # An operand with one scale for the whole axis can be extended to any size.
        tiles = [arrays[i].scale_tile_shape[axis] for i, axis in group if arrays[i].scale.shape[axis] > 1]
        unit = math.lcm(*tiles)
        for i, axis in group:
            if arrays[i].shape[axis] == size:  # the others are broadcast
                sizes[i][axis] = -(-size // unit) * unit
    return [_extended(x, target) for x, target in zip(arrays, sizes, strict=True)]


def _refined(array: PaddedQArray, axes: Sequence[int]) -> QArray:
    """An equal QArray with smaller tiles on some padded axes, cut back to the original size there."""
    original, padded = array._shapes()
    shape = tuple(
        n if axis in axes else s for axis, (n, s) in enumerate(zip(original, array.qvalue.shape, strict=True))
    )

    def refine(leaf: jax.Array) -> jax.Array:
        for axis in axes:
            if (count := leaf.shape[axis]) > 1:
                tile = padded[axis] // count
                step = math.gcd(tile, original[axis])
                leaf = jnp.take(leaf, jnp.arange(0, original[axis], step) // tile, axis=axis)
        return leaf

    qvalue = array.qvalue
    if qvalue.shape != shape:
        qvalue = qvalue[tuple(map(slice, shape))]
    zero_point = None if array.zero_point is None else refine(array.zero_point)
    return QArray(qvalue, refine(array.scale), zero_point, array.qtype)


def _extended(array: QArray, sizes: Mapping[int, int]) -> QArray:
    """A QArray padded along the axes of `sizes`, by elements that dequantize to exactly 0."""
    tiles = array.scale_tile_shape
    if isinstance(array, PaddedQArray):
        array = _refined(array, [axis for axis in array.padded_axes() if axis not in sizes])
    target = tuple(sizes.get(axis, n) for axis, n in enumerate(array.qvalue.shape))
    qvalue = array.qvalue[tuple(map(slice, target))]
    missing = [(0, t - n, 0) for t, n in zip(target, qvalue.shape, strict=True)]

    def extend(leaf: jax.Array) -> jax.Array:
        counts = [n if n == 1 or a not in sizes else sizes[a] // tiles[a] for a, n in enumerate(leaf.shape)]
        return jnp.pad(leaf, [(0, c - n) for c, n in zip(counts, leaf.shape, strict=True)], mode="edge")

    scale = extend(array.scale)
    if array.zero_point is None:
        zero = numerics.convert_to(jnp.zeros(()), array.qtype)
        return QArray(lax.pad(qvalue, zero, missing), scale, None, array.qtype)
    zero_point = extend(array.zero_point)
    full = qarray.broadcast_to(zero_point, target)
    qvalue = lax.dynamic_update_slice(full, qvalue, (0,) * len(target))
    return QArray(qvalue, scale, zero_point, array.qtype)


_THIS_MODULE = sys.modules[__name__]
