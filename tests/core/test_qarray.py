"""QArray against NumPy: the formulas in float32 and float64, shapes, indexing, sharding, pytrees."""

import copy
import dataclasses
import math
import pickle
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding

from qwix._src.core import calibration, numerics, qarray, tiling
from qwix._src.core.qarray import HowToQuantize, QArray

INTEGERS = [jnp.int8, jnp.int4, jnp.int2, jnp.int16, "int3", "int5"]
FLOATS = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn]
BLOCK_FLOATS = ["mxfp8", "mxfp8_16", "mxfp4", "nvfp4"]
FORMATS = [*INTEGERS, *FLOATS, *BLOCK_FLOATS, "nf4"]


def spread(shared, shape):
    """A scale-shaped NumPy array, each element repeated over its tile."""
    for axis, size in enumerate(shape):
        shared = np.repeat(shared, size // max(shared.shape[axis], 1), axis)
    return shared


def tiles_of(x, scale_shape):
    """{scale index: the elements that share it}."""
    tiles = {}
    tile = [n // s for n, s in zip(x.shape, scale_shape, strict=True)]
    for index in np.ndindex(*scale_shape):
        tiles[index] = x[tuple(slice(i * t, (i + 1) * t) for i, t in zip(index, tile, strict=True))]
    return tiles


def reduce_tiles(fn, x, scale_shape):
    out = np.empty(scale_shape, np.float64)
    for index, tile in tiles_of(np.asarray(x).astype(np.float64), scale_shape).items():
        out[index] = fn(tile)
    return out


def numpy_dequantize(q):
    """In float64, with nothing of the code under test."""
    values = np.asarray(q.qvalue).astype(np.float64)
    if q.qtype == "nf4":
        values = np.asarray(numerics.get_nf4_buckets()).astype(np.float64)[values.astype(int)]
    if q.zero_point is not None:
        values = values - spread(np.asarray(q.zero_point).astype(np.float64), q.shape)
    return values * spread(np.asarray(q.scale).astype(np.float64), q.shape)


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(dtype)


@st.composite
def arrays_and_granularities(draw):
    """(array, channelwise_axes, tiled_axes, scale shape)."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=3)))
    channelwise, tiled, scale_shape = [], {}, []
    for axis, size in enumerate(shape):
        name = axis - draw(st.sampled_from([0, len(shape)]))
        tile = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        kind = draw(st.sampled_from(["shared", "channelwise", "tiled", "tiled by a fraction"]))
        if kind == "channelwise":
            channelwise.append(name)
        elif kind != "shared":
            tiled[name] = tile if kind == "tiled" else tile / size
        scale_shape.append({"shared": 1, "channelwise": size}.get(kind, size // tile))
    dtype = draw(st.sampled_from([np.float32, jnp.bfloat16, np.float16]))
    x = normal(shape, draw(st.integers(0, 1000)), dtype)
    return x, channelwise, tiled, tuple(scale_shape)


def assert_rounded(q, x, to_format):
    """qvalue is x / scale rounded, against the scale as it is stored, with float32 arithmetic.

    XLA multiplies by the reciprocal of a scale that is shared by several elements, and fuses the
    addition of a zero point, so that a quotient within some float32 ulps of a tie may go either way.
    """
    quotient = x.astype(np.float64) / spread(np.asarray(q.scale).astype(np.float64), x.shape)
    ulps = (np.abs(quotient) + 128) * 2.0**-22
    low, high = (np.asarray(to_format(quotient + sign * ulps)) for sign in (-1, 1))
    actual = np.asarray(q.qvalue).astype(np.float64)
    assert ((low.astype(np.float64) <= actual) & (actual <= high.astype(np.float64))).all()


# ---------------------------------------------------------------- quantize, against NumPy


@settings(max_examples=15)
@given(arrays_and_granularities(), st.sampled_from(FORMATS), st.sampled_from(["absmax", "rms,3"]))
def test_symmetric_quantization_follows_the_formulas(granularity, qtype, method):
    x, channelwise, tiled, scale_shape = granularity
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=channelwise,
        tiled_axes=tiled,
        calibration_method=method,
    )
    assert qarray.get_scale_shape(x.shape, how) == scale_shape
    q = qarray.quantize(jnp.asarray(x), how)
    qarray.validate_qarray(q)
    assert q.shape == x.shape
    assert q.zero_point is None
    assert q.qtype == qtype
    assert q.scale.dtype == q.dtype == x.dtype

    rtol = float(jnp.finfo(x.dtype).eps) / 2
    rtol = rtol * 1.001 if method == "absmax" else 3 * rtol  # rms rounds more than once
    if method == "absmax":
        absmax = reduce_tiles(lambda tile: np.abs(tile).max(), x, scale_shape)
    else:
        absmax = reduce_tiles(lambda tile: 3 * np.sqrt(np.mean(tile**2)), x, scale_shape)
    exact = absmax / numerics.get_symmetric_bound(qtype)
    scale = np.asarray(q.scale).astype(np.float64)
    if qtype in BLOCK_FLOATS[:3]:
        assert (np.exp2(np.round(np.log2(scale))) == scale).all()
        c = 12 / 7 if qtype == "mxfp4" else 60 / 31
        assert ((scale <= exact * c * 1.01) & (exact * c < 2 * scale * 1.01)).all()
    elif qtype == "nvfp4":
        e4m3 = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        np.testing.assert_allclose(scale, e4m3, rtol=0.07)
        assert (scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) == scale).all()
    else:
        atol = 6e-8 if x.dtype == np.float16 else 0  # its smallest number
        np.testing.assert_allclose(scale, exact, rtol=rtol, atol=atol)

    assert_rounded(q, x, lambda quotient: numerics.convert_to(jnp.float32(quotient), qtype))


@settings(max_examples=15)
@given(arrays_and_granularities(), st.sampled_from([jnp.int8, jnp.int4, "int4", jnp.int16]))
def test_asymmetric_quantization_follows_the_formulas(granularity, qtype):
    x, channelwise, tiled, scale_shape = granularity
    x = (x + np.float32(0.7)).astype(x.dtype)
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=channelwise,
        tiled_axes=tiled,
        calibration_method="minmax",
    )
    q = qarray.quantize(jnp.asarray(x), how)
    qarray.validate_qarray(q)
    assert q.zero_point.shape == q.scale.shape == scale_shape

    low = reduce_tiles(lambda tile: min(tile.min(), 0), x, scale_shape)
    high = reduce_tiles(lambda tile: max(tile.max(), 0), x, scale_shape)
    qmin, qmax = numerics.get_asymmetric_bound(qtype)
    scale = np.asarray(q.scale).astype(np.float64)
    eps = float(jnp.finfo(x.dtype).eps)
    np.testing.assert_allclose(scale, (high - low) / (qmax - qmin), rtol=eps, atol=2e-7 if eps == 2**-10 else 0)
    zero_point = np.clip(np.rint(qmin - low / scale), qmin, qmax)
    np.testing.assert_allclose(np.asarray(q.zero_point).astype(np.float64), zero_point, atol=1)
    shift = spread(np.asarray(q.zero_point).astype(np.float64), x.shape)
    assert_rounded(q, x, lambda quotient: np.clip(np.rint(quotient + shift), qmin, qmax))
    # 0 is exact, whatever the range.
    zeros = qarray.quantize_with_scale_zero_point(jnp.zeros(x.shape, x.dtype), qtype, q.scale, q.zero_point)
    assert (np.asarray(qarray.dequantize(zeros)) == 0).all()


@settings(max_examples=12)
@given(
    arrays_and_granularities(),
    st.sampled_from(FORMATS),
    st.sampled_from(["absmax", "minmax"]),
)
def test_dequantize_is_exact_up_to_one_rounding(granularity, qtype, method):
    x, channelwise, tiled, _ = granularity
    if method == "minmax" and qtype not in (jnp.int8, jnp.int4, jnp.int16):
        qtype = jnp.int8
    q = qarray.quantize_api(
        jnp.asarray(x),
        qtype,
        channelwise_axes=channelwise,
        tiled_axes=tiled,
        calibration_method=method,
    )
    actual = qarray.dequantize(q)
    assert actual.dtype == x.dtype
    exact = numpy_dequantize(q)
    rtol = float(jnp.finfo(x.dtype).eps) * 0.51 + 2**-23
    np.testing.assert_allclose(
        np.asarray(actual).astype(np.float64),
        exact,
        rtol=rtol,
        atol=float(jnp.finfo(x.dtype).smallest_subnormal),
    )
    if qtype == jnp.int8:
        half_step = spread(np.asarray(q.scale).astype(np.float64), x.shape) * (0.51 if method == "absmax" else 1.01)
        # The end of the range saturates by up to a step more in 16 bits, as the scale is rounded.
        slack = np.abs(exact) * 2.0**-6 if x.dtype != np.float32 else 0
        assert (np.abs(exact - x.astype(np.float64)) <= half_step + slack).all()


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))
        how = HowToQuantize(qtype=jnp.int16, channelwise_axes=(0,))
        q = qarray.quantize(x, how)
        assert q.scale.dtype == np.float64
        scale = np.abs(x).max(1, keepdims=True) / 32768
        np.testing.assert_allclose(q.scale, scale, rtol=1e-15)
        values = np.clip(np.rint(x / scale), -32768, 32767)
        np.testing.assert_allclose(qarray.dequantize(q), values * scale, rtol=1e-15)


def test_one_element_and_no_axes():
    q = qarray.quantize(jnp.float32(-3.0), HowToQuantize(qtype=jnp.int8))
    assert q.shape == q.scale.shape == ()
    np.testing.assert_allclose(qarray.dequantize(q), -3, rtol=0.01)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_no_elements(shape):
    for how in (
        HowToQuantize(qtype=jnp.int8),
        HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,)),
        HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), calibration_method="minmax"),
    ):
        q = qarray.quantize(jnp.zeros(shape), how)
        assert q.shape == shape
        assert qarray.dequantize(q).shape == shape


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zeros_stay_zeros_with_a_scale_of_one(qtype, dtype):
    q = qarray.quantize(jnp.zeros((2, 4), dtype), HowToQuantize(qtype=qtype))
    assert q.scale.tolist() == [[1.0]]
    assert (np.asarray(qarray.dequantize(q)) == 0).all()


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e6, 1e30])
def test_tiny_and_huge_magnitudes(qtype, magnitude):
    x = normal((4, 32)) * np.float32(magnitude)
    q = qarray.quantize(jnp.asarray(x), HowToQuantize(qtype=qtype, channelwise_axes=(0,)))
    error = np.abs(numpy_dequantize(q) - x.astype(np.float64)).max(1) / np.abs(x).max(1)
    one = qarray.quantize(jnp.asarray(x / magnitude), HowToQuantize(qtype=qtype))
    expected = np.abs(numpy_dequantize(one) - x / magnitude).max() / np.abs(x / magnitude).max()
    assert (error <= max(2.1 * expected, 0.3 if "fp4" in str(qtype) else 0)).all()


@pytest.mark.parametrize("magnitude", [6e-8, 1e-6, 1e-3, 1.0, 6e4])
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_float16_scales_neither_vanish_nor_overflow(magnitude, method):
    """sqrt(tiny) of float16 is 2^-7: a scale of 1 below that would turn most weights to zero."""
    x = np.array([[-1.0, 0.5, 1.0, 0.0]]) * magnitude
    q = qarray.quantize_api(jnp.asarray(x, jnp.float16), jnp.int8, calibration_method=method)
    assert 0 < float(q.scale[0, 0]) < 2 * 2 * magnitude / 127 + 6e-8
    tolerance = max(magnitude / 64, 6e-8)
    np.testing.assert_allclose(numpy_dequantize(q), x, atol=tolerance)


# ---------------------------------------------------------------- NaN and inf


@pytest.mark.parametrize("shape", [(4, 6), (64, 96)])  # XLA reduces large arrays differently
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("qtype", [jnp.int8, jnp.int4, jnp.float8_e4m3fn, *BLOCK_FLOATS, "nf4"])
def test_a_group_with_nan_or_inf_dequantizes_to_such(qtype, jit, bad, shape):
    x = normal(shape)
    x[1, 2] = bad
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: shape[1] // 2})
    quantize = jax.jit(qarray.quantize, static_argnums=1) if jit else qarray.quantize
    q = quantize(jnp.asarray(x), how)
    finite = np.isfinite(np.asarray(qarray.dequantize(q)))
    expected = np.ones(shape, bool)
    expected[1, : shape[1] // 2] = False
    np.testing.assert_array_equal(finite, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["absmax,0.9", "minmax", "minmax,0.9", "rms,3"])
def test_every_method_shows_nan_and_inf(method, bad):
    x = normal((64, 96))
    x[1, 2] = bad
    how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,), calibration_method=method)
    y = np.asarray(qarray.dequantize(qarray.quantize(jnp.asarray(x), how)))
    assert not np.isfinite(y[:, 2]).any()
    assert np.isfinite(np.delete(y, 2, 1)).all()


@pytest.mark.parametrize("method", ["fixed,2", "fixed,-1,2"])
def test_a_fixed_range_shows_nan_and_clips_inf(method):
    x = normal((64, 96))
    x[1, 2] = np.inf
    y = qarray.dequantize(qarray.quantize_api(jnp.asarray(x), jnp.int8, calibration_method=method))
    np.testing.assert_allclose(y[1, 2], 2, rtol=0.01)
    x[1, 2] = np.nan
    y = qarray.dequantize(qarray.quantize_api(jnp.asarray(x), jnp.int8, calibration_method=method))
    assert np.isnan(y).all()


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("shape", [(4, 6), (64, 96)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_calibration_methods(shape, dtype):
    x = normal(shape, dtype=dtype)
    x[0] = -np.abs(x[0])
    x64 = x.astype(np.float64)
    low, high = np.minimum(x64.min(1), 0), np.maximum(x64.max(1), 0)
    absmax = np.abs(x64).max(1)
    expected = {
        "absmax": {"absmax": absmax},
        "absmax,0.8": {"absmax": 0.8 * absmax},
        " ABSMAX , 0.8": {"absmax": 0.8 * absmax},
        "minmax": {"min": low, "max": high},
        "minmax,0.9": {"min": 0.9 * low, "max": 0.9 * high},
        "rms,7": {"absmax": 7 * np.sqrt((x64**2).mean(1))},
        "fixed,3": {"absmax": np.array([3.0])},
        "fixed,-2,2": {"absmax": np.array([2.0])},
        "fixed,-1,2": {"min": np.array([-1.0]), "max": np.array([2.0])},
        "fixed,0,2": {"min": np.array([0.0]), "max": np.array([2.0])},
    }
    for method, bounds in expected.items():
        how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), calibration_method=method)
        actual = qarray.calibrate(jnp.asarray(x), how)
        assert actual.keys() == bounds.keys(), method
        for name, bound in bounds.items():
            assert actual[name].dtype == dtype
            assert actual[name].shape == (len(bound), 1)
            values = np.asarray(actual[name]).astype(np.float64)[:, 0]
            np.testing.assert_allclose(values, bound, rtol=2 * float(jnp.finfo(dtype).eps))


def test_rms_of_float16_does_not_overflow():
    how = HowToQuantize(qtype=jnp.int8, calibration_method="rms,1")
    assert qarray.calibrate(jnp.full((2, 2), 1000, jnp.float16), how)["absmax"].item() == 1000


@pytest.mark.parametrize(
    "method",
    [
        *("", "max", "absmax,a", "absmax,1,2", "absmax,0", "absmax,-1", "minmax,1,2", "minmax,nan"),
        *("rms", "rms,1,2", "fixed", "fixed,1,2,3", "fixed,1,2", "fixed,-2,-1", "fixed,-3"),
        *("fixed,0", "fixed,2,-1", "fixed,inf", "fixed,nan"),
    ],
)
def test_what_is_no_calibration_method_is_named(method):
    how = HowToQuantize(qtype=jnp.int8, calibration_method=method)
    with pytest.raises(ValueError, match="alibration method") as e:
        qarray.calibrate(jnp.ones((2, 2)), how)
    assert repr(method) in str(e.value)


def test_small_scales_become_one():
    """Below sqrt(smallest normal float32), 1.08e-19."""
    absmax = jnp.array([0.0, 1e-20, 1.3e-17, 1.5e-17]) * 1.0
    scale, zero_point = qarray.compute_scale_zero_point({"absmax": absmax}, jnp.int8)
    np.testing.assert_allclose(scale, [1, 1, 1, 1.5e-17 / 127.5])
    assert zero_point is None


def scales(qtype, absmax, dtype=np.float32):
    calibration = {"absmax": jnp.asarray(np.asarray(absmax, np.float64).astype(dtype))}
    scale, zero_point = qarray.compute_scale_zero_point(calibration, qtype)
    assert zero_point is None
    return np.asarray(scale).astype(np.float64)


@pytest.mark.parametrize(("qtype", "edge"), [("mxfp4", 3.5), ("mxfp8", 448 * 31 / 60), ("mxfp8_16", 448 * 31 / 60)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_mxfp_scales_are_the_power_of_two_below_the_outlier_aware_scale(qtype, edge, dtype):
    """absmax / B * c: the largest element lies in [edge, 2 edge) of the format's largest."""
    absmax = np.array([1.01, 1.5, 1.98]) * edge
    np.testing.assert_array_equal(scales(qtype, absmax, dtype), [1, 1, 1])
    exponents = np.array([-9, -4, 0, 3, 5])
    expected = np.exp2(exponents)
    np.testing.assert_array_equal(scales(qtype, expected * edge * 1.01, dtype), expected)
    np.testing.assert_array_equal(scales(qtype, expected * edge * 0.985, dtype), expected / 2)


def test_mxfp4_scale_at_its_edge():
    below = np.nextafter(np.float32(3.5), np.float32(0))
    np.testing.assert_array_equal(scales("mxfp4", [3.5, below, 7, 1e30, 1e-15])[:3], [1, 0.5, 2])


def test_nvfp4_scales_are_values_of_e4m3fn_where_that_holds_them():
    codes = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(scales("nvfp4", 6 * codes), codes)
    near = (codes[:-1] + codes[1:]) / 2
    np.testing.assert_array_equal(scales("nvfp4", 6 * near * 0.999), codes[:-1])
    # Outside of it, where e4m3fn would give 0 or NaN, 4 significant bits.
    beyond = np.array([449, 1e4, 2e30, 2.0**-11, 3e-10])
    actual = scales("nvfp4", 6 * beyond)
    np.testing.assert_allclose(actual, beyond, rtol=1 / 16)
    mantissa, _ = np.frexp(actual)
    assert (mantissa * 16 % 1 == 0).all()


def test_nvfp4_of_small_and_large_weights():
    for magnitude in (1e-5, 1.0, 1e5):
        x = normal((4, 64)) * np.float32(magnitude)
        q = qarray.quantize_api(jnp.asarray(x), "nvfp4", channelwise_axes=(0,), tiled_axes={1: 16})
        error = np.abs(np.asarray(qarray.dequantize(q)) - x).max() / magnitude
        assert error < 0.6


def test_a_calibration_of_another_kind_is_named():
    with pytest.raises(ValueError, match="hessian"):
        qarray.compute_scale_zero_point({"hessian": jnp.ones(1)}, jnp.int8)
    with pytest.raises(ValueError, match="no asymmetric quantization"):
        bounds = {"min": -jnp.ones((1, 1)), "max": jnp.ones((1, 1))}
        qarray.compute_scale_zero_point(bounds, "nf4")


def test_inside_of_jit_the_same_bits():
    x = jnp.asarray(normal((32, 64)))
    for qtype in FORMATS:
        how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: 16})
        eager, jitted = qarray.quantize(x, how), jax.jit(lambda x, h=how: qarray.quantize(x, h))(x)
        # Step by step as well, as providers do.
        scale, zp = qarray.compute_scale_zero_point(qarray.calibrate(x, how), qtype)
        steps = qarray.quantize_with_scale_zero_point(x, qtype, scale, zp)
        for other in (jitted, steps):
            np.testing.assert_array_equal(other.scale, eager.scale)
            np.testing.assert_array_equal(other.qvalue, eager.qvalue)
            assert other.qvalue.dtype == eager.qvalue.dtype
        np.testing.assert_array_equal(jax.jit(qarray.dequantize)(eager), qarray.dequantize(eager))


