"""What can be done with a model that has adapters: take them out, exchange and mix them, merge them into the weights.

>>> import jax.numpy as jnp, qwix
>>> from flax import nnx
>>> x, rngs = jnp.ones((1, 8)), nnx.Rngs(0)
>>> provider = qwix.LoraProvider(rank=2, alpha=2.0, lora_b_initializer=nnx.initializers.ones)
>>> model = qwix.apply_lora_to_model(nnx.Linear(8, 4, rngs=rngs), provider, x, rngs=rngs)
>>> merged = merge_lora(model)
>>> type(merged).__name__, sorted(nnx.to_pure_dict(nnx.state(merged)))
('Linear', ['bias', 'kernel'])
>>> bool(jnp.allclose(merged(x), model(x), atol=1e-5))
True
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import model as _model
from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import adapters, lora, ptq, quantized_param
from qwix._src.providers.adapters import DEFAULT, AdaptedWeight, Adapter
from qwix._src.providers.with_aux import WithAux
from qwix._src.utils import flax_util

# Attributes that `quantize_model` and adapters leave on NNX modules.
_MARKS = ("qwix_path", "disable_quant_stats_update", "qwix_rngs", "lora_rngs")


def lora_params(model: Any, adapter: str = DEFAULT) -> Any:
    """The parameters of an adapter alone: what has to be trained, saved and sent.

    Args:
      model: an NNX model, or the parameter tree of a Linen model.
      adapter: name of the adapter.

    Returns:
      NNX: an `nnx.State` of `nnx.LoRAParam`s, at the paths of the default adapter whatever the name, so that
      `nnx.update(other, state)` and `add_adapter(other, name, state)` take it. Linen: a nested dict.

    Raises:
      ValueError: the model has no adapter of that name.

    >>> import jax.numpy as jnp
    >>> lora_params({'dense': {'kernel': jnp.ones(2), 'kernel_lora_a': jnp.ones(3)}})
    {'dense': {'kernel_lora_a': Array([1., 1., 1.], dtype=float32)}}
    """
    if not isinstance(model, nnx.Module):
        return _linen_lora_params(model)
    found = {}
    for path, owner, name, weight in adapters.adapted_weights(model):
        this = weight.adapter(adapter)
        if this is not None:
            for part in this.parts:
                key = (*path, dataclasses.replace(this, name=DEFAULT).attribute(name, part))
                found[key] = getattr(owner, this.attribute(name, part))
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapter {adapter!r}; it has {adapter_names(model)}")
    return nnx.from_flat_state(found.items())


def _linen_lora_params(params: Any) -> dict[str, Any]:
    result = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            inner = _linen_lora_params(value)
            if inner:
                result[name] = inner
        elif re.search(r"_lora_[abm]$", name):
            result[name] = value
    return result


def init_lora_params(
    model: nn.Module, params: Any, key: jax.Array, *args: Any, quant_stats: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The parameters of a Linen model with adapters, made from trained weights instead of new ones.

    What `apply_lora_to_model` does of itself in NNX: DoRA's magnitudes, and A and B by PiSSA and LoftQ, come from the
    weights, which are then quantized.

    Args:
      model: what `apply_lora_to_model` gives.
      params: nested dict of the float parameters. If they are boxed (`nn.Partitioned`), so is the result, as by `init`.
      key: for A and B.
      *args: inputs of the model; shapes are enough.
      quant_stats: as of `quantize_params`.
      **kwargs: more inputs, or `method`.

    Raises:
      ValueError: the model has no adapters, or `params` is not of the model.

    >>> import jax.numpy as jnp, qwix
    >>> x, key, dense = jnp.ones((1, 8)), jax.random.key(0), nn.Dense(4)
    >>> params = dense.init(key, x)['params']
    >>> provider = qwix.LoraProvider(rank=2, alpha=2.0, use_dora=True)
    >>> sorted(init_lora_params(qwix.apply_lora_to_model(dense, provider), params, key, x))
    ['bias', 'kernel', 'kernel_lora_a', 'kernel_lora_b', 'kernel_lora_m']
    """
    providers = [p for _, p in _providers(model) if isinstance(p, lora.LoraProvider)]
    if len(providers) != 1:
        raise ValueError(
            f"{type(model).__name__} is under {len(providers)} LoraProviders: call apply_lora_to_model once"
        )
    (provider,) = providers
    provider.starts_from_weights = True
    try:
        inputs = lambda *arrays: model.init(key, *arrays, **kwargs)  # noqa: E731
        abstract = jax.eval_shape(inputs, *args)["params"]
    finally:
        provider.starts_from_weights = False
    given = dict(ptq.flatten(params))
    tree = nnx.traversals.unflatten_mapping({keys: flax_util.unbox(value) for keys, value in given.items()})
    draw = nnx.Rngs(params=key).params
    new: dict[tuple[Any, ...], Any] = {}
    for keys, rule in provider.linen_rules.items():
        where = "/".join(map(str, keys))
        if flax_util.get_value_from_path(tree, keys) is None:
            raise ValueError(f"{where} is not among the params, and the model has an adapter for it")
        target = flax_util.unbox(flax_util.get_value_from_path(abstract, keys))
        replacement = None
        if isinstance(target, WithAux):
            replacement = functools.partial(ptq.quantize_like, target=target, where=where)
        weight = provider.linen_weights[keys]
        parts = adapters.Addition(weight, weight.adapters[0], rule).parts(tree, keys, replacement, draw)
        new |= {(*keys[:-1], f"{keys[-1]}_lora_{part}"): value for part, value in parts.items()}
    quantized = dict(ptq.flatten(ptq.quantize_params(tree, abstract, quant_stats or {})))
    result: Any = nnx.traversals.unflatten_mapping(quantized | new)
    is_boxed = any(isinstance(value, nn.meta.AxisMetadata) for value in given.values())
    return _reboxed(abstract, result) if is_boxed else result


