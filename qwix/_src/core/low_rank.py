"""Low-rank updates of a weight, for any op: what A and B are, and what they add to its output.

A weight W of an op gets an update of rank r (LoRA, arXiv 2106.09685, section 4.1)

    ΔW = A B,        op(x, W + c ΔW) = op(x, W) + c op(x, A) B,

where A takes the axes of W that meet the input and B those that go to the output. `Factors` says which axes
of W are the axes of A and of B; everything else follows from it: shapes, ΔW, and the best A and B for a given matrix.

>>> factors, labels = of_dot_general((((1,), (0,)), ((), ())), ((2, 6), (6, 4)), weight=1)
>>> factors.shapes(rank=3)
((6, 3), (3, 4))
>>> a, b = jnp.ones((6, 3)), jnp.ones((3, 4))
>>> update(labels, factors, [jnp.ones((2, 6))], a, b).shape, factors.product(a, b).shape
((2, 4), (6, 4))
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum

from qwix._src.core import einsum_info, operands

# Axes of the weight that one axis of A or B is made of, or None for the rank.
Axes = tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Factors:
    """How A and B are made of the axes of a weight.

    Attributes:
      shape: of the weight, as the op sees it.
      a: for each axis of A the axes of the weight that are flattened to it; None for the rank.
      b: likewise for B.

    >>> Factors((4, 5, 12), ((0, 1), None), (None, (2,))).shapes(rank=2)
    ((20, 2), (2, 12))
    """

    shape: tuple[int, ...]
    a: tuple[Axes, ...]
    b: tuple[Axes, ...]

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""

        def sizes(axes: tuple[Axes, ...]) -> tuple[int, ...]:
            return tuple(rank if group is None else math.prod(self.shape[i] for i in group) for group in axes)

        return sizes(self.a), sizes(self.b)

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """ΔW = A B in the layout of the weight, in float32 or wider; leading axes that both have more are stacked."""
        extra = a.ndim - len(self.a)
        if extra:
            return jax.vmap(self.product)(a, b)
        left, right = self.split(a, b)
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        return jnp.einsum(
            left.labels + "," + right.labels + "->" + _labels(range(len(self.shape))),
            left.array.astype(dtype),
            right.array.astype(dtype),
            precision=jax.lax.Precision.HIGHEST,
        )

    def split(self, a: jax.Array, b: jax.Array) -> tuple[_Labelled, _Labelled]:
        """A and B with an axis for each axis of the weight, labelled as by `_labels`."""

        def unflatten(array: jax.Array, axes: tuple[Axes, ...]) -> _Labelled:
            shape: list[int] = []
            for size, group in zip(array.shape, axes, strict=True):
                shape += [size] if group is None else [self.shape[i] for i in group]
            labels = "".join(_RANK if group is None else _labels(group) for group in axes)
            return _Labelled(array.reshape(shape), labels)

        return unflatten(a, self.a), unflatten(b, self.b)

    def scale_columns(self, weight: jax.Array, ratio: jax.Array) -> jax.Array:
        """A weight times one factor for each index of B's axes, such as a magnitude over a norm."""
        own = [i for group in self.b if group is not None for i in group]
        order = sorted(range(len(own)), key=lambda j: own[j])
        ratio = ratio.reshape([self.shape[i] for i in own]).transpose(order)
        return weight * ratio.reshape([n if i in own else 1 for i, n in enumerate(self.shape)])

    @property
    def shared(self) -> tuple[int, ...]:
        """Axes of the weight that both A and B have: each index of them has a product of its own."""
        in_a = {i for group in self.a if group is not None for i in group}
        return tuple(i for group in self.b if group is not None for i in group if i in in_a)

    def factorize(self, weight: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
        """The A and B of a rank that minimize ‖weight - A B‖, with the singular values shared equally.

        A = U √S, B = √S Vᵀ of the truncated singular value decomposition (Eckart and Young, 1936) of the matrix whose
        rows are the axes of A and whose columns are those of B; one for each index of the shared axes. float32.
        """
        shared = self.shared
        rows = [i for group in self.a if group is not None for i in group if i not in shared]
        columns = [i for group in self.b if group is not None for i in group if i not in shared]
        sizes = [[self.shape[i] for i in axes] for axes in (shared, rows, columns)]
        batch, height, width = (math.prod(s) for s in sizes)
        matrix = weight.astype(jnp.float32).transpose(*shared, *rows, *columns).reshape(batch, height, width)
        u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
        root = jnp.sqrt(s[:, :rank])
        kept = root.shape[1]
        left, right = u[:, :, :kept] * root[:, None, :], root[:, :, None] * v[:, :kept]
        missing = rank - kept  # a matrix of lower rank than asked for
        left, right = jnp.pad(left, ((0, 0), (0, 0), (0, missing))), jnp.pad(right, ((0, 0), (0, missing), (0, 0)))
        a = _arrange(left.reshape(*sizes[0], *sizes[1], rank), [*shared, *rows, None], self.a)
        b = _arrange(right.reshape(*sizes[0], rank, *sizes[2]), [*shared, None, *columns], self.b)
        shapes = self.shapes(rank)
        return a.reshape(shapes[0]), b.reshape(shapes[1])


@dataclasses.dataclass(frozen=True)
class _Labelled:
    array: jax.Array
    labels: str


_RANK = opt_einsum.get_symbol(0)


def _labels(axes: Sequence[int] | range) -> str:
    return "".join(opt_einsum.get_symbol(1 + i) for i in axes)


def _arrange(array: jax.Array, have: Sequence[int | None], want: tuple[Axes, ...]) -> jax.Array:
    """An array with the axes `have` in the order of the flattened groups `want`."""
    flat = [i for group in want for i in ((None,) if group is None else group)]
    return array.transpose([have.index(i) for i in flat])


@dataclasses.dataclass(frozen=True)
class Labels:
    """An op as an einsum: the labels of the operands beside the weight, of the weight, and of the output."""

    others: tuple[str, ...]
    weight: str
    out: str

    def place(self, factors: Factors, norms: jax.Array) -> jax.Array:
        """An array of B's axes but for the rank, such as `column_norms`, laid on the output.

        Raises:
          NotImplementedError: the op sums over one of these axes.
        """
        own = [self.weight[i] for group in factors.b if group is not None for i in group]
        if not set(own) <= set(self.out):
            raise NotImplementedError(f"the op sums over axes of the output features ({self.weight}->{self.out})")
        order = sorted(range(len(own)), key=lambda i: self.out.index(own[i]))
        sizes = dict(zip(own, norms.shape, strict=True))
        return norms.transpose(order).reshape([sizes.get(c, 1) for c in self.out])


def of_dot_general(
    dimension_numbers: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]], weight: int
) -> tuple[Factors, Labels]:
    """The factors of a `jax.lax.dot_general`: A (batch..., contracted, rank), B (batch..., rank, remaining).

    The contracted axes are flattened to one, and so are the remaining ones.

    Args:
      dimension_numbers: of the dot_general.
      shapes: of its operands.
      weight: which operand is the weight, 0 or 1.

    >>> of_dot_general((((2,), (1,)), ((0,), (0,))), ((3, 7, 12), (3, 12, 5)), weight=1)[0].shapes(rank=2)
    ((3, 12, 2), (3, 2, 5))
    """
    ndims = (len(shapes[0]), len(shapes[1]))
    contracting, batch = operands.canonical_dimension_numbers(dimension_numbers, ndims)
    labels = [[""] * ndims[0], [""] * ndims[1]]
    symbols = iter(opt_einsum.get_symbol(i) for i in range(sum(ndims)))
    for pairs in (batch, contracting):
        for left, right in zip(*pairs, strict=True):
            labels[0][left] = labels[1][right] = next(symbols)
    remaining: list[list[int]] = []
    for side in (0, 1):
        remaining.append([i for i, label in enumerate(labels[side]) if not label])
        for i in remaining[side]:
            labels[side][i] = next(symbols)
    out = "".join([labels[0][i] for i in batch[0]] + [labels[s][i] for s in (0, 1) for i in remaining[s]])
    each = tuple((i,) for i in batch[weight])
    factors = Factors(
        tuple(shapes[weight]),
        (*each, tuple(contracting[weight]), None),
        (*each, None, tuple(remaining[weight])),
    )
    return factors, Labels(("".join(labels[1 - weight]),), "".join(labels[weight]), out)