def test_scale_dtype():
    x = jnp.asarray(normal((4, 32)))
    q = qarray.quantize_api(x, jnp.int8, channelwise_axes=(0,), scale_dtype=jnp.bfloat16)
    assert q.scale.dtype == q.dtype == qarray.dequantize(q).dtype == jnp.bfloat16
    # Rounded against the scale as stored: at most half a step off, where the range holds it.
    scale = np.asarray(q.scale).astype(np.float64)
    inside = np.abs(x) <= 127.5 * scale
    assert (np.abs(numpy_dequantize(q) - x)[inside] <= (0.51 * scale + 0 * x)[inside]).all()
    mx = qarray.quantize_api(x, "mxfp4", channelwise_axes=(0,), tiled_axes={1: 16}, scale_dtype=jnp.float8_e8m0fnu)
    np.testing.assert_array_equal(
        mx.scale.astype(jnp.float32),
        qarray.quantize_api(x, "mxfp4", channelwise_axes=(0,), tiled_axes={1: 16}).scale,
    )


def test_a_scale_does_not_vanish_in_a_narrow_scale_dtype():
    q = qarray.quantize_api(jnp.full((1, 4), 1e-9), jnp.int8, scale_dtype=jnp.float16)
    assert q.scale.item() == 2.0**-24


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_reciprocal(monkeypatch, method):
    x = jnp.asarray(normal((8, 32)))
    how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), calibration_method=method)
    exact = qarray.quantize(x, how)
    monkeypatch.setattr(qarray, "USE_RECIPROCAL_FOR_QUANTIZATION", True)
    text = str(jax.make_jaxpr(lambda x: qarray.quantize(x, how))(x))
    close = qarray.quantize(x, how)
    assert " div 1.0:f32[] " in text
    off = np.asarray(close.qvalue).astype(int) - np.asarray(exact.qvalue).astype(int)
    assert np.abs(off).max() <= 1
    assert (off != 0).mean() < 0.05


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float8_e4m3fn])
def test_only_floats_are_quantized(dtype):
    x = jnp.ones((2, 2), dtype)
    for quantize in (
        lambda: qarray.quantize(x, HowToQuantize(qtype=jnp.int8)),
        lambda: qarray.quantize_with_scale_zero_point(x, jnp.int8, jnp.ones((1, 1)), None),
    ):
        with pytest.raises(ValueError, match=f"Cannot quantize an array of {np.dtype(dtype)}"):
            quantize()


