"""Contractions whose gradients are quantized too: what dot_general, conv and ragged_dot have in common.

The forward of `out = op(lhs, rhs)` quantizes both operands, l = ql sl and r = qr sr. Of its two derivatives

    dlhs = op_l(g, r),      drhs = op_r(l, g)

each sums over axes that sr, or sl, varies along. Yet those are axes of the output, so the scale can go to the
cotangent, and the stored elements are used once more, without being quantized anew:

    dlhs = op_l(quantize(g sr), qr),      drhs = op_r(ql, quantize(g sl))

(the residual is *reused*). That needs a scale that lies on the output, so no tiles along contracting axes. Where a
residual is not reused, it is the float operand, quantized for the derivative's own axes if the config says so.
Quantization itself is differentiated straight through: d quantize(x) / dx = 1 where x lies in the calibrated range, 0
where it was clipped (Bengio et al., arXiv 1308.3432).

    >>> config = QtConfig(lhs_qtype="int8", rhs_qtype="int8")       # quantization-aware training: float gradients
    >>> op = contraction.DotGeneral((((1,), (0,)), ((), ())))
    >>> jax.grad(lambda x: contract(op, x, jnp.ones((2, 3)), config).sum())(jnp.ones((1, 2))).round(1)
    Array([[3., 3.]], dtype=float32)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from qwix._src import interception
from qwix._src.core import calibration as core_calibration
from qwix._src.core import contraction, numerics, operands, qarray, sparsity
from qwix._src.core.contraction import Contraction
from qwix._src.core.qarray import HowToQuantize, QArray
from qwix._src.core.stochastic_rounding import NoiseFn

Calibration = Mapping[str, jax.Array]
CollectFn = Callable[[Any], Any]

_T = TypeVar("_T", bound=type)


def pytree_config(cls: _T) -> _T:
    """Registers a config as a pytree: the keys of its noise functions are its children, all else is static."""
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(self: Any) -> tuple[tuple[Any, ...], Any]:
        values = [getattr(self, name) for name in names]
        children = tuple(value if isinstance(value, NoiseFn) else None for value in values)
        static = tuple(None if isinstance(value, NoiseFn) else value for value in values)
        return children, static

    def unflatten(static: Any, children: Any) -> Any:
        config: Any = object.__new__(cls)
        for name, value, child in zip(names, static, children, strict=True):
            object.__setattr__(config, name, value if child is None else child)
        return config

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    cls.tree_flatten = flatten  # type: ignore[attr-defined]
    return cls


@pytree_config
@dataclasses.dataclass(frozen=True, kw_only=True)
class QtConfig:
    """How to quantize a contraction, and its two derivatives.

    Attributes:
      lhs_qtype, rhs_qtype: formats of the operands; None leaves one in float.
      tile_size: of the last contracting axis of both; a float f means 1 / (number of tiles).
      lhs_calibration_method, rhs_calibration_method: see `HowToQuantize`.
      lhs_collect_quant_stat, rhs_collect_quant_stat: calibration -> the one to use, such as an average over calls.
      lhs_disable_channelwise_axes, rhs_disable_channelwise_axes: one scale for all (or for all of a tile).
      dlhs_grad_qtype, drhs_grad_qtype: format of the cotangent in the derivative for lhs, or rhs; None: float.
      dlhs_grad_calibration_method, drhs_grad_calibration_method: of the cotangent.
      dlhs_tile_size, drhs_tile_size: of the last axis that the derivative contracts.
      dlhs_stochastic_rounding_noise_fn, drhs_stochastic_rounding_noise_fn: noise of the cotangent before rounding.
      dlhs_grad_disable_channelwise_axes, drhs_grad_disable_channelwise_axes: one scale for all of the cotangent.
      disable_gradient_clipping: pass gradients on also where the input was clipped.
      use_original_residuals: derivatives take the float operands instead of the quantized ones.
      dlhs_residual_qtype, drhs_residual_qtype: format of the other operand in the derivative for lhs, or rhs, where
        the one of the forward is not reused; None: float.
      dlhs_residual_calibration_method, drhs_residual_calibration_method: likewise.
      dlhs_residual_disable_channelwise_axes, drhs_residual_disable_channelwise_axes: likewise.
      sparsity_rule: a `core.sparsity.SparsityRule`: lhs is pruned as an activation and rhs as a weight, before they
        are quantized, and what was pruned gets no gradient.
    """

    lhs_qtype: Any = None
    rhs_qtype: Any = None
    tile_size: int | float | None = None
    lhs_calibration_method: str = "absmax"
    rhs_calibration_method: str = "absmax"
    lhs_collect_quant_stat: CollectFn | None = None
    rhs_collect_quant_stat: CollectFn | None = None
    lhs_disable_channelwise_axes: bool = False
    rhs_disable_channelwise_axes: bool = False
    dlhs_grad_qtype: Any = None
    dlhs_grad_calibration_method: str = "absmax"
    dlhs_tile_size: int | float | None = None
    dlhs_stochastic_rounding_noise_fn: numerics.NoiseFn | None = None
    dlhs_grad_disable_channelwise_axes: bool = False
    drhs_grad_qtype: Any = None
    drhs_grad_calibration_method: str = "absmax"
    drhs_tile_size: int | float | None = None
    drhs_stochastic_rounding_noise_fn: numerics.NoiseFn | None = None
    drhs_grad_disable_channelwise_axes: bool = False
    disable_gradient_clipping: bool = False
    use_original_residuals: bool = False
    dlhs_residual_qtype: Any = None
    dlhs_residual_calibration_method: str = "absmax"
    dlhs_residual_disable_channelwise_axes: bool = False
    drhs_residual_qtype: Any = None
    drhs_residual_calibration_method: str = "absmax"
    drhs_residual_disable_channelwise_axes: bool = False
    sparsity_rule: Any = None

    def of(self, role: str, field: str) -> Any:
        """The field of a role: `of("dlhs_grad", "qtype")` is `dlhs_grad_qtype`."""
        return getattr(self, f"{role}_{field}")


def full_config(config: Any) -> QtConfig:
    """A config of fewer fields as one of all, the rest at their defaults."""
    if isinstance(config, QtConfig):
        return config
    return QtConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


class Residuals(NamedTuple):
    """What the backward needs of the forward.

    Attributes:
      lhs, rhs: the operands as the derivatives take them: QArrays where the forward's are reused, else float.
      lhs_inside, rhs_inside: where the input was neither pruned nor outside of a range that clips; None: everywhere.
      extra: group sizes, if any.
      config: of the contraction.
    """

    lhs: operands.MaybeQArray
    rhs: operands.MaybeQArray
    lhs_inside: jax.Array | None
    rhs_inside: jax.Array | None
    extra: tuple[jax.Array, ...]
    config: QtConfig


@interception.disable_interceptions
def contract(op: Contraction, lhs: jax.Array, rhs: jax.Array, config: QtConfig, *extra: jax.Array) -> jax.Array:
    """Runs a contraction on quantized operands, with gradients as the config says.

    Args:
      op: the contraction.
      lhs, rhs: float arrays; others, such as of integers, are taken as they are.
      config: how to quantize.
      *extra: group sizes, for a ragged dot.
    """
    calibrations = collect(op, lhs, rhs, config)
    config = dataclasses.replace(config, lhs_collect_quant_stat=None, rhs_collect_quant_stat=None)
    return _contract(op, lhs, rhs, extra, *calibrations, config)


@interception.disable_interceptions
def contract_calibrated(
    op: Contraction,
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_calibration: Calibration | None,
    rhs_calibration: Calibration | None,
    config: QtConfig,
    *extra: jax.Array,
) -> jax.Array:
    """`contract` with given calibrations (None: found from the operands)."""
    return _contract(op, lhs, rhs, extra, lhs_calibration, rhs_calibration, config)


def collect(op: Contraction, lhs: jax.Array, rhs: jax.Array, config: QtConfig) -> tuple[Any, Any]:
    """The calibrations that the config's functions give for those of lhs and rhs; None where it has none."""
    found: list[Any] = []
    for role, array in (("lhs", lhs), ("rhs", rhs)):
        collect_fn = config.of(role, "collect_quant_stat")
        if collect_fn is None or config.of(role, "qtype") is None:
            found.append(None)
            continue
        how = operand_how(op, role, (lhs.ndim, rhs.ndim), config)
        found.append(collect_fn(qarray.calibrate(jax.lax.stop_gradient(array), how)))
    return found[0], found[1]


