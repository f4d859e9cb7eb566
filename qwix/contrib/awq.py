"""AWQ, activation-aware weight quantization (arXiv 2306.00978), as providers. `awq_core` has the method.

    rules = [AwqRule(weight_qtype="int4", tile_size=128)]

    # 1. Run the float model on some batches, to see which features are large.
    calibration = qwix.quantize_model(model, AwqCalibrationProvider(rules), batch)
    for batch in batches:
        calibration(batch)
    stats = nnx.to_pure_dict(nnx.state(calibration, qwix.QuantStat))

    # 2. Quantize the weights.
    quantized = qwix.quantize_model(model, AwqInferenceProvider(rules), batch)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, quantize_params(params, quantized, stats))

In Linen, the calibration model is applied with `mutable="quant_stats"`, and `quantize_params` takes the abstract
parameters of the quantized model and returns its parameters.

At inference the scales divide the activations, x W = (x / s) (s W), which costs one pass over the activations: the
weight s W stays in its format until the matmul, and goes into an integer one if activations are quantized too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from qwix._src import nnx_nodes, provenance, qconfig
from qwix._src.core import einsum as core_einsum
from qwix._src.core import einsum_info, pytree, qarray
from qwix._src.core import operands as core_operands
from qwix._src.providers import ptq
from qwix._src.utils import flax_util
from qwix.contrib import awq_core, calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class AwqRule(qconfig.QuantizationRule):
    """A rule whose weights are quantized with AWQ.

    Attributes:
      n_grid: number of exponents that are tried, see `awq_core.search_optimal_scales`. `quantize_params` does not see
        rules: pass it there as well.
    """

    n_grid: int = 20


class AwqCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects the mean magnitude of the input features of each weight under an `AwqRule`.

    >>> import qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
    >>> provider = AwqCalibrationProvider([AwqRule(weight_qtype="int4")])
    >>> observed = qwix.quantize_model(model, provider, jnp.ones((1, 2)))
    >>> _ = observed(jnp.array([[1.0, -4.0], [3.0, 0.0]]))
    >>> observed.kernel_awq.get_value()["sum_of_act_scale"].tolist()
    [2.0, 2.0]
    """

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return AwqRule

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        return {"act_scale": awq_core.compute_act_scale(lhs, axis=1)}

    def get_stats_suffix(self) -> str:
        return "_awq"


