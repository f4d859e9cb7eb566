"""Quantized weights whose input features are scaled, and the provider that moves the scales to the activations.

AWQ and SmoothQuant quantize a weight after multiplying each of its input features by a factor, and undo that on the
activations, which leaves the product as it is:

    x W = (x / s) (s W)

`WithInputScale` is such a weight, s W in its format and s beside it. `InputScaleProvider` moves s to the other operand
of the op, so that s W stays in its format until the matmul, and goes into an integer one if activations are quantized
too. Where no other operand can take the scale, the float weight is used.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qwix._src import provenance, qconfig
from qwix._src.core import einsum as core_einsum
from qwix._src.core import einsum_info, qarray
from qwix._src.core import operands as core_operands
from qwix._src.providers import ptq
from qwix._src.utils import flax_util
from qwix.contrib import calibration


class WithInputScale(ptq.WithAux):
    """A quantized weight with a scale for each input feature; the base of `WithAwqScale` and `WithSqScale`.

    weight ~ undo(dequantize(array), scale), and activations become undo(activations, scale). A subclass is an array
    structure with two more fields, the scale and `contracting_axis`. Layout changes carry the scale along.
    """

    scale_field: ClassVar[str]  # the field that holds the scale
    undo: ClassVar[Callable[[jax.Array, jax.Array], jax.Array]]  # operator.truediv or operator.mul

    contracting_axis: int | tuple[int, ...]
    replace: ClassVar[Callable[..., Any]]

    @classmethod
    def with_unit_scale(cls, array: qarray.QArray, how: qarray.HowToQuantize, stacked: int) -> Any:
        """A weight whose scales are all 1; its leaves are boxed like those of `array`. See `Replacement.make`."""
        channelwise = {axis % array.ndim for axis in how.channelwise_axes}
        axes = [axis for axis in range(array.ndim) if axis not in channelwise]
        shape = (*array.shape[:stacked], math.prod(array.shape[axis] for axis in axes))
        ones: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        if not isinstance(flax_util.unbox(array.qvalue), jax.ShapeDtypeStruct):
            ones = jnp.ones(shape, jnp.float32)
        named = [*range(stacked), axes[0] if len(axes) == 1 else None]
        contracting = tuple(axis - stacked for axis in axes)
        return cls._made(
            array,
            how,
            flax_util.update_boxed(array.qvalue, value=ones, transpose=named),
            contracting[0] if len(contracting) == 1 else contracting,
        )

    @classmethod
    def _made(cls, array: Any, how: qarray.HowToQuantize, scale: Any, contracting_axis: int | tuple[int, ...]) -> Any:
        make: Callable[..., Any] = cls
        return make(array, how, **{cls.scale_field: scale, "contracting_axis": contracting_axis})

    @property
    def input_scale(self) -> Any:
        """What the subclass calls its scale; boxed like the array."""
        return getattr(self, self.scale_field)

    @staticmethod
    def stored_scale(scale: jax.Array) -> jax.Array:
        """What the scale's field holds for a weight that was multiplied by `scale`."""
        return scale

    def axes(self) -> tuple[int, ...]:
        """The axes that the scale runs over, without stacked ones."""
        axis = self.contracting_axis
        return (axis,) if isinstance(axis, int) else axis

    def aligned_scale(self) -> jax.Array:
        """The scale with the rank of the weight, of size 1 along the axes that it does not run over."""
        value: Any = self.value
        stacked = value.input_scale.ndim - 1
        kept = [*range(stacked), *(axis + stacked for axis in self.axes())]
        shape = [size if axis in kept else 1 for axis, size in enumerate(value.shape)]
        return value.input_scale.reshape(shape)

    def without_scale(self) -> ptq.WithAux:
        """The scaled weight: what is multiplied with activations that took the scale."""
        return ptq.WithAux(self.array, self.how)

    def _moved(self, result: Any, change: Callable[[qarray.QArray], qarray.QArray]) -> Any:
        """`result`, a changed layout of this weight, with the scale that follows from the same change."""
        value: Any = self.value
        if value.input_scale.ndim > 1:
            raise ValueError(
                "the layout of stacked weights with input scales cannot be changed: change that of each layer"
            )
        # To a layout change, a scale for each feature is a scale like that of a QArray, whatever the codes lie in.
        codes = jnp.broadcast_to(jnp.int8(0), value.shape) if value.array.own_ops else value.array.qvalue
        scale = change(qarray.QArray(codes, value.aligned_scale())).scale
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size != 1)
        full = tuple(size if axis in axes else 1 for axis, size in enumerate(result.shape))
        return result.replace(
            **{self.scale_field: qarray.broadcast_to(scale, full).reshape(-1)},
            contracting_axis=axes[0] if len(axes) == 1 else axes,
        )

    def __getitem__(self, key: Any) -> Any:
        if key is Ellipsis:
            return self.value
        return self._moved(super().__getitem__(key), lambda array: array[key])

    def reshape(self, *shape: Any) -> Any:
        result = super().reshape(*shape)
        return self._moved(result, lambda array: array.reshape(result.shape))

    def transpose(self, *axes: Any) -> Any:
        return self._moved(super().transpose(*axes), lambda array: array.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> Any:
        return self._moved(super().swapaxes(axis1, axis2), lambda array: array.swapaxes(axis1, axis2))

    def apply_layout(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        results: Any = super().apply_layout(function, *args, **kwargs)

        def change(array: qarray.QArray, i: int | None = None) -> qarray.QArray:
            changed = provenance.apply_layout(function, array, args, kwargs)
            return changed if i is None else changed[i]

        if not isinstance(results, list):
            return self._moved(results, change)
        return [self._moved(result, functools.partial(change, i=i)) for i, result in enumerate(results)]

    @staticmethod
    def concatenate(arrays: Sequence[Any], axis: int = 0, **kwargs: Any) -> Any:
        """The float weights joined: they have scales of their own, which no one array of activations can take."""
        return jnp.concatenate([jnp.asarray(x) for x in arrays], kwargs.pop("dimension", axis))

    def __jax_array__(self) -> jax.Array:
        weight = qarray.dequantize(self.value.array)
        return type(self).undo(weight, self.aligned_scale()).astype(weight.dtype)


def quantize_scaled(w: jax.Array, scales: jax.Array, how: qarray.HowToQuantize) -> qarray.QArray:
    """Q(W diag(s)) of a weight (out, in), which dequantizes to the dtype of the weight.

    >>> how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    >>> quantize_scaled(jnp.ones((1, 2)), jnp.array([1.0, 0.5]), how).qvalue.tolist()
    [[127, 64]]
    """
    return qarray.quantize_api(
        w * scales,
        how.qtype,
        channelwise_axes=how.channelwise_axes,
        tiled_axes=how.tiled_axes,
        calibration_method=how.calibration_method,
        scale_dtype=w.dtype,
    )


def with_scale(
    context: calibration.CalibratedQuantContext, cls: type[WithInputScale], array: qarray.QArray, scale: jax.Array
) -> Any:
    """What stands in the parameter tree for a weight.

    Args:
      context: of the weight.
      cls: what to make.
      array: the scaled weight (out, in), quantized.
      scale: (in,), what `cls` calls its scale.
    """
    scale = context.restore_shape(scale[None, :]).reshape(-1)
    return cls._made(context.restore_shape(array), context.abs_w.how, scale, context.contracting_axis)


def check_place(context: calibration.CalibratedQuantContext, provider: type["InputScaleProvider"]) -> None:
    """Raises a ValueError if a weight of an NNX model that has statistics has no place for its scale."""
    if not isinstance(context.abs_w, provider.weight_type):
        raise ValueError(
            f"{'/'.join(map(str, context.path))} has statistics, but the quantized model has no place for its scale: "
            f"quantize the model with {provider.__name__}, and with the {provider.rule_type.__name__}s that were "
            "calibrated"
        )


class InputScaleProvider(ptq.PtqProvider):
    """Runs a model some of whose weights have input scales, the others as PTQ does.

    In an NNX model the weights of dot_general and einsum under a rule of `rule_type` are `weight_type`s from the start,
    with scales of 1 until `nnx.update` brings the real ones. In Linen they are so where `quantize_params` made them so.
    """

    rule_type: ClassVar[type[qconfig.QuantizationRule]]
    weight_type: ClassVar[type[WithInputScale]]

    def _weight_maker(self, rule: qconfig.QuantizationRule, op_id: str | None) -> Callable[..., ptq.WithAux] | None:
        is_matmul = str(op_id).startswith(("dot_general", "einsum"))
        if isinstance(rule, self.rule_type) and is_matmul and not isinstance(flax_util.get_current_module(), nn.Module):
            return self.weight_type.with_unit_scale
        return None

    def _quantize_operand(self, index: int, operand: Any, *args: Any) -> tuple[Any, str]:
        if isinstance(operand, WithInputScale):  # no activations could take the scale
            return operand.__jax_array__(), "quantized"
        return super()._quantize_operand(index, operand, *args)

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
        """`jax.lax.dot_general`, with input scales moved to the activations."""
        if isinstance(lhs, WithInputScale) or isinstance(rhs, WithInputScale):
            (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = core_operands.canonical_dimension_numbers(
                dimension_numbers, (lhs.ndim, rhs.ndim)
            )
            rhs_labels = [("rhs", axis) for axis in range(rhs.ndim)]
            for lhs_axis, rhs_axis in zip((*lhs_ca, *lhs_ba), (*rhs_ca, *rhs_ba), strict=True):
                rhs_labels[rhs_axis] = ("lhs", lhs_axis)
            lhs, rhs = _move_scales([lhs, rhs], [[("lhs", axis) for axis in range(lhs.ndim)], rhs_labels])
        return super().dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
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
        """`jax.numpy.einsum`, with input scales moved to the activations."""
        einsum_str, operands = core_einsum.split_args(einsum_str, *operands)
        if len(operands) > 1 and any(isinstance(x, WithInputScale) for x in operands):
            labels, _ = einsum_info.parse_subscripts(einsum_str, tuple(x.ndim for x in operands))
            operands = tuple(_move_scales(operands, labels))
        return super().einsum(
            einsum_str,
            *operands,
            precision=precision,
            preferred_element_type=preferred_element_type,
            _dot_general=_dot_general,
            out_sharding=out_sharding,
            **kwargs,
        )


def _move_scales(operands: Sequence[Any], labels: Sequence[Sequence[Any]]) -> list[Any]:
    """Moves the scales of weights to the activations that they are multiplied with.

    In a sum of products, a factor f_j of one operand is as well a factor of any other that has the index j.

    Args:
      operands: arrays, variables and quantized weights.
      labels: the index that each axis of each operand runs over.

    Returns:
      The operands; a `WithInputScale` that no one array among the others can take the scale of is left.
    """
    result = [provenance.unwrapped(x) for x in operands]
    for i, weight in enumerate(operands):
        if not isinstance(weight, WithInputScale):
            continue
        needed = [labels[i][axis] for axis in weight.axes()]
        for j, other in enumerate(result):
            is_array = j != i and not isinstance(other, ptq.WithAux | qarray.QArray)
            if is_array and flax_util.find_ref(other) is None and set(needed) <= set(labels[j]):
                result[j] = _undone(other, weight, [list(labels[j]).index(label) for label in needed])
                result[i] = weight.without_scale().value
                break
    return result


def _undone(x: Any, weight: WithInputScale, axes: Sequence[int]) -> jax.Array:
    """Activations that took a weight's scale; `axes` are those of x that go with the weight's scaled ones."""
    value: Any = weight.value
    scale = value.input_scale.reshape([weight.shape[axis] for axis in weight.axes()])
    scale = scale.transpose(*np.argsort(axes).tolist())
    sizes = iter(scale.shape)
    scale = scale.reshape([next(sizes) if axis in axes else 1 for axis in range(x.ndim)])
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else weight.dtype
    return type(weight).undo(x, scale).astype(dtype)
