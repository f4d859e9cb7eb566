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
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import nnx_nodes, qconfig
from qwix._src.core import pytree
from qwix._src.providers import ptq
from qwix.contrib import awq_core, calibration, gptq_core, input_scale, scaling


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

    Args:
      rules: see `QuantizationRule`.
      second_moments: also X X^T of the inputs X, with which scales are searched for on the error of the output.
      **kwargs: see `QuantizationProvider`.

    >>> import qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
    >>> provider = AwqCalibrationProvider([AwqRule(weight_qtype="int4")])
    >>> observed = qwix.quantize_model(model, provider, jnp.ones((1, 2)))
    >>> _ = observed(jnp.array([[1.0, -4.0], [3.0, 0.0]]))
    >>> observed.kernel_awq.get_value()["sum_of_act_scale"].tolist()
    [2.0, 2.0]
    """

    def __init__(self, rules: Sequence[Any], *, second_moments: bool = False, **kwargs: Any):
        super().__init__(rules, **kwargs)
        self._second_moments = second_moments

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return AwqRule

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        stats = {"act_scale": awq_core.compute_act_scale(lhs, axis=1)}
        return stats | {"hessian": gptq_core.compute_hessian(lhs)} if self._second_moments else stats

    def get_stats_suffix(self) -> str:
        return "_awq"


@nnx_nodes.register
@pytree.array_structure
class WithAwqScale(input_scale.WithInputScale):
    """A quantized weight with a scale for each input feature: weight ~ dequantize(array) / awq_scale.

    Layout changes carry the scale along.

    Attributes:
      array: the QArray of the scaled weight.
      how: as in `WithAux`.
      awq_scale: float32 (input features,). Under a scan or vmap over layers, with the stacked axes in front.
      contracting_axis: the axis of the weight that the scale belongs to, without stacked axes. A tuple, if there are
        several: the scale then runs over them in row-major order (static).

    >>> from qwix._src.core import qarray
    >>> array = qarray.quantize_api(jnp.ones((2, 3)), jnp.int8)
    >>> how = qarray.HowToQuantize(qtype=jnp.int8)
    >>> w = WithAwqScale(array, how, awq_scale=jnp.array([1.0, 4.0]), contracting_axis=0)
    >>> jnp.asarray(w).round(2).tolist(), w.T.contracting_axis
    ([[1.0, 1.0, 1.0], [0.25, 0.25, 0.25]], 1)
    """

    scale_field = "awq_scale"
    undo = operator.truediv

    awq_scale: jax.Array
    contracting_axis: int | tuple[int, ...] = pytree.static()
    replace: ClassVar[Callable[..., "WithAwqScale"]]


class AwqInferenceProvider(input_scale.InputScaleProvider):
    """Runs a model with weights from `quantize_params`: those of AWQ, and those rounded to nearest.

    In an NNX model the weights of dot_general and einsum under an `AwqRule` are `WithAwqScale`s from the start, with
    scales of 1 until `nnx.update` brings the real ones. In Linen they are so where `quantize_params` made them so.
    """

    rule_type = AwqRule
    weight_type = WithAwqScale


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
        if is_nnx:
            input_scale.check_place(context, AwqInferenceProvider)
        array, scale = awq_core.quantize_weight(
            context.weight,
            context.calibration_stats["act_scale"],
            context.how,
            n_grid,
            second_moments=context.calibration_stats.get("hessian"),
        )
        return input_scale.with_scale(context, WithAwqScale, array, scale[0])

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


def smooth(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], *, variables: Any = None
) -> tuple[Any, dict[str, str]]:
    """Scales a float model by AWQ, and keeps its outputs: a stage before another method, such as GPTQ.

    Args:
      model: NNX or Linen; it is left alone.
      batches: calibration inputs, read once: arrays, tuples of arguments, dictionaries of keyword arguments.
      rules: `AwqRule`s, with the formats that the weights will get and `n_grid`.
      variables: Linen only.

    Returns:
      The float model (in Linen its variables), and for each weight that was left as it was, by path, why its scale
      cannot be folded. Weights that share an input share a scale.
    """
    return scaling.smooth(_calibrated(model, batches, rules, variables))


def quantize(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], *, variables: Any = None, n_clip: int = 10
) -> Any:
    """Quantizes a model with AWQ on the error of each layer's output.

    Scales are folded where the model lets them (see `folding`), so that inference costs nothing more; at the other
    weights activations take them at inference. Weights that share an input share a scale.

    Args:
      model, batches, rules, variables: see `smooth`.
      n_clip: number of shares that ranges are clipped to, see `awq_core.clip`; 0: none.

    Returns:
      The quantized model; in Linen a pair of it and its variables.

    >>> class Mlp(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.down(nnx.relu(self.up(x)))
    >>> quantized = quantize(Mlp(nnx.Rngs(0)), [jnp.ones((2, 4))], [AwqRule(weight_qtype="int4")])
    >>> type(quantized.up.kernel).__name__, type(quantized.down.kernel).__name__  # that of down went into up
    ('WithAwqScale', 'WithAux')
    """
    return scale_and_quantize(model, batches, rules, variables=variables, n_clip=n_clip).model


def scale_and_quantize(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], *, variables: Any = None, n_clip: int = 10
) -> scaling.Quantized:
    """`quantize`, with the scaled float model that was quantized."""

    def blocks_of(context: calibration.CalibratedQuantContext) -> jax.Array:
        return awq_core.diagonal_blocks(context.calibration_stats["hessian"], context.how)

    def quantize_weight(
        context: calibration.CalibratedQuantContext, w: jax.Array, scale: jax.Array, blocks: jax.Array | None
    ) -> Any:
        if blocks is None:
            return input_scale.quantize_scaled(w, jnp.ones_like(scale), context.how)
        return awq_core.clip(w, awq_core.of_scaled(blocks, scale), context.how, n_clip)

    calibrated = _calibrated(model, batches, rules, variables, **({"keep": blocks_of} if n_clip else {}))
    return scaling.quantize(calibrated, quantize_weight)


def _calibrated(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], variables: Any, **options: Any
) -> scaling.Calibrated:
    n_grid = max((rule.n_grid for rule in rules if isinstance(rule, AwqRule)), default=1)

    def scale_of_site(members: Sequence[scaling.Member]) -> jax.Array:
        act = members[0].context.calibration_stats["act_scale"]
        candidates = awq_core.grid(members[0].to_site(jnp.maximum(act, 1e-4 * act.max() + 1e-30)), n_grid)
        errors = [
            awq_core.output_errors(
                m.context.weight, m.context.calibration_stats["hessian"], m.to_columns(candidates), m.context.how
            )
            for m in members
        ]
        return candidates[jnp.argmin(jnp.stack(errors).sum(0))]

    observer, provider = AwqCalibrationProvider(rules, second_moments=True), AwqInferenceProvider(rules)
    return scaling.calibrate(model, batches, observer, provider, scale_of_site, variables=variables, **options)