def test_a_qarray_is_not_quantized_again_nor_an_array_dequantized():
    q = qarray.quantize_api(jnp.ones((2, 2)), jnp.int8)
    with pytest.raises(ValueError, match="quantized already"):
        qarray.quantize_api(q, jnp.int8)
    with pytest.raises(TypeError, match="takes a QArray"):
        qarray.dequantize(jnp.ones(2))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(tiled_axes={1: 5}), "Axis 1 of size 12 .* tiled by 5"),
        (dict(tiled_axes={1: 0}), "tiled by 0"),
        (dict(tiled_axes={0: 0.01}), "tiled by 0.01"),
        (dict(channelwise_axes=(1,), tiled_axes={1: 4}), "Axis 1 .* both"),
        (dict(channelwise_axes=(1,), tiled_axes={-1: 4}), "Axis 1 .* both"),
        (dict(channelwise_axes=(2,)), "no axis 2"),
        (dict(tiled_axes={-3: 4}), "no axis -3"),
    ],
)
def test_impossible_granularities(how, words):
    with pytest.raises(ValueError, match=words):
        qarray.quantize(jnp.ones((8, 12)), HowToQuantize(qtype=jnp.int8, **how))


def test_scales_that_do_not_fit():
    x = jnp.ones((8, 12))
    for shape in [(12,), (8, 5), (1, 1, 1), (0, 1)]:
        with pytest.raises(ValueError, match="scale of shape"):
            qarray.quantize_with_scale_zero_point(x, jnp.int8, jnp.ones(shape), None)
        with pytest.raises(ValueError, match="zero_point of shape"):
            zero_point = jnp.ones(shape, jnp.int8)
            qarray.quantize_with_scale_zero_point(x, jnp.int8, jnp.ones((1, 1)), zero_point)
    with pytest.raises(ValueError, match="nf4 has no asymmetric"):
        ones = jnp.ones((1, 1))
        qarray.quantize_with_scale_zero_point(x, "nf4", ones, ones.astype(jnp.uint4))


