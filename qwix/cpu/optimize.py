"""Whole models: every quantized weight into the layout of the native kernels, and back."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers.with_aux import WithAux
from qwix.contrib import padded_ptq
from qwix.cpu import native, packed


class NothingToPackError(ValueError):
    """A model has no quantized weight that the kernels read."""


def optimize_for_inference(model: Any) -> Any:
    """A quantized model with its weights packed for the native CPU kernels; the model itself is left alone.

    What is packed multiplies by the kernels on a CPU, and as before elsewhere; it has no gradients. Save checkpoints
    before, or of `restore(model)`: the packed layout is no format to keep.

    Args:
      model: a quantized NNX model, or the variables (or parameters) of a Linen one.

    Returns:
      A model, or variables, of the same structure, in which each `WithAux` holds a `PackedQArray`. Partition specs of
      the weights are dropped, as the packed arrays have other axes; arrays that are sharded by rows or columns stay so
      (see `pack`).

    Raises:
      NothingToPackError: there is no quantized weight in it (a ValueError).

    Weights that no kernel reads (int16, ...) stay as they are, which is warned of.

    >>> import jax.numpy as jnp, qwix
    >>> provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype=jnp.int4, tile_size=32)])
    >>> model = qwix.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), provider, jnp.ones((1, 64)))
    >>> fast = optimize_for_inference(model)
    >>> type(fast.kernel.array).__name__, fast.kernel.array.qvalue.nbytes
    ('PackedQArray', 1024)
    """
    kept: dict[str, str] = {}
    count = 0

    def convert(path: str, value: WithAux) -> WithAux:
        nonlocal count
        array = qarray.pytree.unwrap(value).array
        if isinstance(array, packed.PackedQArray):
            count += 1
            return value
        if isinstance(array, WithAux):  # within a `WithInputTransform`
            return value.replace(array=convert(path, value.array))
        if not isinstance(array, qarray.QArray):
            return value
        if type(array) not in (qarray.QArray, padded_ptq.PaddedQArray):
            kept[path] = f"a {type(array).__name__}"
            return value
        axes = _contracting_axes(array, value.how)
        if problem := packed.why_not_packed(array, axes):
            kept[path] = problem
            return value
        count += 1
        return value.replace(array=_boxed_like(value.array, packed.pack(array, axes)))

    result = _convert(model, convert)
    if kept:
        lines = "".join(f"\n  {path}: {why}" for path, why in kept.items())
        warnings.warn(f"These weights stay as they are, without native kernels:{lines}", qconfig.QuantizationWarning, 2)
    if not count:
        raise NothingToPackError(
            "There is no quantized weight to pack: quantize the model with qwix.quantize_model first, and pass an NNX "
            "model or the variables of a Linen one."
        )
    native.is_available()  # finds or compiles the kernels now, not in the first call
    return result


def restore(model: Any) -> Any:
    """The model that `optimize_for_inference` was given, bit for bit, but for partition specs."""

    def convert(path: str, value: WithAux) -> WithAux:
        array = qarray.pytree.unwrap(value).array
        if isinstance(array, WithAux):
            return value.replace(array=convert(path, value.array))
        if not isinstance(array, packed.PackedQArray):
            return value
        return value.replace(array=_boxed_like(value.array, packed.unpack(array)))

    return _convert(model, convert)


def _convert(model: Any, convert: Callable[[str, WithAux], WithAux]) -> Any:
    if not isinstance(model, nnx.Module):
        is_weight = lambda x: isinstance(x, WithAux)  # noqa: E731

        def of_leaf(path: Any, leaf: Any) -> Any:
            return convert(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) if is_weight(leaf) else leaf

        return jax.tree_util.tree_map_with_path(of_leaf, model, is_leaf=is_weight)
    model = nnx.clone(model)
    done: dict[int, tuple[WithAux, WithAux]] = {}  # a weight that two modules share is packed once
    for path, node in list(nnx.iter_graph(model)):
        if not isinstance(node, nnx.Pytree):
            continue
        for name, value in list(vars(node).items()):
            if isinstance(value, WithAux):
                if id(value) not in done:
                    done[id(value)] = value, convert("/".join(map(str, (*path, name))), value)
                setattr(node, name, done[id(value)][1])
    return model


def _contracting_axes(array: qarray.QArray, how: qarray.HowToQuantize) -> list[int] | None:
    """The axes that ops sum over, if `how` says so: all but the channelwise ones.

    It may have been written for a slice of the array, without the stacked axes before it (Linen's lifted transforms).
    """
    stacked = array.ndim - 1 - max((*how.channelwise_axes, *how.tiled_axes), default=-1)
    shifts = {0, max(0, stacked)}
    for shift in sorted(shifts):
        channelwise = {axis + shift for axis in how.channelwise_axes} | set(range(shift))
        shared = [a for a in range(array.ndim) if array.scale.shape[a] not in (1, array.shape[a])]
        whole = all(array.scale.shape[axis] == array.shape[axis] for axis in channelwise)
        if channelwise and whole and not channelwise & set(shared) and len(channelwise) < array.ndim:
            return [axis for axis in range(array.ndim) if axis not in channelwise]
    return None


def _boxed_like(old: qarray.QArray, new: Any) -> Any:
    """The leaves of a QArray in variables of the same type as those of another one, or bare as they are there."""
    box = old.qvalue
    if not isinstance(box, nnx.Variable):
        return new
    return jax.tree.map(type(box), new)
