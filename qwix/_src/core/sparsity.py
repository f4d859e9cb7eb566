"""Sparsity: which elements of an array stay, and which become zero.

*N:M sparsity* keeps the n largest magnitudes of each m elements (arXiv 2104.08378); GPUs run 2:4 up to twice as fast.
Which m elements make a group is said by `order` and `offset`, on the array read row by row:

| order, offset | a group of m is |
|---|---|
| 'R', 0 | neighbours in a row: along the last axis, where m divides it |
| 'C', 0 | neighbours in a column: along the axis before |
| either, k | every k-th element of a run of m k of them |

so that order 'R' with the width of a matrix as offset groups down its columns, as 'C' does where m divides those.
With a `block_size` b, runs of b elements are kept or pruned as one, by their mean magnitude.

*Unstructured sparsity* prunes a share of all elements, the smallest, wherever they stand. While training, that share
may grow (arXiv 1710.01878, equation 1): at step t between t0 and t1 the rate r is reached up to

    r (1 - (1 - (t - t0) / (t1 - t0))^3),

much at first, when there is much to choose from, and less and less.

>>> x = jnp.array([[1.0, -4.0, 3.0, 2.0]])
>>> prune_inputs_n_m(x, n=2, m=4).tolist()
[[0.0, -4.0, 3.0, 0.0]]
"""

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp

from qwix._src.core import qarray
from qwix._src.core.qarray import QArray

# Up to this size of a group, counting who is larger takes less time than sorting.
_LARGEST_COUNTED = 32


