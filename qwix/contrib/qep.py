"""QEP of a model (arXiv 2504.09629): each weight makes up for the errors of those before it, then GPTQ quantizes it.

    result = quantize(model, batches, [QepRule(weight_qtype="int4", tile_size=128)])
    result.model(x)                                                   # NNX
    result.model.apply({"params": result.params}, x)                  # Linen

Stage by stage, as in `sequential`: every batch runs in the float model and in the one so far quantized. Where they
differ, `qep_core.weight_correct` changes the next weights so that their outputs come close to the float ones again
(section 4 of the paper). That is one float and one quantized pass for each batch, however many stages there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import qconfig
from qwix._src.providers import ptq
from qwix.contrib import calibration, gptq, qep_core, segments, sequential

_SUFFIX = "_qep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QepRule(gptq.GptqRule):
    """A rule whose weights are quantized with QEP.

    Attributes:
      correction_factor: share of the correction; the paper's alpha.
      damping_factor: of the Hessian in the correction, see `qep_core.weight_correct`.
      apply_correction: False: GPTQ without a correction.
    """

    correction_factor: float = 0.5
    damping_factor: float = 0.01
    apply_correction: bool = True


@dataclasses.dataclass(frozen=True)
class QepStage:
    """Weights that are quantized together: what their inputs depend on was quantized before.

    Attributes:
      index: of the stage, from 0.
      param_paths: of its weights; of layers that a scan runs over, with an index at the end.
      module_paths: of the modules that hold them, '/'-joined.
    """

    index: int
    param_paths: tuple[tuple[str | int, ...], ...]
    module_paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class QepResult:
    """What `quantize` made.

    Attributes:
      model: the quantized model; in Linen, the module, to be called with `params`.
      params: the quantized parameters, as `ptq.quantize_params` returns them.
      quant_stats: `<weight>_qep` of each weight: {count, sum_of_hessian, sum_of_hessian_delta}.
      stages: in the order in which they were quantized.
    """

    model: Any
    params: Any
    quant_stats: Any
    stages: tuple[QepStage, ...]


class _Provider(calibration.SinglePassCalibrationProvider):
    """Finds the weights under a `QepRule`, and remembers which."""

    per_group = True

    def __init__(self, rules: Sequence[qconfig.QuantizationRule]):
        super().__init__(rules)
        self.rule_of: dict[tuple[str, ...], QepRule] = {}

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return QepRule

    def get_stats_suffix(self) -> str:
        return _SUFFIX

    def _observe(self, rule: qconfig.QuantizationRule | None, op_id: str | None, find_uses: Callable[[], Any]) -> None:
        def remembered() -> Any:
            for use in find_uses():
                self.rule_of.setdefault(tuple(map(str, use.ref.keys)), rule)  # type: ignore[arg-type]
                yield use

        super()._observe(rule, op_id, remembered)


def quantize(
    model: nn.Module | nnx.Module,
    calibration_data: Iterable[Any],
    rules: Sequence[qconfig.QuantizationRule],
    *,
    variables: Mapping[str, Any] | None = None,
    batch_adapter: Callable[[Any], Any] | None = None,
    methods: Collection[str] = ("__call__",),
    abstract_quantized: Any = None,
    allow_extra_params: bool = False,
    gptq_block_size: int = 128,
    gptq_damping_factor: float = 0.01,
    **options: Any,
) -> QepResult:
    """Quantizes a model with QEP, for `PtqProvider`.

    Args:
      model: float NNX model, or Linen module with `variables`. It is left alone.
      calibration_data: batches of inputs: arrays, tuples (positional) or dicts (keywords). Read once.
      rules: `QepRule`s; weights of other rules are rounded to nearest.
      variables: of a Linen module, with 'params'.
      batch_adapter: makes such inputs of a batch of `calibration_data`.
      methods: the one method that is called and quantized.
      abstract_quantized: what says how parameters are quantized, see `ptq.quantize_params`; found out if None.
      allow_extra_params: see `ptq.quantize_params`.
      gptq_block_size, gptq_damping_factor: `blocksize` and `percdamp` of `gptq_core.quantize_weight`.
      **options: its other options, such as `act_order`. With `keep_zeros`, the correction leaves zeros alone as well.

    Raises:
      ValueError: as `sequential.quantize`.

    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> result = quantize(model, [jnp.eye(4)], [QepRule(weight_qtype="int4")])
    >>> result.stages[0].param_paths, result.model.kernel.array.qvalue.dtype
    ((('kernel',),), dtype(int4))
    """
    if isinstance(methods, str):
        methods = (methods,)
    if len(methods) != 1:
        raise ValueError(f"QEP runs one method, got {tuple(methods)}")
    provider = _Provider(rules)

    def quantize_weight(context: calibration.CalibratedQuantContext) -> ptq.WithAux:
        rule = provider.rule_of[tuple(map(str, context.path))]
        return _quantize_with_context(
            context,
            rule.correction_factor,
            rule.damping_factor,
            rule.apply_correction,
            blocksize=gptq_block_size,
            percdamp=gptq_damping_factor,
            **options,
        )

    result = sequential.quantize(
        model,
        calibration_data if batch_adapter is None else map(batch_adapter, calibration_data),
        provider,
        quantize_weight,
        ptq.PtqProvider(rules),
        variables=variables,
        method=next(iter(methods)),
        pair_stats=qep_core.compute_qep_stats,
        keep_stats=True,
        abstract_quantized=abstract_quantized,
        allow_extra_params=allow_extra_params,
    )
    stages = tuple(
        QepStage(i, paths, tuple(dict.fromkeys("/".join(segments.stem(path)[:-1]) for path in paths)))
        for i, paths in enumerate(result.stages)
    )
    return QepResult(result.model, result.params, result.quant_stats, stages)


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    qep_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
    gptq_block_size: int = 128,
    gptq_damping_factor: float = 0.01,
    correction_factor: float = 0.5,
    damping_factor: float = 0.01,
    apply_correction: bool = True,
    **options: Any,
) -> Any:
    """Quantizes a float parameter tree with QEP, given statistics such as `QepResult.quant_stats`.

    Args:
      params, abstract_quantized_params, allow_extra_params, gptq_block_size, gptq_damping_factor: see
        `gptq.quantize_params`.
      qep_quant_stats: pure nested dict with `<weight>_qep`. A weight without statistics is rounded to nearest.
      correction_factor, damping_factor, apply_correction: see `QepRule`; of all weights.
      **options: other options of `gptq_core.quantize_weight`.

    Raises:
      ValueError: as `calibration.quantize_params_with_calibration`.
    """

    def quantize_weight(context: calibration.CalibratedQuantContext) -> ptq.WithAux:
        return _quantize_with_context(
            context,
            correction_factor,
            damping_factor,
            apply_correction,
            blocksize=gptq_block_size,
            percdamp=gptq_damping_factor,
            **options,
        )

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        qep_quant_stats,
        _SUFFIX,
        quantize_weight,
        allow_extra_params=allow_extra_params,
    )


def _quantize_with_context(
    context: calibration.CalibratedQuantContext,
    correction_factor: float,
    damping_factor: float,
    apply_correction: bool,
    **options: Any,
) -> ptq.WithAux:
    if apply_correction:
        stats = context.calibration_stats
        weight: jax.Array = qep_core.weight_correct(
            context.weight,
            stats["hessian"],
            stats["hessian_delta"],
            correction_factor=correction_factor,
            damping_factor=damping_factor,
        )
        if options.get("keep_zeros"):
            weight = jnp.where(context.weight == 0, 0, weight)
        context = dataclasses.replace(context, weight=weight)
    return gptq.quantize_with_context(context, **options)
