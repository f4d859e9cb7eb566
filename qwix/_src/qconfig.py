"""Quantization rules, and the interface of the providers that apply them."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src import interception, provenance, transforms
from qwix._src.utils import flax_util

_provider_ids = itertools.count()


class QuantizationWarning(UserWarning):
    """An op may not be quantized as its rule was meant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """What to quantize, and how. The first rule that matches an op decides about it.

    Attributes:
      module_path: regular expression that has to match the whole '/'-joined path of the module, such as
        `r'blocks/\\d+/mlp/.*'`; the root's path is ''.
      op_names: ops that it is about ('dot_general', 'einsum', 'conv_general_dilated', ...), or one; empty: all.
      weight_qtype: number format of weights; None leaves them.
      act_qtype: number format of activations; None leaves them.
      tile_size: size of the tiles of the contracting axis that have a scale of their own (sub-channel
        quantization); a float f means 1/tiles; None: one scale for the whole axis.
      act_static_scale: take the activations' scales from statistics; otherwise each call computes them.
      weight_calibration_method: how the range of weights is found, see `qwix.quantize`.
      act_calibration_method: likewise for activations; None: as the provider likes, 'absmax' for most.
      act_batch_axes: axes of activations that static scales are shared over.

    >>> QuantizationRule(module_path='.*mlp.*', weight_qtype='nf4', tile_size=64).weight_qtype
    'nf4'
    """

    module_path: str = ".*"
    op_names: Collection[str] = ()
    weight_qtype: jax.typing.DTypeLike | None = None
    act_qtype: jax.typing.DTypeLike | None = None
    tile_size: int | float | None = None
    act_static_scale: bool | None = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: str | None = None
    act_batch_axes: Collection[int] = (0,)


@dataclasses.dataclass
class OpRecord:
    """What became of one op; `qwix.summarize` shows these.

    Attributes:
      module_path: '/'-joined path of the module that ran it.
      op_id: such as 'dot_general0'.
      rule: index of the rule that matched, or None.
      shapes: of the operands.
      formats: of the operands, such as ('bfloat16', 'int4'), as they went into the op.
      params: paths of the parameters among the operands ('' for an activation).
      note: why something was left in float, or ''.
    """

    module_path: str
    op_id: str
    rule: int | None
    shapes: tuple[tuple[int, ...], ...] = ()
    formats: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    note: str = ""