class SparsityError(ValueError, AssertionError):
    """n and m that are no N:M sparsity. Programs written for Qwix may expect an AssertionError."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityRule:
    """What to prune, and when.

    Attributes:
      weight_sparsity_n, weight_sparsity_m: of the weight, n of m elements stay; 0: all.
      weight_sparsity_order, weight_sparsity_block_size, weight_sparsity_offset: see the module's docstring.
      weight_sparsity_start_step: the first training step whose weights are pruned.
      weight_sparsity_update_step: the mask is found anew every so many steps from then on.
      eval_mode: keep the mask as it is.
      activation_sparsity_n, activation_sparsity_m, activation_sparsity_order, activation_sparsity_block_size,
        activation_sparsity_offset: likewise for activations, which are pruned in every call.
      weight_prune_rate, activation_prune_rate: instead of n and m: the per cent of the smallest elements of the whole
        array that are pruned; 0: none.
      weight_prune_end_step: the step from which on `weight_prune_rate` holds; from the start step to there the rate
        grows, see the module's docstring. 0: it holds at once.

    Raises:
      ValueError: a rate that is none, or beside n and m.
    """

    weight_sparsity_n: int = 0
    weight_sparsity_m: int = 0
    weight_sparsity_order: str = "R"
    weight_sparsity_block_size: int = 0
    weight_sparsity_offset: int = 0
    weight_sparsity_start_step: int = 0
    weight_sparsity_update_step: int = 1
    eval_mode: bool = False
    activation_sparsity_n: int = 0
    activation_sparsity_m: int = 0
    activation_sparsity_order: str = "R"
    activation_sparsity_block_size: int = 0
    activation_sparsity_offset: int = 0
    weight_prune_rate: float = 0.0
    weight_prune_end_step: int = 0
    activation_prune_rate: float = 0.0

    def __post_init__(self) -> None:
        for kind in ("weight", "activation"):
            rate = getattr(self, f"{kind}_prune_rate")
            if not 0 <= rate <= 100:
                raise ValueError(f"{kind}_prune_rate={rate} is no per cent: give a number of 0 to 100")
            if rate and getattr(self, f"{kind}_sparsity_n"):
                raise ValueError(
                    f"{kind}_prune_rate={rate} beside {kind}_sparsity_n={getattr(self, f'{kind}_sparsity_n')}: "
                    "prune single elements, or n of m, not both"
                )

    def prunes(self, kind: str) -> bool:
        """Whether anything of a 'weight' or 'activation' is pruned.

        >>> SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4).prunes("activation")
        False
        """
        n, m, rate = (getattr(self, f"{kind}_{name}") for name in ("sparsity_n", "sparsity_m", "prune_rate"))
        return bool((n and m) or rate)

    def mask(self, kind: str, array: Any, step: Any = None) -> jax.Array:
        """The mask of an array or QArray that is a 'weight' or an 'activation'.

        Args:
          kind: which of them.
          array: what is to be pruned.
          step: of the training, an integer or traced; None: when the rate of a weight no longer grows.
        """
        rate = getattr(self, f"{kind}_prune_rate")
        if not rate:
            names = ("n", "m", "order", "block_size", "offset")
            return get_sparsity_mask(array, *(getattr(self, f"{kind}_sparsity_{name}") for name in names))
        start, end = self.weight_sparsity_start_step, self.weight_prune_end_step
        if kind == "weight" and step is not None and end > start:
            remaining = 1 - jnp.clip((step - start) / (end - start), 0, 1)
            rate = rate * (1 - remaining**3)
        return get_sparsity_mask_unstructured(array, None, rate)


@overload
def apply_sparsity(
    inputs: jax.Array, mask: jax.Array, is_channelwise: bool = False, pruned_value: jax.Array | None = None
) -> jax.Array: ...


@overload
def apply_sparsity(
    inputs: QArray, mask: jax.Array, is_channelwise: bool = False, pruned_value: jax.Array | None = None
) -> QArray: ...


@overload
def apply_sparsity(
    inputs: jax.Array | QArray, mask: jax.Array, is_channelwise: bool = False, pruned_value: jax.Array | None = None
) -> jax.Array | QArray: ...


def apply_sparsity(
    inputs: jax.Array | QArray,
    mask: jax.Array,
    is_channelwise: bool = False,
    pruned_value: jax.Array | None = None,
) -> jax.Array | QArray:
    """inputs where the mask is set, 0 elsewhere.

    Args:
      inputs: an array; of a QArray, pruned elements get the qvalue that stands for 0.
      mask: bool or 0 and 1, of inputs' shape or broadcast to it.
      is_channelwise: says that the mask has an entry for each index of the last axis; it is broadcast either way.
      pruned_value: what pruned elements are multiplied with, instead of becoming 0.

    >>> apply_sparsity(jnp.array([1.0, 2.0]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    del is_channelwise
    mask = jnp.asarray(mask).astype(bool)
    if isinstance(inputs, QArray):
        array = qarray.unwrap(inputs)
        if pruned_value is not None:
            raise ValueError("pruned_value is for float arrays: dequantize the QArray first")
        if array.zero_point is None:
            zero: jax.Array = jnp.zeros((), array.qvalue.dtype)
        else:
            zero = qarray.broadcast_to(array.zero_point, array.shape)
        return array.replace(qvalue=jnp.where(mask, array.qvalue, zero))
    pruned = jnp.zeros_like(inputs) if pruned_value is None else (inputs * pruned_value).astype(inputs.dtype)
    return jnp.where(mask, inputs, pruned)


def get_sparsity_mask(
    inputs: jax.Array | QArray,
    n_sparsity: int = 0,
    m_sparsity: int = 0,
    order: str = "R",
    block_size: int = 0,
    offset: int = 0,
) -> jax.Array:
    """The mask of N:M sparsity: True for the n largest magnitudes of each group of m.

    Of equal ones the first stay; NaN counts as largest, so that it does not vanish.

    Args:
      inputs: an array, or a QArray, whose dequantized elements are compared.
      n_sparsity, m_sparsity: n of m elements stay.
      order, offset, block_size: see the module's docstring.

    Returns:
      bool, of inputs' shape.

    Raises:
      ValueError: n > m, a size that m (times block size and offset) does not divide, or an unknown order.

    >>> get_sparsity_mask(jnp.array([[3.0, 1.0], [2.0, 5.0]]), 1, 2, order="C").tolist()
    [[True, False], [False, True]]
    """
    n, m = n_sparsity, m_sparsity
    if m < 1 or n < 0 or n > m:
        raise SparsityError(f"N must be lower than M for N:M ({n}:{m}) sparsity.")
    if order not in ("R", "C"):
        raise ValueError(f"Index order {order} not supported.")
    x = qarray.dequantize(inputs) if isinstance(inputs, QArray) else jnp.asarray(inputs)
    if order == "C":
        if x.ndim < 2:
            raise ValueError(f"order 'C' needs two axes or more, got an array of shape {x.shape}: use order 'R'")
        return get_sparsity_mask(x.mT, n, m, "R", block_size, offset).mT
    magnitude = jnp.abs(x)
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude).ravel()
    block, stride = max(block_size, 1), max(offset, 1)
    if x.size % m:
        raise ValueError(f"inputs size must be divisible by m, provided {x.size} and {m}")
    if x.size % (m * block * stride):
        raise ValueError(
            f"inputs of {x.size} elements are no multiple of m * block_size * offset = {m} * {block} * {stride}"
        )
    groups = magnitude.reshape(-1, block).mean(1).reshape(-1, m, stride)
    mask = (_ranks(groups) < n).reshape(-1, 1)
    return jnp.broadcast_to(mask, (mask.shape[0], block)).reshape(x.shape)


def _ranks(x: jax.Array) -> jax.Array:
    """How many elements along axis 1 come before each, in falling order, the first of equal ones first."""
    m = x.shape[1]
    if m > _LARGEST_COUNTED:
        return jnp.argsort(jnp.argsort(-x, axis=1, stable=True), axis=1, stable=True)
    before = [(x[:, j : j + 1] > x) | ((x[:, j : j + 1] == x) & (j < jnp.arange(m)[None, :, None])) for j in range(m)]
    return sum(b.astype(jnp.int32) for b in before)  # type: ignore[return-value]


def get_sparsity_mask_unstructured(
    inputs: jax.Array | QArray, mask: jax.Array | None, prune_rate: jax.Array | float
) -> jax.Array:
    """The mask that prunes the smallest `prune_rate` percent of the magnitudes of a whole array.

    Args:
      inputs: a float array, or a QArray, whose dequantized elements are compared.
      mask: of an earlier pruning: what it has pruned counts as 0, so that it stays pruned. None: nothing.
      prune_rate: in percent, 0 to 100; may be traced. Elements that equal the percentile are pruned.

    Returns:
      bool, of inputs' shape.

    >>> get_sparsity_mask_unstructured(jnp.array([1.0, -2.0, 3.0, -4.0]), None, 50).tolist()
    [False, False, True, True]
    """
    x = qarray.dequantize(inputs) if isinstance(inputs, QArray) else inputs
    magnitude = jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is not None:
        magnitude = jnp.where(jnp.asarray(mask).astype(bool), magnitude, 0)
    return magnitude > jnp.percentile(magnitude, prune_rate)


def prune_inputs_n_m(
    inputs: jax.Array | QArray, *, n: int, m: int, order: str = "R", offset: int = 0
) -> jax.Array | QArray:
    """`inputs` with all but the n largest magnitudes of each group of m set to 0; see `get_sparsity_mask`.

    >>> prune_inputs_n_m(jnp.array([1.0, -2.0]), n=1, m=2).tolist()
    [0.0, -2.0]
    """
    return apply_sparsity(inputs, get_sparsity_mask(inputs, n, m, order, 0, offset))