def of_einsum(einsum_str: str, shapes: Sequence[tuple[int, ...]], weight: int) -> tuple[Factors, Labels]:
    """The factors of an einsum: A keeps the axes that the weight shares with other operands, B has the rest.

    Args:
      einsum_str: of any number of operands.
      shapes: of the operands.
      weight: which operand is the weight.

    Raises:
      NotImplementedError: the weight has a label twice.

    >>> of_einsum("BTD,DNH->BTNH", ((2, 7, 12), (12, 4, 5)), weight=1)[0].shapes(rank=3)
    ((12, 3), (3, 4, 5))
    """
    inputs, out = einsum_info.parse_subscripts(einsum_str, tuple(map(len, shapes)))
    labels = inputs[weight]
    if len(set(labels)) != len(labels):
        raise NotImplementedError(f"the weight of einsum {einsum_str!r} has a label twice")
    others = inputs[:weight] + inputs[weight + 1 :]
    elsewhere = set("".join(others))
    shared = [i for i, label in enumerate(labels) if label in elsewhere]
    rest = [i for i, label in enumerate(labels) if label not in elsewhere]
    factors = Factors(
        tuple(shapes[weight]),
        (*((i,) for i in shared), None),
        (None, *((i,) for i in rest)),
    )
    return factors, Labels(others, labels, out)


