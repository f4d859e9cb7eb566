"""Checkpoints that are quantized already: into a model, and back to the rules that fit them.

Such a checkpoint is a nested dict along the paths of an NNX state. A quantized parameter is a dict {'qvalue', 'scale'[,
'zero_point']} of arrays, anything else an array.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix._src.utils import flax_util

_AS_WEIGHTS: Any = object()
_LEAVES = {"qvalue", "scale", "zero_point"}


def process_prequantized_params(
    checkpoint_params: Mapping[str, Any],
    template_params: nnx.Module,
    *,
    allow_extra_params: bool = False,
    use_checkpoint_sharding: bool = False,
) -> dict[str, Any]:
    """Turns a quantized checkpoint into what `nnx.update(model, ...)` takes.

    Where the model has a quantized parameter the checkpoint's goes in as it is, in the dtypes of the model; a scale of
    coarser blocks, as of 2-D block-wise quantization, is repeated to the model's. Where the model has a float parameter
    a quantized one is dequantized. Parameters that the checkpoint does not have stay what they are.

    Args:
      checkpoint_params: see the module's docstring. A number in a list may be written as a string.
      template_params: the model, maybe abstract (`nnx.eval_shape`).
      allow_extra_params: leave out what the model does not have; otherwise it is an error.
      use_checkpoint_sharding: keep the checkpoint's shardings instead of moving each array to the model's.

    Raises:
      ValueError: names the path of a parameter that the model does not have, or that has wrong leaves, a wrong shape,
        or values that the model's format cannot hold.

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> kernel = {'qvalue': jnp.ones((4, 2), jnp.int8), 'scale': jnp.full((1, 2), 0.5)}
    >>> nnx.update(model, process_prequantized_params({'kernel': kernel}, model))
    >>> float(model.kernel[0, 0])
    0.5
    """
    template = ptq.Template(template_params)
    result, extra = {}, []
    for path, leaf in ptq.flatten(checkpoint_params, is_leaf=lambda x: bool(_LEAVES & set(x))):
        keys = _with_indices(path, template_params)
        target = template.get(keys)
        if target is None:
            extra.append("/".join(map(str, path)))
            continue
        where = "/".join(map(str, path))
        new = _fit(leaf, target, where)
        if not use_checkpoint_sharding:
            new = jax.tree.map(_place_like, new, target)
        result[keys] = new
    if extra and not allow_extra_params:
        raise ValueError(
            f"the checkpoint has parameters that the model does not have: {', '.join(extra)}. Pass "
            "allow_extra_params=True to leave them out."
        )
    return template.restore(result)


def _with_indices(path: tuple[str | int, ...], model: Any) -> tuple[str | int, ...]:
    """The path with the numbers that a file can only hold as strings made numbers, where the model has a list."""
    keys: tuple[str | int, ...] = ()
    for key in path:
        is_index = _is_index(key) and flax_util.get_value_from_path(model, (*keys, int(key))) is not None
        keys = (*keys, int(key) if is_index else key)
    return keys


def _fit(leaf: Any, target: Any, where: str) -> Any:
    """A parameter of a checkpoint in the form of the model's."""
    quantized = isinstance(leaf, Mapping)
    if quantized:
        _check_leaves(leaf, where)
    if isinstance(target, ptq.WithAux):
        if not quantized:
            raise ValueError(
                f"{where} is a float array in the checkpoint and quantized in the model: quantize it first "
                "(qwix.quantize_params), or give the model no rule for it"
            )
        return target.replace(array=_fit_qarray(leaf, target.array, where))
    if quantized:
        array = qarray.QArray(
            jnp.asarray(leaf["qvalue"]),
            jnp.asarray(leaf["scale"]).astype(target.dtype),
            None if leaf.get("zero_point") is None else jnp.asarray(leaf["zero_point"]),
        )
        try:
            qarray.validate_qarray(array)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        leaf = qarray.dequantize(array)
    _check_shape(leaf, target, where)
    return jnp.asarray(leaf).astype(target.dtype)


def _check_leaves(leaf: Mapping[str, Any], where: str) -> None:
    missing, unknown = {"qvalue", "scale"} - set(leaf), set(leaf) - _LEAVES
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has the unsupported leaves {sorted(unknown)}"
        raise ValueError(f"{where} {problem}: a quantized parameter has qvalue, scale and maybe zero_point")


