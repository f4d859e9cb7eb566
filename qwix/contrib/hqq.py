r"""HQQ, half-quadratic quantization: scales and zero points without data (Badri and Shaji, 2023, mobiusml.github.io).

Rounding to nearest keeps the largest weights of a group exact, and pays with coarse steps for all the others. HQQ
chooses scale s and zero point z of each group so that a norm of the error becomes small; p < 1 forgives outliers,

    min over s, z of  sum |W - s (Q - z)|^p,    Q = round(W / s + z)               (eq. 2)

by half-quadratic splitting, with an auxiliary E for the sparse error (eq. 3), in alternation:

    E <- shrink(W - s (Q - z), beta),   shrink(x, beta) = sign(x) max(|x| - |x|^(p-1) / beta, 0)     (eq. 5)
    s <- <V, W - E> / <V, V>, V = Q - z;  or, with zero points, s and z by least squares of W - E on Q   (eq. 6)
    beta <- kappa beta

The solver of the original has one float zero point a group and leaves the scale alone. Here zero points are integers,
as a `QArray` has them, so the scale is solved for; and each group starts from several scales, keeps the best that it
has met, rounding to nearest among them, and so is never worse than that in its own objective.

The original has p = 0.7. With integer zero points that clips large weights so hard that at 4 bits the root mean square
error grows (docs/hqq.md has numbers), so the default is p = 2, where nothing is shrunk and the alternation is plain
least squares.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwix._src import model as model_lib
from qwix._src import qconfig
from qwix._src.core import numerics, qarray, tiling
from qwix._src.providers import ptq

# Shares of the range of rounding to nearest that a group starts from.
_STARTS = (1.0, 0.9, 0.8, 0.7)


@dataclasses.dataclass(frozen=True)
class Hqq:
    """How HQQ solves; what quantizes is `quantize`.

    Attributes:
      p: of the norm, 0 < p <= 2; 2 is least squares, the original has 0.7.
      beta: weight of the splitting's quadratic term at the start, in units of the group's scale.
      kappa: what it grows by in each iteration.
      iterations: how many, from each start.
    """

    p: float = 2.0
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.p <= 2:
            raise ValueError(f"p={self.p}: the norm is |x|^p with 0 < p <= 2")

    def quantize(self, array: jax.Array, how: qarray.HowToQuantize) -> qarray.QArray:
        """See `quantize_weight`."""
        name = how.qtype if isinstance(how.qtype, str) else ""
        if name.startswith(("mx", "nv")):
            raise ValueError(
                f"HQQ chooses scales freely, which {name} does not allow: use an integer format, nf4 or fp8"
            )
        qarray.get_scale_shape(array.shape, how)  # raises where a tile does not divide
        return _quantize(array, dataclasses.replace(how, noise_fn=None), self)


def quantize_weight(
    w: jax.Array, how: qarray.HowToQuantize, *, p: float = 2.0, beta: float = 10.0, kappa: float = 1.01
) -> qarray.QArray:
    """Quantizes a weight by HQQ.

    Args:
      w: a float array.
      how: format and granularity: any but the block formats (mxfp4, nvfp4, ...), whose scales are not free. With the
        calibration method "minmax" there are zero points; its range is where the search starts.
      p, beta, kappa: see `Hqq`.

    Returns:
      The QArray, as `qwix.quantize` would give it with other scales; dequantizes to the dtype of `w`.

    >>> w = jnp.array([[0.1, -0.2, 0.3, 0.25, -0.15, 0.05, 0.22, 2.0]])
    >>> how = qarray.HowToQuantize(qtype="int3", channelwise_axes=(0,))
    >>> error = lambda q: float(jnp.median(jnp.abs(w - qarray.dequantize(q))))
    >>> error(quantize_weight(w, how)) <= error(qarray.quantize(w, how))
    True
    """
    return Hqq(p, beta, kappa).quantize(w, how)


def objective(w: jax.Array, q: qarray.QArray, p: float = 2.0) -> jax.Array:
    """sum |W - s (Q - z)|^p of each group, in the shape of the scale."""
    error = jnp.abs(w.astype(jnp.float32) - qarray.dequantize(q).astype(jnp.float32)) ** p
    tiles = tiling.regroup(error, tiling.interleaved_shape(w.shape, q.scale.shape))
    return tiling.regroup(tiles.sum(range(1, tiles.ndim, 2)), q.scale.shape)


@jax.jit
def _shrink(x: jax.Array, beta: jax.Array, p: jax.Array) -> jax.Array:
    magnitude = jnp.maximum(jnp.abs(x), jnp.finfo(x.dtype).tiny)
    return jnp.sign(x) * jnp.maximum(magnitude - magnitude ** (p - 1) / beta, 0)


def _quantize(array: jax.Array, how: qarray.HowToQuantize, settings: Hqq) -> qarray.QArray:
    scale, zero_point = _solve(array, how, settings)
    return qarray.quantize_with_scale_zero_point(array, how.qtype, scale, zero_point)


def _solve(array: jax.Array, how: qarray.HowToQuantize, settings: Hqq) -> tuple[jax.Array, jax.Array | None]:
    return _solve_jit(array, how, settings)


def _solve_impl(array: jax.Array, how: qarray.HowToQuantize, settings: Hqq) -> tuple[jax.Array, jax.Array | None]:
    first_scale, first_zero = qarray.compute_scale_zero_point(qarray.calibrate(array, how), how.qtype)
    shape = first_scale.shape
    # A group is the odd axes of this layout; scales have size 1 there.
    w = tiling.regroup(array, tiling.interleaved_shape(array.shape, shape)).astype(jnp.float32)
    within = tuple(range(1, w.ndim, 2))
    spread = [n for size in shape for n in (size, 1)]
    asymmetric = first_zero is not None
    scale0 = first_scale.astype(jnp.float32).reshape(spread)
    zero0 = first_zero.astype(jnp.float32).reshape(spread) if first_zero is not None else jnp.zeros_like(scale0)
    bounds = numerics.get_asymmetric_bound(how.qtype) if asymmetric else (0.0, 0.0)

    def values(scale: jax.Array, zero: jax.Array) -> jax.Array:
        """Q, as numbers: what the stored elements stand for, before scale and zero point."""
        codes = numerics.encode(w / scale + zero, how.qtype)
        if jnp.issubdtype(codes.dtype, jnp.integer) and numerics.integer_range(how.qtype) is None:
            codes = numerics.narrow(codes, how.qtype)
        return numerics.convert_from(codes, how.qtype).astype(jnp.float32)

    def loss(scale: jax.Array, zero: jax.Array, q: jax.Array) -> jax.Array:
        return (jnp.abs(w - scale * (q - zero)) ** settings.p).sum(within, keepdims=True)

    def step(i: jax.Array, state: Any) -> Any:
        scale, zero, best = state
        stored = scale.astype(array.dtype).astype(jnp.float32)  # what is kept has to be as good in its own dtype
        q = values(stored, zero)
        found = loss(stored, zero, q)
        best = jax.tree.map(lambda new, old: jnp.where(found < best[0], new, old), (found, stored, zero), best)
        error = (w - scale * (q - zero)) / scale
        beta = settings.beta * settings.kappa**i
        target = w - scale * (_shrink(error, beta, settings.p) if settings.p < 2 else 0.0)
        if asymmetric:
            mean_q, mean_t = q.mean(within, keepdims=True), target.mean(within, keepdims=True)
            variance = ((q - mean_q) ** 2).sum(within, keepdims=True)
            slope = ((q - mean_q) * (target - mean_t)).sum(within, keepdims=True) / jnp.where(variance > 0, variance, 1)
            new = jnp.where((variance > 0) & (slope > 0), slope, scale)
            zero = jnp.clip(jnp.round(mean_q - mean_t / new), *bounds)
        else:
            norm = (q * q).sum(within, keepdims=True)
            slope = (q * target).sum(within, keepdims=True) / jnp.where(norm > 0, norm, 1)
            new = jnp.where((norm > 0) & (slope > 0), slope, scale)
        return new, zero, best

    best = (loss(scale0, zero0, values(scale0, zero0)), scale0, zero0)
    for share in _STARTS:
        state = (scale0 * share, zero0, best)
        best = lax.fori_loop(0, settings.iterations, step, state)[2]
    # A NaN in a group is in its scale, and stays there: no comparison with it is true.
    _, scale, zero = best
    zero_point = zero.reshape(first_zero.shape).astype(first_zero.dtype) if first_zero is not None else None
    return scale.reshape(shape).astype(array.dtype), zero_point


_solve_jit = jax.jit(_solve_impl, static_argnums=(1, 2))


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = None,
    *,
    allow_extra_params: bool = False,
    p: float = 2.0,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> Any:
    """`ptq.quantize_params` with HQQ; the tree is for `PtqProvider`, in Linen and in NNX.

    Args:
      params, abstract_quantized_params, quant_stats, allow_extra_params: see `ptq.quantize_params`.
      p, beta, kappa: see `Hqq`.
    """
    return ptq.quantize_params(
        params,
        abstract_quantized_params,
        quant_stats or {},
        allow_extra_params=allow_extra_params,
        _qarray_module=Hqq(p, beta, kappa),
    )


def quantize(
    model: nnx.Module, rules: Sequence[qconfig.QuantizationRule], *model_inputs: Any, p: float = 2.0, **kwargs: Any
) -> nnx.Module:
    """An NNX model with its weights quantized by HQQ.

    Args:
      model: a float model, maybe a rotated one; it is not changed.
      rules: as for `PtqProvider`.
      *model_inputs: what the model is called with; the values do not matter.
      p: see `Hqq`.
      **kwargs: keyword arguments of the model.

    >>> import qwix
    >>> layer, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((1, 64))
    >>> quantized = quantize(layer, [qwix.QuantizationRule(weight_qtype="int4", tile_size=32)], x)
    >>> quantized.kernel.array.scale.shape
    (2, 8)
    """
    quantized = model_lib.quantize_model(model, ptq.PtqProvider(rules), *model_inputs, **kwargs)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, quantize_params(params, quantized, p=p))
    return quantized
