"""`PackedQArray`: a quantized weight in the layout that the native kernels read.

A weight is a matrix to a kernel: its contracted axes are K, its output axes N. Columns come in *blocks* of 16 (the
last one filled up), K comes in the tiles that share a scale, each filled up to a multiple of 8. A block lies in memory
as it is read, one *step* of 64 bytes after the other:

    8 bits:  step = [column 0..15] [k 0..3]           bytes; integers with 128 added
    4 bits:  step = [column 0..15] [k 0..3]           bytes; the low half is k, the high one k + 4;
                                                      integers with 8 added

so that 4 bytes are one 32-bit lane of one column, in which a dot-product instruction (VNNI, and what AVX2 and NEON
have) sums 4 products. Scales and zero points are (blocks, tiles, 16), next to each other for a block.

>>> from qwix._src.core import qarray
>>> w = qarray.quantize_api(jnp.ones((64, 24)), jnp.int4, channelwise_axes=(1,), tiled_axes={0: 32})
>>> packed = pack(w)
>>> packed.shape, packed.qvalue.shape, packed.scale.shape   # 2 blocks, 8 steps of 8 k
((64, 24), (2, 8, 64), (2, 2, 16))
>>> bool((unpack(packed).qvalue == w.qvalue).all())
True

Axes before those of the matrix (layers of a scan, heads of an einsum) are leading axes of every leaf, which may come
and go under `jax.vmap`, `jax.lax.scan` and stacking.

A `PaddedQArray`, whose last tile may be cut short, is packed at its padded shape; the kernels stop where K ends.
"""

import functools
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from qwix._src import nnx_nodes
from qwix._src.core import numerics, pytree, qarray, tiling
from qwix._src.core.qarray import QArray
from qwix._src.providers.with_aux import WithAux
from qwix.contrib.padded_ptq import PaddedQArray

COLUMNS = 16
STEP_BYTES = 64

# A sum of as many products of two int8 does not overflow int32; with zero points, one factor has 9 bits.
MAX_TILE, MAX_TILE_ASYMMETRIC = 2**17 - 1, 2**16 - 1


class Format(NamedTuple):
    """How a number format is packed. `number` is that of `Format` in csrc/job.h."""

    number: int
    bits: int
    is_integer: bool  # whether kernels multiply its codes with int8 activations

    @property
    def offset(self) -> int:
        """What is added to a code; that of a zero point as well."""
        return 1 << (self.bits - 1) if self.number in (0, 1) else 0

    @property
    def step_k(self) -> int:
        """How many k are in a step."""
        return 32 // self.bits


