"""SmoothQuant (arXiv 2211.10438), as providers.

Activations of language models have a few features that are much larger than the others. With one scale for a whole
token these leave the others few steps. SmoothQuant moves a part of their size into the weights, which have room, and
leaves the product as it is (section 4, equations 3 and 4):

    Y = (X diag(s)^-1) (diag(s) W),        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

where X_j is feature j of the activations and W_j the weights that it is multiplied with. alpha = 0.5 divides the
difficulty evenly; 1 would leave it all to the weights.

    rules = [SqRule(weight_qtype="int8", act_qtype="int8")]

    # 1. Run the float model on some batches, to see how large each feature gets.
    calibration = qwix.quantize_model(model, SqCalibrationProvider(rules), batch)
    for batch in batches:
        calibration(batch)
    stats = nnx.to_pure_dict(nnx.state(calibration, qwix.QuantStat))

    # 2. Quantize the weights.
    quantized = qwix.quantize_model(model, SqInferenceProvider(rules), batch)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, quantize_params(params, quantized, stats))

In Linen, the calibration model is applied with `mutable="quant_stats"`, and `quantize_params` takes the abstract
parameters of the quantized model and returns its parameters.

Weights may have any name and layout, and may be used by dot_general (with all that ends there) and einsum. At inference
1 / s multiplies the activations before they are quantized.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import nnx_nodes, qconfig
from qwix._src.core import pytree, qarray
from qwix._src.providers import ptq
from qwix.contrib import awq_core, calibration, folding, input_scale, scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqRule(qconfig.QuantizationRule):
    """A rule whose weights and activations are smoothed.

    Attributes:
      alpha: how much of the size of the activations moves to the weights, from 0 to 1; see the module's docstring.
    """

    alpha: float = 0.5


def compute_scales_ratio(act_stats: jax.Array, weight_stats: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """The smoothing scales s_j = a_j^alpha / w_j^(1 - alpha) (equation 4).

    Args:
      act_stats: a_j, the largest magnitude of each input feature, (in,).
      weight_stats: w_j, the largest magnitude of the weights of each input feature, (in,).
      alpha: from 0 to 1.

    Returns:
      (in,); 1 where a feature is always 0 or has only weights that are 0: there is nothing to balance.

    >>> compute_scales_ratio(jnp.array([4.0, 0.0]), jnp.array([1.0, 1.0]), 0.5).tolist()
    [2.0, 1.0]
    """
    empty = (act_stats == 0) | (weight_stats == 0)
    act_stats, weight_stats = jnp.where(empty, 1, act_stats), jnp.where(empty, 1, weight_stats)
    return act_stats**alpha / weight_stats ** (1 - alpha)


class SqCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects what `quantize_params` needs of each weight under an `SqRule`.

    The statistics `<weight>_sq` are averages over calls: `act_absmax`, the largest magnitude of each input feature in a
    call, and `alpha`, that of the rule, for each feature.

    >>> import qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
    >>> provider = SqCalibrationProvider([SqRule(weight_qtype="int8", act_qtype="int8")])
    >>> observed = qwix.quantize_model(model, provider, jnp.ones((1, 2)))
    >>> _ = observed(jnp.array([[1.0, -4.0], [9.0, 0.0]]))
    >>> observed.kernel_sq.get_value()["sum_of_act_absmax"].tolist()
    [9.0, 4.0]
    """

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return SqRule

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        absmax = jnp.max(jnp.abs(lhs), axis=1).astype(jnp.float32)
        return {"act_absmax": absmax, "alpha": jnp.full_like(absmax, self._alpha)}

    def get_stats_suffix(self) -> str:
        return "_sq"

    def _observe(self, rule: qconfig.QuantizationRule | None, op_id: str | None, find_uses: Any) -> None:
        self._alpha = rule.alpha if isinstance(rule, SqRule) else SqRule.alpha
        super()._observe(rule, op_id, find_uses)