def of_conv(dims: jax.lax.ConvDimensionNumbers, shape: tuple[int, ...]) -> Factors:
    """The factors of a convolution's kernel: A is a kernel with `rank` out-features, B is (rank, out-features).

    >>> dims = jax.lax.conv_dimension_numbers((1, 8, 8, 4), (3, 3, 4, 6), ("NHWC", "HWIO", "NHWC"))
    >>> of_conv(dims, (3, 3, 4, 6)).shapes(rank=2)
    ((3, 3, 4, 2), (2, 6))
    """
    out = dims.rhs_spec[0]
    return Factors(shape, tuple(None if i == out else (i,) for i in range(len(shape))), (None, (out,)))


def of_take(shape: tuple[int, ...], axis: int) -> Factors:
    """The factors of a lookup table: A (entries, rank), B (rank, ...).

    >>> of_take((100, 8), 0).shapes(rank=2)
    ((100, 2), (2, 8))
    """
    return Factors(shape, ((axis,), None), (None, *((i,) for i in range(len(shape)) if i != axis)))


def update(
    labels: Labels,
    factors: Factors,
    others: Sequence[jax.Array],
    a: jax.Array,
    b: jax.Array,
    *,
    precision: jax.lax.PrecisionLike = None,
    out_sharding: Any = None,
) -> jax.Array:
    """What A B adds to the output of an einsum or dot_general: first with A, then with B; no product of both.

    Args:
      labels: the op.
      factors: how A and B relate to its weight.
      others: the operands beside the weight, in order.
      a: A.
      b: B.
      precision: as in the op.
      out_sharding: of the op's output; what stands between the two products is sharded as far as it says.

    Returns:
      Of the promoted dtype of operands, A and B, in the shape of the op's output.
    """
    left, right = factors.split(a, b)
    rank = next(opt_einsum.get_symbol(i) for i in range(1000) if opt_einsum.get_symbol(i) not in _all(labels))
    spell = {symbol: label for symbol, label in zip(_labels(range(len(labels.weight))), labels.weight, strict=True)}
    spell[_RANK] = rank
    a_labels, b_labels = ("".join(spell[c] for c in x.labels) for x in (left, right))
    # Of B's axes only those that A has too (batch axes), and the rank, have to be there before B is.
    own = set(b_labels) - set(a_labels)
    between = "".join(c for c in labels.out if c not in own) + rank
    kwargs: dict[str, Any] = {"precision": precision}
    sharding: dict[str, Any] = {}
    if out_sharding is not None:
        sharding = {"out_sharding": out_sharding}
        spec = out_sharding.spec if isinstance(out_sharding, jax.NamedSharding) else out_sharding
        names = dict(zip(labels.out, (*spec, *[None] * (len(labels.out) - len(spec))), strict=True))
        middle = jax.P(*(names.get(c) for c in between))
        if isinstance(out_sharding, jax.NamedSharding):
            middle = jax.NamedSharding(out_sharding.mesh, middle)  # type: ignore[assignment]
        kwargs["out_sharding"] = middle
    hidden = jnp.einsum(",".join((*labels.others, a_labels)) + "->" + between, *others, left.array, **kwargs)
    return jnp.einsum(f"{between},{b_labels}->{labels.out}", hidden, right.array, **(kwargs | sharding))