FORMATS = {
    "int8": Format(0, 8, True),
    "int4": Format(1, 4, True),
    "float4_e2m1fn": Format(2, 4, True),
    "uint4": Format(3, 4, False),  # nf4
    "float8_e4m3fn": Format(4, 8, False),
    "float8_e5m2": Format(5, 8, False),
}
_SCALE_DTYPES = tuple(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def format_of(qtype: Any) -> Format | None:
    """How a number format is packed; None if it is not.

    >>> format_of('mxfp4').bits, format_of(jnp.int16)
    (4, None)
    """
    dtype = numerics.storage_dtype(qtype)
    name = "int4" if dtype == jnp.int2 else dtype.name
    if name == "uint4" and qtype != "nf4":
        return None
    return FORMATS.get(name)


class _Layout(NamedTuple):
    """What is static in a packed array; axes are those of the matrix, without leading ones."""

    shape: tuple[int, ...]
    k_axes: tuple[int, ...]  # in the order in which they make K
    n_axes: tuple[int, ...]
    tile: int
    scale_shape: tuple[int, ...]
    zero_point_shape: tuple[int, ...] | None
    padded_shape: tuple[int, ...] | None  # of a PaddedQArray; else None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape that consists of whole tiles."""
        return self.shape if self.padded_shape is None else self.padded_shape

    @property
    def k(self) -> int:
        return math.prod(self.shape[axis] for axis in self.k_axes)

    @property
    def padded_k(self) -> int:
        """K of `full_shape`; what is beyond `k` counts for nothing."""
        return math.prod(self.full_shape[axis] for axis in self.k_axes)

    @property
    def tiles(self) -> int:
        return self.padded_k // self.tile

    @property
    def n(self) -> int:
        return math.prod(self.shape[axis] for axis in self.n_axes)

    def permuted(self, order: Sequence[int]) -> "_Layout":
        """Of the array with its axes permuted."""
        at = {axis: i for i, axis in enumerate(order)}
        move = lambda shape: tuple(shape[axis] for axis in order)  # noqa: E731
        return _Layout(
            move(self.shape),
            tuple(at[axis] for axis in self.k_axes),
            tuple(at[axis] for axis in self.n_axes),
            self.tile,
            move(self.scale_shape),
            None if self.zero_point_shape is None else move(self.zero_point_shape),
            None if self.padded_shape is None else move(self.padded_shape),
        )


@nnx_nodes.register
@pytree.array_structure
class PackedQArray(QArray):
    """A QArray in the layout of the native kernels; see the module's docstring, `pack` and `unpack`.

    It multiplies (`dot_general`, `einsum`, `dot`, `conv_general_dilated`) with the kernels on a CPU and as `unpack` of
    it does elsewhere. `transpose`, `astype` and indices of leading axes or of output columns keep it packed; for any
    other function it is unpacked.

    Attributes:
      qvalue: (..., blocks, steps, 64) uint8.
      scale: (..., blocks, tiles, 16), of the dtype of the dequantized array.
      zero_point: None or likewise, uint8.
      layout: the axes of the matrix (static).
    """

    layout: _Layout = pytree.static(default=None)
    replace: ClassVar[Callable[..., "PackedQArray"]]

    @property
    def own_ops(self) -> Any:
        from qwix.cpu import ops  # which imports this module

        return ops

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the axes before the matrix."""
        return tuple(self.qvalue.shape[:-3])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.layout.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """How many elements share a scale along each axis."""
        return (1,) * len(self.lead) + tiling.tile_shape(self.layout.full_shape, self.layout.scale_shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """How many elements share a zero point along each axis; None in symmetric quantization."""
        if self.layout.zero_point_shape is None:
            return None
        return (1,) * len(self.lead) + tiling.tile_shape(self.layout.full_shape, self.layout.zero_point_shape)

    def plain(self) -> QArray:
        """The QArray that was packed; of a PaddedQArray, its `plain` form."""
        return unpack(self).plain()

    def astype(self, dtype: Any) -> "PackedQArray":
        """Changes the dtype of the dequantized array; the codes stay as they are."""
        array = pytree.unwrap(self)
        return array if array.scale.dtype == np.dtype(dtype) else array.replace(scale=array.scale.astype(dtype))

    def transpose(self, *args: Any) -> QArray:
        """Permutes the axes; leading ones have to stay where they are, or the array is unpacked."""
        axes = args[0] if len(args) == 1 and (args[0] is None or isinstance(args[0], Sequence)) else args
        order = [axis % self.ndim for axis in axes] if axes else list(reversed(range(self.ndim)))
        lead = len(self.lead)
        if sorted(order) != list(range(self.ndim)) or order[:lead] != list(range(lead)):
            return self.plain().transpose(order)
        return pytree.unwrap(self).replace(layout=self.layout.permuted([axis - lead for axis in order[lead:]]))

    def swapaxes(self, axis1: int, axis2: int) -> QArray:
        """Exchanges two axes, see `transpose`."""
        order = list(range(self.ndim))
        order[axis1], order[axis2] = order[axis2], order[axis1]
        return self.transpose(order)

    def reshape(self, *new_shape: Any) -> QArray:
        """Reshapes: to its own shape as it is, to another one unpacked."""
        single = new_shape[0] if len(new_shape) == 1 else new_shape
        target = tuple(single) if isinstance(single, Sequence) else (single,)
        return pytree.unwrap(self) if target == self.shape else self.plain().reshape(target)

    def __getitem__(self, idx: Any) -> QArray:
        array = pytree.unwrap(self)
        entries = tiling.expand_index(idx, self.shape)
        used = [i for i, entry in enumerate(entries) if not (isinstance(entry, slice) and entry == slice(None))]
        if len(entries) == self.ndim and all(i < len(self.lead) for i in used):
            return jax.tree.map(lambda leaf: leaf[entries[: len(self.lead)]], array)
        axis = len(self.lead) + self.layout.n_axes[0]
        is_lookup = used == [axis] and len(entries) == self.ndim and not isinstance(entries[axis], slice)
        is_matrix = len(self.layout.n_axes) == 1 and not self.lead and self.layout.padded_shape is None
        if is_lookup and is_matrix and axis == 0:
            return _take_columns(array, entries[axis])
        return self.plain()[idx]


def pack(array: QArray, contracting_axes: Sequence[int] | None = None) -> PackedQArray:
    """Lays a quantized weight out for the native kernels.

    Args:
      array: a QArray in a format of `FORMATS` (integers of up to 8 bits, nf4, fp8, float4 and the block formats of
        these), with scales in float32, bfloat16 or float16; or a PaddedQArray that is padded along the one axis that
        is contracted. One that is sharded by columns or rows stays so, where whole blocks or tiles come to each device
        (and is replicated where the mesh has axes of type Explicit).
      contracting_axes: the axes that products sum over. Default: those without a scale for each index. Axes before
        the first of them are leading axes; if all others are, the last of these is the output axis.

    Raises:
      ValueError: the format, the dtype of the scale, or the granularity has no kernel; `why_not_packed` tells.
    """
    array = pytree.unwrap(array)
    array = array if isinstance(array, PaddedQArray) else array.plain()
    problem, lead, layout = _find_layout(array, contracting_axes)
    if layout is None:
        raise ValueError(f"A QArray of shape {array.shape} cannot be packed: {problem}.")
    stored = QArray(array.qvalue, array.scale, array.zero_point, array.qtype)
    if (mesh := _explicit_mesh(array.qvalue)) is not None:
        whole = jax.NamedSharding(jax.sharding.Mesh(mesh.devices, mesh.axis_names), jax.P())
        return jax.device_put(_pack(jax.device_put(stored, whole), lead, layout), jax.NamedSharding(mesh, jax.P()))
    return jax.tree.map(_in_large_pages, _sharded_alike(stored.qvalue, _pack(stored, lead, layout)))


def why_not_packed(array: QArray, contracting_axes: Sequence[int] | None = None) -> str:
    """Why `pack` refuses an array; an empty string if it does not.

    >>> why_not_packed(qarray.quantize_api(jnp.ones((4, 4)), jnp.int16))
    'int16 has no kernel'
    """
    return _find_layout(array, contracting_axes)[0]


def unpack(array: PackedQArray) -> QArray:
    """The QArray (or PaddedQArray) that was packed, bit for bit."""
    array = pytree.unwrap(array)
    found, layout = _unpack(array), array.layout
    if layout.padded_shape is None:
        return found
    shapes = {"padded_shape": (*array.lead, *layout.padded_shape), "original_shape": array.shape}
    return PaddedQArray(found.qvalue, found.scale, found.zero_point, found.qtype, **shapes)


def matrix(array: PackedQArray) -> QArray:
    """The packed array as a QArray of shape (*lead, padded K, N) with scales (*lead, tiles, N)."""
    return _unpack_matrix(pytree.unwrap(array))


def _find_layout(array: QArray, contracting_axes: Sequence[int] | None) -> tuple[str, int, Any]:
    """(problem, number of leading axes, layout)."""
    format_ = format_of(array.qtype)
    if format_ is None:
        return f"{array.qtype} has no kernel", 0, None
    if array.scale.dtype not in _SCALE_DTYPES:
        return f"scales in {array.scale.dtype} have no kernel", 0, None
    shape, scale_shape = tuple(array.shape), tuple(array.scale.shape)
    zero_shape = None if array.zero_point is None else tuple(array.zero_point.shape)
    if zero_shape is not None and format_.offset == 0:
        return f"zero points of {array.qtype} have no kernel", 0, None
    if contracting_axes is None:
        contracted = [a for a, (n, s) in enumerate(zip(shape, scale_shape, strict=True)) if s != n]
        if not contracted:
            return "every axis has a scale for each index, so that none can be contracted", 0, None
    else:
        contracted = sorted(axis % len(shape) for axis in contracting_axes)
    others = [axis for axis in range(len(shape)) if axis not in contracted]
    if not contracted or not others or math.prod(shape) == 0:
        return "it is no matrix: it needs contracted axes and others", 0, None
    before = [axis for axis in others if axis < contracted[0]]
    lead = len(before) if len(before) < len(others) else len(before) - 1
    for counts in (scale_shape, zero_shape):
        if counts is not None and counts[:lead] != shape[:lead]:
            return f"its leading axes share scales ({counts} of {shape})", 0, None
    k_axes = tuple(axis - lead for axis in contracted)
    n_axes = tuple(axis - lead for axis in others[lead:])
    zero_counts = None if zero_shape is None else zero_shape[lead:]
    padded = None
    if isinstance(array, PaddedQArray):
        if problem := _why_not_padded(array, contracted):
            return problem, 0, None
        padded = tuple(n * tile for n, tile in zip(scale_shape, array.scale_tile_shape, strict=True))[lead:]
    layout = _Layout(shape[lead:], k_axes, n_axes, 0, scale_shape[lead:], zero_counts, padded)
    shared = [counts for counts in (layout.scale_shape, layout.zero_point_shape) if counts is not None]
    tile = functools.reduce(math.gcd, (_flat_tile(layout, counts) for counts in shared))
    if tile > (MAX_TILE if zero_shape is None else MAX_TILE_ASYMMETRIC):
        return f"{tile} elements share a scale, whose sum could overflow", 0, None
    return "", lead, layout._replace(tile=tile)


def _why_not_padded(array: PaddedQArray, contracted: Sequence[int]) -> str:
    """Why the kernels do not read a PaddedQArray; an empty string if they do."""
    if array.qvalue.shape != array.shape:
        return "its padded elements were kept (QARRAY_KEEP_PADDED_SHAPE)"
    whole = [axis for axis in contracted if array.shape[axis] != 1]
    if not set(array.padded_axes()) <= set(whole) or (array.padded_axes() and len(whole) > 1):
        return f"it is padded along {array.padded_axes()} of its axes, of which {tuple(contracted)} are contracted"
    return ""


def _flat_tile(layout: _Layout, counts: tuple[int, ...]) -> int:
    """How many consecutive k share a scale, whose sizes along the axes are `counts`."""
    tile = 1
    for axis in reversed(layout.k_axes):
        tile *= layout.full_shape[axis] // counts[axis]
        if counts[axis] != 1:
            break
    return tile


def _grid(layout: _Layout) -> list[int]:
    """The number of tiles along each axis of K."""
    tile, grid = layout.tile, []
    for axis in reversed(layout.k_axes):
        within = math.gcd(tile, layout.full_shape[axis])
        grid.append(layout.full_shape[axis] // within)
        tile //= within
    return grid[::-1]


def _to_matrix(leaf: jax.Array, lead: int, layout: _Layout) -> jax.Array:
    """(..., K axes and N axes) -> (..., K axes, N axes)."""
    axes = [*range(lead), *(lead + axis for axis in (*layout.k_axes, *layout.n_axes))]
    return leaf.transpose(axes)


def _spread(leaf: jax.Array, lead: int, layout: _Layout) -> jax.Array:
    """A scale as (..., tiles, N)."""
    leaf = _to_matrix(leaf, lead, layout)
    columns = [layout.shape[axis] for axis in layout.n_axes]
    leaf = qarray.broadcast_to(leaf, (*leaf.shape[:lead], *_grid(layout), *columns))
    return leaf.reshape(*leaf.shape[:lead], layout.tiles, layout.n)


def _explicit_mesh(values: jax.Array) -> Any:
    """The mesh of an array, if it has axes of type Explicit, where JAX asks for the sharding of each reshape."""
    sharding = getattr(values, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or isinstance(values, jax.core.Tracer):
        return None
    return sharding.mesh if AxisType.Explicit in sharding.mesh.axis_types else None


def _sharded_alike(values: jax.Array, array: PackedQArray) -> PackedQArray:
    """The packed array sharded as the values were, by columns, rows and leading axes.

    Blocks, and tiles or multiples of 8 k, stay whole; what cannot be cut so is on every device.
    """
    sharding = getattr(values, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or not any(sharding.spec) or isinstance(values, jax.core.Tracer):
        return array
    spec, lead, layout = (*sharding.spec, *[None] * values.ndim)[: values.ndim], len(array.lead), array.layout
    mesh = sharding.mesh
    size = lambda names: math.prod(mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,)))  # noqa: E731
    columns, rows = spec[lead + layout.n_axes[0]], spec[lead + layout.k_axes[0]]
    if columns is not None and (layout.n % COLUMNS or layout.n // COLUMNS % size(columns)):
        columns = None
    units = layout.tiles if layout.tiles > 1 else layout.k // 8 if layout.k % 8 == 0 else 1
    if rows is not None and (layout.k != layout.padded_k or units % size(rows)):
        rows = None

    def put(leaf: jax.Array, rows: Any) -> jax.Array:
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec[:lead], columns, rows, None)))

    shared = rows if layout.tiles > 1 else None
    zeros = None if array.zero_point is None else put(array.zero_point, shared)
    return array.replace(qvalue=put(array.qvalue, rows), scale=put(array.scale, shared), zero_point=zeros)


_LARGE_PAGE = 2**21


def _in_large_pages(leaf: jax.Array) -> jax.Array:
    """The same array, in pages of 2 MiB if it is large, where Linux gives such pages to who asks for them.

    The CPU has fewer addresses to look up then, and fetches ahead past the ends of pages of 4 KiB.
    """
    if isinstance(leaf, jax.core.Tracer) or leaf.nbytes < 2 * _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return leaf
    if len(leaf.devices()) != 1 or (device := next(iter(leaf.devices()))).platform != "cpu":
        return leaf
    memory = mmap.mmap(-1, leaf.nbytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = np.frombuffer(memory, np.uint8)
    start = -place.ctypes.data % _LARGE_PAGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, start, leaf.nbytes // _LARGE_PAGE * _LARGE_PAGE)
    except OSError:  # this kernel was built without them
        return leaf
    copy = place[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
    np.copyto(copy, leaf)
    with jax.default_device(device):
        return jax.device_put(copy, device if leaf.committed else None, may_alias=True)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pack(array: QArray, lead: int, layout: _Layout) -> PackedQArray:
    format_ = format_of(array.qtype)
    assert format_ is not None
    shape = array.shape[:lead]
    tiles, blocks = layout.tiles, -(-layout.n // COLUMNS)
    codes = _to_matrix(_codes(array.qvalue, format_), lead, layout).reshape(*shape, layout.k, layout.n)
    codes = _pad(codes, -2, layout.padded_k).reshape(*shape, tiles, layout.tile, layout.n)
    codes = _pad(_pad(codes, -2, 8), -1, COLUMNS)
    halves = format_.step_k // 4
    codes = codes.reshape(*shape, tiles, -1, halves, 4, blocks, COLUMNS)
    # (blocks, tiles, steps of a tile, halves, columns, 4)
    codes = codes.transpose(*range(lead), *(lead + axis for axis in (4, 0, 1, 2, 5, 3)))
    if halves == 2:
        codes = codes[..., 0, :, :] | codes[..., 1, :, :] << 4
    codes = codes.reshape(*shape, blocks, -1, STEP_BYTES)

    def by_block(leaf: jax.Array) -> jax.Array:
        leaf = _pad(_spread(leaf, lead, layout), -1, COLUMNS)
        return leaf.reshape(*shape, tiles, blocks, COLUMNS).swapaxes(-3, -2)

    zeros = None if array.zero_point is None else by_block(_codes(array.zero_point, format_))
    return PackedQArray(codes, by_block(array.scale), zeros, array.qtype, layout=layout)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    pad = -x.shape[axis] % multiple
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, pad)
    return jnp.pad(x, widths) if pad else x


def _codes(values: jax.Array, format_: Format) -> jax.Array:
    """Stored elements as unsigned codes in uint8."""
    if format_.offset:
        return (values.astype(jnp.int32) + format_.offset).astype(jnp.uint8)
    if jnp.issubdtype(values.dtype, jnp.integer):
        return values.astype(jnp.uint8)
    unsigned = jnp.uint4 if format_.bits == 4 else jnp.uint8
    return jax.lax.bitcast_convert_type(values, unsigned).astype(jnp.uint8)


def _from_codes(codes: jax.Array, qtype: Any) -> jax.Array:
    """The inverse of `_codes`."""
    format_, dtype = format_of(qtype), numerics.storage_dtype(qtype)
    assert format_ is not None
    if format_.offset:
        return (codes.astype(jnp.int32) - format_.offset).astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return codes.astype(dtype)
    unsigned = jnp.uint4 if format_.bits == 4 else jnp.uint8
    return jax.lax.bitcast_convert_type(codes.astype(unsigned), dtype)


def _unpacked_codes(codes: jax.Array, layout: _Layout, format_: Format) -> jax.Array:
    """(..., blocks, steps, 64) -> (..., blocks, padded K, 16) in uint8."""
    shape = codes.shape[:-2]
    tiles = layout.tiles
    codes = codes.reshape(*shape, tiles, -1, COLUMNS, 4).swapaxes(-1, -2)
    if format_.bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], -3)
    codes = codes.reshape(*shape, tiles, -1, COLUMNS)[..., : layout.tile, :]
    return codes.reshape(*shape, layout.padded_k, COLUMNS)


def _join_blocks(leaf: jax.Array, n: int) -> jax.Array:
    """(..., blocks, rows, 16) -> (..., rows, n)."""
    leaf = leaf.swapaxes(-3, -2)
    return leaf.reshape(*leaf.shape[:-2], -1)[..., :n]


@jax.jit
def _unpack_matrix(array: PackedQArray) -> QArray:
    layout, format_ = array.layout, format_of(array.qtype)
    assert format_ is not None
    codes = _join_blocks(_unpacked_codes(array.qvalue, layout, format_), layout.n)
    zeros = array.zero_point
    if zeros is not None:
        zeros = _from_codes(_join_blocks(zeros, layout.n), array.qtype)
    return QArray(_from_codes(codes, array.qtype), _join_blocks(array.scale, layout.n), zeros, array.qtype)


@jax.jit
def _unpack(array: PackedQArray) -> QArray:
    layout, lead = array.layout, len(array.lead)
    found = _unpack_matrix(array)
    order = [*layout.k_axes, *layout.n_axes]
    back = [*range(lead), *(lead + order.index(axis) for axis in range(len(order)))]
    sizes = [layout.shape[axis] for axis in order]

    def restore(leaf: jax.Array, counts: tuple[int, ...]) -> jax.Array:
        grid = [*_grid(layout), *sizes[len(layout.k_axes) :]]
        leaf = leaf.reshape(*leaf.shape[:lead], *grid)
        for i, axis in enumerate(order):
            step = max(1, grid[i] // max(1, counts[axis]))
            leaf = jax.lax.slice_in_dim(leaf, 0, None, step, lead + i)
        return leaf.transpose(back)

    qvalue = jax.lax.slice_in_dim(found.qvalue, 0, layout.k, axis=lead)
    qvalue = qvalue.reshape(*qvalue.shape[:lead], *sizes).transpose(back)
    scale = restore(found.scale, layout.scale_shape)
    zeros = found.zero_point
    if zeros is not None and layout.zero_point_shape is not None:
        zeros = restore(zeros, layout.zero_point_shape)
    return QArray(qvalue, scale, zeros, array.qtype)


def _take_columns(array: PackedQArray, indices: Any) -> QArray:
    """Rows `indices` of an array whose first axis is N (a table that is looked up), unpacked: (*indices, K axes)."""
    layout, format_ = array.layout, format_of(array.qtype)
    assert format_ is not None
    indices = jnp.asarray(indices)
    indices = jnp.where(indices < 0, indices + layout.n, indices)
    indices = jnp.clip(indices, 0, layout.n - 1)
    block, column = indices // COLUMNS, indices % COLUMNS
    tiles = layout.tiles
    codes = array.qvalue.reshape(*array.qvalue.shape[:2], COLUMNS, 4)[block, :, column]
    codes = codes.reshape(*indices.shape, tiles, -1, 4)
    if format_.bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], -2)
    codes = codes.reshape(*indices.shape, tiles, -1)[..., : layout.tile]
    sizes = [layout.shape[axis] for axis in layout.k_axes]
    back = [axis for axis in np.argsort(layout.k_axes)]

    def restore(leaf: jax.Array, grid: Sequence[int]) -> jax.Array:
        order = [*range(indices.ndim), *(indices.ndim + axis for axis in back)]
        return leaf.reshape(*indices.shape, *grid).transpose(order)

    def shared(leaf: jax.Array) -> jax.Array:
        return restore(leaf[block, :, column], _grid(layout))

    zeros = None if array.zero_point is None else _from_codes(shared(array.zero_point), array.qtype)
    return QArray(_from_codes(restore(codes, sizes), array.qtype), shared(array.scale), zeros, array.qtype)


def is_packed(weight: Any) -> bool:
    """Whether a weight of a model, as its module holds it, is packed.

    >>> is_packed(jnp.ones((2, 2)))
    False
    """
    return isinstance(weight, WithAux) and isinstance(pytree.unwrap(weight).array, PackedQArray)