def adapter_names(model: nnx.Module) -> list[str]:
    """Names of the adapters of an NNX model; '' is the one that `apply_lora_to_model` made."""
    return sorted({a.name for *_, weight in adapters.adapted_weights(model) for a in weight.adapters})


def add_adapter(
    model: nnx.Module,
    name: str,
    params: Any | None = None,
    *,
    alpha: float | None = None,
    use_rslora: bool = False,
    rngs: nnx.Rngs | None = None,
    scalings: Mapping[tuple[tuple[Any, ...], str], float] | None = None,
) -> None:
    """Puts one more adapter into an NNX model, beside those that it has; `set_adapter` makes it act.

    Args:
      model: a model with adapters; changed in place.
      name: of the new adapter; an adapter of that name is replaced.
      params: what `lora_params` gives, or the nested dict of its arrays; its rank may be another one, and weights
        that are not in it are not adapted. None: as the default adapter has it, A from `rngs` and B zero.
      alpha: as in `LoraRule`; None: the scaling of the default adapter.
      use_rslora: as in `LoraRule`.
      rngs: for `params=None`.
      scalings: (path of the module, weight's name) -> scaling, where it is not the same for all.

    Raises:
      ValueError: the name is no identifier, `params` has a path that the model has no adapter at, or a shape does not
        fit; nothing is changed then.

    >>> import jax.numpy as jnp, qwix
    >>> x, rngs = jnp.ones((1, 8)), nnx.Rngs(0)
    >>> model = qwix.apply_lora_to_model(
    ...     nnx.Linear(8, 4, rngs=rngs), qwix.LoraProvider(rank=2, alpha=2.0), x, rngs=rngs
    ... )
    >>> add_adapter(model, 'french', rngs=rngs)
    >>> set_adapter(model, {'': 0.5, 'french': 0.5})
    >>> model.kernel_lora_a_french.shape
    (8, 2)
    """
    if not re.fullmatch(r"[A-Za-z0-9]\w*", name):
        raise ValueError(f"{name!r} cannot be the name of an adapter: use letters, digits and _")
    if params is None and rngs is None:
        raise ValueError("give the adapter's params, or rngs=nnx.Rngs(...) to initialize them")
    given = {} if params is None else _flat_arrays(params)
    new: list[tuple[Any, str, AdaptedWeight, Adapter, dict[str, Any]]] = []
    used: set[tuple[Any, ...]] = set()
    for path, owner, weight_name, weight in adapters.adapted_weights(model):
        like = weight.adapter(DEFAULT) or weight.adapters[0]
        values: dict[str, Any] = {}
        if params is None:
            a, b = (flax_util.unbox(getattr(owner, like.attribute(weight_name, part))) for part in "ab")
            extra = a.ndim - len(weight.factors.a)
            init = jax.nn.initializers.he_uniform()
            assert rngs is not None
            draw: Any = rngs.params if "params" in rngs else rngs
            values["a"] = adapters.stacked_initializer(init, draw(), a.shape[:extra], a.shape[extra:], a.dtype, {})
            values["b"] = jnp.zeros_like(b)
        else:
            for part in "abm":
                key = (*path, f"{weight_name}_lora_{part}")
                if key in given:
                    values[part] = given[key]
                    used.add(key)
        if not values:
            continue
        where = "/".join(map(str, (*path, weight_name)))
        rank = _rank_of(weight, values, where)
        scaling = like.scaling if alpha is None else alpha / (math.sqrt(rank) if use_rslora else rank)
        scaling = (scalings or {}).get((path, weight_name), scaling)
        new.append((owner, weight_name, weight, Adapter(name, rank, scaling, like.dropout, "m" in values), values))
    unknown = sorted("/".join(map(str, key)) for key in given.keys() - used)
    if unknown:
        raise ValueError(
            f"{len(unknown)} arrays of the adapter {name!r} have no place, such as {unknown[0]}: the model has no "
            "adapter there. Apply LoRA with rules that match these weights."
        )
    for owner, weight_name, weight, adapter, values in new:
        stored = flax_util.get_value_from_path(owner, weight.keys)
        boxed = stored.array.qvalue if isinstance(stored, WithAux) else stored
        extra = boxed.ndim - len(weight.stored_shape)
        axes = adapters.part_axes(weight, extra)
        for part, value in values.items():
            attribute = adapter.attribute(weight_name, part)
            setattr(owner, attribute, adapters.boxed_like(boxed, jnp.asarray(value), axes[part]))
        setattr(owner, f"{weight_name}_lora", weight.with_adapter(adapter))


