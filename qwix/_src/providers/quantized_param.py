"""Putting a quantized parameter where the float one stands: in its shape, with its box, sharded likewise.

An op says how it wants its operand quantized, in terms of the operand's axes. `replacement_for` says the same of the
stored parameter, which `Replacement` then quantizes: at once in Linen, after the run in NNX (see `model`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from qwix._src import provenance
from qwix._src.core import qarray
from qwix._src.providers.input_transform import WithInputTransform
from qwix._src.providers.with_aux import WithAux
from qwix._src.utils import flax_util


@dataclasses.dataclass(frozen=True)
class Replacement:
    """How the quantized form of a stored parameter is made from it.

    Attributes:
      how: in terms of the axes of `shape`.
      shape: what the parameter is reshaped to; for an op inside of `nnx.scan` or `nnx.vmap`, without the mapped axes.
      param_shape: of the parameter as the op's module saw it.
      qarray_module: what quantizes.
      make: (boxed array, how, number of mapped axes) -> what stands in the tree; None: `WithAux(array, how)`.
      mapped: how many leading axes of `shape` the op does not see, because it is mapped over them.
    """

    how: qarray.HowToQuantize
    shape: tuple[int, ...]
    param_shape: tuple[int, ...]
    qarray_module: Any = qarray
    make: Callable[..., WithAux] | None = None
    mapped: int = 0

    def __call__(self, boxed: Any) -> WithAux:
        """The quantized parameter, each leaf in a box like `boxed`."""
        if isinstance(boxed, WithInputTransform):
            return boxed.holding(self(boxed.array))
        value = flax_util.unbox(boxed)
        how, shape = self._for_stacked(tuple(value.shape))
        value = reshape_value(value, shape)
        array = quantize_value(value, how, self.qarray_module)
        box = lambda leaf: rebox(boxed, leaf, value_shape=shape)  # noqa: E731
        array = jax.tree.map(box, array)
        if self.make is None:
            return WithAux(array, how)
        return self.make(array, how, len(value.shape) - len(self.shape) + self.mapped)

    def _for_stacked(self, stored: tuple[int, ...]) -> tuple[qarray.HowToQuantize, tuple[int, ...]]:
        """The same with the axes that transformations have taken away; each index there has scales of its own."""
        if stored == self.param_shape:
            return self.how, self.shape
        extra = len(stored) - len(self.param_shape)
        if stored[extra:] != self.param_shape:
            raise ValueError(
                f"a parameter of shape {stored} was seen by its op as {self.param_shape}: only stacking along "
                "leading axes (in_axes=0 of nnx.scan and nnx.vmap) can be quantized"
            )
        moved = dataclasses.replace(
            self.how,
            channelwise_axes=(*range(extra), *(a + extra for a in self.how.channelwise_axes)),
            tiled_axes={a + extra: tile for a, tile in self.how.tiled_axes.items()},
        )
        return moved, stored[:extra] + self.shape


def quantize_value(value: Any, how: qarray.HowToQuantize, qarray_module: Any) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda v: qarray_module.quantize(v, how), value)
    return qarray_module.quantize(value, how)


def reshape_value(value: Any, shape: tuple[int, ...]) -> Any:
    if value.shape == shape:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, value.dtype)
    return value.reshape(shape)


def rebox(boxed: Any, leaf: Any, value_shape: tuple[int, ...]) -> Any:
    """A leaf of a quantized parameter in the box of the float one, sharded likewise.

    `value_shape` is the shape that the parameter was quantized in; where it was reshaped for that, an axis keeps its
    name if it is the first of those that came from the named one.
    """
    value = flax_util.unbox(boxed)
    axes = _axes_after_reshape(tuple(value.shape), value_shape)
    return flax_util.update_boxed(boxed, value=_shard_alike(value, leaf), transpose=axes)


def _axes_after_reshape(old: tuple[int, ...], new: tuple[int, ...]) -> list[int | None] | None:
    """For each new axis the old one whose name it keeps: where the sizes before them have equal products."""
    if old == new:
        return None
    starts = {math.prod(old[:i]): i for i in reversed(range(len(old)))}
    axes = [starts.get(math.prod(new[:j])) for j in range(len(new))]
    return [a if a is not None and a not in axes[:j] else None for j, a in enumerate(axes)]


def _shard_alike(value: Any, leaf: Any) -> Any:
    """Puts a new leaf where the array that it was made from lies; an axis of another size of 1 is replicated."""
    sharding = getattr(value, "sharding", None)
    if (
        isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct))
        or not isinstance(sharding, jax.sharding.NamedSharding)
        or sharding.is_fully_replicated
        or len(value.shape) != len(leaf.shape)
    ):
        return leaf
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    fitting = flax_util.update_sharding(jax.P(*spec), shape=leaf.shape, mesh=sharding.mesh)
    return jax.device_put(leaf, jax.sharding.NamedSharding(sharding.mesh, jax.P(*fitting)))


def _granularity(shape: Sequence[int], how: qarray.HowToQuantize) -> tuple[int | None, ...]:
    rank = len(shape)
    tiles = {
        axis % rank: round(shape[axis] * tile) if isinstance(tile, float) else tile
        for axis, tile in how.tiled_axes.items()
    }
    channelwise = {axis % rank for axis in how.channelwise_axes}
    return tuple(1 if axis in channelwise else tiles.get(axis) for axis in range(rank))


def _how_from_granularity(how: qarray.HowToQuantize, granularity: Sequence[int | None]) -> qarray.HowToQuantize:
    return dataclasses.replace(
        how,
        channelwise_axes=tuple(i for i, g in enumerate(granularity) if g == 1),
        tiled_axes={i: g for i, g in enumerate(granularity) if g is not None and g > 1},
    )


def replacement_for(
    ref: provenance.ParamRef,
    operand_shape: tuple[int, ...],
    how: qarray.HowToQuantize,
    qarray_module: Any,
    make: Callable[..., WithAux] | None = None,
) -> tuple[Replacement, provenance.ParamRef]:
    """How to quantize a stored parameter so that the operand made from it is quantized as `how` says.

    Returns the replacement, and the ref from the replaced parameter to the operand. A parameter that is reshaped
    before anything else is stored in that shape.
    """
    param_shape, views = tuple(ref.value.shape), ref.views
    stored_shape = param_shape
    if views and views[0].kind == "reshape":
        stored_shape, views = tuple(views[0].arg), views[1:]
    ref = dataclasses.replace(ref, views=views)
    if views:
        how = _how_from_granularity(how, ref.pull_axes(_granularity(operand_shape, how)))
    mapped = [view.arg[0] for view in views if view.kind == "map"]
    if make is not None and any(mapped):
        raise ValueError(
            f"{ref.path} is mapped over axis {max(mapped)}: only stacking along leading axes can be quantized here"
        )
    return Replacement(how, stored_shape, param_shape, qarray_module, make, len(mapped)), ref


def create_quantized_param(
    name: str,
    value: jax.Array,
    how: qarray.HowToQuantize,
    *,
    _qarray_module: ModuleType | Any = qarray,
) -> WithAux[qarray.QArray]:
    """Quantizes a parameter of the current module, and puts the result where the parameter stands.

    Args:
      name: the parameter's name in its module.
      value: the float operand: the parameter, maybe reshaped, transposed, sliced or cast.
      how: how to quantize it, in terms of the axes of `value`.

    Returns:
      The quantized operand, unboxed, in the shape and layout of `value`.

    Raises:
      ValueError: if a Linen model that is not being initialized holds a float weight; if two ops want one weight
        quantized in different ways.
    """
    ref = flax_util.find_ref(value)
    if not isinstance(ref, provenance.ParamRef):
        module = flax_util.get_current_module()
        keys = (*getattr(module, "qwix_path", getattr(module, "path", ())), name)
        ref = provenance.ParamRef(module if isinstance(module, nn.Module) else None, keys, value)
    return quantize_param(ref, value, how, _qarray_module)


def quantize_param(
    ref: provenance.ParamRef | provenance.ConcatRef,
    value: Any,
    how: qarray.HowToQuantize,
    module: Any,
    make: Callable[..., WithAux] | None = None,
) -> WithAux[qarray.QArray]:
    """`create_quantized_param` for a parameter that is known, of any module of the model.

    `module` is what quantizes, `make` puts the result into the tree; see `Replacement`.
    """
    if isinstance(ref, provenance.ConcatRef):
        starts = np.cumsum((0, *ref.sizes))
        parts = [
            quantize_param(part, jax.lax.slice_in_dim(value, int(start), int(stop), axis=ref.axis), how, module, make)
            for part, start, stop in zip(ref.parts, starts[:-1], starts[1:], strict=True)
        ]
        return WithAux.concatenate(parts, ref.axis)
    replacement, view = replacement_for(ref, tuple(value.shape), how, module, make)
    if ref.module is not None:
        stored = _replace_linen_param(ref, replacement)
        if stored is None or any(v.kind == "map" for v in view.views):
            return WithAux(quantize_value(value, how, module), how)
        return WithAux(view.apply(stored.array).astype(value.dtype), how)
    book = provenance.book()
    if book is None:
        current = flax_util.get_current_module()
        setattr(current, ref.name, replacement(getattr(current, ref.name)))
    else:
        previous = book.replacements.setdefault(ref.keys, replacement)
        if previous != replacement:
            raise ValueError(_conflict(ref, previous.how, replacement.how))
    return WithAux(quantize_value(value, how, module), how)


def _replace_linen_param(ref: provenance.ParamRef, replacement: Replacement) -> WithAux | None:
    """The quantized parameter; None if it waits until a trace inside of the module's, such as a user's jit, is left."""
    module = ref.module
    book = provenance.book()
    if book is not None and book.depth > ref.depth and module.is_initializing():
        book.pending.append((ref.depth, lambda: _replace_linen_param(ref, replacement)))
        return None
    boxed = module.get_variable("params", ref.name)
    current = flax_util.unbox(boxed)
    if isinstance(current, WithInputTransform):
        current = current.inner()
    if isinstance(current, WithAux):
        if current.how != replacement.how or tuple(current.shape) != replacement.shape:
            raise ValueError(_conflict(ref, current.how, replacement.how))
        return current
    if not module.is_initializing():
        raise ValueError(
            f"It seems you're feeding an unquantized param to a quantized model: {ref.path} is a float array. "
            "Quantize the parameters with qwix.quantize_params, or initialize the quantized model."
        )
    quantized = replacement(boxed)
    module.put_variable("params", ref.name, quantized)
    return flax_util.unbox(quantized)


def _conflict(ref: provenance.ParamRef, first: Any, second: Any) -> str:
    return (
        f"{ref.path} is used by two ops that want it quantized in different ways: {first} and {second}. "
        "Give one of them a rule without weight_qtype, or coarser scales that both can use."
    )
