"""Einsum strings: their labels, their order of contraction, and each pair as a dot_general.

    >>> info = EinsumInfo.parse("bqhd,bkhd->bhqk")
    >>> info.dimension_numbers
    (((3,), (3,)), ((0, 2), (0, 2)))
    >>> info.output_perm is None  # dot_general already gives b, h, q, k
    True

Everything here works on strings and shapes, so it is cached and costs nothing on a second trace.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import opt_einsum

from qwix._src.core import qarray
from qwix._src.core.operands import DotDimensionNumbers, MaybeQArray


@dataclasses.dataclass(frozen=True)
class EinsumInfo:
    """A binary einsum as a `jax.lax.dot_general` and a transpose of its output.

    A label of both operands and of the output is a batch axis, one of both operands and not of the
    output a contracting axis, any other a remaining axis.

    Attributes:
      lhs: the labels of the left operand, one a axis, no ellipsis.
      rhs: the labels of the right operand.
      out: the labels of the output.

    >>> EinsumInfo.parse("...ab,bc->...ca", ndims=(3, 2)).contract_chars
    ['b']
    """

    lhs: str
    rhs: str
    out: str

    @classmethod
    def parse(cls, einsum_str: str, ndims: tuple[int, int] | None = None) -> "EinsumInfo":
        """Reads a binary einsum string; `ndims`, the operands' ranks, is needed for an ellipsis.

        Raises:
          NotImplementedError: not two operands, a label twice in one operand (a diagonal), or an
            ellipsis without `ndims`. `einsum` itself takes all of these.
          ValueError: the string is no einsum.
        """
        info = parse_binary(einsum_str, ndims)
        for side, labels in (("lhs", info.lhs), ("rhs", info.rhs)):
            if len(set(labels)) != len(labels):
                raise NotImplementedError(
                    f'The {side} of einsum "{einsum_str}" repeats a label ("{labels}"): a diagonal '
                    "is not a dot_general."
                )
        return info

    @property
    def batch_chars(self) -> list[str]:
        """The labels of both operands and of the output, in alphabetical order."""
        return sorted(set(self.lhs) & set(self.rhs) & set(self.out))

    @property
    def contract_chars(self) -> list[str]:
        """The labels of both operands that the output lacks, in alphabetical order."""
        return sorted((set(self.lhs) & set(self.rhs)) - set(self.out))

    @property
    def dimension_numbers(self) -> DotDimensionNumbers:
        """The dimension numbers of `jax.lax.dot_general`."""
        contract, batch = self.contract_chars, self.batch_chars
        return (
            (_axes(self.lhs, contract), _axes(self.rhs, contract)),
            (_axes(self.lhs, batch), _axes(self.rhs, batch)),
        )

    @property
    def dot_general_out(self) -> str:
        """The labels of the dot_general's output: batch, rest of lhs, rest of rhs."""
        batch = self.batch_chars
        shared = {*batch, *self.contract_chars}
        return "".join([*batch, *(c for c in self.lhs + self.rhs if c not in shared)])

    @property
    def output_perm(self) -> tuple[int, ...] | None:
        """The permutation of the dot_general's output that gives `out`; None where it is `out`.

        Raises:
          NotImplementedError: a label of one operand only is missing in the output, so that it has
            to be summed, not transposed.
        """
        found = self.dot_general_out
        if sorted(found) != sorted(self.out):
            raise NotImplementedError(
                f'Einsum "{self.lhs},{self.rhs}->{self.out}" sums a label of one operand alone: '
                f'no permutation of the dot_general\'s output "{found}" gives its output.'
            )
        return None if found == self.out else _axes(found, self.out)


class Contraction(NamedTuple):
    """One pair of an einsum.

    Attributes:
      lhs: which operand; the n operands of the einsum are 0 to n - 1, the results of the steps
        follow.
      rhs: likewise.
      info: the labels of both and of the result.
    """

    lhs: int
    rhs: int
    info: EinsumInfo


def _axes(labels: str, wanted: Sequence[str]) -> tuple[int, ...]:
    return tuple(labels.index(c) for c in wanted)


@functools.lru_cache(maxsize=1024)
def parse_binary(einsum_str: str, ndims: tuple[int, int] | None = None) -> EinsumInfo:
    """`EinsumInfo.parse` that allows a label twice in one operand."""
    subscripts = einsum_str.partition("->")[0].split(",")
    if len(subscripts) != 2:
        raise NotImplementedError(f'Einsum "{einsum_str}" has not two operands.')
    if ndims is None:
        if "..." in einsum_str:
            raise NotImplementedError(f'Einsum "{einsum_str}" has an ellipsis: pass ndims.')
        first, second = (len(s.replace(" ", "")) for s in subscripts)
        ndims = (first, second)
    (lhs, rhs), out = parse_subscripts(einsum_str, ndims)
    return EinsumInfo(lhs, rhs, out)