def _flat_arrays(params: Any) -> dict[tuple[Any, ...], Any]:
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    return {path: flax_util.unbox(value) for path, value in ptq.flatten(params)}


def _rank_of(weight: AdaptedWeight, values: dict[str, Any], where: str) -> int:
    """The rank of an adapter, by its shapes; ValueError if they do not fit the weight."""
    if not {"a", "b"} <= values.keys():
        raise ValueError(f"{where}: the adapter has only {sorted(values)} of A and B")
    a_shape, b_shape = (tuple(values[part].shape) for part in "ab")
    extra = len(a_shape) - len(weight.factors.a)
    rank = a_shape[extra + weight.factors.a.index(None)] if extra >= 0 else 0
    if (a_shape[max(extra, 0) :], b_shape[max(extra, 0) :]) != weight.factors.shapes(rank):
        raise ValueError(
            f"{where}: A and B of shapes {a_shape} and {b_shape} do not fit; for rank 1 they are "
            f"{weight.factors.shapes(1)}"
        )
    return rank


def set_adapter(
    model: Any,
    active: str | Mapping[str, float] | None,
    params: Any | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> Any:
    """Chooses the adapters of a model that act.

    Args:
      model: an NNX or Linen model with adapters; an NNX model is changed in place.
      active: a name ('' is the one that `apply_lora_to_model` made); names with shares, whose updates are added up,
        each times its share; None: no adapter acts, which gives the base.
      params: Linen only, and needed there: its parameters. Their adapter is the one named ''.
      adapters: Linen only: name -> adapter, as `lora_params` takes it out; ranks may differ. The model's rule says
        alpha / rank for all of them: where one was trained with another, its share is to be multiplied by the ratio.

    Returns:
      NNX: None. Linen: the parameters with the chosen adapters in place of theirs. Several become one: of the sum of
      their ranks, for [A1, A2] [s1 B1; s2 B2] = s1 A1 B1 + s2 A2 B2. With equal ranks, another choice of one adapter
      is no reason to compile anew.

    Raises:
      ValueError: an adapter is unknown or does not fit, or one with a magnitude (DoRA) is mixed with others; a Linen
        model has not run yet.

    >>> import jax.numpy as jnp, qwix
    >>> x, key = jnp.ones((1, 8)), jax.random.key(0)
    >>> model = qwix.apply_lora_to_model(nn.Dense(4), qwix.LoraProvider(rank=2, alpha=2.0))
    >>> params = model.init(key, x)['params']
    >>> french = jax.tree.map(jnp.ones_like, lora_params(params))
    >>> mixed = set_adapter(model, {'': 0.5, 'french': 0.5}, params, {'french': french})
    >>> mixed['kernel_lora_a'].shape, mixed['kernel_lora_b'].shape
    ((8, 4), (4, 4))
    """
    shares = {} if active is None else {active: 1.0} if isinstance(active, str) else dict(active)
    if isinstance(model, nn.Module):
        if params is None:
            raise ValueError("set_adapter of a Linen model needs params, and returns them with other adapters")
        return _set_linen_adapter(model, shares, params, adapters or {})
    if params is not None or adapters is not None:
        raise ValueError("an NNX model holds its adapters itself: use add_adapter, and leave out params and adapters")
    _set_nnx_adapter(model, shares)
    return None


def _set_nnx_adapter(model: nnx.Module, shares: Mapping[str, float]) -> None:
    for name in shares:
        if name not in adapter_names(model):
            raise ValueError(f"{type(model).__name__} has no adapter {name!r}; it has {adapter_names(model)}")
    chosen = tuple((name, float(share)) for name, share in shares.items())
    weights = list(adapters.adapted_weights(model))
    for path, _, weight_name, weight in weights:
        used = [a for a in weight.adapters if a.name in shares]
        if any(a.use_dora for a in used) and chosen != ((used[0].name, 1.0),):
            where = "/".join(map(str, (*path, weight_name)))
            raise ValueError(f"{where}: an adapter with use_dora acts alone and with share 1, not as {dict(chosen)}")
    for _, owner, weight_name, weight in weights:
        setattr(owner, f"{weight_name}_lora", dataclasses.replace(weight, active=chosen))


def _set_linen_adapter(
    model: nn.Module, shares: Mapping[str, float], params: Any, adapters: Mapping[str, Any]
) -> dict[str, Any]:
    given = {name: dict(ptq.flatten(tree)) for name, tree in adapters.items()}
    flat = dict(ptq.flatten(params))
    given[DEFAULT] = dict(ptq.flatten(_linen_lora_params(params)))
    for name in shares:
        if name not in given:
            raise ValueError(f"there is no adapter {name!r}; there are {sorted(given)}")
        unknown = sorted("/".join(map(str, keys)) for keys in given[name].keys() - flat.keys())
        if unknown:
            raise ValueError(f"the adapter {name!r} has {unknown[0]}, and the model's params have not")
    result = dict(flat)
    for keys, weight in _linen_weights(model, flat).items():
        where = "/".join(map(str, keys))
        names = {part: (*keys[:-1], f"{keys[-1]}_lora_{part}") for part in "abm"}
        used = [(share, given[name]) for name, share in shares.items() if names["a"] in given[name]]
        if names["m"] in flat and used and [share for share, _ in used] != [1.0]:
            raise ValueError(f"{where}: an adapter with use_dora acts alone and with share 1, not as {dict(shares)}")
        values = [(share, {p: flax_util.unbox(tree[n]) for p, n in names.items() if n in tree}) for share, tree in used]
        for _, parts in values:
            _rank_of(weight, parts, where)
        if not values:
            values = [(0.0, {part: flax_util.unbox(flat[name]) for part, name in names.items() if name in flat})]
        parts = _mixed(weight, values)
        if names["m"] in flat:
            parts["m"] = values[0][1]["m"] if used else _norms_of_base(weight, flat[keys], parts)
        for part, value in parts.items():
            result[names[part]] = flax_util.update_boxed(flat[names[part]], value=value)
    return nnx.traversals.unflatten_mapping(result)


def _mixed(weight: AdaptedWeight, values: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """A and B of the sum of several adapters, each times its share: theirs side by side along the rank."""
    factors = weight.factors
    extra = values[0][1]["a"].ndim - len(factors.a)
    dtype = values[0][1]["a"].dtype
    all_a = [parts["a"].astype(dtype) for _, parts in values]
    all_b = [(share * parts["b"]).astype(dtype) for share, parts in values]
    return {
        "a": jnp.concatenate(all_a, axis=extra + factors.a.index(None)),
        "b": jnp.concatenate(all_b, axis=extra + factors.b.index(None)),
    }


def _norms_of_base(weight: AdaptedWeight, boxed: Any, parts: dict[str, Any]) -> jax.Array:
    """The magnitude with which DoRA leaves a weight as it is, where B is zero."""
    operand = weight.to_operand(_float_of(boxed))
    norms = weight.norms(operand, parts["a"], parts["b"], scaling=1.0)
    leading = norms.shape[: parts["a"].ndim - len(weight.factors.a)]
    return norms.reshape(*leading, *adapters.magnitude_shape(weight.factors)).astype(parts["a"].dtype)


def merge_lora(model: Any, params: Any | None = None, *, requantize: bool = False) -> Any:
    """A model without adapters, whose weights have the active ones in them: W + scaling · A B.

    Args:
      model: an NNX or Linen model with adapters; left alone.
      params: Linen only, and needed there: its parameters.
      requantize: quantize those weights again that are quantized now, in the same way: the result is a model under a
        `PtqProvider`, in Linen the parameters of one with the same rules, and differs by the error of the format. The
        base lies on the grid of its format, so that a change of less than half a step is rounded away: in 4 bits that
        may be most of it, see `docs/lora.md`.
        Otherwise every weight becomes float.

    Returns:
      NNX: the model; a float one is of the class that it had before `apply_lora_to_model`. Linen: the parameters of
      that model.

    Raises:
      ValueError: a weight cannot hold its change: a convolution's kernel of several groups, or a table with an adapter
        for the logits but none for lookups; a Linen model has not run yet.
    """
    if isinstance(model, nn.Module):
        if params is None:
            raise ValueError("merge_lora of a Linen model needs params, and returns them without adapters")
        return _merge_linen(model, params, requantize)
    merged = nnx.clone(model)
    for path, owner, name, weight in list(adapters.adapted_weights(merged)):
        keys = (*path, *weight.keys)
        where = "/".join(map(str, keys))
        _check_mergeable(weight, where)
        values = {
            a.name: {part: flax_util.unbox(getattr(owner, a.attribute(name, part))) for part in a.parts}
            for a in weight.adapters
        }
        stored = flax_util.get_value_from_path(merged, keys)
        value = _float_of(stored)
        result = weight.merged(value, values).astype(value.dtype)
        if isinstance(stored, WithAux) and requantize:
            array = qarray.quantize(result, ptq.how_of(flax_util.unbox(stored)))
            adapters.set_at(merged, keys, _reboxed(stored, stored.replace(array=array)))
        elif isinstance(stored, WithAux):
            result = result.reshape(*result.shape[: result.ndim - len(weight.stored_shape)], *weight.shape)
            adapters.set_at(merged, keys, quantized_param.rebox(stored.array.qvalue, result, result.shape))
        else:
            adapters.set_at(merged, keys, flax_util.update_boxed(stored, value=result))
        for a in weight.adapters:
            for part in a.parts:
                delattr(owner, a.attribute(name, part))
        delattr(owner, f"{name}_lora")
    if not requantize:
        for keys, node in list(nnx.iter_graph(merged)):
            if isinstance(node, WithAux) and isinstance(node.array, qarray.QArray):
                value = _float_of(node)
                adapters.set_at(merged, keys, quantized_param.rebox(node.array.qvalue, value, value.shape))
    return _without_provider(merged, requantize)


def _check_mergeable(weight: AdaptedWeight, where: str) -> None:
    if weight.not_mergeable:
        raise ValueError(f"{where} cannot take up its adapter: {weight.not_mergeable}. Keep the adapter")


def _float_of(stored: Any) -> jax.Array:
    value = flax_util.unbox(stored)
    return qarray.dequantize(value.array) if isinstance(value, WithAux) else value


def _reboxed(stored: Any, new: Any) -> Any:
    """A quantized weight, or a tree of parameters, in the boxes of another one."""
    is_box = lambda x: isinstance(x, (nnx.Variable, nn.meta.AxisMetadata))  # noqa: E731
    return jax.tree.map(lambda box, leaf: flax_util.update_boxed(box, value=leaf), stored, new, is_leaf=is_box)


def _providers(model: Any) -> Iterator[tuple[type, qconfig.QuantizationProvider]]:
    """(class, provider) of each `quantize_model` that a model went through, the last one first."""
    for cls in type(model).__mro__:
        if "_qwix_records" in vars(cls):
            yield cls, list(cls._qwix_records)[-1]  # type: ignore[attr-defined]


def _without_provider(model: Any, requantize: bool) -> Any:
    """An NNX model as it was before `quantize_model`, or under a provider that quantizes alike."""
    providers = list(_providers(model))
    model.__class__ = next(cls for cls in type(model).__mro__ if "_qwix_records" not in vars(cls))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Module):
            for name in _MARKS:
                if name in vars(module):
                    delattr(module, name)
    if not requantize:
        return model
    cls, provider = providers[-1]
    plain = [f.name for f in dataclasses.fields(qconfig.QuantizationRule)]
    rules = [qconfig.QuantizationRule(**{n: getattr(rule, n) for n in plain}) for rule in provider._rules]
    methods = cls._qwix_methods  # type: ignore[attr-defined]
    return _model.quantize_model(model, ptq.PtqProvider(rules), methods=methods, skip_nnx_init=True)


def _linen_weights(model: nn.Module, flat: Mapping[tuple[Any, ...], Any]) -> dict[tuple[Any, ...], AdaptedWeight]:
    """What the adapters in the parameters of a Linen model mean, by the keys of their weights."""
    known: dict[tuple[Any, ...], AdaptedWeight] = {}
    for _, provider in _providers(model):
        if isinstance(provider, lora.LoraProvider):
            known |= provider.linen_weights
    result = {}
    for keys, boxed in flat.items():
        if (*keys[:-1], f"{keys[-1]}_lora_a") not in flat:
            continue
        if keys not in known:
            where = "/".join(map(str, keys))
            raise ValueError(f"{where}: this model has not run yet, call its init or apply (maybe in jax.eval_shape)")
        weight, shape = known[keys], flax_util.unbox(boxed).shape
        views = weight.views
        if views and views[0].kind == "reshape" and shape[-len(weight.stored_shape) :] != weight.stored_shape:
            weight = dataclasses.replace(weight, views=views[1:])  # that was done before it was quantized
        result[keys] = weight
    return result


def linen_adapters(
    model: nn.Module, params: Any
) -> Iterator[tuple[tuple[Any, ...], str, AdaptedWeight, Adapter, dict[str, Any]]]:
    """The adapters in the parameters of a Linen model: module, name of the weight, what they mean, their arrays."""
    flat = dict(ptq.flatten(params))
    for keys, weight in _linen_weights(model, flat).items():
        names = {part: (*keys[:-1], f"{keys[-1]}_lora_{part}") for part in "abm"}
        values = {part: flax_util.unbox(flat[name]) for part, name in names.items() if name in flat}
        yield keys[:-1], str(keys[-1]), weight, weight.adapters[0], values


def _merge_linen(model: nn.Module, params: Any, requantize: bool) -> dict[str, Any]:
    flat = dict(ptq.flatten(params))
    weights = _linen_weights(model, flat)
    result: dict[tuple[Any, ...], Any] = {}
    for keys, boxed in flat.items():
        if re.search(r"_lora_[abm]$", str(keys[-1])):
            continue
        if keys not in weights:
            becomes_float = isinstance(flax_util.unbox(boxed), WithAux) and not requantize
            result[keys] = _linen_float(boxed, _float_of(boxed)) if becomes_float else boxed
            continue
        weight = weights[keys]
        _check_mergeable(weight, "/".join(map(str, keys)))
        value = _float_of(boxed)
        names = {part: (*keys[:-1], f"{keys[-1]}_lora_{part}") for part in "abm"}
        values = {part: flax_util.unbox(flat[name]) for part, name in names.items() if name in flat}
        out = weight.merged(value, {DEFAULT: values}).astype(value.dtype)
        if isinstance(boxed, WithAux) and requantize:
            array = qarray.quantize(out, ptq.how_of(flax_util.unbox(boxed)))
            result[keys] = _reboxed(boxed, boxed.replace(array=array))
        else:
            result[keys] = _linen_float(boxed, out)
    return nnx.traversals.unflatten_mapping(result)


def _linen_float(boxed: Any, value: jax.Array) -> Any:
    """A float parameter in the box that a stored one has."""
    if isinstance(flax_util.unbox(boxed), WithAux):
        return quantized_param.rebox(boxed.array.qvalue, value, value.shape)
    return flax_util.update_boxed(boxed, value=value)
