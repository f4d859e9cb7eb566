"""Stochastic rounding: noise that is added before rounding to the nearest integer.

With u uniform on [-1/2, 1/2), round(x + u) is x on average, E[round(x + u)] = x, where round(x) alone is off
by up to 1/2 in the same direction each time. Gradients need that: many small ones add up to a large update, or to
nothing if each is rounded to zero (Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551).

    >>> noise = get_noise_fn("uniform", jax.random.key(0), channelwise_noise_axes=(0,))
    >>> noise((2, 3)).shape
    (2, 1)
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qwix._src.core.pytree import array_structure, static

# 256 values, the centres of equal bins, cost a byte of random bits each where float32 noise takes four.
_LOW_BITS = 8


def uniform_noise(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """float32 noise, uniform on [-1/2, 1/2).

    >>> bool(jnp.all(jnp.abs(uniform_noise(jax.random.key(0), (100,))) <= 0.5))
    True
    """
    return jax.random.uniform(key, tuple(shape), jnp.float32, -0.5, 0.5)


def low_bit_uniform_noise(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """float32 noise of the 256 values (i + 1/2) / 256 - 1/2, i = 0 .. 255: symmetric around 0, so its mean is 0.

    A quarter of the random bits of `uniform_noise`. Rounding is unbiased for multiples of 1/256, and off by at most
    1/512 between them.

    >>> float(jnp.max(jnp.abs(low_bit_uniform_noise(jax.random.key(0), (10_000,)))))
    0.498046875
    """
    bits = jax.random.bits(key, tuple(shape), jnp.uint8).astype(jnp.float32)
    return (bits + 0.5) / 2**_LOW_BITS - 0.5


_METHODS: dict[str, Callable[[jax.Array, Sequence[int]], jax.Array]] = {
    "uniform": uniform_noise,
    "low_bit_uniform": low_bit_uniform_noise,
}


@array_structure
class NoiseFn:
    """A noise function shape -> noise, as `HowToQuantize.noise_fn` takes it, that can go through `jax.jit`.

    Attributes:
      key: a key of `jax.random`; equal keys give equal noise.
      method: "uniform" or "low_bit_uniform" (static).
      channelwise_noise_axes: axes along which each index has noise of its own (static); all others share it, which
        is unbiased as well, but correlated.
    """

    key: jax.Array
    method: str = static()
    channelwise_noise_axes: tuple[int, ...] = static()
    replace: ClassVar[Callable[..., "NoiseFn"]]  # array_structure adds it

    def __call__(self, shape: Sequence[int]) -> jax.Array:
        """The noise for an array of `shape`, of size 1 along the axes that share it."""
        own = {axis % len(shape) for axis in self.channelwise_noise_axes if -len(shape) <= axis < len(shape)}
        noise_shape = [size if axis in own else 1 for axis, size in enumerate(shape)]
        return _METHODS[self.method](self.key, noise_shape)


def get_noise_fn(method: str, key: jax.Array, channelwise_noise_axes: Sequence[int] = (0,)) -> NoiseFn:
    """A noise function for stochastic rounding.

    Args:
      method: "uniform" or "low_bit_uniform".
      key: a key of `jax.random`.
      channelwise_noise_axes: axes along which each index has noise of its own; all others share it. Axes that an
        array does not have are passed over.

    Raises:
      ValueError: the method is unknown.

    >>> get_noise_fn("gaussian", jax.random.key(0))
    Traceback (most recent call last):
    ...
    ValueError: Unknown method of stochastic rounding 'gaussian': use one of uniform, low_bit_uniform.
    """
    if method not in _METHODS:
        raise ValueError(f"Unknown method of stochastic rounding {method!r}: use one of {', '.join(_METHODS)}.")
    axes: Any = (channelwise_noise_axes,) if isinstance(channelwise_noise_axes, int) else channelwise_noise_axes
    return NoiseFn(key, method, tuple(axes))
