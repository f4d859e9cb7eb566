"""GPTQ of a model (arXiv 2210.17323): second moments of each weight's inputs, then one weight after the other.

    provider = GptqCalibrationProvider([GptqRule(weight_qtype="int4", tile_size=128)])
    observed = qwix.quantize_model(model, provider, x)
    for batch in batches:
        observed(batch)                                     # <weight>_gptq: mean of X X^T
    quantized = qwix.quantize_model(model, qwix.PtqProvider(rules), x)
    nnx.update(quantized, quantize_params(params, quantized, stats))

The quantized model is that of `PtqProvider`: GPTQ chooses other codes and scales, and costs nothing at inference. What
it minimizes, and how, is in `gptq_core`. A weight of several matrices has a Hessian for each: along batch axes, in the
feature groups of a convolution, and for the experts of a ragged_dot. One that several ops share has the mean of theirs.

All statistics above are those of the float model. In one call, each weight with the inputs that the quantized earlier
ones give it (`sequential`), which is more accurate and no slower:

    quantized = quantize(model, batches, rules).model
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from qwix._src import qconfig
from qwix._src.providers import ptq
from qwix.contrib import calibration, gptq_core
from qwix.contrib import sequential as sequential_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqRule(qconfig.QuantizationRule):
    """A rule whose weights are quantized with GPTQ."""


class GptqCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects X X^T of the inputs X of each weight under a `GptqRule`.

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
    >>> provider = GptqCalibrationProvider([GptqRule(weight_qtype="int4")])
    >>> observed = qwix.quantize_model(model, provider, jnp.ones((1, 2)))
    >>> _ = observed(jnp.array([[1.0, -4.0], [3.0, 0.0]]))
    >>> observed.kernel_gptq.get_value()["sum_of_hessian"].tolist()
    [[10.0, -4.0], [-4.0, 16.0]]
    """

    per_group = True

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return GptqRule

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        return {"hessian": gptq_core.compute_hessian(lhs)}

    def get_stats_suffix(self) -> str:
        return "_gptq"


def quantize(
    model: nn.Module | nnx.Module,
    batches: Iterable[Any],
    rules: Sequence[qconfig.QuantizationRule],
    *,
    variables: Mapping[str, Any] | None = None,
    method: str = "__call__",
    sequential: bool = True,
    progress: Callable[[int, int], None] = lambda done, stages: None,
    **options: Any,
) -> sequential_lib.Result:
    """Quantizes a model with GPTQ, for `PtqProvider`.

    Args:
      model, batches, variables, method, sequential, progress: see `sequential.quantize`.
      rules: `GptqRule`s; weights of other rules are rounded to nearest.
      **options: of `gptq_core.quantize_weight`, such as `act_order`.

    Raises:
      ValueError: as `sequential.quantize`.

    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> quantize(model, [jnp.eye(4)], [GptqRule(weight_qtype="int4")]).model.kernel.array.qvalue.dtype
    dtype(int4)
    """
    return sequential_lib.quantize(
        model,
        batches,
        GptqCalibrationProvider(rules),
        lambda context: quantize_with_context(context, **options),
        ptq.PtqProvider(rules),
        variables=variables,
        method=method,
        sequential=sequential,
        progress=progress,
    )


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    gptq_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
    gptq_block_size: int = 128,
    gptq_damping_factor: float = 0.01,
    **options: Any,
) -> Any:
    """Quantizes a float parameter tree with GPTQ, for `PtqProvider`.

    Args:
      params: pure nested dict of float arrays, see `ptq.quantize_params`.
      abstract_quantized_params: the abstract parameters in Linen, the quantized model in NNX.
      gptq_quant_stats: pure nested dict of what `GptqCalibrationProvider` collected. A weight without statistics is
        rounded to nearest.
      allow_extra_params: see `ptq.quantize_params`.
      gptq_block_size, gptq_damping_factor: `blocksize` and `percdamp` of `gptq_core.quantize_weight`.
      **options: its other options, such as `act_order`.

    Returns:
      The tree with `WithAux`s; in NNX, the nested dict that `nnx.update(model, ...)` takes.

    Raises:
      ValueError: as `calibration.quantize_params_with_calibration`.
    """

    def quantize(context: calibration.CalibratedQuantContext) -> ptq.WithAux:
        return quantize_with_context(context, blocksize=gptq_block_size, percdamp=gptq_damping_factor, **options)

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        gptq_quant_stats,
        GptqCalibrationProvider([]).get_stats_suffix(),
        quantize,
        allow_extra_params=allow_extra_params,
    )


def quantize_with_context(context: calibration.CalibratedQuantContext, **options: Any) -> ptq.WithAux:
    """One weight by `gptq_core.quantize_weight`, as it stands in the tree."""
    hessian = context.calibration_stats["hessian"]
    name = "/".join(map(str, context.path))
    array, _ = gptq_core.quantize_weight(context.weight, hessian, context.how, name=name, **options)
    return ptq.WithAux(context.restore_shape(array), context.abs_w.how)
