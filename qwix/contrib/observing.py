"""A float model run once over calibration batches, for the methods that take all statistics first: NNX and Linen alike.

A batch is what a call is given: an array, a tuple of positional arguments or a dictionary of keyword arguments. Batches
are read once, one after the other, and each goes through one compiled program.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import model as model_lib
from qwix._src import qconfig
from qwix._src.utils import flax_util

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(batch: Any) -> Call:
    """(args, kwargs) of a batch: a dict is keywords, a tuple or list positional arguments, all else the only one.

    >>> as_call((1, 2)), as_call({"x": 1}), as_call(3)
    (((1, 2), {}), ((), {'x': 1}), ((3,), {}))
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def observe(
    model: nn.Module | nnx.Module,
    batches: Iterable[Any],
    provider: qconfig.QuantizationProvider,
    variables: Any = None,
) -> tuple[Any, Call]:
    """The statistics (`quant_stats`) that a calibration provider takes of a model.

    Args:
      model: NNX or Linen; it is left alone.
      batches: see the module's docstring.
      provider: such as `gptq.GptqCalibrationProvider`.
      variables: Linen only.

    Returns:
      A pure nested dict, and the arguments of the first call.

    Raises:
      ValueError: there is no batch; or a Linen model came without variables.
    """
    check(model, variables)
    first: Call | None = None
    step = stats = None
    for batch in batches:
        args, kwargs = as_call(batch)
        if step is None:
            first = (args, kwargs)
            step, stats = _observing(model, provider, variables, first)
        stats = step(stats, args, kwargs)
    if first is None:
        raise ValueError("no calibration batch: the method needs to see activations")
    if isinstance(model, nn.Module):
        return stats, first
    return nnx.to_pure_dict(nnx.state(stats, flax_util.QuantStat)), first


def check(model: Any, variables: Any) -> None:
    """Raises ValueError if a Linen model comes without variables."""
    if isinstance(model, nn.Module) and variables is None:
        raise ValueError("a Linen model needs variables={'params': ...}")


def _observing(model: Any, provider: Any, variables: Any, inputs: Call) -> tuple[Callable[..., Any], Any]:
    """A compiled step (statistics so far, args, kwargs) -> statistics, and what it starts from."""
    if isinstance(model, nn.Module):
        module = model_lib.quantize_model(model, provider)

        @functools.partial(jax.jit, donate_argnums=0)
        def linen_step(stats: Any, args: Any, kwargs: Any) -> Any:
            tree = {**variables, "quant_stats": stats}
            return module.apply(tree, *args, mutable=["quant_stats"], **kwargs)[1]["quant_stats"]

        return linen_step, {}
    observed = model_lib.quantize_model(model, provider, *inputs[0], **inputs[1])
    # Statistics are as large as the weights, and new memory for them in each call takes longer than to sum them up.
    # What is donated with them must not be the caller's.
    graph, state = nnx.split(observed)
    observed = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    call = nnx.jit(lambda model, args, kwargs: model(*args, **kwargs), donate_argnums=0)

    def nnx_step(observed: Any, args: Any, kwargs: Any) -> Any:
        call(observed, args, kwargs)
        return observed

    return nnx_step, observed


def params_of(model: Any, variables: Any) -> Any:
    """The float parameters as a pure dictionary."""
    if isinstance(model, nn.Module):
        return variables["params"]
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_params(model: Any, provider: qconfig.QuantizationProvider, inputs: Call, method: str = "__call__") -> Any:
    """What the model's parameters become under a provider, without values: a tree in Linen, a model in NNX."""
    args, kwargs = inputs
    if isinstance(model, nn.Module):
        quantized = model_lib.quantize_model(model, provider, methods=(method,))
        init = lambda: quantized.init(jax.random.key(0), *args, method=method, **kwargs)  # noqa: E731
        return jax.eval_shape(init)["params"]
    return nnx.eval_shape(lambda: model_lib.quantize_model(model, provider, *args, methods=(method,), **kwargs))