def operand_how(op: Contraction, role: str, ndims: tuple[int, int], config: QtConfig) -> HowToQuantize:
    """How the forward quantizes its operand `role`, "lhs" or "rhs"."""
    how = op.how(
        role == "lhs",
        ndims,
        config.tile_size,
        qtype=config.of(role, "qtype"),
        calibration_method=config.of(role, "calibration_method"),
    )
    return dataclasses.replace(how, channelwise_axes=()) if config.of(role, "disable_channelwise_axes") else how


def forward(
    op: Contraction,
    lhs: jax.Array,
    rhs: jax.Array,
    extra: tuple[jax.Array, ...],
    lhs_calibration: Calibration | None,
    rhs_calibration: Calibration | None,
    config: QtConfig,
) -> tuple[jax.Array, Residuals]:
    """The output, and what `backward` needs. A calibration of None is found from the operand itself."""
    ndims = (lhs.ndim, rhs.ndim)
    quantized: list[operands.MaybeQArray] = []
    residuals: list[operands.MaybeQArray] = []
    inside: list[jax.Array | None] = []
    for role, array, calibration in (("lhs", lhs, lhs_calibration), ("rhs", rhs, rhs_calibration)):
        kept = _kept(array, role, config.sparsity_rule)
        if kept is not None:
            array = sparsity.apply_sparsity(array, kept)
        if config.of(role, "qtype") is None or not numerics.should_quantize(array.dtype):
            quantized.append(array)
            residuals.append(array)
            inside.append(kept)
            continue
        how = operand_how(op, role, ndims, config)
        if calibration is None:
            q = qarray.quantize(array, how)
        else:
            scale, zero_point = qarray.compute_scale_zero_point(calibration, how.qtype)
            q = qarray.quantize_with_scale_zero_point(array, how.qtype, scale.astype(array.dtype), zero_point)
        quantized.append(q)
        # A tiled scale lies on axes that the derivatives sum over, or not, so that the float operand serves them.
        residuals.append(array if how.tiled_axes or config.use_original_residuals else q)
        unclipped = None if config.disable_gradient_clipping else _inside(array, how, calibration)
        inside.append(unclipped if kept is None else kept if unclipped is None else kept & unclipped)
    out = op.run(*quantized, *extra)  # type: ignore[arg-type]
    return out, Residuals(residuals[0], residuals[1], inside[0], inside[1], extra, config)


