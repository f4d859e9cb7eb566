"""`WithAux`: a quantized weight in a parameter tree, which goes through a model's code like the float one did."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src import nnx_nodes, provenance
from qwix._src.core import pytree, qarray
from qwix._src.utils import flax_util

ArrayTypeVar = TypeVar("ArrayTypeVar", bound=Any)


def _arithmetic(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `WithAux` that applies an operator to the float weight."""

    def method(*operands: Any) -> jax.Array:
        return operation(*(x.__jax_array__() if isinstance(x, WithAux) else x for x in operands))

    return method


def _reflected(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: operation(b, a)


@nnx_nodes.register
@pytree.array_structure
class WithAux(Generic[ArrayTypeVar]):
    """A quantized weight in a parameter tree, with how it was quantized. It looks like an `nnx.Variable`.

    Attributes:
      array: the QArray (or the static scale of an activation); its leaves may be boxed.
      how: the `HowToQuantize` that made it, so that `quantize_params` can make another one (static).
    """

    array: ArrayTypeVar
    how: qarray.HowToQuantize = pytree.static()

    replace: ClassVar[Callable[..., WithAux]]  # array_structure adds it

    __array_priority__: ClassVar[int] = 100  # operators of it and a NumPy array are its own, as a jax.Array's

    @property
    def value(self) -> WithAux[ArrayTypeVar]:
        """Itself with its leaves unboxed; what `nnx.Variable.value` is to an array."""
        return flax_util.unbox(self)

    def get_value(self) -> WithAux[ArrayTypeVar]:
        """As `value`; the newer spelling."""
        return self.value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def dtype(self):
        """dtype of the dequantized array."""
        return self.array.dtype

    @property
    def T(self) -> WithAux[ArrayTypeVar]:
        return self.transpose()

    @property
    def mT(self) -> WithAux[ArrayTypeVar]:
        return self.swapaxes(-1, -2)

    def __getitem__(self, key: Any) -> WithAux[ArrayTypeVar]:
        value = self.value
        if key is Ellipsis:
            return value
        return value._laid_out(qarray.rewriting_take(value.array, key), lambda x: x[key])

    def _laid_out(self, array: ArrayTypeVar, change: Callable[[Any], Any]) -> WithAux[ArrayTypeVar]:
        """Itself with another layout of its array; `change` is what was done, as a function of arrays."""
        provenance.follow_quantized(self.array, array, change)
        return self.replace(array=array)

    def astype(self, dtype: jax.typing.DTypeLike) -> WithAux[ArrayTypeVar]:
        """Itself with another dtype of the dequantized array."""
        value = self.value
        array = value.array.astype(dtype)
        return value if array is value.array else value.replace(array=array)

    def reshape(self, *shape: int | Sequence[int]) -> WithAux[ArrayTypeVar]:
        """Itself in another shape; ValueError where the scales cannot follow."""
        value = self.value
        new = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if tuple(new) in (tuple(value.shape), (-1,) if value.ndim == 1 else None):
            return value
        try:
            return value._laid_out(value.array.reshape(*new), lambda x: x.reshape(*new))
        except (ValueError, TypeError) as e:
            raise ValueError(
                f"PTQ weights should already have the target shape. Got {self.shape=} but shape={tuple(new)} is "
                f"requested: {e}"
            ) from e

    def transpose(self, *axes: int | Sequence[int]) -> WithAux[ArrayTypeVar]:
        """Itself with its axes permuted."""
        value = self.value
        return value._laid_out(value.array.transpose(*axes), lambda x: x.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> WithAux[ArrayTypeVar]:
        """Itself with two axes exchanged."""
        value = self.value
        return value._laid_out(value.array.swapaxes(axis1, axis2), lambda x: x.swapaxes(axis1, axis2))

    def squeeze(self, axis: int | Sequence[int] | None = None) -> WithAux[ArrayTypeVar]:
        """Itself without axes of size 1."""
        return self.apply_layout(jnp.squeeze, axis)

    def ravel(self) -> WithAux[ArrayTypeVar]:
        """Itself with one axis; ValueError where the scales cannot follow."""
        return self.reshape(-1)

    flatten = ravel

    def apply_layout(self, function: Callable[..., Any], *args, **kwargs) -> Any:
        """What a layout function of `jax.numpy` or `jax.lax` makes of it; see `provenance`."""
        value = self.value
        results = provenance.apply_layout(function, value.array, args, kwargs)
        if results is None:
            raise TypeError(
                f"{getattr(function, '__name__', function)} of a quantized weight of shape {self.shape} is not a "
                "layout change that its scales can follow: dequantize it first (qwix.dequantize)"
            )
        if isinstance(results, list):
            return [value.replace(array=array) for array in results]
        return value._laid_out(results, lambda x: function(x, *args, **kwargs))

    @staticmethod
    def concatenate(arrays: Sequence[WithAux], axis: int = 0, **kwargs) -> WithAux:
        """Quantized weights joined along an axis; their scales must agree on what they share."""
        axis = kwargs.pop("dimension", axis)
        return arrays[0].value.replace(array=concatenate_qarrays([a.value.array for a in arrays], axis))

    # A contraction is left to `jax.numpy.matmul`, which may be intercepted; all else is that of the float weight.
    def __matmul__(self, other: Any) -> jax.Array:
        return jnp.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> jax.Array:
        return jnp.matmul(other, self)  # type: ignore[arg-type]

    __neg__ = _arithmetic(operator.neg)
    __add__, __radd__ = _arithmetic(operator.add), _arithmetic(_reflected(operator.add))
    __sub__, __rsub__ = _arithmetic(operator.sub), _arithmetic(_reflected(operator.sub))
    __mul__, __rmul__ = _arithmetic(operator.mul), _arithmetic(_reflected(operator.mul))
    __truediv__, __rtruediv__ = _arithmetic(operator.truediv), _arithmetic(_reflected(operator.truediv))
    __pow__ = _arithmetic(operator.pow)

    def __jax_array__(self) -> jax.Array:
        """The float weight, for functions that know nothing of quantization."""
        return qarray.dequantize(self.value.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The same for NumPy, which would make an array of one object of it."""
        if copy is False:
            raise ValueError("A quantized weight becomes a float array as a copy only.")
        return np.asarray(self.__jax_array__(), dtype)


def concatenate_qarrays(arrays: Sequence[qarray.QArray], axis: int) -> qarray.QArray:
    """Joins QArrays along an axis that each has scales of its own on, or all have equal tiles on."""
    first = arrays[0]
    axis %= first.ndim
    join = lambda leaves: jnp.concatenate(leaves, axis)  # noqa: E731

    def follow(name: str) -> Any:
        leaves = [getattr(a, name) for a in arrays]
        if leaves[0] is None:
            return None
        shared = {a.shape[axis] // leaf.shape[axis] for a, leaf in zip(arrays, leaves, strict=True)}
        others = {leaf.shape[:axis] + leaf.shape[axis + 1 :] for leaf in leaves}
        if len(shared) > 1 or len(others) > 1:
            leaves = [
                qarray.broadcast_to(leaf, leaf.shape[:axis] + (a.shape[axis],) + leaf.shape[axis + 1 :])
                for a, leaf in zip(arrays, leaves, strict=True)
            ]
        return join(leaves)

    if len({(a.qtype, a.qvalue.dtype, a.zero_point is None) for a in arrays}) > 1:
        raise ValueError("weights of different formats cannot be concatenated: quantize them alike")
    return first.replace(
        qvalue=join([a.qvalue for a in arrays]),
        scale=follow("scale"),
        zero_point=follow("zero_point"),
    )