@nnx_nodes.register
@pytree.array_structure
class WithSqScale(input_scale.WithInputScale):
    """A quantized weight that was smoothed: weight ~ dequantize(array) * inv_sq_scale.

    Layout changes carry the scale along.

    Attributes:
      array: the QArray of the weight that was multiplied by s.
      how: as in `WithAux`.
      inv_sq_scale: 1 / s, float32 (input features,); what activations are multiplied by. Under a scan or vmap over
        layers, with the stacked axes in front.
      contracting_axis: the axis of the weight that the scale belongs to, without stacked axes. A tuple, if there are
        several: the scale then runs over them in row-major order (static).

    >>> array = qarray.quantize_api(jnp.ones((2, 3)), jnp.int8)
    >>> how = qarray.HowToQuantize(qtype=jnp.int8)
    >>> w = WithSqScale(array, how, inv_sq_scale=jnp.array([1.0, 0.25]), contracting_axis=0)
    >>> jnp.asarray(w).round(2).tolist(), w.T.contracting_axis
    ([[1.0, 1.0, 1.0], [0.25, 0.25, 0.25]], 1)
    """

    scale_field = "inv_sq_scale"
    undo = operator.mul

    inv_sq_scale: jax.Array
    contracting_axis: int | tuple[int, ...] = pytree.static()
    replace: ClassVar[Callable[..., "WithSqScale"]]

    @staticmethod
    def stored_scale(scale: jax.Array) -> jax.Array:
        return 1 / scale


class SqInferenceProvider(input_scale.InputScaleProvider):
    """Runs a model with weights from `quantize_params`: those that were smoothed, and those rounded to nearest.

    In an NNX model the weights of dot_general and einsum under an `SqRule` are `WithSqScale`s from the start, with
    scales of 1 until `nnx.update` brings the real ones. In Linen they are so where `quantize_params` made them so.
    """

    rule_type = SqRule
    weight_type = WithSqScale


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    sq_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
) -> Any:
    """Quantizes a float parameter tree with SmoothQuant, for `SqInferenceProvider`.

    Args:
      params: pure nested dict of float arrays, see `ptq.quantize_params`.
      abstract_quantized_params: the abstract parameters in Linen, the quantized model in NNX.
      sq_quant_stats: pure nested dict of what `SqCalibrationProvider` collected. A weight without statistics is rounded
        to nearest.
      allow_extra_params: see `ptq.quantize_params`.

    Returns:
      The tree with `WithSqScale`s, and `WithAux`s where there were no statistics; in NNX, the nested dict that
      `nnx.update(model, ...)` takes.

    Raises:
      ValueError: as `calibration.quantize_params_with_calibration`; or the NNX model has no place for the scales.
    """
    is_nnx = isinstance(abstract_quantized_params, nnx.Module)

    def quantize(context: calibration.CalibratedQuantContext) -> WithSqScale:
        if is_nnx:
            input_scale.check_place(context, SqInferenceProvider)
        stats = context.calibration_stats
        weights = jnp.max(jnp.abs(context.weight.astype(jnp.float32)), axis=0)
        scale = compute_scales_ratio(stats["act_absmax"], weights, stats["alpha"])
        array = input_scale.quantize_scaled(context.weight, scale, context.how)
        return input_scale.with_scale(context, WithSqScale, array, 1 / scale)

    def unit_stats(target: ptq.WithAux) -> dict[str, jax.Array] | None:
        """For weights that have a place for a scale: features that are always 0 are left as they are."""
        if not isinstance(target, WithSqScale):
            return None
        shape = target.inv_sq_scale.shape
        zeros = jnp.zeros(shape, jnp.float32)
        return {"count": jnp.ones(shape[:-1], jnp.int32), "sum_of_act_absmax": zeros, "sum_of_alpha": zeros}

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        sq_quant_stats,
        SqCalibrationProvider([]).get_stats_suffix(),
        quantize,
        allow_extra_params=allow_extra_params,
        default_stats=unit_stats,
    )