def _fit_qarray(leaf: Mapping[str, Any], target: Any, where: str) -> qarray.QArray:
    _check_shape(leaf["qvalue"], target.qvalue, f"{where}/qvalue")
    zero_point = leaf.get("zero_point")
    if (zero_point is None) != (target.zero_point is None):
        is_, should_be = ("has an unexpected", "symmetric") if zero_point is not None else ("lacks a", "asymmetric")
        raise ValueError(f"{where} {is_} zero_point: the model's parameter is {should_be}")
    qvalue = jnp.asarray(leaf["qvalue"])
    converted = qvalue.astype(target.qvalue.dtype)
    if converted.dtype != qvalue.dtype and not bool((converted.astype(qvalue.dtype) == qvalue).all()):
        raise ValueError(
            f"{where}/qvalue is {qvalue.dtype} and does not fit into the model's {converted.dtype}: give the model a "
            f"rule with weight_qtype={qvalue.dtype}"
        )
    return target.replace(
        qvalue=converted,
        scale=_repeat_to(leaf["scale"], target.scale, f"{where}/scale"),
        zero_point=None if zero_point is None else _repeat_to(zero_point, target.zero_point, f"{where}/zero_point"),
    )


def _repeat_to(values: Any, target: Any, where: str) -> jax.Array:
    """Values of coarser blocks repeated along each axis to the target's shape, in its dtype."""
    values = jnp.asarray(values)
    if values.ndim != len(target.shape) or any(t % v for v, t in zip(values.shape, target.shape, strict=True)):
        _check_shape(values, target, where)
    return qarray.broadcast_to(values, tuple(target.shape)).astype(target.dtype)


def _check_shape(value: Any, target: Any, where: str) -> None:
    if tuple(np.shape(value)) != tuple(target.shape):
        raise ValueError(f"{where} has shape {tuple(np.shape(value))}, the model expects {tuple(target.shape)}")


def _place_like(value: jax.Array, target: Any) -> jax.Array:
    sharding = getattr(target, "sharding", None)
    return value if sharding is None or isinstance(target, jax.core.Tracer) else jax.device_put(value, sharding)


def restore_quantization_rules(
    checkpoint_params: Mapping[str, Any],
    rule_type: type[qconfig.QuantizationRule],
    *,
    tile_size: int | float | None,
    act_qtype: Any = _AS_WEIGHTS,
    **kwargs: Any,
) -> list[Any]:
    r"""The rules under which a model has the quantized parameters of a checkpoint: one for each kind of weight.

    A kind is a path with its numbers left open: `layers/0/mlp/kernel` and `layers/1/mlp/kernel` give one rule with
    `module_path='layers/\d+/mlp'`, as long as their formats are the same.

    Args:
      checkpoint_params: see the module's docstring.
      rule_type: class of the rules, `QuantizationRule` or one with more fields.
      tile_size: of all rules.
      act_qtype: format of the activations; by default that of the weight.
      **kwargs: further fields of the rules.

    >>> kernel = {'qvalue': jnp.ones((4, 2), jnp.int8), 'scale': jnp.ones((1, 2))}
    >>> tree = {'layers': {0: {'kernel': kernel}, 1: {'kernel': kernel}}}
    >>> [r.module_path for r in restore_quantization_rules(tree, qconfig.QuantizationRule, tile_size=None)]
    ['layers/\\d+']
    """
    kinds: dict[str, dict[str, np.dtype]] = {}
    for path, leaf in ptq.flatten(checkpoint_params, is_leaf=lambda x: bool(_LEAVES & set(x))):
        if isinstance(leaf, Mapping):
            _check_leaves(leaf, "/".join(map(str, path)))
            exact = "/".join(re.escape(str(key)) for key in path[:-1])
            kind = "/".join(r"\d+" if _is_index(key) else re.escape(str(key)) for key in path[:-1])
            kinds.setdefault(kind, {})[exact] = np.dtype(leaf["qvalue"].dtype)
    rules = []
    for kind, formats in kinds.items():
        alike = len(set(formats.values())) == 1
        for module_path, qtype in [(kind, next(iter(formats.values())))] if alike else formats.items():
            act = qtype if act_qtype is _AS_WEIGHTS else act_qtype
            rules.append(
                rule_type(module_path=module_path, weight_qtype=qtype, act_qtype=act, tile_size=tile_size, **kwargs)
            )
    return rules


def _is_index(key: str | int) -> bool:
    return isinstance(key, int) or key.isdecimal()
