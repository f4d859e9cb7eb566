"""Noise for stochastic rounding: its range, what shares it, and that rounding with it is unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import qarray, stochastic_rounding
from qwix._src.core.stochastic_rounding import NoiseFn, get_noise_fn

SAMPLES = 20_000


@pytest.mark.parametrize("method", ["uniform", "low_bit_uniform"])
def test_rounding_is_unbiased(method):
    """The mean of n roundings of x has a standard error of at most 1 / (2 sqrt n); 5 of them are allowed for."""
    x = jnp.asarray([-3.75, -0.5, -0.125, 0.0, 0.25, 0.5, 2.0, 6.875])  # multiples of 1/8: exact for both methods
    scale = jnp.ones((1, 1))
    noise = get_noise_fn(method, jax.random.key(1), (0, 1))
    tiled = jnp.broadcast_to(x, (SAMPLES, x.size))
    q = qarray.quantize_with_scale_zero_point(tiled, jnp.int8, scale, None, noise).qvalue
    values = np.asarray(q, np.float64)
    assert np.all(np.abs(values - np.asarray(x)) <= 1)
    bound = 5 * 0.5 / np.sqrt(SAMPLES)
    np.testing.assert_allclose(values.mean(0), np.asarray(x), atol=bound)
    # Rounding to nearest is off by far more than the bound.
    assert np.abs(np.round(np.asarray(x)) - np.asarray(x)).max() > 10 * bound


@pytest.mark.parametrize("method", ["uniform", "low_bit_uniform"])
def test_noise_is_uniform(method):
    """Kolmogorov-Smirnov: the empirical distribution is within 1.95 / sqrt n (p < 0.001) and half a bin of it."""
    noise = np.sort(getattr(stochastic_rounding, f"{method}_noise")(jax.random.key(0), (SAMPLES,)))
    assert noise.dtype == np.float32 and noise[0] >= -0.5 and noise[-1] < 0.5
    distance = np.abs(noise + 0.5 - (np.arange(SAMPLES) + 0.5) / SAMPLES).max()
    assert distance < 1.95 / np.sqrt(SAMPLES) + 1 / 512


def test_which_axes_have_noise_of_their_own():
    key = jax.random.key(0)
    for axes, shape in {(0,): (2, 1, 1), (-1,): (1, 1, 4), (0, 2): (2, 1, 4), (): (1, 1, 1), (0, 5): (2, 1, 1)}.items():
        assert get_noise_fn("uniform", key, axes)((2, 3, 4)).shape == shape
    assert get_noise_fn("uniform", key, 1)((2, 3)).shape == (1, 3)


def test_it_goes_through_jit_with_its_key_as_an_argument():
    traces = []

    @jax.jit
    def draw(noise_fn):
        traces.append(noise_fn)
        return noise_fn((3,))

    first, second = (draw(get_noise_fn("uniform", jax.random.key(i))) for i in (0, 1))
    assert len(traces) == 1 and not np.array_equal(first, second)
    np.testing.assert_array_equal(first, get_noise_fn("uniform", jax.random.key(0))((3,)))
    assert NoiseFn(jax.random.key(0), "uniform", (0,)).replace(method="low_bit_uniform").method == "low_bit_uniform"


def test_unknown_method():
    with pytest.raises(ValueError, match="Unknown method of stochastic rounding 'normal'"):
        get_noise_fn("normal", jax.random.key(0))
