"""Providers whose weights stand quantized in the parameter tree, and their ops.

When such a provider meets a float weight in an op (while a Linen model is initialized, or in the first run of an NNX
model), it puts the quantized weight where the float one stood, with the box of the original around each leaf. From then
on the module hands out a `WithAux`, which goes through casts and layout changes to the op like the array did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes

from qwix._src import interception, provenance, qconfig
from qwix._src.core import conv_general, dot_general, einsum, einsum_info, numerics, qarray
from qwix._src.core import dot as core_dot
from qwix._src.core import operands as core_operands
from qwix._src.providers.quantized_param import create_quantized_param, quantize_param
from qwix._src.providers.with_aux import ArrayTypeVar, WithAux
from qwix._src.utils import flax_util

__all__ = ["ArrayTypeVar", "BoxedParamProvider", "WithAux", "create_quantized_param", "quantize_act"]


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


def _seen_by_operand(einsum_str: str, ndims: Sequence[int], index: int) -> tuple[str, tuple[int, int]]:
    """An einsum of two operands of which the first has the role that operand `index` has in one of many; and ranks."""
    labels, out = einsum_info.parse_subscripts(einsum_str, tuple(ndims))
    rest = "".join(dict.fromkeys("".join(labels[:index] + labels[index + 1 :])))
    return f"{labels[index]},{rest}->{out}", (len(labels[index]), len(rest))


# --- the provider ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ToQuantize:
    """A float operand that is quantized within the op's own jit, with scales computed there."""

    array: jax.Array
    how: qarray.HowToQuantize


@interception.disable_interceptions
def run_op(
    op: Callable[..., Any],
    operands: Sequence[Any],
    qarray_module: Any = qarray,
    *,
    keep_quantized: bool = False,
    **kwargs: Any,
) -> jax.Array:
    """Runs an op on quantized operands, those that are `_ToQuantize` quantized first.

    The whole is jitted, so that ops that are equal but for the values of their operands are traced once for a model.
    With `keep_quantized` a backward pass dequantizes anew, instead of keeping the forward's float copy until then; it
    has no forward-mode derivative.
    """
    hows = tuple(x.how if isinstance(x, _ToQuantize) else None for x in operands)
    arrays = [x.array if isinstance(x, _ToQuantize) else x for x in operands]
    static = tuple((name, _hashable(value)) for name, value in kwargs.items())
    return _jitted_op(_Call(op, qarray_module, hows, static, keep_quantized), *arrays)


@dataclasses.dataclass(frozen=True)
class _Call:
    op: Callable[..., Any]
    qarray_module: Any
    hows: tuple[qarray.HowToQuantize | None, ...]
    kwargs: tuple[tuple[str, Any], ...]
    keep_quantized: bool


@dataclasses.dataclass(frozen=True)
class _EinsumOf:  # a partial that is equal to another of the same einsum
    einsum: Callable[..., Any]
    subscripts: str

    def __call__(self, *operands: Any, **kwargs: Any) -> jax.Array:
        return self.einsum(self.subscripts, *operands, **kwargs)


def _run(call: _Call, *arrays: Any) -> jax.Array:
    def run(*arrays: Any) -> jax.Array:
        quantize = call.qarray_module.quantize
        if core_operands.own_ops(*arrays) is not None and getattr(call.qarray_module, "QUANTIZES_ALIKE", False):
            quantize = functools.partial(qarray.UnquantizedQArray, module=call.qarray_module)
        operands = [
            array if how is None else quantize(array, how) for array, how in zip(arrays, call.hows, strict=True)
        ]
        return call.op(*operands, **dict(call.kwargs))

    return _dequantizing_anew(run)(*arrays) if call.keep_quantized else run(*arrays)


