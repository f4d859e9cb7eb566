"""`quantize_model`: where a model call enters a provider, for Linen and for NNX."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from qwix._src import interception, provenance, qconfig, transforms
from qwix._src.utils import flax_util


def quantize_model(
    model: nn.Module | nnx.Module,
    provider: qconfig.QuantizationProvider,
    *model_inputs: Any,
    methods: Collection[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> Any:
    """Returns a copy of a model whose ops go through a provider. The given model is left alone.

    The copy's class is a subclass of the model's, of the same name.

    Args:
      model: a Linen or NNX module, which may be quantized already.
      provider: decides what happens to each op.
      *model_inputs: NNX only, and needed there: inputs of the method, to find out which ops there are. Their values do
        not matter and may be `jax.ShapeDtypeStruct`s; the model is traced, not run.
      methods: the methods to quantize; one of them in NNX.
      **model_inputs_kwargs: NNX only. `rngs=nnx.Rngs(...)` is for parameters that the provider has to initialize, and
        `skip_nnx_init=True` leaves the tracing to the first call.

    Raises:
      ValueError: if inputs are missing (NNX) or given (Linen), if a method does not exist, or if an op cannot be
        quantized as its rule says.

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype='int4')])
    >>> quantized = quantize_model(model, provider, jnp.ones((1, 8)))
    >>> quantized.kernel.array.qvalue.dtype, model.kernel.dtype
    (dtype(int4), dtype('float32'))
    """
    if isinstance(methods, str):
        methods = (methods,)
    for name in methods:
        if not callable(getattr(type(model), name, None)):
            raise ValueError(f"{type(model).__name__} has no method {name!r} to quantize")
    if isinstance(model, nn.Module):
        if model_inputs or model_inputs_kwargs:
            raise ValueError("a Linen model is quantized when it is initialized or called: leave the model inputs out")
        return quantize_linen_model(model, provider, methods)
    if isinstance(model, nnx.Module):
        if len(methods) != 1:
            raise ValueError(f"one method of an NNX model can be quantized, got {tuple(methods)}")
        (method,) = methods
        return quantize_nnx_model(model, provider, *model_inputs, call_method=method, **model_inputs_kwargs)
    raise ValueError(f"{type(model).__name__} is neither a Linen nor an NNX module")


def quantize_linen_model(
    model: nn.Module, provider: qconfig.QuantizationProvider, methods: Collection[str]
) -> nn.Module:
    """`quantize_model` for Linen."""
    cls = type(model)
    wrapped = {name: _intercepted(getattr(cls, name), provider, name) for name in methods}
    if cls.setup is not nn.Module.setup:  # it may create parameters, which have to be followed
        wrapped["setup"] = _intercepted(cls.setup, provider, None)
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.init and field.name != "parent" and not (field.name == "name" and model.name is None)
    }
    return _subclass(cls, wrapped, provider)(**fields)


def quantize_nnx_model(
    model: nnx.Module,
    provider: qconfig.QuantizationProvider,
    *model_inputs: Any,
    call_method: str = "__call__",
    **model_inputs_kwargs: Any,
) -> nnx.Module:
    """`quantize_model` for NNX."""
    skip_init = model_inputs_kwargs.pop("skip_nnx_init", False)
    wrapped = {call_method: _intercepted(getattr(type(model), call_method), provider, call_method)}
    model = nnx.clone(model)  # its variables as well: nnx.merge(*nnx.split(model)) would share them
    model.__class__ = _subclass(type(model), wrapped, provider)
    for path, module in _modules(model):
        module.qwix_path = path
        module.disable_quant_stats_update = False
        module.qwix_rngs = nnx.data(None)  # data, so that a user may set it to nnx.Rngs
    if skip_init:
        return model
    if not model_inputs and not model_inputs_kwargs and _has_required_inputs(model, call_method):
        raise ValueError(
            "model inputs are needed to quantize an NNX model, as in quantize_model(model, provider, x): they tell "
            "which ops there are"
        )
    return _first_run(model, provider, call_method, model_inputs, model_inputs_kwargs)


def _modules(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, module) of each module of a model, itself included."""
    return ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))


def _has_required_inputs(model: nnx.Module, method: str) -> bool:
    parameters = inspect.signature(getattr(model, method)).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in variadic for p in parameters)


def _subclass(cls: type, methods: dict[str, Callable[..., Any]], provider: qconfig.QuantizationProvider) -> type:
    namespace = methods | {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        # provider -> records of the ops of this model, for `summarize`
        "_qwix_methods": tuple(methods),
        "_qwix_records": {**getattr(cls, "_qwix_records", {}), provider: {}},
    }
    return type(cls)(cls.__name__, (cls,), namespace)


