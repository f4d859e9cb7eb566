"""`WithInputTransform`: a weight that wants the activations that it meets transformed first.

    x W = (x T^T) (T W),        T^T T = I

T W stands in the parameter tree, in float or quantized, and the provider that runs the model applies T to the other
operand of the op. To whatever comes after (calibration, quantization, another such transform) the op is then an
ordinary one, of transformed activations with the array inside.

A transform is any hashable object with `size`, `__call__(x, axis)` and `inverse(x, axis)`, orthonormal, such as
`qwix.contrib.hadamard.HadamardTransform`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qwix._src import nnx_nodes, provenance
from qwix._src.core import pytree, qarray
from qwix._src.providers.with_aux import WithAux, concatenate_qarrays


@nnx_nodes.register
@pytree.array_structure
class WithInputTransform(WithAux):
    """A transformed weight: float or quantized, in the place of the weight itself. Layout changes carry the transforms.

    Attributes:
      array: the transformed weight: a float array, a QArray, or another `WithAux`; its leaves may be boxed.
      how: of the QArray; of a float array, what is transformed (static).
      transforms: pairs of an axis of the weight, counted from the end, and what was done along it (static).

    >>> from qwix.contrib.hadamard import HadamardTransform
    >>> how = qarray.HowToQuantize(qtype=jnp.float32)
    >>> w = WithInputTransform(jnp.eye(4), how, transforms=((-2, HadamardTransform(4, None)),))
    >>> jnp.asarray(w)[0].tolist(), w.T.transforms[0][0]
    ([0.5, 0.5, 0.5, 0.5], -1)
    """

    transforms: tuple[tuple[int, Any], ...] = pytree.static(default=())
    replace: ClassVar[Callable[..., WithInputTransform]]

    def inner(self) -> Any:
        """The transformed weight as what an op takes: a float array, or a `WithAux`."""
        value: Any = self.value
        return WithAux(value.array, value.how) if isinstance(value.array, qarray.QArray) else value.array

    def holding(self, inner: Any) -> WithInputTransform:
        """Itself with another transformed weight inside, in the form of `inner()`; leaves may be boxed."""
        if type(inner) is WithAux:
            return self.replace(array=inner.array, how=inner.how)
        return self.replace(array=inner)

    def transformed(self, weight: Any) -> Any:
        """What `inner()` is for another float weight (or `jax.ShapeDtypeStruct`), in the shape of this one."""

        def transform(x: jax.Array) -> jax.Array:
            x = x.reshape(self.shape)
            for axis, transform in self.transforms:
                x = transform(x, axis)
            return x

        return jax.eval_shape(transform, weight) if isinstance(weight, jax.ShapeDtypeStruct) else transform(weight)

    def _changed(self, array: Any, change: Callable[[qarray.QArray], Any]) -> WithInputTransform:
        """`array`, a changed layout of the weight, with the axes of its transforms; `change` is that of a QArray."""
        transforms = []
        for axis, transform in self.transforms:
            # To a layout change, what is transformed is like an axis with a scale for each index.
            scale_shape = [size if i - self.ndim == axis else 1 for i, size in enumerate(self.shape)]
            probe = functools.partial(_probe, self.shape, tuple(scale_shape), change)
            found = jax.eval_shape(probe).scale.shape
            axes = [i - len(found) for i, size in enumerate(found) if size != 1]
            if len(axes) != 1 or found[axes[0]] != transform.size or array.shape[axes[0]] != transform.size:
                raise ValueError(
                    f"a weight of shape {self.shape} that is transformed along axis {axis} cannot become one of shape "
                    f"{tuple(array.shape)}: the axis would not be whole. Leave this weight untransformed."
                )
            transforms.append((axes[0], transform))
        value: Any = self.value
        return value.replace(array=array, transforms=tuple(transforms))

    def apply_layout(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        array = self.value.array

        def change(x: Any) -> Any:
            return provenance.apply_layout(function, x, args, kwargs)

        if isinstance(array, WithAux):
            results = array.apply_layout(function, *args, **kwargs)
        elif isinstance(array, qarray.QArray):
            results = change(array)
        else:
            results = provenance.follow_views(function, array, *args, **kwargs)
        if results is None:
            raise TypeError(f"{getattr(function, '__name__', function)} of a transformed weight is no layout change")
        if isinstance(results, list | tuple):
            return [self._changed(x, functools.partial(_item, change, i)) for i, x in enumerate(results)]
        return self._changed(results, change)

    def __getitem__(self, key: Any) -> WithInputTransform:
        value: Any = self.value
        if key is Ellipsis:
            return value
        array = value.array
        taken = array[key] if isinstance(array, WithAux) else qarray.rewriting_take(array, key)
        return self._changed(taken, lambda x: qarray.rewriting_take(x, key))

    def astype(self, dtype: jax.typing.DTypeLike) -> WithInputTransform:
        value: Any = self.value
        array = value.array.astype(dtype) if value.dtype != dtype else value.array
        provenance.follow_same(value.array, array)
        return value.replace(array=array)

    def reshape(self, *shape: Any) -> WithInputTransform:
        new = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if tuple(new) == tuple(self.shape):
            return self.value  # type: ignore[return-value]
        return self.apply_layout(jnp.reshape, tuple(new))

    def transpose(self, *axes: Any) -> WithInputTransform:
        new = axes[0] if len(axes) == 1 and isinstance(axes[0], Sequence | None) else axes
        return self.apply_layout(jnp.transpose, tuple(new) if new else None)

    def swapaxes(self, axis1: int, axis2: int) -> WithInputTransform:
        return self.apply_layout(jnp.swapaxes, axis1, axis2)

    @staticmethod
    def concatenate(arrays: Sequence[Any], axis: int = 0, **kwargs: Any) -> Any:
        """Weights joined that are transformed alike; otherwise, the float weights joined."""
        axis = kwargs.pop("dimension", axis)
        first = arrays[0]
        alike = all(isinstance(x, WithInputTransform) and x.transforms == first.transforms for x in arrays)
        parts = [x.value.array for x in arrays] if alike else []
        along = axis % first.ndim - first.ndim
        if not alike or any(a == along for a, _ in first.transforms) or len({type(x) for x in parts}) > 1:
            return jnp.concatenate([jnp.asarray(x) for x in arrays], axis)
        if isinstance(parts[0], qarray.QArray):
            joined: Any = concatenate_qarrays(parts, axis)
        elif isinstance(parts[0], WithAux):
            joined = parts[0].concatenate(parts, axis)
        else:
            joined = jnp.concatenate(parts, axis)
        return first.value.replace(array=joined)

    def __jax_array__(self) -> jax.Array:
        """The float weight as it was before the transforms."""
        inner = self.inner()
        weight = inner.__jax_array__() if isinstance(inner, WithAux) else inner
        for axis, transform in reversed(self.transforms):
            weight = transform.inverse(weight, axis)
        return weight


def _probe(shape: tuple[int, ...], scale_shape: tuple[int, ...], change: Callable[[qarray.QArray], Any]) -> Any:
    return change(qarray.QArray(jnp.zeros(shape, jnp.int8), jnp.zeros(scale_shape)))


def _item(change: Callable[[Any], Any], i: int, x: Any) -> Any:
    return change(x)[i]
