"""Second moments of samples: each instruction set of this CPU, against NumPy in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix.contrib import gptq_core
from qwix.cpu import native

KERNELS = range(len(native.kernels()))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def check(x: np.ndarray, actual: jax.Array) -> None:
    samples = x.astype(np.float64)
    magnitude = np.swapaxes(np.abs(samples), -1, -2) @ np.abs(samples)
    error = np.abs(actual - np.swapaxes(samples, -1, -2) @ samples)
    assert actual.dtype == jnp.float32
    assert np.all(error <= 2.0**-24 * (4 + x.shape[-2]) * magnitude)
    np.testing.assert_array_equal(actual, np.swapaxes(actual, -1, -2))


@pytest.mark.parametrize("kernel", KERNELS)
@hypothesis.given(
    batch=st.lists(st.integers(0, 3), max_size=2), samples=st.integers(0, 70), features=st.integers(0, 80)
)
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_shape(kernel: int, batch: list[int], samples: int, features: int) -> None:
    x = random(*batch, samples, features)
    check(x, native.second_moments(jnp.asarray(x), kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(600, 130), (260, 519), (20, 1050), (256, 1024)])
def test_several_tiles_and_parts(kernel: int, shape: tuple[int, int]) -> None:
    x = random(*shape)
    check(x, native.second_moments(jnp.asarray(x), kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_extremes_and_what_is_not_finite(kernel: int) -> None:
    x = random(40, 35)
    scales = np.logspace(-18, 18, 35, dtype=np.float32)
    check(x * scales, native.second_moments(jnp.asarray(x * scales), kernel=kernel))
    x[7, 20] = np.nan
    moments = np.asarray(native.second_moments(jnp.asarray(x), kernel=kernel))
    spoilt = np.zeros((35, 35), bool)
    spoilt[20] = spoilt[:, 20] = True
    np.testing.assert_array_equal(np.isnan(moments), spoilt)


def test_within_transformations() -> None:
    x = random(2, 3, 50, 20)
    check(x, jax.vmap(jax.vmap(native.second_moments, in_axes=1), in_axes=1)(jnp.asarray(x.transpose(2, 0, 1, 3))))
    _, scanned = jax.lax.scan(lambda carry, x: (carry, native.second_moments(x)), 0, jnp.asarray(x[0]))
    check(x[0], scanned)


@pytest.mark.parametrize("x", [np.zeros((2, 2), np.float16), np.zeros(2, np.float32)])
def test_what_they_are_not_of(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"second moments are of float32\[\.\.\., samples, features\], not of float"):
        native.second_moments(x)


@pytest.mark.parametrize(("devices", "backend", "natively"), [(1, "cpu", True), (2, "cpu", False), (1, "gpu", False)])
def test_calibration_has_them(monkeypatch, devices: int, backend: str, natively: bool) -> None:
    """On a CPU alone: of several devices the samples would be gathered."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(random(24, 30), dtype)
        jaxpr = jax.make_jaxpr(lambda x: gptq_core.compute_hessian(x))(x)  # a function that nothing is cached for
        assert (native.SECOND_MOMENTS in str(jaxpr)) == natively
        check(np.asarray(x, np.float32).T, gptq_core.compute_hessian(x))