def _intercepted(
    method: Callable[..., Any], provider: qconfig.QuantizationProvider, name: str | None
) -> Callable[..., Any]:
    """A method under the provider's interceptors. `name` is None for a method that is no call of the model."""

    def input_transform(args: Any, kwargs: Any) -> Any:
        if name is None:
            return args, kwargs
        model, args, kwargs = provider.process_model_inputs(args[0], args[1:], kwargs)
        return (model, *args), kwargs

    def output_transform(output: Any) -> Any:
        return output if name is None else provider.process_model_output(name, output)

    run = method
    for i, get_interceptor in enumerate(reversed(provider.get_interceptors())):
        around: dict[str, Any] = {}
        if i == 0:  # the innermost
            around = {"input_transform": input_transform, "output_transform": output_transform}
        run = interception.wrap_func_intercepted(
            run,
            get_interceptor,
            disable_jit=provider.disable_jit,
            **around,
        )

    # Not functools.wraps: Linen would take the copied marks of @nn.compact for a compact method of the subclass.
    @functools.wraps(method, assigned=("__doc__", "__name__", "__qualname__"), updated=())
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        root = flax_util.module_path(self)
        with provenance.session() as book:
            book.roots.append((provider, root, type(self)._qwix_records[provider]))
            if isinstance(self, nnx.Module):
                flax_util.track_nnx_model(self)
            elif self.is_initializing():
                book.initializing = True
            if book.initializing:
                transforms.not_of_parameters((args, kwargs))
            try:
                output = run(self, *args, **kwargs)
            finally:
                book.roots.pop()
            if isinstance(self, nnx.Module) and not book.keep_replacements:
                _carry_out(book.additions, book.replacements, self, root, getattr(self, "qwix_rngs", None))
            return output

    return wrapper


def _carry_out(
    additions: dict[tuple[str | int, ...], Callable[..., None]],
    replacements: dict[tuple[str | int, ...], Callable[[Any], Any]],
    model: nnx.Module,
    root: tuple[str | int, ...],
    rngs: nnx.Rngs | None,
) -> None:
    """Puts into an NNX model what a provider asked for: new parameters beside others, and quantized ones for others.

    The new ones come first, in the order of the ops, as they may be made from the float parameters, or change them.
    """
    for keys in [k for k in additions if k[: len(root)] == root]:
        additions.pop(keys)(model, keys[len(root) :], replacements.get(keys), rngs)
    for keys in [k for k in replacements if k[: len(root)] == root]:
        replace = replacements.pop(keys)
        owner, key = flax_util.get_value_from_path(model, keys[len(root) : -1]), keys[-1]
        if isinstance(key, int) or isinstance(owner, dict):
            owner[key] = replace(owner[key])
        else:
            setattr(owner, key, replace(getattr(owner, key)))


def _first_run(
    model: nnx.Module,
    provider: qconfig.QuantizationProvider,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nnx.Module:
    """Traces an NNX model once, and puts in what its provider asked for: quantized weights and new variables.

    The trace tells which weights to quantize, and how; that is then done one weight at a time, outside of the trace. Of
    the model's own computation only what new variables depend on (static scales) is ever run.
    """
    rngs = kwargs.get("rngs")
    for _, module in _modules(model):
        module.disable_quant_stats_update = True
    # Arrays are traced; flags, strings and None are what they are.
    leaves, treedef = jax.tree.flatten((args, {k: v for k, v in kwargs.items() if k != "rngs"}))
    is_array = [isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for x in leaves]
    graphdef, state = nnx.split((model, rngs))
    found: dict[str, Any] = {}  # what the trace leaves behind beside its jaxpr

    def run(state: Any, arrays: list[Any]) -> Any:
        model, rngs = nnx.merge(graphdef, state)
        arrays = iter(arrays)  # type: ignore[assignment]
        merged = [next(arrays) if a else x for a, x in zip(is_array, leaves, strict=True)]  # type: ignore[call-overload]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        if rngs is not None:
            kwargs["rngs"] = rngs
            if "rngs" not in inspect.signature(getattr(model, method)).parameters:
                del kwargs["rngs"]
            if provider.rngs_in_modules:
                for _, module in _modules(model):
                    module.qwix_rngs = nnx.data(rngs)
        with provenance.session() as book:
            book.keep_replacements = book.initializing = True
            book.first_run_of = provider
            getattr(model, method)(*args, **kwargs)
            found["additions"], found["replacements"] = book.additions, book.replacements
        for _, module in _modules(model):
            module.qwix_rngs = nnx.data(None)
            module.disable_quant_stats_update = False
        found["graphdef"], state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        found["paths"] = list(flat)
        return list(flat.values())

    arrays = [x for x, a in zip(leaves, is_array, strict=True) if a]
    jaxpr, variables = jax.make_jaxpr(run, return_shape=True)(state, arrays)
    old = dict(nnx.to_flat_state(nnx.state(model)))
    new = [path not in old for path in found["paths"]]
    if any(new):
        variables = _evaluate(jaxpr, variables, new, (state, arrays))
    flat = {path: old.get(path, variable) for path, variable in zip(found["paths"], variables, strict=True)}
    model = nnx.merge(found["graphdef"], nnx.from_flat_state(flat.items()))
    _carry_out(found["additions"], found["replacements"], model, (), rngs)
    return model


def _evaluate(jaxpr: Any, variables: list[Any], wanted: list[bool], inputs: Any) -> list[Any]:
    """The wanted ones of a jaxpr's results computed, the others as they are; `variables` gives their structure."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(inputs[0])):
        return variables  # an abstract model
    mask = [w for w, variable in zip(wanted, variables, strict=True) for _ in jax.tree.leaves(variable)]

    @jax.jit
    def compute(*flat_inputs: Any) -> list[Any]:
        outputs = jax.extend.core.jaxpr_as_fun(jaxpr)(*flat_inputs)
        return [output for output, w in zip(outputs, mask, strict=True) if w]

    flat_inputs = jax.tree.leaves(inputs)
    zeros = [jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x for x in flat_inputs]
    computed = iter(compute(*zeros))
    leaves, structure = jax.tree.flatten(variables)
    return jax.tree.unflatten(structure, [next(computed) if w else x for x, w in zip(leaves, mask, strict=True)])