def _kept(array: jax.Array, role: str, rule: sparsity.SparsityRule | None) -> jax.Array | None:
    """Which elements sparsity keeps, of lhs as an activation or rhs as a weight; None: all."""
    kind = "activation" if role == "lhs" else "weight"
    if rule is None or not rule.prunes(kind):
        return None
    steps = (rule.weight_sparsity_start_step, rule.weight_sparsity_update_step, rule.weight_prune_end_step)
    if kind == "weight" and steps != (0, 1, 0):
        raise ValueError(
            "An op finds the mask of its weight anew in each call, so it knows no steps: leave out "
            "weight_sparsity_start_step, weight_sparsity_update_step and weight_prune_end_step, or use SparsityModule "
            "of qwix.contrib.sparsity.sparsity_module."
        )
    return rule.mask(kind, array)


def _inside(array: jax.Array, how: HowToQuantize, calibration: Calibration | None) -> jax.Array | None:
    """Where an array lies in its range, as bools; None if the range holds all of it."""
    name, args = core_calibration.parse_calibration_method(how.calibration_method)
    if calibration is None:
        if name in ("absmax", "minmax") and (not args or args[0] >= 1):
            return None
        calibration = qarray.calibrate(array, how)
    # A given range holds what it was averaged over, not every later input: compared whatever the method says.
    method = how.calibration_method if name in ("rms", "fixed") else f"{name},0.5"
    everywhere = jnp.ones(array.shape, bool)
    return qarray.clip_gradient_to_calibration(everywhere, array, calibration, method)


