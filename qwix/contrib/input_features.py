"""What a weight is multiplied with: the activations of an op as (input features, samples).

    y = einsum("bte,ehd->bthd", x, w)     features: e,  samples: b, t

*Input features* are the elements of the weight's contracted axes, in row-major order of the axes that the quantized
model stores it in. A convolution is a matmul with patches of its input (im2col), whose features are the input channels
at each position of the kernel.

A weight may be several matrices that meet different activations: along a batch axis, in the feature groups of a
convolution, or as the experts of a ragged_dot. *Groups* are these; they are axes of the stored weight, or parts of one.
`Use.features(per_group=False)` counts the activations of all groups as samples of one.

`of_dot_general`, `of_conv` and `of_ragged_dot` give the `Use`s of weights in an op: none if no operand is one, or each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src import provenance
from qwix._src.core import operands as core_operands
from qwix._src.utils import flax_util


@dataclasses.dataclass(frozen=True)
class Features:
    """The activations that a weight meets in one op.

    Attributes:
      ref: which parameter it is.
      x: (features, samples); with `groups` and no `group_of_sample`, (number of groups, features, samples).
      groups: () if the weight is one matrix. Else for each axis of the stored weight the number of groups along it, so
        that the axis is a multiple of it. Groups are numbered in row-major order of these.
      group_of_sample: (samples,) the group of each, where samples are sorted into groups; one that is none counts for
        none.
      shape: of the parameter as the op sees it: without the axes of layers that a scan or vmap stacked.
      axes: of `shape`, those that the features run over, ascending; () if it was reshaped first.
    """

    ref: provenance.ParamRef
    x: jax.Array
    groups: tuple[int, ...] = ()
    group_of_sample: jax.Array | None = None
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    def map_groups(self, compute: Callable[[jax.Array], Any]) -> Any:
        """compute((features, samples)) of each group, with the axes `groups` in front of each result's.

        Samples of other groups are zeros.

        >>> f = Features(None, jnp.array([[1.0, 2.0, 4.0]]), (2,), jnp.array([0, 1, 1]))
        >>> f.map_groups(lambda x: x.sum(1)).tolist()
        [[1.0], [6.0]]
        """
        if not self.groups:
            return compute(self.x)
        if self.group_of_sample is None:
            results = jax.vmap(compute)(self.x)
        else:  # one after the other: the masked activations of all experts may be too many
            results = lax.map(
                lambda group: compute(jnp.where(self.group_of_sample == group, self.x, 0)),
                jnp.arange(math.prod(self.groups)),
            )
        return jax.tree.map(lambda leaf: leaf.reshape(*self.groups, *leaf.shape[1:]), results)


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight in an op, in terms of the op's operand.

    Attributes:
      ref: which parameter it is, and the steps from it to the operand.
      shape: of the operand.
      axes: its contracted axes, ascending.
      x: (groups, features, samples), features in row-major order of `axes`; (features, samples) with `group_of_sample`.
      group_axes: its axes that groups run over, ascending, with the size of a group along each: 1, but for the feature
        groups of a convolution. Groups are numbered in row-major order of these.
      group_of_sample: see `Features`.
    """

    ref: provenance.ParamRef
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    x: jax.Array
    group_axes: tuple[tuple[int, int], ...] = ()
    group_of_sample: jax.Array | None = None

    def features(self, *, per_group: bool) -> Features:
        """The activations in the order of the stored weight.

        Raises:
          ValueError: features or groups are not whole axes of the stored weight.
        """
        order, axes = _stored_order(self.ref, self.shape, self.axes)
        inside = max((i for i, view in enumerate(self.ref.views, 1) if view.kind == "map"), default=0)
        shape = tuple(next((view.in_shape for view in self.ref.views[inside:]), self.shape))
        if self.ref.views and self.ref.views[0].kind in ("reshape", "map"):
            axes = ()
        x = self.x if np.array_equal(order, np.arange(len(order))) else self.x[..., order, :]
        if self.group_of_sample is not None:
            if not per_group:
                return Features(self.ref, jnp.where(self.group_of_sample >= 0, x, 0), shape=shape, axes=axes)
            return Features(self.ref, x, self._stored_groups()[0], self.group_of_sample, shape, axes)
        if not self.group_axes or not per_group:
            # Groups are samples: (groups, features, samples) -> (features, groups * samples).
            x = x[0] if len(x) == 1 else jnp.moveaxis(x, 0, 1).reshape(len(order), -1)
            return Features(self.ref, x, shape=shape, axes=axes)
        groups, group_order = self._stored_groups()
        moved = not np.array_equal(group_order, np.arange(len(group_order)))
        return Features(self.ref, x[group_order] if moved else x, groups, shape=shape, axes=axes)

    def _stored_groups(self) -> tuple[tuple[int, ...], np.ndarray]:
        """The groups along each stored axis, and for each of them which one of `x` it is."""
        granularity: list[int | None] = [None] * len(self.shape)
        for axis, size in self.group_axes:
            granularity[axis] = size
        if any(size != 1 for _, size in self.group_axes):
            order = np.arange(self.shape[self.group_axes[0][0]] // self.group_axes[0][1])  # of a convolution
        else:
            order, _ = _stored_order(self.ref, self.shape, [axis for axis, _ in self.group_axes])
        shape, views = self.shape, _stored_views(self.ref)
        for view in reversed(views):
            granularity, shape = list(view.pull(granularity)), view.in_shape
        groups = tuple(1 if tile is None else size // tile for size, tile in zip(shape, granularity, strict=True))
        mapped = [view for view in views if view.kind == "map"]
        if mapped or math.prod(groups) != len(order):
            raise ValueError(f"the groups of the op are not whole axes of the parameter of shape {shape}")
        return groups, order


def sharding_of(weight: Any, axes: Sequence[int], groups: Sequence[int]) -> jax.sharding.NamedSharding | None:
    """How statistics of a weight's inputs are sharded: their features, and groups, as these axes of the weight.

    Args:
      weight: an array.
      axes: of it, counted from the last one, that the features run over; () if unknown.
      groups: see `Features`.

    Returns:
      The sharding of the first axes of a statistic; None if the weight is not sharded along them.
    """
    sharding = getattr(weight, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or not axes:
        return None
    spec = (*sharding.spec, *[None] * (weight.ndim - len(sharding.spec)))
    aligned = len(groups) == weight.ndim  # else there are axes of layers, of which some are no groups
    of_groups = [spec[i] if aligned and n > 1 else None for i, n in enumerate(groups)]
    found = [*of_groups, spec[axes[0]]]
    return jax.sharding.NamedSharding(sharding.mesh, jax.P(*found)) if any(found) else None


def sharded(stats: Mapping[str, jax.Array], sharding: jax.sharding.NamedSharding | None) -> dict[str, jax.Array]:
    """Statistics with the sharding of `sharding_of`."""
    if sharding is None:
        return dict(stats)

    def place(x: jax.Array) -> jax.Array:
        placed = jax.sharding.NamedSharding(sharding.mesh, jax.P(*sharding.spec[: x.ndim]))
        return jax.lax.with_sharding_constraint(x, placed)

    return {name: place(x) for name, x in stats.items()}


def of_dot_general(lhs: Any, rhs: Any, dimension_numbers: Any) -> Iterator[Use]:
    """The weight of a dot_general: one operand, or the parameters that were concatenated to it."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = core_operands.canonical_dimension_numbers(
        dimension_numbers, (lhs.ndim, rhs.ndim)
    )
    refs = [flax_util.find_ref(lhs), flax_util.find_ref(rhs)]
    if sum(ref is not None for ref in refs) != 1:  # no weight; or two, and no activations
        return
    if refs[0] is None:
        ref, weight, x = refs[1], rhs, lhs
        axes, batch = dict(zip(rhs_axes, lhs_axes, strict=True)), dict(zip(rhs_batch, lhs_batch, strict=True))
    else:
        ref, weight, x = refs[0], lhs, rhs
        axes, batch = dict(zip(lhs_axes, rhs_axes, strict=True)), dict(zip(lhs_batch, rhs_batch, strict=True))
    for part, start, shape in _parts(ref, weight.shape):
        activations = x
        joined = None if part is ref else ref.axis  # type: ignore[union-attr]
        if joined in axes or joined in batch:
            along = axes[joined] if joined in axes else batch[joined]
            activations = lax.slice_in_dim(x, start, start + shape[joined], axis=along)
        features, groups = [axes[axis] for axis in sorted(axes)], [batch[axis] for axis in sorted(batch)]
        samples = [axis for axis in range(x.ndim) if axis not in (*features, *groups)]
        sizes = [math.prod(activations.shape[axis] for axis in group) for group in (groups, features, samples)]
        laid_out = lax.transpose(activations, (*groups, *features, *samples)).reshape(sizes)
        yield Use(part, shape, tuple(sorted(axes)), laid_out, tuple((axis, 1) for axis in sorted(batch)))


def of_conv(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> Iterator[Use]:
    """The kernel of a convolution, with the patches of the input that it meets."""
    del precision, preferred_element_type
    ref = flax_util.find_ref(rhs)
    if not isinstance(ref, provenance.ParamRef) or flax_util.find_ref(lhs) is not None or batch_group_count != 1:
        return
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    out_axis, in_axis, *spatial = numbers.rhs_spec
    patches = lax.conv_general_dilated_patches(
        lhs,
        [rhs.shape[axis] for axis in spatial],
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers=numbers,
    )
    # Features of patches: input channels, then positions in the kernel.
    x = jnp.moveaxis(patches, numbers.out_spec[1], 0)
    x = x.reshape(feature_group_count, *(rhs.shape[axis] for axis in (in_axis, *spatial)), -1)
    axes = tuple(sorted((in_axis, *spatial)))
    x = x.transpose(0, *(1 + (in_axis, *spatial).index(axis) for axis in axes), x.ndim - 1)
    groups = ((out_axis, rhs.shape[out_axis] // feature_group_count),) if feature_group_count > 1 else ()
    yield Use(ref, rhs.shape, axes, x.reshape(feature_group_count, -1, x.shape[-1]), groups)


def of_ragged_dot(lhs: Any, rhs: Any, group_sizes: jax.Array, *_: Any, **kwargs: Any) -> Iterator[Use]:
    """The experts (groups, in, out) of a ragged_dot, with the rows of lhs (rows, in) sorted into them."""
    ref = flax_util.find_ref(rhs)
    if not isinstance(ref, provenance.ParamRef) or kwargs.get("group_offset") is not None:
        return
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(lhs.shape[0]), side="right")
    group = jnp.where(group < rhs.shape[0], group, -1)
    yield Use(ref, rhs.shape, (1,), lhs.T, ((0, 1),), group)


def _parts(ref: Any, shape: tuple[int, ...]) -> Iterator[tuple[provenance.ParamRef, int, tuple[int, ...]]]:
    """(parameter, where it starts, its shape) of each parameter that an operand is a concatenation of."""
    if isinstance(ref, provenance.ParamRef):
        yield ref, 0, tuple(shape)
        return
    start = 0
    for part, size in zip(ref.parts, ref.sizes, strict=True):
        yield part, start, (*shape[: ref.axis], size, *shape[ref.axis + 1 :])
        start += size


def _stored_views(ref: provenance.ParamRef) -> tuple[provenance.View, ...]:
    """The steps from the parameter as the quantized model stores it: in the shape of a reshape that comes first."""
    return ref.views[1:] if ref.views and ref.views[0].kind == "reshape" else ref.views


def _stored_order(
    ref: provenance.ParamRef, shape: tuple[int, ...], axes: Sequence[int]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """For each element of some axes of the stored weight, which one of the operand it is; and these axes, ascending.

    Args:
      ref: the steps from the parameter to the operand.
      shape: the operand's.
      axes: axes of the operand, ascending.

    Raises:
      ValueError: these elements are not whole axes of the stored weight.
    """
    axes = list(axes)
    order = np.arange(math.prod(shape[axis] for axis in axes))
    granularity: tuple[Any, ...] = tuple(None if axis in axes else 1 for axis in range(len(shape)))
    for view in reversed(_stored_views(ref)):
        granularity = view.pull(granularity)
        if view.kind == "transpose":
            sources = [view.arg[axis] for axis in axes]
            order = order.reshape([shape[axis] for axis in axes]).transpose(np.argsort(sources)).ravel()
            axes = sorted(sources)
        else:
            axes = [axis for axis, tile in enumerate(granularity) if tile is None]
        shape = view.in_shape
        if math.prod(shape[axis] for axis in axes) != len(order):
            raise ValueError(
                f"the op contracts {len(order)} elements of it, which are not whole axes of the parameter of shape "
                f"{shape}"
            )
    return order, tuple(axes)
