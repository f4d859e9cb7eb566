"""The shapes of scales: how an array and a smaller one that it shares scales through fit together.

A scale has the rank of its array, and every axis of the array is a multiple of the scale's: the
quotient is the tile size, the number of elements that share a scale along this axis. An
element-wise operation between two such arrays is *generic broadcasting*. Nothing here knows
quantized arrays; `qarray.py` does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def axis_index(shape: Sequence[int], axis: int) -> int:
    """The axis counted from the start. Raises ValueError if there is none."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"There is no axis {axis} in an array of shape {tuple(shape)}.")
    return axis % len(shape)


def tile_size(shape: Sequence[int], axis: int, tile: int | float) -> int:
    """The tile size of an axis in elements; a float f means 1 / (number of tiles).

    Raises ValueError if it does not divide the axis.

    >>> tile_size((8, 12), 1, 4), tile_size((8, 12), 1, 0.5)
    (4, 6)
    """
    size = round(shape[axis] * tile) if isinstance(tile, float) else int(tile)
    if size <= 0 or shape[axis] % size:
        raise ValueError(
            f"Axis {axis} of size {shape[axis]} in shape {tuple(shape)} cannot be tiled by {tile}: "
            "the tile must divide it."
        )
    return size


def tile_shape(shape: Sequence[int], shared: Sequence[int]) -> tuple[int, ...]:
    """How many elements of an array of `shape` share an element of the `shared` shape, by axis."""
    return tuple(n // s if s else 0 for n, s in zip(shape, shared, strict=True))


def interleaved_shape(shape: Sequence[int], shared: Sequence[int]) -> tuple[int, ...]:
    """The shape in which each axis of an array is two: (number of tiles, tile size).

    >>> interleaved_shape((8, 12), (8, 3))
    (8, 1, 3, 4)
    """
    pairs = zip(shared, tile_shape(shape, shared), strict=True)
    return tuple(n for pair in pairs for n in pair)


def check_divides(name: str, shared: Sequence[int], shape: Sequence[int]) -> None:
    """Raises ValueError if an array of `shape` cannot have a scale of the `shared` shape."""
    if len(shared) != len(shape):
        raise ValueError(f"{name} of shape {tuple(shared)} must have the rank of its array of shape {tuple(shape)}.")
    if any(n != s and (s == 0 or n % s) for n, s in zip(shape, shared, strict=True)):
        raise ValueError(
            f"{name} of shape {tuple(shared)} does not fit an array of shape {tuple(shape)}: each "
            "axis of the array must be a multiple."
        )


def regroup(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """array.reshape(shape), for axes that are split or joined; keeps explicit shardings.

    Where a mesh has axes of type Explicit (the default of `jax.make_mesh`), JAX wants to be told
    how most reshaped arrays are sharded: an axis that is split hands its name to the first part,
    and axes that are joined keep that of the first. Raises ValueError where this would move data
    between devices.

    >>> regroup(jnp.ones((4, 6)), (2, 2, 6)).shape
    (2, 2, 6)
    """
    shape = tuple(shape)
    sharding = jax.typeof(array).sharding
    if array.size == 0 or not any(sharding.spec):
        return array.reshape(shape)
    spec: list[Any] = [None] * len(shape)
    i = j = 0
    while i < array.ndim:
        # The least numbers of old and of new axes from here that hold equally many elements.
        i_end, j_end = i + 1, j + 1
        old_size, new_size = array.shape[i], math.prod(shape[j:j_end])
        while old_size != new_size:
            if old_size < new_size:
                old_size *= array.shape[i_end]
                i_end += 1
            else:
                new_size *= shape[j_end]
                j_end += 1
        named = [axis for axis in range(i, i_end) if sharding.spec[axis] is not None]
        if named:
            names = sharding.spec[named[0]]
            all_names = names if isinstance(names, tuple) else (names,)
            parts = math.prod(sharding.mesh.shape[name] for name in all_names)
            first = next(axis for axis in range(j, j_end) if shape[axis] > 1)
            before = math.prod(array.shape[i : named[0]])
            if len(named) > 1 or before > 1 or shape[first] % parts:
                raise ValueError(
                    f"An array of shape {array.shape} and sharding {sharding.spec} cannot be seen "
                    f"as {shape} without moving it between devices: let tiles divide what lies on "
                    f"each of the {parts} devices, or use mesh axes of type Auto."
                )
            spec[first] = names
        i, j = i_end, j_end
    return jnp.reshape(array, shape, out_sharding=jax.P(*spec))


def split_axis(array: Any, tiled_axes: Mapping[int, int | float]) -> Any:
    """Reshapes each tiled axis into two, (number of tiles, tile size). Takes arrays and QArrays.

    >>> split_axis(jnp.ones((4, 6)), {1: 2}).shape
    (4, 3, 2)
    """
    tiles = {axis_index(array.shape, axis): tile for axis, tile in tiled_axes.items()}
    new_shape: list[int] = []
    for axis, size in enumerate(array.shape):
        if axis in tiles:
            tile = tile_size(array.shape, axis, tiles[axis])
            new_shape += [size // tile, tile]
        else:
            new_shape.append(size)
    if isinstance(array, jax.Array):
        return regroup(array, new_shape)
    return array.reshape(tuple(new_shape))


def call_with_generic_broadcast(
    op: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, y: jax.Array
) -> jax.Array:
    """op(x, y), element-wise, where on each axis one size divides the other: x meets tiles of y.

    Nothing is repeated in memory: a longer axis is viewed as (tiles, tile size). Raises ValueError
    if ranks differ or sizes do not divide.

    >>> x, y = jnp.ones((2, 4)), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> call_with_generic_broadcast(jnp.multiply, x, y).tolist()
    [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]
    """
    if x.ndim != y.ndim:
        raise ValueError(f"Cannot broadcast {x.shape} and {y.shape}: they have different ranks.")
    x_shape: list[int] = []
    y_shape: list[int] = []
    out_shape: list[int] = []
    for nx, ny in zip(x.shape, y.shape, strict=True):
        tiles, size = min(nx, ny), max(nx, ny)
        if nx == ny or tiles == 1 or size == 1:
            out_shape.append(nx if ny == 1 else ny)
            x_shape.append(nx)
            y_shape.append(ny)
        elif tiles and size % tiles == 0:
            out_shape.append(size)
            x_shape += [tiles, nx // tiles]
            y_shape += [tiles, ny // tiles]
        else:
            raise ValueError(f"Cannot broadcast {x.shape} and {y.shape}: {tiles} does not divide {size}.")
    if len(x_shape) == x.ndim:
        return op(x, y)
    return regroup(op(regroup(x, x_shape), regroup(y, y_shape)), out_shape)


def broadcast_array_to(array: jax.Array, target: Sequence[int]) -> jax.Array:
    """Broadcasts generically: an axis whose size divides the target repeats each of its elements.

    Missing leading axes are added. Raises ValueError if a size does not divide.

    >>> broadcast_array_to(jnp.arange(2), (4,)).tolist()
    [0, 0, 1, 1]
    """
    target = tuple(target)
    if array.ndim > len(target):
        raise ValueError(f"Cannot broadcast {array.shape} to {target}: it has fewer axes.")
    shape = (1,) * (len(target) - array.ndim) + array.shape
    check_divides("An operand to broadcast", shape, target)
    if all(n in (1, t) for n, t in zip(shape, target, strict=True)):
        return jnp.broadcast_to(array, target)
    split = [n for size in shape for n in (size, 1)]
    repeated = jnp.broadcast_to(regroup(array, split), interleaved_shape(target, shape))
    return regroup(repeated, target)


def transpose_array(array: jax.Array, transpose: Sequence[int | None]) -> jax.Array:
    """Transposes, where None makes a new axis of size 1 and an axis that is not listed goes.

    Raises ValueError if an axis is listed twice, or not listed and of another size than 1.

    >>> transpose_array(jnp.ones((2, 1, 3)), (2, None, 0)).shape
    (3, 1, 2)
    """
    kept = [axis for axis in transpose if axis is not None]
    dropped = [axis for axis in range(array.ndim) if axis not in kept]
    if (
        len(set(kept)) != len(kept)
        or any(not 0 <= axis < array.ndim for axis in kept)
        or any(array.shape[axis] != 1 for axis in dropped)
    ):
        raise ValueError(
            f"Cannot transpose {array.shape} as {tuple(transpose)}: each axis is listed at most "
            "once, and one that is not listed must have size 1."
        )
    order = sorted(kept)
    array = array.reshape(tuple(array.shape[axis] for axis in order))
    array = array.transpose([order.index(axis) for axis in kept])
    sizes = iter(array.shape)
    return array.reshape(tuple(1 if axis is None else next(sizes) for axis in transpose))


def reshaped_scale_shape(shape: Sequence[int], shared: Sequence[int], target: Sequence[int]) -> tuple[int, ...] | None:
    """The scale's shape after its array is reshaped to `target`; None if there is none.

    In row-major order the array is a sequence of factors, alternately the number of tiles of an
    axis, along which the scale varies, and the tile size, along which it does not. Each new axis
    takes factors from the front, splitting one where it has to. It is a tiled axis if those that
    vary come first.

    >>> reshaped_scale_shape((4, 6), (4, 3), (4, 3, 2)), reshaped_scale_shape((4, 6), (4, 3), (24,))
    ((4, 3, 1), (12,))
    """
    if tuple(shape) == tuple(target):
        return tuple(shared)
    if math.prod(shared) == 1:
        return (1,) * len(target)
    if math.prod(shape) == 0:
        return None
    factors: list[tuple[bool, int]] = []
    for i, n in enumerate(interleaved_shape(shape, shared)):
        varies = i % 2 == 0
        if n > 1 and factors and factors[-1][0] == varies:
            factors[-1] = varies, factors[-1][1] * n
        elif n > 1:
            factors.append((varies, n))
    factors.reverse()
    result = []
    for size in target:
        left, tiles, within_tile = size, 1, False
        while left > 1:
            varies, n = factors.pop()
            taken = math.gcd(left, n)
            if taken not in (left, n) or (varies and within_tile):
                return None
            if taken < n:
                factors.append((varies, n // taken))
            left //= taken
            within_tile |= not varies
            tiles *= taken if varies else 1
        result.append(tiles)
    return tuple(result)


def expand_index(idx: Any, shape: Sequence[int]) -> tuple:
    """An index with one entry for each axis, without masks and lists. Nones stay, and so does an
    Ellipsis for no axis, as index arrays on both sides of it are not adjacent ones.

    >>> expand_index((..., None, 0), (2, 3))
    (slice(None, None, None), None, 0)
    """
    entries: list = []
    for entry in idx if isinstance(idx, tuple) else (idx,):
        value = np.asarray(entry) if isinstance(entry, (list, bool)) else entry
        if getattr(value, "dtype", None) != np.bool_:
            entries.append(value)
        elif value.ndim:
            entries.extend(np.nonzero(np.asarray(value)))
        else:
            raise IndexError("A quantized array is not indexed with a single bool.")
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    ellipses = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if used > len(shape) or len(ellipses) > 1:
        raise IndexError(f"Too many indices for an array of shape {tuple(shape)}: {idx}.")
    where = ellipses[0] if ellipses else len(entries)
    fill: list = [slice(None)] * (len(shape) - used)
    if ellipses and not fill:
        fill = [Ellipsis]
    return tuple(entries[:where] + fill + entries[where + 1 :])


def take_shared(leaf: jax.Array, idx: tuple, shape: Sequence[int]) -> jax.Array:
    """What of a scale belongs to array[idx], for an array of `shape` and an `expand_index` index.

    Where the scale has size 1 the result has as well. Elsewhere a slice keeps the largest tiles
    that divide its start and length and the old tile; other indices get each element's scale.
    """
    new_idx: list = []
    axis = 0
    for entry in idx:
        if entry is None or entry is Ellipsis:
            new_idx.append(entry)
            continue
        size, count = shape[axis], leaf.shape[axis]
        tile = size // count if count else 1
        if isinstance(entry, slice):
            if count > 1 and entry != slice(None):
                # The slice is taken here: an index array among the others could move axes.
                leaf = jnp.take(leaf, _tiles_of_slice(entry, size, tile), axis=axis)
            new_idx.append(slice(None))
        elif count == 1:
            # No slice, since it would not place the result's axes as the array's index does.
            new_idx.append(np.zeros((1,) * np.ndim(entry), int) if np.ndim(entry) else 0)
        elif tile == 1:
            new_idx.append(entry)
        elif isinstance(entry, (int, np.integer)):
            element = min(max(entry + size if entry < 0 else entry, 0), size - 1)
            new_idx.append(int(element) // tile)
        else:
            element = jnp.clip(jnp.where(entry < 0, entry + size, entry), 0, size - 1)
            new_idx.append(element // tile)
        axis += 1
    return leaf[tuple(new_idx)]


def _tiles_of_slice(entry: slice, size: int, tile: int) -> np.ndarray:
    """Which scale each tile of a sliced axis has, for the largest tiles that fit the slice."""
    start, stop, step = entry.indices(size)
    elements = np.arange(start, stop, step)
    if step != 1 or not len(elements):
        return elements // tile
    if start // tile == (stop - 1) // tile:
        return elements[:1] // tile
    return elements[:: math.gcd(tile, start, stop - start)] // tile
