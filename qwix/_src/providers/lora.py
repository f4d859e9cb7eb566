"""LoRA and QLoRA: a trainable low-rank update beside each frozen weight, which may be quantized.

The output of an op of a weight W that a rule matched becomes

    op(x, W) + scaling · op(dropout(x), A) B,       scaling = alpha / rank, or alpha / √rank (rsLoRA),

with A and B of rank `rank` (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732) and W in float or, with `weight_qtype`,
in any of the number formats (QLoRA, arXiv 2305.14314), where it stays also while gradients are computed. With
`use_dora` the result is rescaled, for each output feature, to a trained norm (DoRA, arXiv 2402.09353, equation 5):

    (op(x, W) + scaling · op(x, A) B) · m / ‖W + scaling · A B‖.

>>> import jax.numpy as jnp, qwix
>>> from flax import nnx
>>> model = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
>>> provider = LoraProvider(rank=2, alpha=4.0, weight_qtype='nf4', tile_size=32)
>>> model = apply_lora_to_model(model, provider, jnp.ones((1, 64)), rngs=nnx.Rngs(1))
>>> model.kernel_lora_a.shape, model.kernel_lora_b.shape, model.kernel.array.qvalue.dtype
((64, 2), (2, 4), dtype(uint4))
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import interception, provenance, qconfig
from qwix._src.core import einsum as core_einsum
from qwix._src.core import low_rank, numerics, qarray
from qwix._src.model import quantize_model
from qwix._src.providers import adapters, boxed_param, ptq
from qwix._src.providers.adapters import AdaptedWeight, Adapter
from qwix._src.providers.with_aux import WithAux
from qwix._src.utils import flax_util

__all__ = ["LoraProvider", "LoraRule", "apply_lora_to_model"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraRule(qconfig.QuantizationRule):
    """Which weights get an adapter, and what kind of.

    Attributes:
      rank: of A and B.
      alpha: the update is multiplied by alpha / rank.
      dropout: rate at which elements of the input of the update are zeroed, in training.
      lora_a_initializer: (key, shape, dtype) -> A; `out_sharding` is passed as well where the weight's mesh has
        explicit axes.
      lora_b_initializer: likewise for B; zeros leave the model as it was.
      use_rslora: multiply by alpha / √rank instead (arXiv 2312.03732, theorem 3.2).
      use_dora: train the norm of each output feature's weights apart (arXiv 2402.09353).
      init_lora_weights: None: from the initializers. 'pissa': A and B are the principal part of the weight, and the
        base keeps the rest (arXiv 2404.02948). 'loftq' or 'loftq,<steps>': A and B approximate what the
        quantization lost, in alternating steps (arXiv 2310.08659, algorithm 1; 5 by default). In Linen, as DoRA, with
        `init_lora_params`.

    >>> LoraRule(module_path='.*attn.*', rank=8, alpha=16.0, weight_qtype='nf4', tile_size=64).rank
    8
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    lora_a_initializer: Callable[..., Any] = jax.nn.initializers.he_uniform()  # noqa: RUF009
    lora_b_initializer: Callable[..., Any] = jax.nn.initializers.zeros
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str | None = None

    @property
    def scaling(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoraProvider(boxed_param.BoxedParamProvider):
    """Adds low-rank adapters to weights; quantizes weights and activations as well, where a rule says so.

    It adapts the weights of dot_general (and dot, matmul, `@`), einsum and convolutions, and of `jax.numpy.take`
    (embeddings) where 'take' is among a rule's `op_names`. A rule that is a plain `QuantizationRule` only quantizes.

    Args:
      rules: `LoraRule`s and `QuantizationRule`s, the first match wins.
      disable_jit: see `QuantizationProvider`.
      **kwargs: the fields of one `LoraRule`, instead of `rules`.

    Raises:
      ValueError: both rules and fields of one are given, or a rule contradicts itself.
    """

    # An adapter's parameters are created when the model has been traced, see `adapters.Addition`.
    rngs_in_modules = False
    # Only adapters are trained, so that the base is not needed in float but for a moment.
    _run_op = staticmethod(functools.partial(boxed_param.run_op, keep_quantized=True))

    def __init__(
        self,
        rules: Sequence[qconfig.QuantizationRule] | None = None,
        *,
        disable_jit: bool = False,
        **kwargs: Any,
    ):
        if rules is not None and kwargs:
            raise ValueError(f"give rules, or the fields of one rule, not both: got rules and {sorted(kwargs)}")
        super().__init__([LoraRule(**kwargs)] if rules is None else rules, disable_jit=disable_jit)
        # keys of the parameters that are looked up in
        self._looked_up: set[tuple[str | int, ...]] = set()
        # keys of a Linen parameter -> what its adapters mean, for the model that ran last
        self.linen_weights: dict[tuple[str | int, ...], AdaptedWeight] = {}
        # likewise, the rules that they are of
        self.linen_rules: dict[tuple[str | int, ...], LoraRule] = {}
        # whether a Linen model is initialized for `init_lora_params`, which makes adapters from its weights
        self.starts_from_weights = False
        self._adapts_take = any("take" in rule.op_names for rule in self._rules)

    def _init_rule(self, rule: qconfig.QuantizationRule) -> qconfig.QuantizationRule:
        if isinstance(rule, LoraRule):
            if not isinstance(rule.rank, int) or rule.rank < 1:
                raise ValueError(f"the rank of an adapter is a positive integer, not {rule.rank!r}: {rule}")
            if not 0 <= rule.dropout < 1:
                raise ValueError(f"dropout={rule.dropout!r} is not in [0, 1): {rule}")
            if rule.init_lora_weights is not None:
                name, _ = adapters.parse_init(rule.init_lora_weights)
                if name == "loftq" and rule.weight_qtype is None:
                    raise ValueError(f"init_lora_weights='loftq' needs a weight_qtype to make good for: {rule}")
        return super()._init_rule(rule)

    # --- ops ---

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: jax.lax.DotDimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.dot_general`, with the update of its weight."""
        found = self._find_weight("dot_general", (lhs, rhs))
        out = super().dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
        if found is None:
            return out
        shapes = (tuple(lhs.shape), tuple(rhs.shape))
        factors, labels = low_rank.of_dot_general(dimension_numbers, shapes, found.index)
        options = {"precision": precision, "out_sharding": out_sharding}
        return self._adapt(found, factors, out, [(rhs, lhs)[found.index]], _Contraction(labels, _hashable(options)))

    def einsum(self, einsum_str: str, *operands: Any, **kwargs: Any) -> jax.Array:
        """`jax.numpy.einsum`, with the update of its weight."""
        einsum_str, operands = core_einsum.split_args(einsum_str, *operands)
        found = self._find_weight("einsum", operands) if len(operands) > 1 else None
        out = super().einsum(einsum_str, *operands, **kwargs)
        if found is None:
            return out
        try:
            factors, labels = low_rank.of_einsum(einsum_str, [tuple(x.shape) for x in operands], found.index)
        except NotImplementedError as e:
            return self._leave(found, out, str(e))
        options = {name: kwargs.get(name) for name in ("precision", "out_sharding")}
        others = [x for i, x in enumerate(operands) if i != found.index]
        return self._adapt(found, factors, out, others, _Contraction(labels, _hashable(options)))

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
        """`jax.lax.conv_general_dilated`, with the update of its kernel."""
        found = self._find_weight("conv_general_dilated", (lhs, rhs))
        arguments: dict[str, Any] = {
            "window_strides": window_strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
            "precision": precision,
        }
        out = super().conv_general_dilated(
            lhs,
            rhs,
            dimension_numbers=dimension_numbers,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            **arguments,
        )
        if found is None:
            return out
        if found.index == 0 or found.rule.rank % (feature_group_count * batch_group_count):
            groups = f"rank={found.rule.rank} is no multiple of its {feature_group_count * batch_group_count} groups"
            return self._leave(found, out, "the weight is its input" if found.index == 0 else groups)
        dims = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        factors = low_rank.of_conv(dims, tuple(rhs.shape))
        is_grouped = feature_group_count * batch_group_count > 1
        reason = "it is a kernel of several feature groups, and B mixes the groups" if is_grouped else ""
        return self._adapt(found, factors, out, [lhs], _Convolution(dims, _hashable(arguments)), reason)

    def _take(self, a: Any, indices: Any, axis: int | None = None, **kwargs: Any) -> jax.Array:
        """`jax.numpy.take`, with the update of the table."""
        ref = flax_util.find_ref(a) if hasattr(a, "dtype") else None
        if isinstance(ref, provenance.ParamRef):
            self._looked_up.add(ref.keys)
        found = self._find_weight("take", (a,)) if self._adapts_take and axis is not None else None
        out = super()._take(a, indices, axis, **kwargs)
        if found is None:
            return out
        assert axis is not None
        self._get_current_rule_and_op_id("take")  # counts it
        axis %= a.ndim
        return self._adapt(
            found, low_rank.of_take(tuple(a.shape), axis), out, [indices], _Lookup(axis, _hashable(kwargs))
        )

    # --- the weight of an op, and its adapters ---

    def _find_weight(self, op_name: str, operands: Sequence[Any]) -> _Found | None:
        """The last of the operands that is a weight, where the rule wants an adapter for it."""
        rule, _ = self._get_current_rule_and_op_id(op_name, only_rule=True)
        if not isinstance(rule, LoraRule) or (op_name == "take" and "take" not in rule.op_names):
            return None
        for index in reversed(range(len(operands))):
            operand = operands[index]
            is_quantized = isinstance(operand, WithAux) and isinstance(operand.array, qarray.QArray)
            if not is_quantized and not numerics.should_quantize(getattr(operand, "dtype", jnp.int32)):
                continue
            ref = flax_util.find_ref(operand)
            if ref is not None:
                return _Found(op_name, index, operand, ref, rule)
        return None

    def _leave(self, found: _Found, out: Any, why: str) -> Any:
        """Says, when a model is made, that a weight has no adapter."""
        book = provenance.book()
        if book is not None and book.initializing:
            path = found.ref.path if isinstance(found.ref, provenance.ParamRef) else found.ref.parts[0].path
            warnings.warn(
                f"{path} gets no adapter for this {found.op_name}, though a LoraRule matches: {why}. "
                "Use another rule or rank for it, or put a plain QuantizationRule for it first.",
                qconfig.QuantizationWarning,
                stacklevel=2,
            )
        return out

    def _adapt(
        self,
        found: _Found,
        factors: low_rank.Factors,
        out: jax.Array,
        others: Sequence[Any],
        op: _Contraction | _Convolution | _Lookup,
        not_mergeable: str = "",
    ) -> jax.Array:
        """The output of an op with what the active adapters add to it; creates the adapter if there is none."""
        ref = found.ref
        if isinstance(ref, provenance.ConcatRef):
            return self._leave(found, out, "the op's weight is several parameters joined")
        if any(view.kind == "index" for view in ref.views):
            return self._leave(found, out, "the op's weight is a part of the parameter")
        found = dataclasses.replace(found, ref=_outside_of_map(ref))
        if any(view.kind == "map" for view in found.ref.views):
            return self._leave(found, out, "jax.vmap takes an axis of the parameter away; use nnx.vmap")
        if found.op_name != "take" and ref.keys in self._looked_up:
            not_mergeable = f"it is a table as well, whose lookups have no adapter, beside the {found.op_name}"
        weight = AdaptedWeight(
            found.op_name,
            factors,
            found.ref.views,
            tuple(found.ref.value.shape),
            (found.rule_adapter,),
            not_mergeable=not_mergeable,
        )
        parts = self._linen_parts(found, weight) if ref.module is not None else self._nnx_parts(found, weight)
        others = [provenance.unwrapped(x) for x in others]
        for adapter, share, values in parts:
            key = _dropout_key(found, adapter)
            out = _add_update(
                _Update(op, factors, adapter, share, jnp.dtype(found.operand.dtype)),
                out,
                [_float(x) for x in others],
                _float(found.operand) if adapter.use_dora else None,
                values,
                key,
            )
        return out

    def _linen_parts(self, found: _Found, weight: AdaptedWeight) -> list[tuple[Adapter, float, dict[str, Any]]]:
        """A and B of a weight of a Linen module, which are created while it is initialized."""
        module, adapter, rule = found.ref.module, found.rule_adapter, found.rule
        needs_weights = rule.use_dora or rule.init_lora_weights is not None
        if needs_weights and module.is_initializing() and not self.starts_from_weights:
            raise ValueError(
                f"{found.ref.path}: use_dora and init_lora_weights start from the trained weights, which a Linen model "
                "has not when it is initialized: call qwix.init_lora_params(model, params, key, ...) instead of init"
            )
        root, _ = self._running_model()
        self.linen_weights[found.ref.keys[len(root) :]] = weight
        self.linen_rules[found.ref.keys[len(root) :]] = rule
        axes = adapters.part_axes(weight)
        initializers: dict[str, Callable[..., Any]] = {"a": rule.lora_a_initializer, "b": rule.lora_b_initializer}
        shapes = dict(zip("ab", weight.factors.shapes(adapter.rank), strict=True))
        if rule.use_dora:  # a magnitude from the weights takes its place
            initializers["m"], shapes["m"] = jax.nn.initializers.ones, adapters.magnitude_shape(weight.factors)
        values = {}
        for part, shape in shapes.items():

            def init(key: jax.Array, part: str = part, shape: tuple[int, ...] = shape) -> Any:
                stored = module.get_variable("params", found.ref.name)
                unboxed = flax_util.unbox(stored)
                boxed = stored.array.qvalue if isinstance(unboxed, WithAux) else stored
                sharding = adapters.explicit_sharding(boxed, axes[part], shape)
                value = initializers[part](key, shape, unboxed.dtype, **sharding)
                return adapters.boxed_like(boxed, value, axes[part])

            name = adapter.attribute(found.ref.name, part)
            values[part] = flax_util.linen_param(module, name, init)
        return [(adapter, 1.0, values)]

    def _nnx_parts(self, found: _Found, weight: AdaptedWeight) -> list[tuple[Adapter, float, dict[str, Any]]]:
        owner, name, _ = _running_owner(found.ref.keys)
        known: AdaptedWeight | None = getattr(owner, f"{name}_lora", None)
        book = provenance.book()
        assert book is not None
        if known is None:
            adapter = found.rule_adapter
            addition = adapters.Addition(weight, adapter, found.rule)
            previous = book.additions.setdefault(found.ref.keys, addition)
            if not previous.weight.same_use(weight):
                self._leave(found, None, f"it has one for a {previous.weight.op} that uses it in another way")
            return []
        if book.first_run_of is self:
            raise ValueError(
                f"{found.ref.path} has adapters already: add another one by name (qwix.add_adapter), or merge them "
                "first (qwix.merge_lora)"
            )
        if not known.same_use(weight):
            return []  # it was said when the model was made
        result = []
        for adapter_name, share in known.active:
            active = known.adapter(adapter_name)
            if active is not None:
                values = {p: flax_util.unbox(getattr(owner, active.attribute(name, p))) for p in active.parts}
                result.append((active, share, values))
        return result


def apply_lora_to_model(
    model: nn.Module | nnx.Module,
    provider: LoraProvider,
    *model_inputs: Any,
    methods: Collection[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> Any:
    """Returns a copy of a model with adapters; `quantize_model` with a `LoraProvider`.

    Args:
      model: a Linen or NNX module. One that a `PtqProvider` has quantized stays so (QLoRA from a quantized checkpoint):
        its weights are taken as they are stored, its activations quantized by its own rules, and those of `provider`
        say where adapters are.
      provider: says which weights get adapters.
      *model_inputs: NNX only: inputs of the method, as for `quantize_model`.
      methods: as for `quantize_model`.
      **model_inputs_kwargs: NNX only. `rngs=nnx.Rngs(...)` initializes A and B: the stream 'params', and for `dropout`
        the stream 'dropout'.

    Raises:
      ValueError: as `quantize_model`, and for a weight that has adapters already.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> lora = apply_lora_to_model(model, LoraProvider(rank=2, alpha=2.0), jnp.ones((1, 8)), rngs=nnx.Rngs(1))
    >>> [path[-1] for path, _ in nnx.to_flat_state(nnx.state(lora, nnx.LoRAParam))]
    ['kernel_lora_a', 'kernel_lora_b']
    """
    if isinstance(model, nnx.Module) and model_inputs_kwargs.get("rngs") is None:
        warnings.warn(
            "rngs should be given to initialize the adapters of an NNX model, as in apply_lora_to_model(model, "
            "provider, x, rngs=nnx.Rngs(0)). nnx.Rngs(0) is taken.",
            stacklevel=2,
        )
        model_inputs_kwargs["rngs"] = nnx.Rngs(0)
    model, provider = _taken_over(model, provider)
    adapted = quantize_model(model, provider, *model_inputs, methods=methods, **model_inputs_kwargs)
    if isinstance(adapted, nnx.Module) and not model_inputs_kwargs.get("skip_nnx_init"):
        if not any(True for _ in adapters.adapted_weights(adapted)):
            warnings.warn(
                f"no weight of {type(model).__name__} got an adapter: no op that is quantized by no other provider "
                f"matches a LoraRule of {provider._rules}",
                qconfig.QuantizationWarning,
                stacklevel=2,
            )
    return adapted


# --- a base that is quantized already -------------------------------------------------------------


def _taken_over(model: Any, provider: LoraProvider) -> tuple[Any, LoraProvider]:
    """A model without the `PtqProvider`s that it is under, and a provider that does what they do as well.

    They would handle the ops first and hide them. Models under any other provider are left as they are.
    """
    quantized = [cls for cls in type(model).__mro__ if "_qwix_records" in vars(cls)]
    providers = [list(vars(cls)["_qwix_records"])[-1] for cls in quantized]
    if not providers or any(type(p) is not ptq.PtqProvider for p in providers):
        return model, provider
    cls = next(cls for cls in type(model).__mro__ if "_qwix_records" not in vars(cls))
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.__class__ = cls
    else:
        fields = [f.name for f in dataclasses.fields(model) if f.init and f.name not in ("parent", "name")]
        model = cls(**{name: getattr(model, name) for name in fields}, name=model.name)
    # The innermost provider, which is the last class here, sees an op first.
    base_rules = [rule for p in reversed(providers) for rule in p._rules]
    both = copy.copy(provider)
    LoraProvider.__init__(both, _with_base_rules(provider._rules, base_rules), disable_jit=provider.disable_jit)
    return model, both


def _with_base_rules(
    rules: Sequence[qconfig.QuantizationRule], base_rules: Sequence[qconfig.QuantizationRule]
) -> list[qconfig.QuantizationRule]:
    """Rules of which the first match says what the first matches of both lists say: adapters, and quantization."""
    result: list[qconfig.QuantizationRule] = []
    for rule in rules:
        for base in base_rules:
            op_names: Collection[str] = rule.op_names or base.op_names
            if rule.op_names and base.op_names:
                op_names = [name for name in rule.op_names if name in base.op_names]
                if not op_names:
                    continue
            fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(qconfig.QuantizationRule)}
            path = rf"(?=(?:{rule.module_path})\Z)(?:{base.module_path})"
            result.append(dataclasses.replace(rule, **fields | {"module_path": path, "op_names": tuple(op_names)}))
        result.append(rule)
    return [*result, *base_rules]


# --- one weight of one op -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Found:
    """The weight of an op, and its rule."""

    op_name: str
    index: int
    operand: Any
    ref: Any
    rule: LoraRule

    @property
    def rule_adapter(self) -> Adapter:
        rule = self.rule
        return Adapter(adapters.DEFAULT, rule.rank, rule.scaling, rule.dropout, rule.use_dora)


def _running_owner(keys: tuple[str | int, ...]) -> tuple[Any, str, tuple[str | int, ...]]:
    """`adapters.owner_of` among the running modules: under `nnx.scan` these hold what is there for one step."""
    for module in flax_util.running_nnx_modules():
        path = getattr(module, "qwix_path", None)
        if path is not None and keys[: len(path)] == path:
            return adapters.owner_of(module, keys[len(path) :])
    raise ValueError(f"{'/'.join(map(str, keys))}: none of the running modules holds it")


def _outside_of_map(ref: provenance.ParamRef) -> provenance.ParamRef:
    """A ref without the axes that `nnx.vmap` takes away from a whole module, adapters included."""
    if ref.module is not None or not ref.views or ref.views[0].kind != "map":
        return ref
    shape, views = list(ref.value.shape), list(ref.views)
    while views and views[0].kind == "map":
        del shape[views.pop(0).arg[0]]
    module, name, _ = _running_owner(ref.keys)
    here = getattr(module, name, None)
    if here is None or tuple(here.shape) != tuple(shape):
        return ref  # the module is outside of the map
    return dataclasses.replace(ref, views=tuple(views), value=jax.ShapeDtypeStruct(tuple(shape), ref.value.dtype))


def _dropout_key(found: _Found, adapter: Adapter) -> jax.Array | None:
    """A key for the dropout of an adapter; None where there is none."""
    if not adapter.dropout or found.op_name == "take":
        return None
    if found.ref.module is not None:
        module: Any = flax_util.get_current_module()
        return None if module.is_initializing() else module.make_rng("dropout")
    owner, _, _ = _running_owner(found.ref.keys)
    if owner.deterministic:
        return None
    rngs = owner.qwix_rngs if owner.qwix_rngs is not None else owner.lora_rngs
    return rngs.dropout() if "dropout" in rngs else rngs()


# --- the update of an op's output -----------------------------------------------------------------


def _hashable(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    def as_tuple(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return tuple(map(as_tuple, value))
        return value

    return tuple((name, as_tuple(value)) for name, value in options.items())


def _float(operand: Any) -> Any:
    """An operand as an array or a QArray."""
    operand = provenance.unwrapped(operand)
    return operand.value.array if isinstance(operand, WithAux) else operand


@dataclasses.dataclass(frozen=True)
class _Contraction:
    labels: low_rank.Labels
    options: tuple[tuple[str, Any], ...]

    def update(self, factors: low_rank.Factors, others: list[jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
        return low_rank.update(self.labels, factors, others, a, b, **dict(self.options))

    def place(self, factors: low_rank.Factors, norms: jax.Array, out: jax.Array) -> jax.Array:
        del out
        return self.labels.place(factors, norms)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    dims: jax.lax.ConvDimensionNumbers
    arguments: tuple[tuple[str, Any], ...]

    def update(self, factors: low_rank.Factors, others: list[jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
        del factors
        return low_rank.update_of_conv(self.dims, others[0], a, b, **dict(self.arguments))

    def place(self, factors: low_rank.Factors, norms: jax.Array, out: jax.Array) -> jax.Array:
        del factors
        return norms.reshape([-1 if i == self.dims.out_spec[1] else 1 for i in range(out.ndim)])


@dataclasses.dataclass(frozen=True)
class _Lookup:
    axis: int
    options: tuple[tuple[str, Any], ...]

    def update(self, factors: low_rank.Factors, others: list[jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
        (indices,) = others
        rows = jnp.tensordot(jnp.take(a, indices, axis=0, **dict(self.options)), b, axes=1)
        return jnp.moveaxis(rows, range(jnp.ndim(indices), jnp.ndim(indices) + self.axis), range(self.axis))

    def place(self, factors: low_rank.Factors, norms: jax.Array, out: jax.Array) -> jax.Array:
        inserted = out.ndim - len(factors.shape) + 1
        return norms.reshape(*norms.shape[: self.axis], *[1] * inserted, *norms.shape[self.axis :])


@dataclasses.dataclass(frozen=True)
class _Update:
    op: _Contraction | _Convolution | _Lookup
    factors: low_rank.Factors
    adapter: Adapter
    share: float
    dtype: Any


@interception.disable_interceptions
def _add_update(
    update: _Update,
    out: jax.Array,
    others: list[Any],
    weight: Any,
    values: dict[str, jax.Array],
    key: jax.Array | None,
) -> jax.Array:
    """The output of an op with the update of one adapter; jitted, so that equal layers share a trace."""
    return _jitted_update(update, out, others, weight, values, key)


def _qwix_lora(
    update: _Update,
    out: jax.Array,
    others: list[Any],
    weight: Any,
    values: dict[str, jax.Array],
    key: jax.Array | None,
) -> jax.Array:
    adapter, factors = update.adapter, update.factors
    others = [qarray.dequantize(x) if isinstance(x, qarray.QArray) else x for x in others]
    if key is not None:
        keep = 1 - adapter.dropout
        mask = jax.random.bernoulli(key, keep, others[0].shape)
        others[0] = jnp.where(mask, others[0] / keep, jnp.zeros_like(others[0]))
    a, b = (values[part].astype(update.dtype) for part in "ab")
    added = update.op.update(factors, others, a, b)
    out = out + (update.share * adapter.scaling * added).astype(out.dtype)
    if adapter.use_dora:
        weight = qarray.dequantize(weight) if isinstance(weight, qarray.QArray) else weight
        # DoRA, section 4.3: the norm is a constant of the backward pass.
        arrays = jax.lax.stop_gradient((weight, values["a"], values["b"]))
        norms = low_rank.column_norms(factors, *arrays, adapter.scaling)
        ratio = values["m"].astype(norms.dtype).reshape(norms.shape) / norms
        out = out * update.op.place(factors, ratio, out).astype(out.dtype)
    return out


_jitted_update = jax.jit(_qwix_lora, static_argnums=0)