def smooth(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], *, variables: Any = None, n_grid: int = 0
) -> tuple[Any, dict[str, str]]:
    """Smooths a float model: the scales go into the norms and layers before the weights, and the outputs stay the same.

    A stage before another method, such as GPTQ. Weights that share an input share a scale.

    Args:
      model: NNX or Linen; it is left alone.
      batches: calibration inputs, read once: arrays, tuples of arguments, dictionaries of keyword arguments.
      rules: `SqRule`s, which say which weights, and their alpha.
      variables: Linen only.
      n_grid: number of alphas, evenly spaced from 0 to 1, of which each activation gets the one with the smallest
        error of the outputs of its layers, weights and activations quantized; the samples are those of the first
        batch. 0: that of the rule.

    Returns:
      The float model (in Linen its variables), and for each weight that was left as it was, by path, why its scale
      cannot be folded.

    >>> class Mlp(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.down(nnx.relu(self.up(x)))
    >>> model, x = Mlp(nnx.Rngs(0)), jnp.ones((2, 4))
    >>> smoothed, left = smooth(model, [x], [SqRule(weight_qtype="int8", act_qtype="int8")])
    >>> list(left), bool(jnp.allclose(smoothed(x), model(x), atol=1e-5))
    (['up/kernel'], True)
    """
    return scaling.smooth(_calibrated(model, batches, rules, variables, n_grid))


def quantize(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], *, variables: Any = None, n_grid: int = 0
) -> Any:
    """Quantizes a model with SmoothQuant.

    Scales are folded where the model lets them, as by `smooth`; other weights have activations take them at inference.

    Args:
      model, batches, rules, variables, n_grid: see `smooth`.

    Returns:
      The quantized model; in Linen a pair of it and its variables.
    """
    return scale_and_quantize(model, batches, rules, variables=variables, n_grid=n_grid).model


def scale_and_quantize(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], *, variables: Any = None, n_grid: int = 0
) -> scaling.Quantized:
    """`quantize`, with the smoothed float model that was quantized."""
    calibrated = _calibrated(model, batches, rules, variables, n_grid)
    return scaling.quantize(calibrated, lambda context, w, *_: qarray.quantize(w, context.how))


def _calibrated(
    model: Any, batches: Iterable[Any], rules: Sequence[Any], variables: Any, n_grid: int
) -> scaling.Calibrated:
    scale_of: Callable[[Sequence[scaling.Member]], jax.Array] = _scale_of_site
    if n_grid:
        batches = iter(batches)
        first = list(itertools.islice(batches, 1))
        batches = itertools.chain(first, batches)
        scale_of = _searching(model, first, rules, variables, n_grid)
    observer, provider = SqCalibrationProvider(rules), SqInferenceProvider(rules)
    return scaling.calibrate(model, batches, observer, provider, scale_of, variables=variables, by_stage=False)


def _scale_of_site(members: Sequence[scaling.Member], alpha: Any = None) -> jax.Array:
    """Equation 4 with the largest weight of each feature over all matrices; with several alphas, (alphas, features)."""
    weights = [m.to_site(_positive(jnp.max(jnp.abs(m.context.weight), 0))) for m in members]
    largest = jnp.stack(weights).max(0)
    stats = members[0].context.calibration_stats
    act = members[0].to_site(_positive(stats["act_absmax"]))
    # A feature that is always 0 has nothing to balance.
    empty = (act <= _TINY) | (largest <= _TINY)
    return jnp.where(empty, 1, compute_scales_ratio(act, largest, stats["alpha"][0] if alpha is None else alpha))


_TINY = 1e-20


def _positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x.astype(jnp.float32), _TINY)


# --- searching alpha


