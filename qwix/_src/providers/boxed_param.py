"""Providers whose weights stand quantized in the parameter tree: `WithAux`, and the ops on it.

When such a provider meets a float weight in an op (while a Linen model is initialized, or in the first run of an NNX
model), it puts the quantized weight where the float one stood, with the box of the original around each leaf. From then
on the module hands out a `WithAux`, which goes through casts and layout changes to the op like the array did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes

from qwix._src import interception, nnx_nodes, provenance, qconfig
from qwix._src.core import conv_general, dot_general, einsum, numerics, pytree, qarray
from qwix._src.core import dot as core_dot
from qwix._src.utils import flax_util

ArrayTypeVar = TypeVar("ArrayTypeVar", bound=Any)


def _arithmetic(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `WithAux` that applies an operator to the float weight."""

    def method(*operands: Any) -> jax.Array:
        return operation(*(x.__jax_array__() if isinstance(x, WithAux) else x for x in operands))

    return method


def _reflected(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: operation(b, a)


@nnx_nodes.register
@pytree.array_structure
class WithAux(Generic[ArrayTypeVar]):
    """A quantized weight in a parameter tree, with how it was quantized. It looks like an `nnx.Variable`.

    Attributes:
      array: the QArray (or the static scale of an activation); its leaves may be boxed.
      how: the `HowToQuantize` that made it, so that `quantize_params` can make another one (static).
    """

    array: ArrayTypeVar
    how: qarray.HowToQuantize = pytree.static()

    replace: ClassVar[Callable[..., WithAux]]  # array_structure adds it

    @property
    def value(self) -> WithAux[ArrayTypeVar]:
        """Itself with its leaves unboxed; what `nnx.Variable.value` is to an array."""
        return flax_util.unbox(self)

    def get_value(self) -> WithAux[ArrayTypeVar]:
        """As `value`; the newer spelling."""
        return self.value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def dtype(self):
        """dtype of the dequantized array."""
        return self.array.dtype

    @property
    def T(self) -> WithAux[ArrayTypeVar]:
        return self.transpose()

    @property
    def mT(self) -> WithAux[ArrayTypeVar]:
        return self.swapaxes(-1, -2)

    def __getitem__(self, key: Any) -> WithAux[ArrayTypeVar]:
        value = self.value
        if key is Ellipsis:
            return value
        return value.replace(array=qarray.rewriting_take(value.array, key))

    def astype(self, dtype: jax.typing.DTypeLike) -> WithAux[ArrayTypeVar]:
        """Itself with another dtype of the dequantized array."""
        value = self.value
        return value.replace(array=value.array.astype(dtype))

    def reshape(self, *shape: int | Sequence[int]) -> WithAux[ArrayTypeVar]:
        """Itself in another shape; ValueError where the scales cannot follow."""
        value = self.value
        new = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if tuple(new) in (tuple(value.shape), (-1,) if value.ndim == 1 else None):
            return value
        try:
            return value.replace(array=value.array.reshape(*new))
        except (ValueError, TypeError) as e:
            raise ValueError(
                f"PTQ weights should already have the target shape. Got {self.shape=} but shape={tuple(new)} is "
                f"requested: {e}"
            ) from e

    def transpose(self, *axes: int | Sequence[int]) -> WithAux[ArrayTypeVar]:
        """Itself with its axes permuted."""
        value = self.value
        return value.replace(array=value.array.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> WithAux[ArrayTypeVar]:
        """Itself with two axes exchanged."""
        value = self.value
        return value.replace(array=value.array.swapaxes(axis1, axis2))

    def squeeze(self, axis: int | Sequence[int] | None = None) -> WithAux[ArrayTypeVar]:
        """Itself without axes of size 1."""
        return self.apply_layout(jnp.squeeze, axis)

    def ravel(self) -> WithAux[ArrayTypeVar]:
        """Itself with one axis; ValueError where the scales cannot follow."""
        return self.reshape(-1)

    flatten = ravel

    def apply_layout(self, function: Callable[..., Any], *args, **kwargs) -> Any:
        """What a layout function of `jax.numpy` or `jax.lax` makes of it; see `provenance`."""
        value = self.value
        results = provenance.apply_layout(function, value.array, args, kwargs)
        if results is None:
            raise TypeError(
                f"{getattr(function, '__name__', function)} of a quantized weight of shape {self.shape} is not a "
                "layout change that its scales can follow: dequantize it first (qwix.dequantize)"
            )
        if isinstance(results, list):
            return [value.replace(array=array) for array in results]
        return value.replace(array=results)

    @staticmethod
    def concatenate(arrays: Sequence[WithAux], axis: int = 0, **kwargs) -> WithAux:
        """Quantized weights joined along an axis; their scales must agree on what they share."""
        axis = kwargs.pop("dimension", axis)
        return arrays[0].value.replace(array=concatenate_qarrays([a.value.array for a in arrays], axis))

    # A contraction is left to `jax.numpy.matmul`, which may be intercepted; all else is that of the float weight.
    def __matmul__(self, other: Any) -> jax.Array:
        return jnp.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> jax.Array:
        return jnp.matmul(other, self)  # type: ignore[arg-type]

    __neg__ = _arithmetic(operator.neg)
    __add__, __radd__ = _arithmetic(operator.add), _arithmetic(_reflected(operator.add))
    __sub__, __rsub__ = _arithmetic(operator.sub), _arithmetic(_reflected(operator.sub))
    __mul__, __rmul__ = _arithmetic(operator.mul), _arithmetic(_reflected(operator.mul))
    __truediv__, __rtruediv__ = _arithmetic(operator.truediv), _arithmetic(_reflected(operator.truediv))
    __pow__ = _arithmetic(operator.pow)

    def __jax_array__(self) -> jax.Array:
        """The float weight, for functions that know nothing of quantization."""
        return qarray.dequantize(self.value.array)


def concatenate_qarrays(arrays: Sequence[qarray.QArray], axis: int) -> qarray.QArray:
    """Joins QArrays along an axis that each has scales of its own on, or all have equal tiles on."""
    first = arrays[0]
    axis %= first.ndim
    join = lambda leaves: jnp.concatenate(leaves, axis)  # noqa: E731

    def follow(name: str) -> Any:
        leaves = [getattr(a, name) for a in arrays]
        if leaves[0] is None:
            return None
        shared = {a.shape[axis] // leaf.shape[axis] for a, leaf in zip(arrays, leaves, strict=True)}
        others = {leaf.shape[:axis] + leaf.shape[axis + 1 :] for leaf in leaves}
        if len(shared) > 1 or len(others) > 1:
            leaves = [
                qarray.broadcast_to(leaf, leaf.shape[:axis] + (a.shape[axis],) + leaf.shape[axis + 1 :])
                for a, leaf in zip(arrays, leaves, strict=True)
            ]
        return join(leaves)

    if len({(a.qtype, a.qvalue.dtype, a.zero_point is None) for a in arrays}) > 1:
        raise ValueError("weights of different formats cannot be concatenated: quantize them alike")
    return first.replace(
        qvalue=join([a.qvalue for a in arrays]),
        scale=follow("scale"),
        zero_point=follow("zero_point"),
    )


# --- quantizing what stands in a module -----------------------------------------------------------


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
    return _create(ref, value, how, _qarray_module)


def _create(
    ref: provenance.ParamRef | provenance.ConcatRef,
    value: Any,
    how: qarray.HowToQuantize,
    module: Any,
    make: Callable[..., WithAux] | None = None,
) -> WithAux[qarray.QArray]:
    if isinstance(ref, provenance.ConcatRef):
        starts = np.cumsum((0, *ref.sizes))
        parts = [
            _create(part, jax.lax.slice_in_dim(value, int(start), int(stop), axis=ref.axis), how, module, make)
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


def quantize_act(
    array: jax.Array,
    how: qarray.HowToQuantize,
    rule: qconfig.QuantizationRule,
    act_name: str,
    *,
    _qarray_module: ModuleType | Any = qarray,
) -> qarray.QArray:
    """Quantizes an activation: with scales computed here, or static ones from the parameters.

    Args:
      array: float activation.
      how: how to quantize it.
      rule: `act_static_scale` chooses static range; its scales are shared over `act_batch_axes` and live in the current
        module's parameters `<act_name>_scale` (a `WithAux`) and, for asymmetric formats, `<act_name>_zero_point`.
      act_name: such as 'dot_general0_lhs'.
    """
    if not rule.act_static_scale:
        return _qarray_module.quantize(array, how)

    def init() -> tuple[jax.Array, jax.Array | None]:
        calibration = qarray.calibrate(array, how)
        axes = tuple(a for a in rule.act_batch_axes if -array.ndim <= a < array.ndim)
        calibration = {k: v.mean(axes, keepdims=True) for k, v in calibration.items()}
        return qarray.compute_scale_zero_point(calibration, how.qtype)

    scale = flax_util.get_or_create_param(f"{act_name}_scale", lambda: WithAux(init()[0].astype(jnp.float32), how))
    zero_point = None
    if jax.eval_shape(init)[1] is not None:
        zero_point = flax_util.get_or_create_param(f"{act_name}_zero_point", lambda: init()[1])
    return _qarray_module.quantize_with_scale_zero_point(array, how.qtype, scale.array.astype(array.dtype), zero_point)


@contextlib.contextmanager
def _named(path: str, op_id: str | None):
    """Puts the path and the op into the message of a ValueError."""
    try:
        yield
    except ValueError as e:
        if path and str(e).startswith(path):
            raise
        use = " Use another tile_size, or qwix.contrib.padded_ptq.PaddedPtqProvider."
        hint = use if "be tiled by" in str(e) else ""
        raise ValueError(f"{path or 'the root module'}, {op_id}: {e}{hint}") from e


def _format(operand: Any) -> str:
    if isinstance(operand, _ToQuantize):
        qtype = operand.how.qtype
    elif isinstance(operand, qarray.QArray):
        qtype = operand.qtype if operand.qtype is not None else operand.qvalue.dtype
    else:
        qtype = operand.dtype
    return qtype if isinstance(qtype, str) else jnp.dtype(qtype).name


def _binary_einsum(einsum_str: str, ndims: Sequence[int], index: int) -> tuple[str, tuple[int, int], bool]:
    """An einsum of two operands in which one operand has the role that it has in an einsum of many.

    Returns the einsum string, the ranks of the two operands, and whether the operand in question is the left one.
    """
    if len(ndims) == 2:
        return einsum_str, (ndims[0], ndims[1]), index == 0
    inputs, arrow, output = einsum_str.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if not arrow:
        letters = inputs.replace(".", "").replace(",", "")
        once = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
        output = ("..." if "..." in inputs else "") + once
    others = subscripts[:index] + subscripts[index + 1 :]
    rest = "".join(dict.fromkeys("".join(others).replace(".", "")))
    broadcast = max(n - len(s.replace("...", "")) for s, n in zip(subscripts, ndims, strict=True))
    if broadcast and any("..." in s for s in others):
        return (
            f"{subscripts[index]},...{rest}->{output}",
            (ndims[index], len(rest) + broadcast),
            True,
        )
    return f"{subscripts[index]},{rest}->{output}", (ndims[index], len(rest)), True


# --- the provider ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ToQuantize:
    """A float operand that is quantized within the op's own jit, with scales computed there."""

    array: jax.Array
    how: qarray.HowToQuantize


@interception.disable_interceptions
def run_op(op: Callable[..., Any], operands: Sequence[Any], qarray_module: Any = qarray, **kwargs: Any) -> jax.Array:
    """Runs an op on quantized operands, those that are `_ToQuantize` quantized first.

    The whole is jitted, so that ops that are equal but for the values of their operands are traced once for a model.
    """
    hows = tuple(x.how if isinstance(x, _ToQuantize) else None for x in operands)
    arrays = [x.array if isinstance(x, _ToQuantize) else x for x in operands]
    static = tuple((name, _hashable(value)) for name, value in kwargs.items())
    return _jitted_op(_Call(op, qarray_module, hows, static), *arrays)


@dataclasses.dataclass(frozen=True)
class _Call:
    op: Callable[..., Any]
    qarray_module: Any
    hows: tuple[qarray.HowToQuantize | None, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class _EinsumOf:  # a partial that is equal to another of the same einsum
    einsum: Callable[..., Any]
    subscripts: str

    def __call__(self, *operands: Any, **kwargs: Any) -> jax.Array:
        return self.einsum(self.subscripts, *operands, **kwargs)


def _run(call: _Call, *arrays: Any) -> jax.Array:
    operands = [
        array if how is None else call.qarray_module.quantize(array, how)
        for array, how in zip(arrays, call.hows, strict=True)
    ]
    return call.op(*operands, **dict(call.kwargs))


_run.__name__ = "qwix_op"
_jitted_op = jax.jit(_run, static_argnums=0)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return tuple(map(_hashable, value))
    return value


def _without(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A passive handler out of one that finds the original by its name."""
    return lambda _, *args, **kwargs: handler(*args, **kwargs)


class BoxedParamProvider(qconfig.QuantizationProvider):
    """Quantizes weights in the parameter tree and activations on the fly; the base of PTQ and LoRA.

    Args:
      rules: see `QuantizationRule`.
      disable_jit: see `QuantizationProvider`.
      _qarray_module: what quantizes; has `quantize`, `get_scale_shape`, and `quantize_with_scale_zero_point` or a
        `quantize_act` of its own.
      _dot_general_fn, _einsum_fn, _conv_general_dilated_fn: the ops on quantized operands.
    """

    def __init__(
        self,
        rules: Sequence[qconfig.QuantizationRule],
        *,
        disable_jit: bool = False,
        _qarray_module: Any = qarray,
        _dot_general_fn: Callable[..., Any] = dot_general.dot_general,
        _einsum_fn: Callable[..., Any] = einsum.einsum,
        _conv_general_dilated_fn: Callable[..., Any] = conv_general.conv_general_dilated,
    ):
        super().__init__(rules, disable_jit=disable_jit)
        self._qarray_module = _qarray_module
        self._dot_general_fn = _dot_general_fn
        self._einsum_fn = _einsum_fn
        self._conv_general_dilated_fn = _conv_general_dilated_fn

    def _quantize_operands(
        self,
        operands: Sequence[Any],
        get_how: Callable[..., qarray.HowToQuantize],
        rule: qconfig.QuantizationRule | None,
        op_id: str | None,
    ) -> list[Any] | None:
        """The operands as the rule wants them; None if all of them stay as they are.

        Args:
          operands: arrays, `nnx.Variable`s or `WithAux`s.
          get_how: (index of the operand, qtype=, calibration_method=) -> HowToQuantize.
          rule: what matched.
          op_id: see `_get_current_rule_and_op_id`.
        """
        result, params = [], []
        for i, operand in enumerate(operands):
            quantized, param = self._quantize_operand(i, operand, get_how, rule, op_id)
            result.append(quantized)
            params.append(param)
        if rule is not None:
            self._record(
                op_id,  # type: ignore[arg-type]
                shapes=tuple(tuple(jnp.shape(x) if not hasattr(x, "shape") else x.shape) for x in operands),
                formats=tuple(map(_format, result)),
                params=tuple(params),
            )
            if rule.weight_qtype is not None and not any(params):
                self._warn_of_no_weight(op_id, operands)  # type: ignore[arg-type]
        if any(isinstance(x, (qarray.QArray, _ToQuantize, WithAux)) for x in (*result, *operands)):
            return result
        return None

    def _weight_maker(self, rule: qconfig.QuantizationRule, op_id: str | None) -> Callable[..., WithAux] | None:
        """What puts a quantized weight of this rule and op into the tree; see `Replacement.make`."""
        del rule, op_id
        return None

    def _quantize_operand(
        self,
        index: int,
        operand: Any,
        get_how: Callable[..., qarray.HowToQuantize],
        rule: qconfig.QuantizationRule | None,
        op_id: str | None,
    ) -> tuple[Any, str]:
        if isinstance(operand, WithAux):
            return operand.value.array, "quantized"
        if isinstance(operand, qarray.QArray):
            return qarray.unwrap(operand), ""
        operand = provenance.unwrapped(operand)
        if rule is None or not numerics.should_quantize(operand.dtype):
            return operand, ""
        ref = flax_util.find_ref(operand)
        if ref is not None:
            path = ref.path if isinstance(ref, provenance.ParamRef) else ref.parts[0].path
            if rule.weight_qtype is None:
                return operand, path
            with _named(path, op_id):
                how = get_how(
                    index,
                    qtype=rule.weight_qtype,
                    calibration_method=rule.weight_calibration_method,
                )
                make = self._weight_maker(rule, op_id)
                return _create(ref, operand, how, self._qarray_module, make).array, path
        if rule.act_qtype is None:
            return operand, ""
        with _named("/".join(map(str, flax_util.get_current_module_path())), op_id):
            how = get_how(index, qtype=rule.act_qtype, calibration_method=rule.act_calibration_method)
            if not rule.act_static_scale:
                self._qarray_module.get_scale_shape(operand.shape, how)  # raises where a tile does not divide
                return _ToQuantize(operand, how), ""
            name = f"{op_id}_{('lhs', 'rhs')[index] if index < 2 else f'operand{index}'}"
            own = getattr(self._qarray_module, "quantize_act", None)
            own = own or functools.partial(quantize_act, _qarray_module=self._qarray_module)
            act = own(operand, how, rule, name)
        return act, ""

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: jax.lax.DotDimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.dot_general`, quantized as the rule says."""
        rule, op_id = self._get_current_rule_and_op_id("dot_general")

        def get_how(index: int, **kwargs) -> qarray.HowToQuantize:
            return dot_general.get_how_to_quantize(
                dimension_numbers=dimension_numbers,
                ndims=(lhs.ndim, rhs.ndim),
                for_lhs=index == 0,
                tile_size=rule.tile_size,  # type: ignore[union-attr]
                **kwargs,
            )

        operands = self._quantize_operands([lhs, rhs], get_how, rule, op_id)
        kwargs: dict[str, Any] = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if operands is None:
            lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, **kwargs)
        return run_op(
            self._dot_general_fn, operands, self._qarray_module, dimension_numbers=dimension_numbers, **kwargs
        )

    def einsum(
        self,
        einsum_str: str,
        *operands: Any,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        _dot_general: Callable[..., Any] = jax.lax.dot_general,
        out_sharding: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`jax.numpy.einsum`, quantized as the rule says."""
        kwargs |= {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if len(operands) == 1:  # no contraction of two arrays: a layout change, a diagonal or a sum
            return self._einsum_of_one(einsum_str, operands[0], kwargs)
        rule, op_id = self._get_current_rule_and_op_id("einsum")

        def get_how(index: int, **kwargs) -> qarray.HowToQuantize:
            binary, ndims, for_lhs = _binary_einsum(einsum_str, [x.ndim for x in operands], index)
            return einsum.get_how_to_quantize(
                einsum_str=binary,
                ndims=ndims,
                for_lhs=for_lhs,
                tile_size=rule.tile_size,  # type: ignore[union-attr]
                **kwargs,
            )

        quantized = self._quantize_operands(operands, get_how, rule, op_id)
        if quantized is None:
            if _dot_general is not jax.lax.dot_general:
                kwargs["_dot_general"] = _dot_general
            return jnp.einsum(einsum_str, *map(provenance.unwrapped, operands), **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return run_op(_EinsumOf(self._einsum_fn, einsum_str), quantized, self._qarray_module, **kwargs)

    def _einsum_of_one(self, einsum_str: str, operand: Any, kwargs: dict[str, Any]) -> Any:
        def function(x: Any) -> Any:
            return jnp.einsum(einsum_str, x, **kwargs)

        if isinstance(operand, WithAux):
            return operand.apply_layout(function)
        return provenance.follow_views(function, operand)

    def conv_general_dilated(
        self,
        lhs: Any,
        rhs: Any,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.conv_general_dilated`, quantized as the rule says."""
        rule, op_id = self._get_current_rule_and_op_id("conv_general_dilated")
        numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)

        def get_how(index: int, **kwargs) -> qarray.HowToQuantize:
            if rule.tile_size:  # type: ignore[union-attr]
                raise ValueError("tile_size is not supported for a convolution: leave it out of its rule")
            return conv_general.get_how_to_quantize(dimension_numbers=numbers, for_lhs=index == 0, **kwargs)

        kwargs: dict[str, Any] = {
            "window_strides": window_strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": dimension_numbers,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
            "precision": precision,
            "preferred_element_type": preferred_element_type,
        }
        if out_sharding is not None:
            kwargs["out_sharding"] = out_sharding
        operands = self._quantize_operands([lhs, rhs], get_how, rule, op_id)
        if operands is None:
            lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
            return jax.lax.conv_general_dilated(lhs, rhs, **kwargs)
        return run_op(self._conv_general_dilated_fn, operands, self._qarray_module, **kwargs)

    def nn_param(self, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        """`flax.linen.Module.param` that knows quantized parameters, and remembers what it hands out."""
        if module.has_variable("params", name):
            stored: Any = module.get_variable("params", name)
            if isinstance(flax_util.unbox(stored), WithAux):
                return flax_util.unbox(stored) if kwargs.get("unbox", True) else stored
        return qconfig.nn_param(module, name, *args, **kwargs)

    def promote_dtype(self, *args: Any, **kwargs: Any) -> Any:
        """The `promote_dtype` of Linen (arrays one by one) and NNX (arrays in a tuple), also for `WithAux`."""
        in_tuple = len(args) == 1 and isinstance(args[0], (tuple, list))
        arrays: Sequence[Any] = args[0] if in_tuple else args
        dtypes = nnx_dtypes if in_tuple else linen_dtypes
        if not any(isinstance(x, WithAux) for x in arrays):
            promoted = dtypes.promote_dtype(*args, **kwargs)
            for old, new in zip(arrays, promoted, strict=True):
                provenance.follow_same(old, new)
            return promoted
        # An empty array has a weight's say in the common dtype, at no cost.
        like = [np.empty((0,), x.dtype) if isinstance(x, WithAux) else x for x in arrays]
        dtype = dtypes.canonicalize_dtype(*like, **kwargs)
        result = [None if x is None else self.asarray(x, dtype) for x in arrays]
        return tuple(result) if in_tuple else result

    def dot(
        self,
        a: Any,
        b: Any,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.numpy.dot`, as a dot_general."""
        return core_dot.dot(
            a,
            b,
            precision,
            preferred_element_type,
            out_sharding,
            _qwix_dot_general=self.dot_general,
        )

    def _matmul(self, a: Any, b: Any, **kwargs: Any) -> jax.Array:
        if isinstance(a, WithAux) or isinstance(b, WithAux):
            return core_dot.matmul(a, b, _qwix_dot_general=self.dot_general, **kwargs)
        return qconfig.COMMON_INTERCEPTS["jax.numpy.matmul"](a, b, **kwargs)

    def asarray(self, a: Any, dtype: Any = None, order: Any = None, **kwargs: Any) -> Any:
        """`jax.numpy.asarray`, also for `WithAux`."""
        if isinstance(a, WithAux):
            return a.value if dtype is None else a.astype(dtype)
        result = jnp.asarray(a, dtype, order, **kwargs)
        provenance.follow_same(a, result)
        return result

    def _take(self, a: Any, indices: Any, axis: int | None = None, **kwargs: Any) -> jax.Array:
        """`jax.numpy.take`: an embedding lookup dequantizes only the rows that it takes."""
        if not isinstance(a, WithAux) or axis is None:
            return jnp.take(a, indices, axis, **kwargs)
        index = (slice(None),) * (axis % a.ndim) + (indices,)
        return a[index].__jax_array__()

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        return super().get_intercept_map() | {
            "jax.lax.conv_general_dilated": self.conv_general_dilated,
            "jax.lax.dot_general": self.dot_general,
            "jax.numpy.asarray": interception.passive(_without(self.asarray)),
            "jax.numpy.dot": self.dot,
            "jax.numpy.einsum": self.einsum,
            "jax.numpy.matmul": interception.reentrant(self._matmul),
            "jax.numpy.take": interception.passive(_without(self._take)),
            "flax.linen.Module.param": self.nn_param,
            "flax.linen.dtypes.promote_dtype": interception.passive(_without(self.promote_dtype)),
            "flax.nnx.nn.dtypes.promote_dtype": interception.passive(_without(self.promote_dtype)),
        }