@functools.lru_cache(maxsize=1024)
def parse_subscripts(einsum_str: str, ndims: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """The labels of each operand and of the output; ellipses and an implicit output spelled out.

    Args:
      einsum_str: any einsum string; spaces are ignored.
      ndims: the rank of each operand.

    Raises:
      ValueError: operands and `ndims` differ in number, a rank does not fit its labels, the output
        has a label twice or one that no operand has, or lacks the ellipsis that operands have.

    >>> parse_subscripts("...ab,bc", (3, 2))
    (('dab', 'bc'), 'dac')
    """
    inputs, arrow, out = einsum_str.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if len(subscripts) != len(ndims):
        raise ValueError(f'Einsum "{einsum_str}" names {len(subscripts)} operands, {len(ndims)} were given.')
    hidden = []
    for labels, ndim in zip(subscripts, ndims, strict=True):
        count = ndim - len(labels.replace("...", "", 1))
        if count < 0 or (count > 0 and "..." not in labels):
            raise ValueError(f'Operand "{labels}" of einsum "{einsum_str}" has the wrong rank: {ndim}.')
        hidden.append(count)
    # The axes of an ellipsis are aligned at the right, as in broadcasting.
    ellipsis = "".join(_unused_labels(einsum_str, max(hidden, default=0)))
    spelled = tuple(
        labels.replace("...", ellipsis[len(ellipsis) - count :], 1)
        for labels, count in zip(subscripts, hidden, strict=True)
    )
    joined = "".join(spelled)
    if not arrow:
        seen_once = sorted(c for c in set(joined) if joined.count(c) == 1 and c not in ellipsis)
        return spelled, ellipsis + "".join(seen_once)
    if ellipsis and "..." not in out:
        raise ValueError(f'The output of einsum "{einsum_str}" lacks the ellipsis of its operands.')
    out = out.replace("...", ellipsis, 1)
    if len(set(out)) != len(out) or not set(out) <= set(joined):
        raise ValueError(f'The output of einsum "{einsum_str}" has a label twice or one that no operand has.')
    return spelled, out


def _unused_labels(used: str, count: int) -> Iterator[str]:
    index = 0
    while count:
        label = opt_einsum.get_symbol(index)
        index += 1
        if label not in used:
            count -= 1
            yield label


@functools.lru_cache(maxsize=1024)
def contraction_steps(
    operands: tuple[str, ...],
    out: str,
    shapes: tuple[tuple[int, ...], ...],
    optimize: bool | str | tuple[tuple[int, ...], ...] = "auto",
) -> tuple[Contraction, ...]:
    """The pairs into which an einsum of two or more operands falls, in order.

    Args:
      operands: the labels of each operand, as of `parse_subscripts`, none of them twice in one.
      out: the labels of the output.
      shapes: the shape of each operand; they decide the order, by opt_einsum.
      optimize: as in `jax.numpy.einsum`; False contracts from left to right.

    Returns:
      The steps, the last of which gives the einsum's output. A label of one operand alone that the
      output lacks must have been summed before.

    >>> steps = contraction_steps(("ab", "bc", "c"), "a", ((9, 9), (9, 9), (9,)))
    >>> [(step.lhs, step.rhs) for step in steps]
    [(1, 2), (0, 3)]
    """
    path = _path(operands, out, shapes, optimize) if len(operands) > 2 else [(0, 1)]
    labels = list(operands)
    left = list(range(len(operands)))
    steps: list[Contraction] = []
    for positions in path:
        group = [left[p] for p in sorted(positions)]
        left = [operand for operand in left if operand not in group]
        lhs = group[0]
        for i, rhs in enumerate(group[1:], 2):
            rest = [*left, *group[i:]]
            used = set(out).union(*(labels[operand] for operand in rest))
            info = EinsumInfo(labels[lhs], labels[rhs], out)
            if rest:
                kept = "".join(c for c in dict.fromkeys(info.lhs + info.rhs) if c in used)
                # In the order that the dot_general gives, there is nothing to transpose.
                info = dataclasses.replace(info, out=kept)
                info = dataclasses.replace(info, out=info.dot_general_out)
            steps.append(Contraction(lhs, rhs, info))
            lhs = len(labels)
            labels.append(info.out)
        left.append(lhs)
    return tuple(steps)


def _path(
    operands: tuple[str, ...], out: str, shapes: tuple[tuple[int, ...], ...], optimize: Any
) -> list[tuple[int, ...]]:
    if optimize is False:
        return [tuple(range(len(operands)))]
    if isinstance(optimize, tuple):
        optimize = list(optimize[1:] if optimize[0] == "einsum_path" else optimize)
    path, _ = opt_einsum.contract_path(
        ",".join(operands) + "->" + out,
        *map(sanitize_shape, shapes),
        shapes=True,
        optimize=optimize,
    )
    return [tuple(positions) for positions in path]


def broadcast_operands(operands: Sequence[MaybeQArray], operand_subs_list: Sequence[str]) -> list[MaybeQArray]:
    """Stretches every axis of size 1 to the size that its label has elsewhere.

    Args:
      operands: arrays or QArrays.
      operand_subs_list: the labels of each.

    Raises:
      ValueError: a label has two sizes, neither of them 1.
    """
    sizes: dict[str, Any] = {}
    for operand, labels in zip(operands, operand_subs_list, strict=True):
        for label, size in zip(labels, operand.shape, strict=True):
            known = sizes.setdefault(label, size)
            if known not in (1, size) and size != 1:
                raise ValueError(f'Label "{label}" has sizes {known} and {size}.')
            if known == 1:
                sizes[label] = size
    stretched = []
    for operand, labels in zip(operands, operand_subs_list, strict=True):
        shape = tuple(sizes[label] for label in labels)
        stretched.append(operand if shape == tuple(operand.shape) else qarray.broadcast_to(operand, shape))
    return stretched


def sanitize_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """`shape` with 1 for every symbolic size: opt_einsum needs numbers, to compare costs only.

    >>> sanitize_shape((2, "batch", 3))
    (2, 1, 3)
    """
    return tuple(size if isinstance(size, int) else 1 for size in shape)