class _SampleProvider(SqCalibrationProvider):
    """Keeps some of the activations of one call, and which rule each weight is under."""

    def __init__(self, rules: Sequence[Any]):
        super().__init__(rules)
        self.rule_of: dict[str, SqRule] = {}

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        return {calibration.SAMPLES: lhs[:, :: max(lhs.shape[1] // _MAX_SAMPLES, 1)].astype(jnp.float32)}

    def _observe(self, rule: qconfig.QuantizationRule | None, op_id: str | None, find_uses: Any) -> None:
        self._rule = rule
        super()._observe(rule, op_id, find_uses)

    def _collect(self, features: Any, op_id: str) -> None:
        assert isinstance(self._rule, SqRule)
        self.rule_of[features.ref.path] = self._rule
        super()._collect(features, op_id)


# How many samples are enough to choose an alpha.
_MAX_SAMPLES = 128


def _searching(
    model: Any, first: Sequence[Any], rules: Sequence[Any], variables: Any, n_grid: int
) -> Callable[[Sequence[scaling.Member]], jax.Array]:
    """`_scale_of_site` with the alpha of the smallest error on samples of the first batch."""
    provider = _SampleProvider(rules)
    inputs, _, (found,) = scaling.observe(model, first, provider, variables, by_stage=False)
    weights = scaling.Weights(model, variables, inputs, SqInferenceProvider(rules))
    sampled = {
        path: [context.calibration_stats[calibration.SAMPLES] for context in weights.contexts(path, stats)]
        for path, stats in found.items()
    }
    layer: dict[folding.Path, int] = {}

    def scale_of(members: Sequence[scaling.Member]) -> jax.Array:
        candidates = _scale_of_site(members, jnp.linspace(0, 1, n_grid)[:, None])
        total = jnp.zeros(n_grid)
        for m in members:
            i = layer[m.path] = layer.get(m.path, -1) + 1
            act = _how_of_activations(provider.rule_of["/".join(map(str, m.path))], m.context.how)
            total += output_errors(m.context.weight, sampled[m.path][i], m.to_columns(candidates), m.context.how, act)
        return candidates[jnp.argmin(total)]

    return scale_of


def _how_of_activations(rule: SqRule, weight: qarray.HowToQuantize) -> qarray.HowToQuantize | None:
    """How activations (in, samples) are quantized: each sample by itself, or all alike if the scale is static."""
    if rule.act_qtype is None:
        return None
    return qarray.HowToQuantize(
        qtype=rule.act_qtype,
        channelwise_axes=() if rule.act_static_scale else (1,),
        tiled_axes={0: weight.tiled_axes[1]} if 1 in weight.tiled_axes else {},
        calibration_method=rule.act_calibration_method or "absmax",
    )


@functools.partial(jax.jit, static_argnames=("how", "act_how"))
def output_errors(
    w: jax.Array,
    x: jax.Array,
    scales: jax.Array,
    how: qarray.HowToQuantize,
    act_how: qarray.HowToQuantize | None,
) -> jax.Array:
    """||Q(W diag(s)) Q(diag(s)^-1 X) - W X||^2 for several choices of s, on some of the rows of a large W.

    Args:
      w: (out, in).
      x: (in, samples).
      scales: (choices, in).
      how, act_how: how the two are quantized; None: not at all.

    Returns:
      float32 (choices,).

    >>> how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(0,))
    >>> w, x = jnp.array([[1.0, 0.005]]), jnp.array([[1.0], [100.0]])
    >>> errors = output_errors(w, x, jnp.array([[1.0, 1.0], [1.0, 100.0]]), how, None)
    >>> bool(errors[1] < errors[0])
    True
    """
    w = awq_core.some_rows(w, awq_core.MAX_ROWS).astype(jnp.float32)
    exact = w @ x

    def error(s: jax.Array) -> jax.Array:
        inputs = x / s[:, None]
        if act_how is not None:
            inputs = awq_core.round_trip(inputs, act_how)
        return jnp.sum((awq_core.round_trip(w * s, how) @ inputs - exact) ** 2)

    return jax.lax.map(error, scales)