class QuantizationProvider:
    """Decides what happens to the ops of a model; the base of all providers.

    A subclass maps names of functions to its own in `get_intercept_map`. One provider may serve several models.

    Args:
      rules: `QuantizationRule`s, the first match wins.
      disable_jit: run the model under `jax.disable_jit()`.

    Raises:
      ValueError: for a rule that contradicts itself.
    """

    # Whether ops draw from `rngs=` while an NNX model is traced for the first time. A provider whose parameters are
    # made after that leaves it, because `nnx.scan` and `nnx.vmap` can take no generator that all modules share.
    rngs_in_modules = True

    def __init__(self, rules: Sequence[QuantizationRule], *, disable_jit: bool = False):
        self._rules = [self._init_rule(rule) for rule in rules]
        self._rule_matches = [0] * len(self._rules)
        self._rule_index_cache: dict[tuple[str, str], int | None] = {}
        self._id = next(_provider_ids)
        self.disable_jit = disable_jit

    def _init_rule(self, rule: QuantizationRule) -> QuantizationRule:
        """Checks a rule and fills in what it leaves open."""
        try:
            re.compile(rule.module_path)
        except re.error as e:
            raise ValueError(f"module_path {rule.module_path!r} is no regular expression: {e}") from e
        if rule.act_static_scale and rule.act_qtype is None:
            raise ValueError(
                f"act_static_scale needs an act_qtype to be the scale of: set act_qtype, or drop it from {rule}"
            )
        return dataclasses.replace(
            rule,
            op_names=(rule.op_names,) if isinstance(rule.op_names, str) else rule.op_names,
            act_static_scale=bool(rule.act_static_scale),
            act_calibration_method=rule.act_calibration_method or "absmax",
        )

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Dotted name -> what is called in its place while the model runs."""
        return {
            "qwix._src.qconfig.get_current_rule": self._get_rule,
            # Kernels are traced by pallas itself; their bodies work on references, not on the model's arrays.
            "jax.experimental.pallas.pallas_call": _pallas_call,
        }

    def get_interceptors(self) -> Sequence[Callable[[], interception.Interceptor]]:
        """Factories of the interceptors to run the model under, outermost first."""
        return [
            lambda: interception.Interceptor({**COMMON_INTERCEPTS, **self.get_intercept_map()}, id=("qwix", self._id))
        ]

    def process_model_inputs(
        self, model: Any, model_args: Sequence[Any], model_kwargs: dict[str, Any]
    ) -> tuple[Any, Sequence[Any], dict[str, Any]]:
        """Called with the model and its inputs before each top-level call; may change them."""
        return model, model_args, model_kwargs

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """Called with the result of each top-level call; may change it."""
        del method_name
        return model_output

    def get_unused_rules(self) -> Sequence[QuantizationRule]:
        """The rules that no op has matched so far, over all models that this provider has run."""
        return [r for r, n in zip(self._rules, self._rule_matches, strict=True) if n == 0]

    def _running_model(self) -> tuple[tuple[str | int, ...], dict[tuple[str, str], OpRecord]]:
        """Keys of the innermost running model that this provider quantizes, and the records of its ops."""
        book = provenance.book()
        for provider, root, records in reversed(book.roots if book is not None else ()):
            if provider is self:
                return root, records
        return (), {}

    def _relative_module_path(self) -> str:
        """Path of the running module below the model that this provider quantizes."""
        root, _ = self._running_model()
        return "/".join(map(str, flax_util.get_current_module_path()[len(root) :]))

    def _find_rule(self, path: str, op_name: str) -> int | None:
        key = (path, op_name)
        if key not in self._rule_index_cache:
            self._rule_index_cache[key] = next(
                (
                    i
                    for i, rule in enumerate(self._rules)
                    if re.fullmatch(rule.module_path, path) and (not rule.op_names or op_name in rule.op_names)
                ),
                None,
            )
        return self._rule_index_cache[key]

    def _get_rule(self, op_name: str) -> QuantizationRule | None:
        return self._get_current_rule_and_op_id(op_name, only_rule=True)[0]

    def _get_current_rule_and_op_id(
        self, op_name: str, *, only_rule: bool = False, repeated_call: bool = False
    ) -> tuple[QuantizationRule | None, str | None]:
        """The rule for an op of the running module, and the op's id.

        Args:
          op_name: such as 'dot_general'.
          only_rule: do not count the op; the id is None.
          repeated_call: the op was counted already; give its id once more.

        Returns:
          The rule or None, and the op's name followed by its count within the module during this top-level call.
        """
        path = self._relative_module_path()
        index = self._find_rule(path, op_name)
        rule = None if index is None else self._rules[index]
        if only_rule:
            return rule, None
        if index is not None and not repeated_call:
            self._rule_matches[index] += 1
        op_id = f"{op_name}{_count_op(op_name, repeated_call)}"
        if not repeated_call:
            self._running_model()[1][path, op_id] = OpRecord(path, op_id, index)
        return rule, op_id

    def _warn_of_no_weight(self, op_id: str, operands: Sequence[Any]) -> None:
        """Warns if an operand of an op without a weight, by the looks of it, was meant as one."""
        book = provenance.book()
        if book is None or not book.initializing:
            return
        for i, operand in enumerate(operands):
            what, names = "is computed from", transforms.parameters_of(operand)
            if not names:
                what, names = (
                    "may be, inside of a transform that qwix does not follow,",
                    transforms.lost_parameters(operand),
                )
            if not names:
                continue
            note = f"operand {i} {what} {', '.join(sorted(names))}"
            self._record(op_id, note=note)
            path = "/".join(map(str, flax_util.get_current_module_path()))
            warnings.warn(
                f"{path or 'the root module'}, {op_id}: its rule quantizes weights, but it has none. Its {note}, so "
                "that it counts as an activation. Make one parameter of what the op uses (merge the parameters before "
                "quantizing), or give the op a rule without weight_qtype.",
                QuantizationWarning,
                stacklevel=2,
            )

    def _record(self, op_id: str, **found: Any) -> None:
        """Adds to the record of an op of the running module."""
        path = self._relative_module_path()
        _, records = self._running_model()
        record = records.setdefault((path, op_id), OpRecord(path, op_id, None))
        for name, value in found.items():
            setattr(record, name, value)


def _count_op(op_name: str, repeated_call: bool) -> int:
    book = provenance.book()
    if book is None:
        return 0
    module = flax_util.get_current_module()
    # The module is kept with its counts: a collected one's id could be another's.
    _, counts = book.op_counts.setdefault(id(module), (module, {}))
    count = counts.get(op_name, 0) - (1 if repeated_call else 0)
    counts[op_name] = count + 1
    book.ops += 1
    return count


def _pallas_call(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    from jax.experimental import pallas as pl  # a heavy import, only needed once a kernel is there

    return interception.disable_interceptions(pl.pallas_call(*args, **kwargs))


@interception.reentrant
def _matmul_operator(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b)


@interception.reentrant
def _matmul_operator_reversed(a: Any, b: Any) -> Any:
    return jnp.matmul(b, a)


@interception.reentrant
def _lax_dot(*args: Any, **kwargs: Any) -> Any:
    """`jax.lax.dot`, which does not call dot_general in jax 0.10."""
    signature = inspect.signature(interception.interception_manager.original("jax.lax.dot"))
    arguments = signature.bind(*args, **kwargs).arguments
    lhs, rhs = arguments.pop("lhs"), arguments.pop("rhs")
    numbers = arguments.pop("dimension_numbers", None) or (((jnp.ndim(lhs) - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, numbers, **arguments)


def _unjitted(name: str) -> Callable[..., Any]:
    """The Python body of a jitted function of `jax.numpy`.

    jit would hand its body other arrays than the parameters, and run the body once for all calls of equal shapes.
    """
    return interception.reentrant(interception.get_attribute(name).__wrapped__)


def nn_param(module: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """`flax.linen.Module.param`, remembering what it hands out."""
    value = interception.interception_manager.original("flax.linen.Module.param")(module, name, *args, **kwargs)
    if kwargs.get("unbox", True):
        flax_util.track_linen_param(module, name, value)
    return value


# In force for every provider: these follow parameters, and make contractions visible as dot_general.
COMMON_INTERCEPTS: Mapping[str, Callable[..., Any]] = {
    **provenance.LAYOUT_INTERCEPTS,
    **transforms.INTERCEPTS,
    "flax.linen.Module.param": nn_param,
    "jax.lax.dot": _lax_dot,
    "jax._src.numpy.array_methods._operator_matmul": _matmul_operator,
    "jax._src.numpy.array_methods._operator_rmatmul": _matmul_operator_reversed,
    **{f"jax.numpy.{name}": _unjitted(f"jax.numpy.{name}") for name in ("matmul", "dot", "vdot", "inner")},
}


def get_current_rule(op_name: str) -> QuantizationRule | None:
    """The rule that applies to an op at this point of a quantized model; None outside of one.

    A model that runs its own kernels asks with this how they should quantize.

    >>> get_current_rule('dot_general') is None
    True
    """
    del op_name  # the provider of a running model answers in the place of this function
    return None
