"""Quantized training: QAT, and training with quantized gradients.

Weights stay float parameters, and are quantized anew in each forward. `core/qt.py` says what the ops compute, forward
and backward; this provider says which op is computed how.

    rule = QtRule(weight_qtype="int8", act_qtype="int8")                         # QAT: gradients in float
    rule = QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")       # gradients in int8 as well

Ranges of activations are computed in each call, or, with `act_static_scale`, averaged over calls in the collection
`quant_stats` (Linen) or in `QuantStat` variables (NNX), from which `qwix.quantize_params` makes the static scales of a
PTQ model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import averaging, provenance, qconfig
from qwix._src.core import conv_general_qt, dot_general_qt, numerics, qt, ragged_dot_qt, stochastic_rounding
from qwix._src.core import einsum as core_einsum
from qwix._src.core.contraction import ragged_dot_general_of
from qwix._src.utils import flax_util

_average = averaging.SimpleMovingAverage()


@dataclasses.dataclass(frozen=True, kw_only=True)
class QtRule(qconfig.QuantizationRule):
    """A `QuantizationRule` that says how gradients are quantized as well.

    Attributes:
      bwd_qtype: number format of gradients in both derivatives of an op; None: they stay float (QAT).
      bwd_calibration_method: how the range of gradients is found, see `qwix.quantize`.
      bwd_weight_grad_tile_size: size of the tiles of the last axis that the gradient of a weight sums over (of the
        tokens or examples) that have a scale of their own; a float f means 1/tiles.
      disable_channelwise_axes: one scale for each operand and gradient, instead of one a channel.
      bwd_stochastic_rounding: 'uniform' or 'low_bit_uniform': round gradients up or down at random, right on average.
        Needs an rng stream 'stochastic_rounding'.
      channelwise_noise_axes: axes of the gradient along which each index has noise of its own.
      additional_qt_config: overrides fields of the op's config, such as `core.dot_general_qt.DotGeneralQtConfig`.

    >>> QtRule(weight_qtype='int8', bwd_qtype='int8', bwd_weight_grad_tile_size=128).bwd_calibration_method
    'absmax'
    """

    bwd_qtype: jax.typing.DTypeLike | None = None
    bwd_calibration_method: str = "absmax"
    bwd_weight_grad_tile_size: int | float | None = None
    disable_channelwise_axes: bool = False
    bwd_stochastic_rounding: str | None = None
    channelwise_noise_axes: Collection[int] = (0,)
    additional_qt_config: Mapping[str, Any] | None = None


class _Operand(NamedTuple):
    """What an operand of an op is: the parameter at `path`, or an activation named `name`."""

    array: Any
    path: str
    name: str


class QtProvider(qconfig.QuantizationProvider):
    """Quantized training: runs ops on operands quantized from float parameters, with gradients for them.

    Rules are `QtRule`s; a plain `QuantizationRule` is one that leaves gradients float.

    >>> import jax.numpy as jnp, qwix
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> rule = qwix.QtRule(weight_qtype=jnp.int8, act_qtype=jnp.int8, bwd_qtype=jnp.int8)
    >>> model = qwix.quantize_model(model, QtProvider([rule]), jnp.ones((2, 8)))
    >>> grads = nnx.grad(lambda model, x: model(x).sum())(model, jnp.ones((2, 8)))
    >>> grads.kernel.shape
    (8, 4)
    """

    def _init_rule(self, rule: qconfig.QuantizationRule) -> qconfig.QuantizationRule:
        if not isinstance(rule, QtRule):
            fields = dataclasses.fields(qconfig.QuantizationRule)
            rule = QtRule(**{field.name: getattr(rule, field.name) for field in fields})
        if rule.bwd_stochastic_rounding is not None and rule.bwd_qtype is None:
            raise ValueError(
                "bwd_stochastic_rounding rounds quantized gradients, and there are none: set bwd_qtype, or drop it "
                f"from {rule}"
            )
        return super()._init_rule(rule)

    # --- ops ----------------------------------------------------------------------------------------

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
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        kwargs: dict[str, Any] = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if rule is None:
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, **kwargs)
        config = self._create_dot_general_qt_config(rule, op_id, lhs, rhs)
        return dot_general_qt.dot_general_qt(lhs, rhs, dimension_numbers, config, **kwargs)

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
        """`jax.numpy.einsum`, run as the dot_generals of its pairs of operands, quantized as the rule says.

        Of three or more operands, the results of pairs stay float.
        """
        einsum_str, operands = core_einsum.split_args(einsum_str, *operands)
        kwargs |= {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if len(operands) == 1:  # no contraction of two arrays: a layout change, a diagonal or a sum
            return provenance.follow_views(lambda x: jnp.einsum(einsum_str, x, **kwargs), *operands)
        rule, op_id = self._get_current_rule_and_op_id("einsum")
        operands = tuple(map(provenance.unwrapped, operands))
        if rule is None:
            if _dot_general is not jax.lax.dot_general:
                kwargs["_dot_general"] = _dot_general
            return jnp.einsum(einsum_str, *operands, **kwargs)
        described = self._describe(op_id, operands, rule)

        def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, **options: Any) -> jax.Array:
            pair = _find_operands(described, lhs, rhs)
            config = self._config(dot_general_qt.DotGeneralQtConfig, rule, pair)
            return dot_general_qt.dot_general_qt(lhs, rhs, dimension_numbers, config, **options)

        return core_einsum.einsum(einsum_str, *operands, _qwix_dot_general=dot_general, **kwargs)

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
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        arguments: dict[str, Any] = {
            "window_strides": window_strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": dimension_numbers,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if rule is None:
            return jax.lax.conv_general_dilated(lhs, rhs, **arguments)
        config = self._create_conv_general_qt_config(rule, op_id, lhs, rhs)
        return conv_general_qt.conv_general_qt(lhs, rhs, config, **arguments)

    def ragged_dot(
        self,
        lhs: Any,
        rhs: Any,
        group_sizes: jax.Array,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        group_offset: jax.Array | None = None,
    ) -> jax.Array:
        """`jax.lax.ragged_dot`, quantized as the rule says."""
        rule, op_id = self._get_current_rule_and_op_id("ragged_dot")
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        arguments = (precision, preferred_element_type, group_offset)
        if rule is None:
            return jax.lax.ragged_dot(lhs, rhs, group_sizes, *arguments)
        config = self._create_ragged_dot_qt_config(rule, op_id, lhs, rhs)
        return ragged_dot_qt.ragged_dot_qt(lhs, rhs, group_sizes, config, *arguments)

    def ragged_dot_general(
        self,
        lhs: Any,
        rhs: Any,
        group_sizes: jax.Array,
        ragged_dot_dimension_numbers: jax.lax.RaggedDotDimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        group_offset: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`jax.lax.ragged_dot_general`, quantized as the rule for ragged_dot_general says."""
        rule, op_id = self._get_current_rule_and_op_id("ragged_dot_general")
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        if rule is None:
            arguments = (ragged_dot_dimension_numbers, precision, preferred_element_type, group_offset)
            return jax.lax.ragged_dot_general(lhs, rhs, group_sizes, *arguments, **kwargs)
        given = [name for name, value in {"group_offset": group_offset, **kwargs}.items() if value is not None]
        if given:
            raise NotImplementedError(
                f"ragged_dot_general with {', '.join(given)} is not quantized: use jax.lax.ragged_dot, or give the "
                "op no rule"
            )
        config = self._create_ragged_dot_qt_config(rule, op_id, lhs, rhs)
        op = ragged_dot_general_of(
            ragged_dot_dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
        )
        return qt.contract(op, lhs, rhs, qt.full_config(config), group_sizes)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        return super().get_intercept_map() | {
            "jax.lax.conv_general_dilated": self.conv_general_dilated,
            "jax.lax.dot_general": self.dot_general,
            "jax.lax.ragged_dot": self.ragged_dot,
            "jax.lax.ragged_dot_general": self.ragged_dot_general,
            "jax.numpy.einsum": self.einsum,
        }

    # --- configs ------------------------------------------------------------------------------------

    def _create_dot_general_qt_config(
        self, rule: qconfig.QuantizationRule, op_id: str | None, lhs: Any, rhs: Any
    ) -> dot_general_qt.DotGeneralQtConfig:
        return self._config(dot_general_qt.DotGeneralQtConfig, rule, self._describe(op_id, (lhs, rhs), rule))

    def _create_conv_general_qt_config(
        self, rule: qconfig.QuantizationRule, op_id: str | None, lhs: Any, rhs: Any
    ) -> conv_general_qt.ConvGeneralQtConfig:
        if rule.tile_size is not None:
            raise ValueError(
                f"{self._relative_module_path() or 'the root module'}, {op_id}: tile_size is not supported for a "
                "convolution: leave it out of its rule"
            )
        return self._config(conv_general_qt.ConvGeneralQtConfig, rule, self._describe(op_id, (lhs, rhs), rule))

    def _create_ragged_dot_qt_config(
        self, rule: qconfig.QuantizationRule, op_id: str | None, lhs: Any, rhs: Any
    ) -> ragged_dot_qt.RaggedDotQtConfig:
        return self._config(ragged_dot_qt.RaggedDotQtConfig, rule, self._describe(op_id, (lhs, rhs), rule))

    def _describe(
        self, op_id: str | None, operands: Sequence[Any], rule: qconfig.QuantizationRule
    ) -> list[_Operand | None]:
        """What each operand of an op is, and records it."""
        assert op_id is not None
        described: list[_Operand | None] = []
        for i, array in enumerate(operands):
            ref = flax_util.find_ref(array)
            path = "" if ref is None else (ref.path if isinstance(ref, provenance.ParamRef) else ref.parts[0].path)
            name = f"{op_id}_{('lhs', 'rhs')[i] if i < 2 else f'operand{i}'}"
            described.append(_Operand(array, path, name))
        self._record(
            op_id,
            shapes=tuple(tuple(x.array.shape) for x in described if x is not None),
            formats=tuple(_format(x, rule) for x in described if x is not None),
            params=tuple(x.path for x in described if x is not None),
        )
        if rule.weight_qtype is not None and not any(x.path for x in described if x is not None):
            self._warn_of_no_weight(op_id, operands)
        return described

    def _config(self, config_type: Any, rule: qconfig.QuantizationRule, operands: Sequence[_Operand | None]) -> Any:
        """The config of an op of two operands; None is the result of another op, which stays float."""
        assert isinstance(rule, QtRule)
        names = {field.name for field in dataclasses.fields(config_type)}
        fields: dict[str, Any] = {"lhs_qtype": None, "rhs_qtype": None}
        for role, operand in zip(("lhs", "rhs"), operands, strict=True):
            qtype = _qtype(operand, rule)
            if operand is None or qtype is None:
                continue
            fields[f"{role}_qtype"] = qtype
            if operand.path:
                fields[f"{role}_calibration_method"] = rule.weight_calibration_method
                continue
            fields[f"{role}_calibration_method"] = rule.act_calibration_method
            if rule.act_static_scale:
                fields[f"{role}_collect_quant_stat"] = functools.partial(
                    self._update_and_get_quant_stat, operand.name, tuple(rule.act_batch_axes)
                )
        if "tile_size" in names:
            fields["tile_size"] = rule.tile_size
        for role, operand in zip(("dlhs", "drhs"), operands, strict=True):
            fields[f"{role}_grad_qtype"] = rule.bwd_qtype
            fields[f"{role}_grad_calibration_method"] = rule.bwd_calibration_method
            if rule.bwd_weight_grad_tile_size and operand is not None and operand.path and f"{role}_tile_size" in names:
                fields[f"{role}_tile_size"] = rule.bwd_weight_grad_tile_size
        if rule.disable_channelwise_axes:
            fields |= {f"{part}_disable_channelwise_axes": True for part in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
        if rule.bwd_stochastic_rounding is not None:
            for role, key in zip(("dlhs", "drhs"), jax.random.split(_noise_key()), strict=True):
                fields[f"{role}_stochastic_rounding_noise_fn"] = stochastic_rounding.get_noise_fn(
                    rule.bwd_stochastic_rounding, key, tuple(rule.channelwise_noise_axes)
                )
        fields |= rule.additional_qt_config or {}
        sparsity_rule = fields.get("sparsity_rule")
        if sparsity_rule is not None and sparsity_rule.prunes("weight") and not (operands[1] and operands[1].path):
            path = self._relative_module_path() or "the root module"
            raise ValueError(
                f"{path}: sparsity_rule prunes the second operand of an op as its weight, and there it is none: limit "
                "the rule to other ops with module_path and op_names"
            )
        unknown = sorted(set(fields) - names)
        if unknown:
            raise ValueError(
                f"additional_qt_config has {', '.join(unknown)}, which {config_type.__name__} does not: take it out, "
                "or limit the rule to other ops with op_names"
            )
        return config_type(**fields)

    def _update_and_get_quant_stat(
        self, name: str, batch_axes: tuple[int, ...], calibration: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Averages a calibration, shared over the batch axes, into the current module's statistic `name`."""
        rank = next(iter(calibration.values())).ndim
        axes = tuple(axis for axis in batch_axes if -rank <= axis < rank)
        calibration = {key: value.mean(axes, keepdims=True) for key, value in calibration.items()}
        variable: Any = flax_util.get_or_create_variable("quant_stats", name, lambda: _average.init(calibration))
        is_nnx = isinstance(variable, nnx.Variable)
        stat = variable.get_value() if is_nnx else variable.value
        if flax_util.should_update_quant_stats():
            stat = _average.update(stat, calibration)
            if is_nnx:
                variable.set_value(stat)
            else:
                variable.value = stat
        # In float32, as in a PTQ model, whatever the activation's dtype.
        default = {key: value.astype(jnp.float32) for key, value in calibration.items()}
        return _average.get_calibration(stat, default)


def _qtype(operand: _Operand | None, rule: qconfig.QuantizationRule) -> Any:
    if operand is None or not numerics.should_quantize(operand.array.dtype):
        return None
    return rule.weight_qtype if operand.path else rule.act_qtype


def _format(operand: _Operand, rule: qconfig.QuantizationRule) -> str:
    qtype = _qtype(operand, rule)
    qtype = numerics.canonical_qtype(operand.array.dtype if qtype is None else qtype)
    return qtype if isinstance(qtype, str) else qtype.name


def _find_operands(described: Sequence[_Operand | None], lhs: Any, rhs: Any) -> list[_Operand | None]:
    """Which operands of an einsum a pair to contract is.

    Two operands are contracted in their order. Of more, operands are known by identity, and the results of pairs, or
    what the einsum changed first (a sum over an axis of its own, a diagonal), are none.
    """
    if len(described) == 2:
        return list(described)
    by_id = {id(x.array): x for x in described if x is not None}
    return [by_id.get(id(lhs)), by_id.get(id(rhs))]


def _noise_key() -> jax.Array:
    book = provenance.book()
    if book is not None and book.initializing:
        return jax.random.key(0)  # no gradient is taken of an initialization
    module = flax_util.get_current_module()
    if isinstance(module, nnx.Module) and getattr(module, "qwix_rngs", None) is None:
        path = "/".join(map(str, flax_util.module_path(module))) or "the root module"
        raise ValueError(
            f"{path}: bwd_stochastic_rounding needs a random key: give the quantized model a stream with "
            "model.set_attributes(qwix_rngs=nnx.Rngs(stochastic_rounding=0)), once"
        )
    return flax_util.make_rng("stochastic_rounding")