def _dequantizing_anew(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of QArrays whose derivative dequantizes them anew."""
    function = jax.custom_vjp(run)

    def backward(arrays: Any, gradient: jax.Array) -> Any:
        # `jax.checkpoint` says the same with an optimization barrier, which XLA of jax 0.10 takes out on the CPU before
        # it merges equal computations, so that all layers' float weights would be there at once. A scale that depends
        # on the gradient makes the computations differ. (0 * x is not simplified: x may be NaN.)
        zero = 0 * jnp.max(gradient)

        def tied(x: Any) -> Any:
            return x.replace(scale=x.scale + zero.astype(x.scale.dtype)) if isinstance(x, qarray.QArray) else x

        _, pullback = jax.vjp(run, *map(tied, arrays))
        return pullback(gradient)

    function.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return function


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

    # How ops on quantized operands run, see `run_op`.
    _run_op = staticmethod(run_op)

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
          get_how: (index of the operand, tile_size=, qtype=, calibration_method=) -> HowToQuantize.
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
                    tile_size=rule.tile_size,
                    qtype=rule.weight_qtype,
                    calibration_method=rule.weight_calibration_method,
                )
                make = self._weight_maker(rule, op_id)
                return quantize_param(ref, operand, how, self._qarray_module, make).array, path
        if rule.act_qtype is None:
            return operand, ""
        with _named("/".join(map(str, flax_util.get_current_module_path())), op_id):
            how = get_how(
                index,
                tile_size=rule.tile_size,
                qtype=rule.act_qtype,
                calibration_method=rule.act_calibration_method,
            )
            if not rule.act_static_scale:
                self._qarray_module.get_scale_shape(operand.shape, how)  # raises where a tile does not divide
                return _ToQuantize(operand, how), ""
            name = f"{op_id}_{('lhs', 'rhs')[index] if index < 2 else f'operand{index}'}"
            own = getattr(self._qarray_module, "quantize_act", None)
            own = own or functools.partial(quantize_act, _qarray_module=self._qarray_module)
            act = own(operand, how, rule, name)
        return act, ""

    def _operands_of_dot_general(self, lhs: Any, rhs: Any, dimension_numbers: Any) -> list[Any] | None:
        """What `_quantize_operands` makes of those of a `dot_general`, which is counted."""
        rule, op_id = self._get_current_rule_and_op_id("dot_general")

        def get_how(index: int, **kwargs) -> qarray.HowToQuantize:
            return dot_general.get_how_to_quantize(
                dimension_numbers=dimension_numbers,
                ndims=(lhs.ndim, rhs.ndim),
                for_lhs=index == 0,
                **kwargs,
            )

        return self._quantize_operands([lhs, rhs], get_how, rule, op_id)

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
        operands = self._operands_of_dot_general(lhs, rhs, dimension_numbers)
        kwargs: dict[str, Any] = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if operands is None:
            lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, **kwargs)
        return self._run_op(
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
        einsum_str, operands = einsum.split_args(einsum_str, *operands)
        kwargs |= {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if len(operands) == 1:  # no contraction of two arrays: a layout change, a diagonal or a sum
            return self._einsum_of_one(einsum_str, operands[0], kwargs)
        rule, op_id = self._get_current_rule_and_op_id("einsum")

        def get_how(index: int, **kwargs) -> qarray.HowToQuantize:
            binary, ndims = _seen_by_operand(einsum_str, [x.ndim for x in operands], index)
            return einsum.get_how_to_quantize(
                einsum_str=binary,
                ndims=ndims,
                for_lhs=True,
                **kwargs,
            )

        quantized = self._quantize_operands(operands, get_how, rule, op_id)
        if quantized is None:
            if _dot_general is not jax.lax.dot_general:
                kwargs["_dot_general"] = _dot_general
            return jnp.einsum(einsum_str, *map(provenance.unwrapped, operands), **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return self._run_op(_EinsumOf(self._einsum_fn, einsum_str), quantized, self._qarray_module, **kwargs)

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

        def get_how(index: int, tile_size: int | float | None, **kwargs) -> qarray.HowToQuantize:
            if tile_size:
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
        return self._run_op(self._conv_general_dilated_fn, operands, self._qarray_module, **kwargs)

    def nn_param(self, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        """`flax.linen.Module.param` that knows quantized parameters, and remembers what it hands out."""
        if module.has_variable("params", name):
            stored: Any = module.get_variable("params", name)
            unboxed = flax_util.unbox(stored)
            if isinstance(unboxed, WithAux):
                flax_util.track_linen_param(module, name, unboxed)
                return unboxed if kwargs.get("unbox", True) else stored
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