@nnx_nodes.register
@pytree.array_structure
class WithAwqScale(ptq.WithAux):
    """A quantized weight with a scale for each input feature: weight ~ dequantize(array) / awq_scale.

    Layout changes carry the scale along.

    Attributes:
      array: the QArray of the scaled weight.
      how: as in `WithAux`.
      awq_scale: float32 (input features,). Under a scan or vmap over layers, with the stacked axes in front.
      contracting_axis: the axis of the weight that the scale belongs to, without stacked axes. A tuple, if there are
        several: the scale then runs over them in row-major order (static).

    >>> array = qarray.quantize_api(jnp.ones((2, 3)), jnp.int8)
    >>> how = qarray.HowToQuantize(qtype=jnp.int8)
    >>> w = WithAwqScale(array, how, awq_scale=jnp.array([1.0, 4.0]), contracting_axis=0)
    >>> jnp.asarray(w).round(2).tolist(), w.T.contracting_axis
    ([[1.0, 1.0, 1.0], [0.25, 0.25, 0.25]], 1)
    """

    awq_scale: jax.Array
    contracting_axis: int | tuple[int, ...] = pytree.static()
    replace: ClassVar[Callable[..., "WithAwqScale"]]

    def axes(self) -> tuple[int, ...]:
        """The axes that the scale runs over, without stacked ones."""
        axis = self.contracting_axis
        return (axis,) if isinstance(axis, int) else axis

    def aligned_scale(self) -> jax.Array:
        """The scale with the rank of the weight, of size 1 along the axes that it does not run over."""
        value: Any = self.value
        stacked = value.awq_scale.ndim - 1
        kept = [*range(stacked), *(axis + stacked for axis in self.axes())]
        shape = [size if axis in kept else 1 for axis, size in enumerate(value.shape)]
        return value.awq_scale.reshape(shape)

    def without_scale(self) -> ptq.WithAux:
        """The scaled weight: what is multiplied with activations that are divided by the scale."""
        value: Any = self.value
        return ptq.WithAux(value.array, value.how)

    def _moved(self, result: Any, change: Callable[[qarray.QArray], qarray.QArray]) -> "WithAwqScale":
        """`result`, a changed layout of this weight, with the scale that follows from the same change."""
        value: Any = self.value
        if value.awq_scale.ndim > 1:
            raise ValueError("the layout of stacked AWQ weights cannot be changed: change that of each layer")
        # To a layout change, a scale for each feature is a scale like that of a QArray.
        scale = change(qarray.QArray(value.array.qvalue, value.aligned_scale())).scale
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size != 1)
        full = tuple(size if axis in axes else 1 for axis, size in enumerate(result.shape))
        return result.replace(
            awq_scale=qarray.broadcast_to(scale, full).reshape(-1),
            contracting_axis=axes[0] if len(axes) == 1 else axes,
        )

    def __getitem__(self, key: Any) -> Any:
        if key is Ellipsis:
            return self.value
        return self._moved(super().__getitem__(key), lambda array: array[key])

    def reshape(self, *shape: Any) -> "WithAwqScale":
        result = super().reshape(*shape)
        return self._moved(result, lambda array: array.reshape(result.shape))

    def transpose(self, *axes: Any) -> "WithAwqScale":
        return self._moved(super().transpose(*axes), lambda array: array.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> "WithAwqScale":
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
        return (weight / self.aligned_scale()).astype(weight.dtype)


def _with_unit_scale(array: qarray.QArray, how: qarray.HowToQuantize, stacked: int) -> WithAwqScale:
    """A quantized weight whose scales are all 1; its leaves are boxed like those of `array`."""
    channelwise = {axis % array.ndim for axis in how.channelwise_axes}
    axes = [axis for axis in range(array.ndim) if axis not in channelwise]
    shape = (*array.shape[:stacked], math.prod(array.shape[axis] for axis in axes))
    ones: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    if not isinstance(flax_util.unbox(array.qvalue), jax.ShapeDtypeStruct):
        ones = jnp.ones(shape, jnp.float32)
    named = [*range(stacked), axes[0] if len(axes) == 1 else None]
    contracting = tuple(axis - stacked for axis in axes)
    return WithAwqScale(
        array,
        how,
        awq_scale=flax_util.update_boxed(array.qvalue, value=ones, transpose=named),
        contracting_axis=contracting[0] if len(contracting) == 1 else contracting,
    )


class AwqInferenceProvider(ptq.PtqProvider):
    """Runs a model with weights from `quantize_params`: those of AWQ, and those rounded to nearest.

    In an NNX model the weights of dot_general and einsum under an `AwqRule` are `WithAwqScale`s from the start, with
    scales of 1 until `nnx.update` brings the real ones. In Linen they are so where `quantize_params` made them so.
    """

    def _weight_maker(self, rule: qconfig.QuantizationRule, op_id: str | None) -> Callable[..., ptq.WithAux] | None:
        is_matmul = str(op_id).startswith(("dot_general", "einsum"))
        if isinstance(rule, AwqRule) and is_matmul and not isinstance(flax_util.get_current_module(), nn.Module):
            return _with_unit_scale
        return None

    def _quantize_operand(self, index: int, operand: Any, *args: Any) -> tuple[Any, str]:
        if isinstance(operand, WithAwqScale):  # no activations could take the scale
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
        """`jax.lax.dot_general`, with AWQ scales moved to the activations."""
        if isinstance(lhs, WithAwqScale) or isinstance(rhs, WithAwqScale):
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
        """`jax.numpy.einsum`, with AWQ scales moved to the activations."""
        einsum_str, operands = core_einsum.split_args(einsum_str, *operands)
        if len(operands) > 1 and any(isinstance(x, WithAwqScale) for x in operands):
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
    """Divides activations by the AWQ scales of the weights that they are multiplied with.

    In a sum of products, a factor 1 / s_j of one operand is as well a factor of any other that has the index j.

    Args:
      operands: arrays, variables and quantized weights.
      labels: the index that each axis of each operand runs over.

    Returns:
      The operands; a `WithAwqScale` that no one array among the others can take the scale of is left.
    """
    result = [provenance.unwrapped(x) for x in operands]
    for i, weight in enumerate(operands):
        if not isinstance(weight, WithAwqScale):
            continue
        needed = [labels[i][axis] for axis in weight.axes()]
        for j, other in enumerate(result):
            is_array = j != i and not isinstance(other, ptq.WithAux | qarray.QArray)
            if is_array and flax_util.find_ref(other) is None and set(needed) <= set(labels[j]):
                result[j] = _divided(other, weight, [list(labels[j]).index(label) for label in needed])
                result[i] = weight.without_scale()
                break
    return result


def _divided(x: Any, weight: WithAwqScale, axes: Sequence[int]) -> jax.Array:
    """Activations divided by a weight's scale; `axes` are those of x that go with the weight's scaled ones."""
    value: Any = weight.value
    scale = value.awq_scale.reshape([weight.shape[axis] for axis in weight.axes()])
    scale = scale.transpose(*np.argsort(axes).tolist())
    sizes = iter(scale.shape)
    scale = scale.reshape([next(sizes) if axis in axes else 1 for axis in range(x.ndim)])
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else weight.dtype
    return (x / scale).astype(dtype)


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    awq_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
    n_grid: int = 20,
) -> Any:
    """Quantizes a float parameter tree with AWQ, for `AwqInferenceProvider`.

    Args:
      params: pure nested dict of float arrays, see `ptq.quantize_params`.
      abstract_quantized_params: the abstract parameters in Linen, the quantized model in NNX.
      awq_quant_stats: pure nested dict of what `AwqCalibrationProvider` collected. A weight without statistics is
        rounded to nearest.
      allow_extra_params: see `ptq.quantize_params`.
      n_grid: see `awq_core.search_optimal_scales`.

    Returns:
      The tree with `WithAwqScale`s, and `WithAux`s where there were no statistics; in NNX, the nested dict that
      `nnx.update(model, ...)` takes.

    Raises:
      ValueError: as `calibration.quantize_params_with_calibration`; or the NNX model has no place for the scales.
    """
    is_nnx = isinstance(abstract_quantized_params, nnx.Module)

    def quantize(context: calibration.CalibratedQuantContext) -> WithAwqScale:
        if is_nnx and not isinstance(context.abs_w, WithAwqScale):
            raise ValueError(
                f"{'/'.join(map(str, context.path))} has AWQ statistics, but the quantized model has no place for its "
                "scale: quantize the model with AwqInferenceProvider, and with the AwqRules that were calibrated"
            )
        array, scale = awq_core.quantize_weight(
            context.weight, context.calibration_stats["act_scale"], context.how, n_grid
        )
        return WithAwqScale(
            context.restore_shape(array),
            context.abs_w.how,
            awq_scale=context.restore_shape(scale).reshape(-1),
            contracting_axis=context.contracting_axis,
        )

    def unit_stats(target: ptq.WithAux) -> dict[str, jax.Array] | None:
        """For weights that have a place for a scale: with equal magnitudes, AWQ is rounding to nearest."""
        if not isinstance(target, WithAwqScale):
            return None
        shape = target.awq_scale.shape
        return {"count": jnp.ones(shape[:-1], jnp.int32), "sum_of_act_scale": jnp.ones(shape, jnp.float32)}

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        awq_quant_stats,
        AwqCalibrationProvider([]).get_stats_suffix(),
        quantize,
        allow_extra_params=allow_extra_params,
        default_stats=unit_stats,
    )
