"""A product of the kernels in a batch, and over the devices of a mesh.

XLA knows nothing of a custom call: it would gather all that is sharded, and run it whole on every device. So the call
says how it falls into parts (Shardy, https://openxla.org/shardy, through `jax.experimental.custom_partitioning`):

    y[z, m, n] = sum_k x[z, m, k] w[z, k, n]

- over z and m, the batch and the rows, each device has its own activations;
- over n, each device has its own blocks of columns (`N % 16 == 0`), and keeps its columns of the result;
- over k, each device has its own tiles, or, where one scale is for all of K, its own steps: the sums of all devices are
  added up. Activations that are quantized with one scale for a row are so by the largest magnitude on any device.

The weight stays where it is: an axis that it is not sharded along is gathered in the activations, which are smaller.
On one device, and within `jax.shard_map`, the product is the custom call and nothing else.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from qwix._src.core import qarray
from qwix.cpu import native

# The operands of a product, in order; those of the last line need not be there.
_OPERANDS = ("x", "codes", "scale", "x_scale", "zeros", "bias")
_OF_WEIGHT = ("codes", "scale", "zeros", "bias")


class Call(NamedTuple):
    """What is static in a product; see `native.matmul`."""

    format_number: int
    mode: int
    columns: int
    tile: int
    factor: float
    activation: str | None
    dtype: np.dtype


def matmul(
    call: Call,
    x: jax.Array,
    x_scale: jax.Array | None,
    codes: jax.Array,
    scale: jax.Array,
    zeros: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """`native.matmul` of one x (M, K) that may be mapped (`jax.vmap`) and sharded."""
    given = dict(zip(_OPERANDS, (x, codes, scale, x_scale, zeros, bias), strict=True))
    present = {name: array for name, array in given.items() if array is not None}
    return _in_batch(call, tuple(present))(*(array[None] for array in present.values()))[0]


@functools.cache
def _in_batch(call: Call, names: tuple[str, ...]) -> Any:
    """The product of operands with one batch axis, which `jax.vmap` makes larger.

    A batch of activations for one weight is rows of one product; one for each of many weights is a batch.
    """

    @jax.custom_batching.custom_vmap
    def product(*operands: jax.Array) -> jax.Array:
        return _on_mesh(call, names, tuple(x.shape for x in operands))(*operands)

    @product.def_vmap
    def _(size: int, is_batched: Sequence[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
        given = {
            name: x if batched else jnp.broadcast_to(x, (size, *x.shape))
            for name, x, batched in zip(names, operands, is_batched, strict=True)
        }
        if any(batched for name, batched in zip(names, is_batched, strict=True) if name in _OF_WEIGHT):
            merged = [x.reshape(-1, *x.shape[2:]) for x in given.values()]
            out = product(*merged)
            return out.reshape(size, -1, *out.shape[1:]), True
        rows = {name: given[name].swapaxes(0, 1) for name in names if name not in _OF_WEIGHT}
        merged_rows = {name: x.reshape(x.shape[0], -1, x.shape[-1]) for name, x in rows.items()}
        out = product(*(merged_rows.get(name, x) for name, x in zip(names, operands, strict=True)))
        return out.reshape(out.shape[0], size, -1, out.shape[-1]).swapaxes(0, 1), True

    return product


@functools.lru_cache(maxsize=4096)
def _on_mesh(call: Call, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The product of operands of these shapes, with how it falls into parts."""
    cut = _Cut(call, names, shapes)

    def product(*operands: jax.Array) -> jax.Array:
        return _product(call, dict(zip(names, operands, strict=True)))

    def parts(mesh: Any, arg_shapes: Any, result_shape: Any) -> _Parts:
        del result_shape
        return cut.parts(mesh, [arg.sharding for arg in arg_shapes])

    def partition(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        found = parts(mesh, arg_shapes, result_shape)
        shardings = [jax.NamedSharding(mesh, found.spec(name)) for name in (*names, "y")]
        return mesh, functools.partial(cut.part, found), shardings[-1], tuple(shardings[:-1])

    def infer(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        return jax.NamedSharding(mesh, parts(mesh, arg_shapes, result_shape).spec("y"))

    partitioned = custom_partitioning(product)
    rule, sizes = cut.rule()
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule, **sizes)
    return partitioned


def _product(call: Call, given: dict[str, jax.Array]) -> jax.Array:
    return native.matmul(
        given["x"],
        given.get("x_scale"),
        given["codes"],
        given["scale"],
        given.get("zeros"),
        given.get("bias"),
        **call._asdict(),
    )


class _Parts(NamedTuple):
    """The mesh axes along which a product is cut: None, a name, or several."""

    z: Any
    m: Any
    n: Any
    k: Any
    tiled: bool  # whether scales are cut along k as well
    x_tiled: bool

    def spec(self, name: str) -> jax.P:
        """How an operand, or the result y, lies."""
        shared = self.k if self.tiled else None
        return {
            "x": jax.P(self.z, self.m, self.k),
            "codes": jax.P(self.z, self.n, self.k, None),
            "scale": jax.P(self.z, self.n, shared, None),
            "zeros": jax.P(self.z, self.n, shared, None),
            "x_scale": jax.P(self.z, self.m, self.k if self.x_tiled else None),
            "bias": jax.P(self.z, self.n),
            "y": jax.P(self.z, self.m, self.n),
        }[name]


class _Cut:
    """How a product of given shapes may be cut."""

    def __init__(self, call: Call, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]):
        self.call, self.names, self.shapes = call, names, dict(zip(names, shapes, strict=True))
        self.blocks, self.steps = self.shapes["codes"][1:3]
        self.tiles, self.k = self.shapes["scale"][2], self.shapes["x"][2]
        self.x_tiles = self.shapes.get("x_scale", (0, 0, 1))[2]
        self.whole_blocks = call.columns % 16 == 0
        # What k may be cut into: whole tiles, or 8 of it.
        is_whole = self.tiles * call.tile == self.k and (self.tiles > 1 or self.k % 8 == 0)
        self.units = 1 if not is_whole else self.tiles if self.tiles > 1 else self.k // 8

    def rule(self) -> tuple[str, dict[str, int]]:
        """The factors of the operands' axes, as Shardy has them, and the sizes that it cannot see."""
        u = self.units
        unit, tile = ("u", u), ("u", u) if self.tiles > 1 else ("t", 1)
        whole = self.whole_blocks
        blocks, steps = ("b", self.blocks), (unit, ("s", self.steps // u))
        columns = (blocks, ("l", 16)) if whole else (("n", 0),)
        batch, rows = (("z", 0),), (("m", 0),)
        factors: dict[str, list[Any]] = {
            "x": [batch, rows, (unit, ("k", self.k // u))],
            "codes": [batch, (blocks,), steps, (("c", 0),)],
            "scale": [batch, (blocks,), (tile,), (("l", 16),)],
            "x_scale": [batch, rows, (unit if self.x_tiles > 1 else ("v", 1),)],
            "bias": [batch, columns],
            "y": [batch, rows, columns],
        }
        factors["zeros"] = factors["scale"]
        # Shardy has no factors of size 1 beside others, and wants no size of one that is a whole axis somewhere.
        dims = {
            name: [tuple(f for f in dim if f[1] != 1) or dim[:1] for dim in factors[name]]
            for name in (*self.names, "y")
        }
        seen = {dim[0][0] for name in dims for dim in dims[name] if len(dim) == 1}
        sizes = {f: n for name in dims for dim in dims[name] if len(dim) > 1 for f, n in dim if f not in seen}

        def spell(name: str) -> str:
            return " ".join(f"({' '.join(f for f, _ in dim)})" if len(dim) > 1 else dim[0][0] for dim in dims[name])

        return ", ".join(map(spell, self.names)) + " -> " + spell("y"), sizes

    def parts(self, mesh: Any, shardings: Sequence[Any]) -> _Parts:
        """Where operands that are sharded so are cut: the weight as it is, the activations so that they fit."""
        specs = {
            name: (*sharding.spec, *[None] * 4)[: len(self.shapes[name])]
            for name, sharding in zip(self.names, shardings, strict=True)
        }
        taken: set[str] = set()

        def take(names: Any, size: int) -> Any:
            """The mesh axes, if parts of equal size come of them, and none of them is in use."""
            each = names if isinstance(names, tuple) else (names,)
            if names is None or size % math.prod(mesh.shape[n] for n in each) or taken & {*each}:
                return None
            taken.update(each)
            return names

        z = take(specs["codes"][0] or specs["x"][0], self.shapes["x"][0])
        n = take(specs["codes"][1], self.blocks) if self.whole_blocks else None
        k = take(specs["codes"][2], self.units)
        m = take(specs["x"][1], self.shapes["x"][1])
        return _Parts(z, m, n, k, self.tiles > 1, self.x_tiles > 1)

    def part(self, parts: _Parts, *operands: jax.Array) -> jax.Array:
        """What one device does with its parts of the operands."""
        call, given = self.call, dict(zip(self.names, operands, strict=True))
        rows, blocks = given["x"], given["codes"].shape[1]
        if parts.n is not None:
            call = call._replace(columns=16 * blocks)
        if parts.k is None:
            return _product(call, given)
        if self.tiles == 1:
            call = call._replace(tile=rows.shape[-1])
            if call.mode == native.DYNAMIC:
                given["x"], given["x_scale"] = _quantize(rows, call.factor, parts.k)
                call = call._replace(mode=native.QUANTIZED)
        bias = given.pop("bias", None)
        y = lax.psum(_product(call._replace(dtype=np.dtype(np.float32), activation=None), given), parts.k)
        y = y if bias is None else y + bias[:, None, :]
        return native.activate(y, call.activation).astype(call.dtype)


def _quantize(x: jax.Array, factor: float, names: Any) -> tuple[jax.Array, jax.Array]:
    """Rows of which each device has a part, in int8, and their scales."""
    largest = lax.all_gather(jnp.abs(x).max(-1, keepdims=True), names)
    # XLA's CPU backend drops NaN in the maximum of some arrays, and in no sum.
    has_nan = jnp.isnan(lax.psum(x.astype(jnp.float32).sum(-1, keepdims=True) * 0, names))
    absmax = jnp.where(has_nan, jnp.nan, largest.max(0) * factor).astype(x.dtype)
    scale, _ = qarray.compute_scale_zero_point({"absmax": absmax}, jnp.int8)
    array = qarray.quantize_with_scale_zero_point(x, jnp.int8, scale, None)
    return array.qvalue, scale.astype(jnp.float32)
