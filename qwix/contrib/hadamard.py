r"""The randomized Hadamard transform of an axis of any width, in O(n log n).

    y = H diag(s) x,        H H^T = I,        s_i = -1 or 1 (from a seed)

spreads an outlier of x over all of y: every |H_ij| is 1 / sqrt(n), or nearly so. It is undone exactly by
x = diag(s) H^T y, and a product of two vectors is that of the two transformed ones, which is what rotating a layer
stands on (QuaRot, arXiv 2404.00456, section 3; QuIP#, arXiv 2402.04396, section 3, for why the signs are random).

For a width n = 2^k m, m odd, H is the Kronecker product of small orthonormal matrices,

    H = H_64 (x) ... (x) H_2^j (x) B

so that it takes a few small matmuls on a reshaped array instead of one of n x n. The H_2^j are Sylvester's, and B is
- nothing, for m = 1;
- a Hadamard matrix of order 4 m or 8 m by Paley's constructions, where q = order - 1 is a prime, or q = order / 2 - 1
  is one with q = 1 mod 4 (12, 20, 24, 36, 44, 60, ...);
- Hartley's matrix of order m, B_ij = (cos + sin)(2 pi i j / m) / sqrt(m), else: its largest element is sqrt(2 / m).

An m with too large a prime factor leaves H block-diagonal: equal blocks of the largest width that works or, if that is
small, blocks of falling powers of two. A `block_size` makes blocks on purpose: those that do not cross the shards of a
sharded axis, or the groups of a number format.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src import interception

# Factors of this size keep a matmul of the CPU's or an accelerator's unit busy (measured on CPUs: 16 to 64 are alike).
_LARGEST_POWER = 64
# Odd factors up to this one have a dense matrix of their own; it costs that many multiplications an element.
_LARGEST_ODD = 127
# Equal blocks narrower than this mix too little, where the width has nothing but large prime factors.
_SMALLEST_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class HadamardTransform:
    """x -> H diag(s) x along one axis; see the module's docstring. Hashable, so that it can be static data.

    Equal fields mean equal transforms, on every machine and with every version of NumPy and JAX: what was rotated and
    saved can be run anywhere.

    Attributes:
      size: of the axis.
      seed: of the signs s; None: all 1.
      block_size: width of the blocks of a block-diagonal H; None: as wide as possible.

    Raises:
      ValueError: if the size is not positive, or the block size does not divide it.

    >>> transform = HadamardTransform(6)
    >>> x = jnp.array([1.0, 2.0, 40.0, 3.0, 1.0, 2.0])
    >>> transform.inverse(transform(x)).round(4).tolist()
    [1.0, 2.0, 40.0, 3.0, 1.0, 2.0]
    >>> HadamardTransform(4, seed=None)(jnp.array([2.0, 0.0, 0.0, 0.0])).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    size: int
    seed: int | None = 0
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: there is no transform of an axis without elements")
        if self.block_size is not None and (self.block_size < 1 or self.size % self.block_size):
            raise ValueError(f"block_size={self.block_size} does not divide the axis of {self.size}: choose a divisor")

    def __call__(self, x: jax.Array, axis: int = -1) -> jax.Array:
        """H diag(s) x along an axis; computed in float32 or wider, returned in the dtype of x.

        Raises:
          ValueError: the axis has another size.
        """
        return self._run(x, axis, False)

    def inverse(self, x: jax.Array, axis: int = -1) -> jax.Array:
        """diag(s) H^T x along an axis: what `__call__` undoes, and undoes it."""
        return self._run(x, axis, True)

    def matrix(self) -> np.ndarray:
        """H diag(s) as an array (size, size) of float64: y = M x."""
        matrix = np.zeros((self.size, self.size))
        start = 0
        for size, count in self.blocks():
            block: np.ndarray = functools.reduce(np.kron, map(_factor, factors(size)), np.ones((1, 1)))
            for _ in range(count):
                matrix[start : start + size, start : start + size] = block
                start += size
        return matrix * self.signs()

    def signs(self) -> np.ndarray:
        """s, an int8 array (size,)."""
        if self.seed is None:
            return np.ones(self.size, np.int8)
        # Of NumPy's random numbers only the raw ones of its bit generators are the same in every version.
        words = np.random.Philox(key=self.seed).random_raw(-(-self.size // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: self.size]
        return 1 - 2 * bits.astype(np.int8)

    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(width, how many of it) of the blocks of H, from the first on."""
        if self.block_size is not None and self.block_size != self.size:
            return tuple((size, count * self.size // self.block_size) for size, count in _blocks_of(self.block_size))
        return _blocks_of(self.size)

    @interception.disable_interceptions  # its matmuls are no ops of the model
    def _run(self, x: jax.Array, axis: int, inverse: bool) -> jax.Array:
        if x.shape[axis] != self.size:
            raise ValueError(f"a transform of size {self.size} does not fit axis {axis} of {x.shape}")
        return _apply(self, x, axis, inverse)


def factors(size: int) -> tuple[int, ...]:
    """The orders of the matrices whose Kronecker product is H, for a block of a size that has one.

    >>> factors(4096), factors(576), factors(768), factors(11008)
    ((64, 64), (16, 36), (64, 12), (16, 16, 43))
    """
    odd = size // (size & -size)
    power = size // odd
    base = odd
    if odd > 1:
        base = next((n for n in (4 * odd, 8 * odd) if size % n == 0 and _paley_prime(n) is not None), odd)
        power = size // base
    exponent = power.bit_length() - 1
    count = -(-exponent // (_LARGEST_POWER.bit_length() - 1))
    powers = [2 ** (exponent // count + (i < exponent % count)) for i in range(count)]
    return (*powers, base) if base > 1 else tuple(powers)


@functools.cache
def _blocks_of(size: int) -> tuple[tuple[int, int], ...]:
    odd = size // (size & -size)
    width = size // odd * max(d for d in range(1, min(odd, _LARGEST_ODD) + 1) if odd % d == 0)
    if width == size or width >= _SMALLEST_BLOCK:
        return ((width, size // width),)
    return tuple((1 << bit, 1) for bit in reversed(range(size.bit_length())) if size >> bit & 1)


@functools.cache
def _factor(order: int) -> np.ndarray:
    """The orthonormal matrix of one factor, float64."""
    if order & (order - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < order:
            matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
        return matrix / math.sqrt(order)
    prime = _paley_prime(order)
    if prime is not None:
        return _paley(order, prime) / math.sqrt(order)
    angles = 2 * np.pi / order * (np.outer(np.arange(order), np.arange(order)) % order)
    return (np.cos(angles) + np.sin(angles)) / math.sqrt(order)


def _paley_prime(order: int) -> int | None:
    """The prime that one of Paley's constructions of a Hadamard matrix of this order needs; None if it has none."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int, prime: int) -> np.ndarray:
    """Paley's Hadamard matrix: I + S for prime = order - 1, C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] else.

    Q_ij is 1 if i - j is a square modulo the prime, -1 if it is not, and 0 for i = j. S borders Q with -1 and 1, C with
    ones (J. Math. Phys. 12, 1933).
    """
    residues = np.full(prime, -1)
    residues[np.arange(1, prime) ** 2 % prime] = 1
    residues[0] = 0
    q = residues[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    bordered = np.ones((prime + 1, prime + 1), int)
    bordered[0, 0] = 0
    bordered[1:, 1:] = q
    if prime == order - 1:
        bordered[1:, 0] = -1
        return np.eye(order, dtype=int) + bordered
    identity = np.eye(prime + 1, dtype=int)
    return np.kron(bordered, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _apply(transform: HadamardTransform, x: jax.Array, axis: int, inverse: bool) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.moveaxis(x.astype(dtype), axis, -1)
    signs = transform.signs().astype(dtype)
    if not inverse:
        y = y * signs
    y = jnp.concatenate(list(_transformed_blocks(transform, y, inverse)), axis=-1)
    if inverse:
        y = y * signs
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def _transformed_blocks(transform: HadamardTransform, x: jax.Array, inverse: bool) -> Iterator[jax.Array]:
    start = 0
    for size, count in transform.blocks():
        part = lax.slice_in_dim(x, start, start + size * count, axis=-1)
        start += size * count
        orders = factors(size)
        y = part.reshape(*x.shape[:-1], count, *orders)
        for order in orders:
            matrix = _factor(order).astype(x.dtype)
            # Contracts the first of the factors' axes, and puts the result last: in the end their order is back.
            contracted = (((x.ndim,), (0 if inverse else 1,)), ((), ()))
            y = lax.dot_general(y, matrix, contracted, precision=lax.Precision.HIGHEST)
        yield y.reshape(part.shape)