def test_validate():
    good = qarray.quantize_api(jnp.ones((8, 12)), jnp.int8, calibration_method="minmax")
    qarray.validate_qarray(good)
    wrong = {
        "must have the rank": dict(scale=jnp.ones((8,))),
        "does not fit": dict(scale=jnp.ones((8, 5))),
        "must be a float": dict(scale=jnp.ones((1, 1), jnp.int8)),
        "stored as int4": dict(qtype="int4"),
        "zero_point must be int8": dict(zero_point=jnp.ones((1, 1))),
        "zero_point of shape": dict(zero_point=jnp.ones((3, 1), jnp.int8)),
    }
    for words, change in wrong.items():
        with pytest.raises(ValueError, match=words):
            qarray.validate_qarray(good.replace(**change))


def test_a_qarray_is_no_numpy_array():
    q = qarray.quantize_api(jnp.ones((2, 2)), jnp.int8)
    with pytest.raises(TypeError, match="dequantize it first"):
        np.asarray(q)
    with pytest.raises(TypeError):
        jnp.add(q, 1)


# ---------------------------------------------------------------- shapes


@st.composite
def qarrays(draw, max_rank=3):
    """QArrays with a random qvalue, scale and maybe zero point of unlike granularity."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=max_rank)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def shared():
        return tuple(draw(st.sampled_from([s for s in range(1, n + 1) if n % s == 0])) for n in shape)

    zero_point = rng.integers(-9, 9, shared()).astype(np.int8) if draw(st.booleans()) else None
    qvalue = rng.integers(-99, 99, shape).astype(np.int8)
    return QArray(*map(_to_jax, (qvalue, rng.uniform(1, 2, shared()).astype(np.float32), zero_point)))


def _to_jax(x):
    return None if x is None else jnp.asarray(x)


@st.composite
def indices(draw, shape):
    """Ints, arrays, slices, lists and masks for some of the axes, with Ellipsis and None between."""

    def entry(size):
        element = st.integers(-size, size - 1)
        edge = st.none() | st.integers(-size, size)
        return draw(
            element
            | element.map(jnp.asarray)
            | st.builds(slice, edge, edge, st.sampled_from([None, 1, 2, -1]))
            | st.lists(element, min_size=2, max_size=2).map(np.array)
            | st.lists(st.booleans(), min_size=size, max_size=size).map(np.array)
        )

    before = draw(st.integers(0, len(shape)))
    after = draw(st.integers(before, len(shape)))
    entries = [entry(size) for size in (*shape[:before], *shape[after:])]
    masks = [i for i, e in enumerate(entries) if getattr(e, "dtype", None) == np.bool_]
    for i in masks:
        # More than one mask, or one with other than 2 elements, might not fit the other arrays.
        if len(masks) > 1 or entries[i].sum() not in (1, 2):
            entries[i] = slice(None)
    if before < after or draw(st.booleans()):
        entries.insert(before, Ellipsis)
    if draw(st.booleans()):
        entries.insert(draw(st.integers(0, len(entries))), None)
    return tuple(entries)


@settings(max_examples=15)  # each compiles several gathers
@given(st.data())
def test_indexing_is_that_of_the_dequantized_array(data):
    q = data.draw(qarrays())
    idx = data.draw(indices(q.shape))
    taken = qarray.rewriting_take(q, idx)
    qarray.validate_qarray(taken)
    expected = numpy_dequantize(q)[tuple(np.asarray(i) if isinstance(i, jax.Array) else i for i in idx)]
    np.testing.assert_array_equal(numpy_dequantize(taken), expected)


def test_indexing_with_one_thing_that_is_no_tuple():
    q = QArray(jnp.arange(24, dtype=jnp.int8).reshape(4, 6), jnp.array([[1.0, 2.0, 3.0]]))
    full = numpy_dequantize(q)
    for idx in (2, -1, slice(1, 3), None, ..., np.array([0, 3]), [0, 3], jnp.array(1), np.int64(2)):
        np.testing.assert_array_equal(numpy_dequantize(q[idx]), full[idx])
    np.testing.assert_array_equal(numpy_dequantize(q[full > 20]), full[full > 20])
    rows = [numpy_dequantize(row) for row in q]
    np.testing.assert_array_equal(rows, full)
    assert len(q) == 4


def test_indexing_with_tracers():
    q = QArray(jnp.arange(24, dtype=jnp.int8).reshape(4, 6), jnp.array([[1.0, 2.0, 3.0]]))
    taken = jax.jit(lambda q, i, j: q[i, j])(q, 2, jnp.array([5, -1, 0]))
    np.testing.assert_array_equal(numpy_dequantize(taken), numpy_dequantize(q)[2, [5, -1, 0]])


def test_slices_keep_the_largest_tiles():
    q = QArray(jnp.ones((4, 24), jnp.int8), jnp.ones((1, 3)))
    for idx, tiles in [
        (slice(8, 24), 2),
        (slice(4, 20), 4),
        (slice(1, 7), 1),
        (slice(7, 10), 3),
        (slice(None), 3),
        (slice(None, None, 2), 12),
    ]:
        assert q[:, idx].scale.shape == (1, tiles)


def test_too_many_indices_are_an_error():
    q = QArray(jnp.ones((4, 6), jnp.int8), jnp.ones((1, 3)))
    for idx in [(0, 0, 0), (..., ...)]:
        with pytest.raises(IndexError, match="Too many indices"):
            q[idx]
    with pytest.raises(IndexError, match="single bool"):
        q[True]


def test_indexing_of_plain_arrays():
    x = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(qarray.rewriting_take(x, (..., 1)), x[:, 1])


def _factorizations(n, parts):
    if parts == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in _factorizations(n // d, parts - 1)]


@given(st.data())
def test_reshape_is_that_of_the_dequantized_array_or_an_error(data):
    q = data.draw(qarrays())
    target = data.draw(st.sampled_from(_factorizations(q.size, data.draw(st.integers(1, 3)))))
    expected = numpy_dequantize(q).reshape(target)

    def has_scale(leaf):
        """Whether some scale shape gives the reshaped scale, by trying all of them."""
        full = spread(np.arange(leaf.size).reshape(leaf.shape), q.shape).reshape(target)
        candidates = [()]
        for n in target:
            candidates = [(*c, s) for c in candidates for s in range(1, n + 1) if n % s == 0]
        return any(
            math.prod(shape) == leaf.size
            and all((tile == tile.flat[0]).all() for tile in tiles_of(full, shape).values())
            for shape in candidates
        )

    leaves = [q.scale] if q.zero_point is None else [q.scale, q.zero_point]
    if all(map(has_scale, leaves)):
        reshaped = q.reshape(target)
        qarray.validate_qarray(reshaped)
        assert reshaped.shape == target
        np.testing.assert_array_equal(numpy_dequantize(reshaped), expected)
    else:
        with pytest.raises(ValueError, match="cannot follow") as e:
            q.reshape(*target)
        assert str(q.shape) in str(e.value) and str(target) in str(e.value)


def test_reshape_with_an_unknown_size():
    q = QArray(jnp.ones((4, 6), jnp.int8), jnp.ones((4, 3)))
    assert q.reshape(-1).shape == (24,)
    assert q.reshape((2, -1, 6)).shape == (2, 2, 6)
    assert q.reshape([4, -1, 2]).scale.shape == (4, 3, 1)
    for target in [(5, -1), (-1, -1), (4, 5), (0, -1)]:
        with pytest.raises(ValueError, match=r"\(4, 6\) to"):
            q.reshape(target)


@settings(max_examples=12)
@given(qarrays(), st.data())
def test_transposing(q, data):
    full = numpy_dequantize(q)
    order = data.draw(st.permutations(range(q.ndim)))
    np.testing.assert_array_equal(numpy_dequantize(q.transpose(order)), full.transpose(order))
    np.testing.assert_array_equal(numpy_dequantize(q.transpose(*order)), full.transpose(order))
    np.testing.assert_array_equal(numpy_dequantize(q.T), full.T)
    np.testing.assert_array_equal(numpy_dequantize(q.swapaxes(0, -1)), full.swapaxes(0, -1))
    if q.ndim > 1:
        np.testing.assert_array_equal(numpy_dequantize(q.mT), full.swapaxes(-1, -2))


@settings(max_examples=12)
@given(qarrays(), st.data())
def test_broadcasting_repeats_elements(q, data):
    factors = [data.draw(st.integers(1, 3)) for _ in q.shape]
    target = tuple(n * f for n, f in zip(q.shape, factors, strict=True))
    lead = data.draw(st.sampled_from([(), (2,)]))
    expected = np.broadcast_to(spread(numpy_dequantize(q), target), lead + target)
    broadcast = qarray.broadcast_to(q, lead + target)
    qarray.validate_qarray(broadcast)
    assert broadcast.scale.size == q.scale.size
    np.testing.assert_array_equal(numpy_dequantize(broadcast), expected)
    np.testing.assert_allclose(qarray.broadcast_to(qarray.dequantize(q), lead + target), expected)


def test_impossible_broadcasts():
    for target in [(4, 7), (6,), (2, 6)]:
        with pytest.raises(ValueError, match=r"Cannot broadcast|to broadcast"):
            qarray.broadcast_to(jnp.ones((4, 6)), target)


@given(st.lists(st.tuples(*[st.sampled_from([1, 2, 6])] * 2), min_size=1, max_size=3))
def test_generic_broadcast(sizes):
    x = normal([a for a, _ in sizes])
    y = normal([b for _, b in sizes], seed=1)
    shape = [max(pair) for pair in sizes]
    actual = qarray.call_with_generic_broadcast(jnp.subtract, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(actual, spread(x, shape) - spread(y, shape))


def test_generic_broadcast_repeats_nothing_in_memory():
    jaxpr = jax.make_jaxpr(lambda x, y: qarray.call_with_generic_broadcast(jnp.multiply, x, y))(
        jnp.ones((8, 6)), jnp.ones((2, 3))
    )
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.invars]
    assert "repeat" not in str(jaxpr) and "gather" not in str(jaxpr)
    assert min(sizes) == 6


def test_impossible_generic_broadcasts():
    for a, b in [((4, 6), (4, 5)), ((4,), (1, 4)), ((4, 0), (4, 3))]:
        with pytest.raises(ValueError, match="Cannot broadcast"):
            qarray.call_with_generic_broadcast(jnp.add, jnp.ones(a), jnp.ones(b))


def test_split_axis():
    x = jnp.arange(96).reshape(8, 12)
    assert qarray.split_axis(x, {}) is not None
    np.testing.assert_array_equal(qarray.split_axis(x, {1: 4}), np.reshape(x, (8, 3, 4)))
    np.testing.assert_array_equal(qarray.split_axis(x, {-1: 0.5}), np.reshape(x, (8, 2, 6)))
    np.testing.assert_array_equal(qarray.split_axis(x, {0: 2, 1: 4}), np.reshape(x, (4, 2, 3, 4)))
    q = QArray(x.astype(jnp.int8), jnp.ones((8, 3)))
    split = qarray.split_axis(q, {1: 4})
    assert (split.shape, split.scale.shape) == ((8, 3, 4), (8, 3, 1))


def test_transpose_array():
    x = jnp.arange(6).reshape(2, 1, 3)
    for transpose, expected in [
        ((2, 0), np.squeeze(x, 1).T),
        ((2, None, 1, 0), np.transpose(x, (2, 1, 0))[:, None]),
        ((None, 0, 2, None), np.squeeze(x, 1)[None, ..., None]),
    ]:
        np.testing.assert_array_equal(qarray.transpose_array(x, transpose), expected)
    for transpose in [(0, 1), (2, 2, 0), (3, 0, 2), (None,)]:
        with pytest.raises(ValueError, match=r"Cannot transpose \(2, 1, 3\)"):
            qarray.transpose_array(x, transpose)


def test_tile_shapes_and_tiled_axes():
    q = qarray.quantize_api(jnp.ones((4, 12, 6)), jnp.int8, channelwise_axes=(0,), tiled_axes={1: 4})
    assert q.scale_tile_shape == (1, 4, 6)
    assert q.zero_point_tile_shape is None
    assert qarray.get_tiled_axes(q) == {1: 4}
    # Tiles of one element, and one tile for all, are not tiles.
    for tiled in [{1: 1}, {1: 12}, {1: 1.0}]:
        q = qarray.quantize_api(jnp.ones((4, 12)), jnp.int8, tiled_axes=tiled)
        assert qarray.get_tiled_axes(q) == {}
    q = qarray.quantize_api(jnp.ones((4, 12)), jnp.int8, calibration_method="minmax")
    assert q.zero_point_tile_shape == (4, 12)


def test_astype_changes_the_dequantized_dtype():
    q = qarray.quantize_api(jnp.asarray(normal((2, 4))), jnp.int8).astype(jnp.bfloat16)
    assert q.dtype == qarray.dequantize(q).dtype == jnp.bfloat16
    assert q.qvalue.dtype == jnp.int8


# ---------------------------------------------------------------- clipping


def test_clip_to_calibration():
    x = jnp.asarray(normal((4, 12)))
    for method, tiled in [("absmax,0.5", {1: 4}), ("minmax,0.5", {}), ("fixed,-0.5,1", {})]:
        how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes=tiled, calibration_method=method)
        bounds = qarray.calibrate(x, how)
        low, high = bounds.get("min", -bounds.get("absmax", 0)), bounds.get("max", bounds.get("absmax"))
        expected = np.clip(x, spread(np.asarray(low), x.shape), spread(np.asarray(high), x.shape))
        np.testing.assert_array_equal(qarray.clip_to_calibration(x, bounds, tiled), expected)
    with pytest.raises(ValueError, match="does not fit"):
        qarray.clip_to_calibration(x, {"absmax": jnp.ones((4, 3))}, {1: 2})


@pytest.mark.parametrize("method", ["absmax,0.5", "minmax,0.5", "rms,1", "fixed,0.5", "fixed,-0.1,1"])
@pytest.mark.parametrize("tiled", [{}, {1: 4}])
def test_gradients_vanish_where_the_range_clips(method, tiled):
    x, g = jnp.asarray(normal((4, 12))), jnp.asarray(normal((4, 12), seed=1))
    how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes=tiled, calibration_method=method)
    bounds = qarray.calibrate(x, how)
    actual = qarray.clip_gradient_to_calibration(g, x, bounds, method)
    inside = np.asarray(qarray.clip_to_calibration(x, bounds, tiled)) == np.asarray(x)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(actual, np.where(inside, g, 0))


@pytest.mark.parametrize("method", ["absmax", "absmax,1", "absmax,1.5", "minmax", "minmax,1.0"])
def test_gradients_pass_where_nothing_clips(method):
    x, g = jnp.asarray(normal((4, 12))), jnp.asarray(normal((4, 12), seed=1))
    bounds = qarray.calibrate(x, HowToQuantize(qtype=jnp.int8, calibration_method=method))
    assert qarray.clip_gradient_to_calibration(g, x, bounds, method) is g


# ---------------------------------------------------------------- dtypes of a matmul


def test_accumulator_and_result_types():
    f32, bf16 = jnp.ones((2, 2)), jnp.ones((2, 2), jnp.bfloat16)
    q8, q8_bf16 = qarray.quantize_api(f32, jnp.int8), qarray.quantize_api(bf16, jnp.int8)
    q4, q16 = qarray.quantize_api(f32, "int4"), qarray.quantize_api(f32, jnp.int16)
    fp8 = qarray.quantize_api(bf16, jnp.float8_e4m3fn)
    mx = qarray.quantize_api(bf16, "mxfp4")
    for operands, preferred, expected in [
        ((q8, q8), None, (jnp.int32, jnp.float32)),
        ((q8_bf16, q8_bf16), None, (jnp.int32, jnp.bfloat16)),
        ((q8, q8_bf16), None, (jnp.int32, jnp.float32)),
        ((q8_bf16, q4), jnp.bfloat16, (jnp.int32, jnp.bfloat16)),
        ((q8_bf16, q8_bf16.qvalue), None, (jnp.int32, jnp.bfloat16)),
        ((q16, q8), None, (jnp.float32, jnp.float32)),
        ((fp8, fp8), None, (jnp.float32, jnp.bfloat16)),
        ((mx, mx), jnp.float32, (jnp.float32, jnp.float32)),
        ((q8_bf16, fp8), None, (jnp.float32, jnp.bfloat16)),
        ((q8, f32), None, (jnp.float32, jnp.float32)),
        ((bf16, q8_bf16), None, (jnp.bfloat16, jnp.bfloat16)),
        ((bf16, q8), None, (jnp.float32, jnp.float32)),
        ((bf16, bf16), jnp.float32, (jnp.float32, jnp.float32)),
        ((f32, f32), None, (jnp.float32, jnp.float32)),
    ]:
        actual = qarray.get_accumulator_and_result_type(*operands, preferred_element_type=preferred)
        assert actual == tuple(map(np.dtype, expected))


def test_sparsify_without_a_rule_changes_nothing():
    x = jnp.ones((2, 4))
    assert qarray.sparsify(x, HowToQuantize(qtype=jnp.int8)) is x

    @dataclasses.dataclass
    class Rule:
        weight_sparsity_n: int
        weight_sparsity_m: int

    assert qarray.sparsify(x, Rule(0, 0)) is x
    assert qarray.sparsify(x, Rule(2, 4)).tolist() == [[1, 1, 0, 0]] * 2


# ---------------------------------------------------------------- HowToQuantize


def test_how_is_hashable_and_compared_by_value():
    forms = [jnp.int8, "int8", np.dtype("int8"), np.int8]
    hows = [HowToQuantize(qtype=form, channelwise_axes=[1, 0], tiled_axes={3: 4, 2: 0.5}) for form in forms]
    hows.append(HowToQuantize(qtype=jnp.int8, channelwise_axes={0, 1}, tiled_axes={2: 0.5, 3: 4}))
    assert len(set(hows)) == 1
    assert all(how == hows[0] and how.qtype == jnp.int8 for how in hows)
    assert hows[0] != dataclasses.replace(hows[0], tiled_axes={3: 8})
    assert hows[0] != dataclasses.replace(hows[0], calibration_method="rms,3")
    assert HowToQuantize(qtype="nf4").qtype == "nf4"
    assert pickle.loads(pickle.dumps(hows[0])) == hows[0] == copy.deepcopy(hows[0])


def test_how_compares_noise_by_identity():
    def noise(shape):
        return jnp.zeros(shape)

    how = HowToQuantize(qtype=jnp.int8, noise_fn=noise)
    assert how == HowToQuantize(qtype=jnp.int8, noise_fn=noise)
    assert how != HowToQuantize(qtype=jnp.int8, noise_fn=jnp.zeros)
    with pytest.raises(dataclasses.FrozenInstanceError):
        how.qtype = jnp.int4
    with pytest.raises(TypeError):
        HowToQuantize(jnp.int8)


def test_noise_may_close_over_tracers():
    x = jnp.asarray(normal((4, 8)))

    @jax.jit
    def quantize(x, key):
        def noise(shape):
            return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)

        how = HowToQuantize(qtype=jnp.int8, noise_fn=noise)
        qarray.calibrate(x, how)
        return qarray.quantize(x, how)

    a, b = quantize(x, jax.random.key(0)), quantize(x, jax.random.key(1))
    assert (np.asarray(a.qvalue) != np.asarray(b.qvalue)).any()
    mean = np.mean([quantize(x, jax.random.key(i)).qvalue for i in range(200)], 0)
    np.testing.assert_allclose(mean, x / a.scale, atol=0.2)


# ---------------------------------------------------------------- pytrees and transformations


def quantized(method="minmax"):
    x = jnp.asarray(normal((4, 6)))
    return qarray.quantize_api(x, jnp.int8, channelwise_axes=(0,), calibration_method=method)


def test_leaves_and_keys():
    q = quantized()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert [str(p) for (p,) in paths] == [".qvalue", ".scale", ".zero_point"]
    assert all(isinstance(p, jax.tree_util.GetAttrKey) for (p,) in paths)
    assert len(jax.tree.leaves(quantized("absmax"))) == 2
    assert jax.tree.structure(q) == jax.tree.structure(quantized())
    assert hash(jax.tree.structure(q)) == hash(jax.tree.structure(quantized()))
    assert jax.tree.structure(q) != jax.tree.structure(q.replace(qtype="int7"))


@pytest.mark.parametrize("leaf", [None, object(), 3, "text", jax.ShapeDtypeStruct((4, 6), jnp.int8), jax.P("data")])
def test_any_leaf_may_stand_in_a_tree(leaf):
    q = jax.tree.map(lambda _: leaf, quantized())
    assert type(q) is QArray
    assert q.qvalue is leaf and q.zero_point is leaf
    assert q.qtype == jnp.int8
    assert QArray(leaf, leaf).qvalue is leaf


def test_fields_cannot_be_assigned_but_replaced():
    q = quantized()
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.scale = q.scale * 2
    doubled = q.replace(scale=q.scale * 2)
    np.testing.assert_allclose(qarray.dequantize(doubled), 2 * qarray.dequantize(q), rtol=1e-6)
    assert doubled.qvalue is q.qvalue
    object.__setattr__(q, "scale", doubled.scale)  # as NNX does
    assert q.scale is doubled.scale
    assert q != doubled
    assert q in [doubled, q]


def test_qtype_defaults_to_the_dtype_of_qvalue():
    assert QArray(jnp.ones(2, jnp.int8), jnp.ones(1)).qtype == jnp.int8
    assert QArray(jnp.ones(2, jnp.int8), jnp.ones(1), qtype="int7").qtype == "int7"


def test_copies():
    q = quantized()
    for other in (copy.deepcopy(q), copy.copy(q), pickle.loads(pickle.dumps(q))):
        assert type(other) is QArray
        assert jax.tree.structure(other) == jax.tree.structure(q)
        jax.tree.map(np.testing.assert_array_equal, other, q)


class Box:
    """Like nnx.Param: no array, but has one, and its shape and dtype."""

    def __init__(self, value):
        self._value = value

    def get_value(self):
        return self._value

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._value, name)


def test_leaves_in_boxes():
    q = quantized()
    boxed = QArray(Box(q.qvalue), Box(q.scale), Box(q.zero_point))
    assert (boxed.shape, boxed.ndim, boxed.dtype, boxed.size) == ((4, 6), 2, np.float32, 24)
    assert boxed.qtype == jnp.int8
    assert boxed.scale_tile_shape == (1, 6)
    plain = qarray.unwrap(boxed)
    assert plain.qvalue is q.qvalue and plain.zero_point is q.zero_point
    assert qarray.unwrap(plain) is plain
    np.testing.assert_array_equal(qarray.dequantize(boxed), qarray.dequantize(q))
    for fn in (
        lambda q: q.T,
        lambda q: q[1:3],
        lambda q: q.reshape(2, 2, 6),
        lambda q: q.astype(jnp.bfloat16),
        lambda q: qarray.broadcast_to(q, (2, 4, 6)),
    ):
        jax.tree.map(np.testing.assert_array_equal, fn(boxed), fn(q))
    x = Box(jnp.asarray(normal((4, 6))))
    how = HowToQuantize(qtype=jnp.int8)
    jax.tree.map(np.testing.assert_array_equal, qarray.quantize(x, how), qarray.quantize(x.get_value(), how))


def test_vmap_scan_eval_shape_and_grad():
    x = jnp.asarray(normal((3, 4, 8)))
    how = HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: 4})
    each = [qarray.quantize(a, how) for a in x]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    mapped = jax.vmap(lambda a: qarray.quantize(a, how))(x)
    jax.tree.map(np.testing.assert_array_equal, mapped, stacked)
    _, scanned = jax.lax.scan(lambda c, q: (c, qarray.dequantize(q)), None, stacked)
    np.testing.assert_array_equal(scanned, [qarray.dequantize(q) for q in each])

    abstract = jax.eval_shape(lambda a: qarray.quantize(a, how), jax.ShapeDtypeStruct((4, 8), jnp.bfloat16))
    assert abstract.qvalue == jax.ShapeDtypeStruct((4, 8), jnp.int4)
    assert abstract.scale == jax.ShapeDtypeStruct((4, 2), jnp.bfloat16)
    assert abstract.shape == (4, 8)

    def loss(a):
        return qarray.dequantize(qarray.quantize(a, how)).sum()

    assert np.isfinite(jax.grad(loss)(x[0])).all()

    def dequantized_sum(scale):
        return qarray.dequantize(each[0].replace(scale=scale)).sum()

    expected = np.asarray(each[0].qvalue).astype(np.float32).reshape(4, 2, 4).sum(-1)
    np.testing.assert_allclose(jax.grad(dequantized_sum)(each[0].scale), expected)


@pytest.mark.parametrize("qtype", [jnp.int8, "int4", "nf4", "mxfp4"])
def test_an_array_from_outside_of_a_trace(qtype):
    x = jnp.asarray(normal((4, 8)))
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,))
    expected = qarray.quantize(x, how)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: qarray.quantize(x, how))(), expected)


def test_quantize_leaves_no_call_in_the_jaxpr():
    how = HowToQuantize(qtype="nf4", channelwise_axes=(0,))
    x = jnp.ones((4, 8))
    text = str(jax.make_jaxpr(lambda x: qarray.dequantize(qarray.quantize(x, how)))(x))
    assert "_calibrate" not in text and "_dequantize" not in text


def test_threads():
    x = jnp.asarray(normal((8, 16)))
    hows = [HowToQuantize(qtype=q, channelwise_axes=(0,)) for q in (jnp.int8, "int4", "nf4")] * 3
    results = [None] * len(hows)

    def work(i):
        results[i] = qarray.quantize(x, hows[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(hows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for how, q in zip(hows, results, strict=True):
        jax.tree.map(np.testing.assert_array_equal, q, qarray.quantize(x, how))


def test_numpy_arrays_are_quantized():
    x = normal((4, 8))
    for qtype in (jnp.int8, "int4", "nf4", "mxfp4"):
        how = HowToQuantize(qtype=qtype)
        jax.tree.map(np.testing.assert_array_equal, qarray.quantize(x, how), qarray.quantize(jnp.asarray(x), how))


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [jax.P("a", "b"), jax.P(None, ("a", "b"))])
@pytest.mark.parametrize("qtype", [jnp.int8, "int4"])
def test_sharded_arrays_stay_sharded(axis_type, spec, qtype):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))
    x = jnp.asarray(normal((32, 64)))
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    for granularity in (
        dict(channelwise_axes=(1,)),
        dict(channelwise_axes=(1,), tiled_axes={0: 8}),
        dict(channelwise_axes=(0,), tiled_axes={1: 8}),
    ):
        how = HowToQuantize(qtype=qtype, **granularity)
        expected = qarray.quantize(x, how)
        with jax.set_mesh(mesh):
            for quantize in (qarray.quantize, jax.jit(qarray.quantize, static_argnums=1)):
                q = quantize(sharded, how)
                assert q.qvalue.sharding.is_equivalent_to(sharded.sharding, 2)
                jax.tree.map(np.testing.assert_array_equal, q, expected)
                y = qarray.dequantize(q)
                assert y.sharding.is_equivalent_to(sharded.sharding, 2)
                np.testing.assert_array_equal(y, qarray.dequantize(expected))


def test_tiles_across_explicitly_sharded_devices_are_an_error():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, jax.P("a", None)))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="moving it between devices"):
        tiling.regroup(x, (2, 8, 4))


@pytest.mark.parametrize("qtype", [jnp.int8, "int4", "nf4", "mxfp4"])
def test_results_stay_on_their_device(qtype):
    device = jax.devices()[3]
    x = jax.device_put(jnp.asarray(normal((4, 8))), device)
    q = qarray.quantize(x, HowToQuantize(qtype=qtype))
    assert all(leaf.devices() == {device} and leaf.committed for leaf in jax.tree.leaves(q))
    uncommitted = qarray.quantize(jnp.asarray(normal((4, 8))), HowToQuantize(qtype=qtype))
    assert not any(leaf.committed for leaf in jax.tree.leaves(uncommitted))


@pytest.mark.parametrize("qtype", [jnp.int4, jnp.int2, "int3", "nf4", "mxfp4"])
def test_narrow_elements_are_the_same_by_view_and_by_xla(qtype):
    """Eagerly on a CPU they are bytes seen as 4-bit elements; arithmetic on both must agree."""
    x = jnp.asarray(normal((8, 32)))
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,))
    viewed, converted = qarray.quantize(x, how), jax.jit(qarray.quantize, static_argnums=1)(x, how)
    np.testing.assert_array_equal(viewed.qvalue, converted.qvalue)
    for fn in (lambda v: v.astype(jnp.float32), lambda v: v.T.reshape(-1), lambda v: v[1:, 2:9]):
        np.testing.assert_array_equal(jax.jit(fn)(viewed.qvalue), jax.jit(fn)(converted.qvalue))


def test_compute_dtype():
    assert calibration.compute_dtype(jnp.bfloat16) == np.float32
    assert calibration.compute_dtype(jnp.float16) == np.float32
    assert calibration.compute_dtype(np.float64) == np.float64