def backward(op: Contraction, residuals: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cotangents of lhs and rhs."""
    lhs, rhs, extra = residuals.lhs, residuals.rhs, residuals.extra
    results = []
    for role, own, other, inside in (
        ("dlhs", lhs, rhs, residuals.lhs_inside),
        ("drhs", rhs, lhs, residuals.rhs_inside),
    ):
        for_lhs = role == "dlhs"
        derivative = contraction.transpose(op, for_lhs, lhs, rhs, *extra)
        cotangent, residual = _without_scale(op, not for_lhs, g, other, residuals)
        prepare = functools.partial(
            _prepare, derivative.contraction, derivative.g_is_lhs, residuals.config, role, isinstance(other, QArray)
        )
        result = derivative.run(cotangent, residual, extra, prepare).astype(own.dtype)
        if inside is not None:
            result = jnp.where(inside, result, jnp.zeros_like(result))
        results.append(result)
    return results[0], results[1]


def _without_scale(
    op: Contraction, is_lhs: bool, g: jax.Array, other: operands.MaybeQArray, residuals: Residuals
) -> tuple[jax.Array, operands.MaybeQArray]:
    """The cotangent and the other operand for a derivative, the operand's scale moved to the cotangent if it can be."""
    if not isinstance(other, QArray):
        return g, other
    quantizes = residuals.config.of("drhs" if is_lhs else "dlhs", "grad_qtype") is not None
    if not quantizes or other.zero_point is not None or not numerics.can_dequant_on_output(other.qtype):
        return g, qarray.dequantize(other)
    shapes = (residuals.lhs.shape, residuals.rhs.shape)
    scale = op.scale_on_output(other.scale, is_lhs, *shapes, *residuals.extra)
    dtype = core_calibration.compute_dtype(g.dtype)
    g = operands.multiply(g.astype(dtype), scale.astype(dtype))
    return g, other.replace(scale=jnp.ones((1,) * other.ndim, other.dtype))


def _prepare(
    op: Contraction,
    g_is_lhs: bool,
    config: QtConfig,
    role: str,
    reuses_residual: bool,
    operand: Any,
    is_g: bool,
    ndims: tuple[int, int],
) -> Any:
    """Quantizes an operand of a derivative, `role` "dlhs" or "drhs", if it is to be and was not in the forward."""
    part = f"{role}_grad" if is_g else f"{role}_residual"
    qtype = config.of(part, "qtype")
    if qtype is None or (reuses_residual and not is_g) or not numerics.should_quantize(operand.dtype):
        return operand
    how = op.how(
        is_g == g_is_lhs,
        ndims,
        config.of(role, "tile_size"),
        qtype=qtype,
        calibration_method=config.of(part, "calibration_method"),
        noise_fn=config.of(role, "stochastic_rounding_noise_fn") if is_g else None,
    )
    if config.of(part, "disable_channelwise_axes"):
        how = dataclasses.replace(how, channelwise_axes=())
    return qarray.quantize(operand, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_derivatives(op: Contraction, lhs, rhs, extra, lhs_calibration, rhs_calibration, config):
    return forward(op, lhs, rhs, extra, lhs_calibration, rhs_calibration, config)[0]


@interception.disable_interceptions
def _forward(op: Contraction, *args: Any) -> tuple[jax.Array, Residuals]:
    return forward(op, *args)


# The backward is traced when the caller's gradient is, which may be inside of a model that is intercepted.
@interception.disable_interceptions
def _backward(op: Contraction, residuals: Residuals, g: jax.Array) -> tuple[Any, ...]:
    return (*backward(op, residuals, g), None, None, None, None)


_with_derivatives.defvjp(_forward, _backward)


# One trace for all layers of equal shapes, of the op and of its derivatives alike.
@functools.partial(jax.jit, static_argnums=0)
def _contract(op: Contraction, lhs, rhs, extra, lhs_calibration, rhs_calibration, config) -> jax.Array:
    return _with_derivatives(op, lhs, rhs, extra, lhs_calibration, rhs_calibration, config)