def _all(labels: Labels) -> set[str]:
    return set("".join((*labels.others, labels.weight, labels.out)))


def update_of_conv(
    dims: jax.lax.ConvDimensionNumbers,
    image: jax.Array,
    a: jax.Array,
    b: jax.Array,
    **kwargs: Any,
) -> jax.Array:
    """What A B adds to the output of a convolution; `kwargs` are the other arguments of the convolution."""
    dtype = jnp.result_type(image, a)
    hidden = jax.lax.conv_general_dilated(image.astype(dtype), a.astype(dtype), dimension_numbers=dims, **kwargs)
    features = dims.out_spec[1]
    return jnp.moveaxis(jnp.tensordot(hidden, b, axes=((features,), (0,))), -1, features)


def column_norms(factors: Factors, weight: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    """‖W + c A B‖ over the axes that only A has: one for each index of the others; what DoRA divides by.

    With a = A, b = B of one column, ‖w + c A b‖² = ‖w‖² + 2c (wᵀA) b + c² bᵀ(AᵀA) b, so that no matrix of the size of
    W is needed beside W. float32, in the order of B's axes, none of them flattened.

    >>> factors = Factors((2, 3), ((0,), None), (None, (1,)))
    >>> column_norms(factors, jnp.eye(2, 3), jnp.ones((2, 1)), jnp.zeros((1, 3)).at[0, 2].set(4), 0.75).round(2)
    Array([1.  , 1.  , 4.24], dtype=float32)
    """
    left, right = factors.split(a.astype(jnp.float32), b.astype(jnp.float32))
    every = _labels(range(len(factors.shape)))
    out = right.labels.replace(_RANK, "")
    weight = weight.astype(jnp.float32)
    shared = "".join(c for c in left.labels if c in right.labels and c != _RANK)
    twin = opt_einsum.get_symbol(1 + len(every))
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    with_a = einsum(f"{every},{left.labels}->{out}{_RANK}", weight, left.array)
    gram = einsum(f"{left.labels},{left.labels.replace(_RANK, twin)}->{shared}{_RANK}{twin}", left.array, left.array)
    squares = (
        einsum(f"{every},{every}->{out}", weight, weight)
        + 2 * scaling * einsum(f"{out}{_RANK},{right.labels}->{out}", with_a, right.array)
        + scaling**2
        * einsum(
            f"{right.labels},{shared}{_RANK}{twin},{right.labels.replace(_RANK, twin)}->{out}",
            right.array,
            gram,
            right.array,
        )
    )
    return jnp.sqrt(jnp.maximum(squares, np.finfo(np.float32).tiny))
