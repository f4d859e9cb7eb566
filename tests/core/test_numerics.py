"""Number formats against ml_dtypes (every code, every tie) and NumPy in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwix._src.core import numerics

FLOAT_FORMATS = [
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]
INTEGER_FORMATS = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 8)},
    jnp.int2: (-2, 1),
    jnp.int4: (-8, 7),
    jnp.int8: (-128, 127),
    jnp.int16: (-32768, 32767),
    jnp.uint4: (0, 15),
    jnp.uint8: (0, 255),
}


@functools.cache
def finite_values(name):
    """All finite values of a float format, ascending, by ml_dtypes."""
    dtype = np.dtype(name)
    bits = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
    values = bits.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def values_around_ties(points):
    """The points, the midpoints between neighbours, and the float32 next to each of these."""
    points = np.asarray(points, np.float64)
    exact = np.concatenate([points, (points[1:] + points[:-1]) / 2]).astype(np.float32)
    below = np.nextafter(exact, np.float32(-np.inf))
    above = np.nextafter(exact, np.float32(np.inf))
    return np.concatenate([exact, below, above])


def assert_same_numbers(actual, expected):
    """Equal values, signs of zero and NaNs."""
    actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_float_formats_round_like_ml_dtypes(name, dtype, jit):
    points = finite_values(name)
    largest = points[-1]
    beyond = np.array([largest * 1.01, largest * 4, 3e38, -largest * 1.01, -3e38, 0.0, -0.0])
    x = np.concatenate([values_around_ties(points), beyond.astype(np.float32)])
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    expected = np.clip(x.astype(np.float32), -largest, largest).astype(np.dtype(name))
    convert = functools.partial(numerics.convert_to, qtype=name)
    actual = (jax.jit(convert) if jit else convert)(jnp.asarray(x))
    assert actual.dtype == np.dtype(name)
    assert_same_numbers(actual, expected)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_every_value_of_a_float_format_survives(name):
    points = finite_values(name)
    actual = numerics.convert_to(jnp.asarray(points, jnp.float32), name)
    np.testing.assert_array_equal(np.asarray(actual).astype(np.float64), points)


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_non_finite_values_in_float_formats(name):
    """inf saturates, NaN stays NaN where the format has one."""
    largest = finite_values(name)[-1]
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    actual = np.asarray(numerics.convert_to(x, name)).astype(np.float64)
    np.testing.assert_array_equal(actual[:2], [largest, -largest])
    assert np.isnan(actual[2]) == (name != "float4_e2m1fn")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("qtype", INTEGER_FORMATS, ids=str)
def test_integers_round_half_to_even_and_saturate(qtype, dtype):
    low, high = INTEGER_FORMATS[qtype]
    steps = np.unique(np.linspace(low - 3, high + 3, 2001).round())
    x = np.concatenate([values_around_ties(steps), [np.inf, -np.inf, 3e38, -3e38]])
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    expected = np.clip(np.rint(x.astype(np.float64)), low, high)
    actual = numerics.convert_to(jnp.asarray(x), qtype)
    assert actual.dtype == numerics.storage_dtype(qtype)
    np.testing.assert_array_equal(np.asarray(actual).astype(np.float64), expected)


def test_float64_is_not_rounded_to_float32_first():
    with jax.enable_x64(True):
        x = jnp.array([0.5 + 1e-12, 0.5, 1.5 - 1e-12])
        assert numerics.convert_to(x, jnp.int8).tolist() == [1, 0, 1]
        # 0.25 is the tie of float4_e2m1fn between 0 and 0.5.
        x = jnp.array([0.25 + 1e-12, 0.25])
        assert numerics.convert_to(x, "mxfp4").astype(np.float32).tolist() == [0.5, 0.0]


class TestNf4:
    def test_code_points_are_those_of_the_paper(self):
        points = numerics.get_nf4_buckets()
        assert points.shape == (16,)
        assert points.dtype == np.float32
        assert points[0] == -1 and points[7] == 0 and points[15] == 1
        # Appendix E prints 16 digits; three of them as a check against typing errors.
        expected = np.float32([-0.6961928009986877, 0.07958029955625534, 0.7229568362236023])
        np.testing.assert_array_equal(points[np.array([1, 8, 14])], expected)
        # Section 3: quantiles of N(0, 1) at equal steps, negative and positive half apart.
        normal = pytest.importorskip("scipy.stats").norm
        offset = 0.9677083  # (1/2) (1 - 1/32 + 1 - 1/30)
        positive = normal.ppf(np.linspace(offset, 0.5, 9)[:-1])
        negative = -normal.ppf(np.linspace(offset, 0.5, 8)[:-1])
        levels = np.sort(np.concatenate([negative, [0], positive]))
        np.testing.assert_allclose(points, levels / levels[-1], atol=1e-5)

    def test_every_index_survives(self):
        index = jnp.arange(16, dtype=jnp.uint4)
        values = numerics.nf4_to_fp(index)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, numerics.get_nf4_buckets())
        np.testing.assert_array_equal(numerics.fp_to_nf4(values).astype(int), np.arange(16))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_nearest_code_point_and_the_lower_one_on_a_tie(self, dtype):
        points = np.asarray(numerics.get_nf4_buckets()).astype(np.float64)
        grid = np.linspace(-1.3, 1.3, 3001)
        extremes = [np.inf, -np.inf, 3e38]
        with np.errstate(over="ignore"):
            x = np.concatenate([values_around_ties(points), grid, extremes]).astype(dtype)
        clipped = np.clip(x.astype(np.float64), -2, 2)
        expected = np.abs(clipped[:, None] - points).argmin(1)  # the first, which is the lower
        actual = numerics.fp_to_nf4(jnp.asarray(x))
        assert actual.dtype == jnp.uint4
        np.testing.assert_array_equal(actual.astype(int), expected)

    def test_exact_ties_in_float64(self):
        points = np.asarray(numerics.get_nf4_buckets()).astype(np.float64)
        midpoints = (points[1:] + points[:-1]) / 2
        with jax.enable_x64(True):
            x = jnp.concatenate([midpoints, np.nextafter(midpoints, 2)])
            expected = np.concatenate([np.arange(15), np.arange(1, 16)])
            np.testing.assert_array_equal(numerics.fp_to_nf4(x).astype(int), expected)


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    qtype=st.sampled_from([*INTEGER_FORMATS, *FLOAT_FORMATS, "nf4", "mxfp8", "mxfp4", "nvfp4"]),
)
def test_converting_is_monotonic_and_idempotent(values, qtype):
    x = np.zeros(20, np.float32)
    x[: len(values)] = values
    x.sort()
    once = numerics.convert_to(jnp.asarray(x), qtype)
    numbers = np.asarray(numerics.convert_from(once, qtype)).astype(np.float32)
    assert (np.diff(numbers) >= 0).all()
    np.testing.assert_array_equal(numerics.convert_to(jnp.asarray(numbers), qtype), once)


@pytest.mark.parametrize(
    ("qtype", "bound"),
    [
        (jnp.int8, 127.5),
        ("int8", 127.5),
        (jnp.int4, 7.5),
        ("int4", 7.5),
        ("int3", 3.5),
        ("int2", 1.5),
        (jnp.int2, 1.5),
        ("int7", 63.5),
        (jnp.int16, 32768.0),
        ("nf4", 1.0),
        (jnp.float8_e4m3fn, 448.0),
        (jnp.float8_e5m2, 57344.0),
        (jnp.float4_e2m1fn, 6.0),
        ("mxfp8", 448.0),
        ("mxfp8_16", 448.0),
        ("mxfp4", 6.0),
        ("nvfp4", 6.0),
    ],
)
def test_symmetric_bounds(qtype, bound):
    assert numerics.get_symmetric_bound(qtype) == bound


def test_asymmetric_bounds():
    for qtype, bounds in [
        (jnp.int8, (-128, 127)),
        ("int8", (-128, 127)),
        (jnp.int4, (-8, 7)),
        ("int4", (-8, 7)),
        (jnp.int16, (-32768, 32767)),
    ]:
        assert numerics.get_asymmetric_bound(qtype) == bounds
    for qtype in ("int3", jnp.int2, "nf4", jnp.float8_e4m3fn, "mxfp4", jnp.uint8):
        with pytest.raises(ValueError, match="no asymmetric"):
            numerics.get_asymmetric_bound(qtype)


@pytest.mark.parametrize("qtype", [jnp.int32, jnp.bfloat16, jnp.float32, jnp.bool_, jnp.float8_e8m0fnu, "int1"])
def test_dtypes_that_are_no_quantized_format(qtype):
    with pytest.raises(ValueError, match="Cannot quantize to"):
        numerics.get_symmetric_bound(qtype)


@pytest.mark.parametrize("qtype", ["int9", "nf3", "", None, 7.5])
def test_unknown_formats_are_named(qtype):
    with pytest.raises(ValueError, match="is no number format") as e:
        numerics.canonical_qtype(qtype)
    assert repr(qtype) in str(e.value)


def test_storage():
    expected = {
        "int2": jnp.int4,
        "int3": jnp.int4,
        "int4": jnp.int4,
        "int5": jnp.int8,
        "int6": jnp.int8,
        "int7": jnp.int8,
        jnp.int2: jnp.int2,
        "nf4": jnp.uint4,
        "mxfp8": jnp.float8_e4m3fn,
        "mxfp8_16": jnp.float8_e4m3fn,
        "mxfp4": jnp.float4_e2m1fn,
        "nvfp4": jnp.float4_e2m1fn,
        jnp.float8_e5m2: jnp.float8_e5m2,
    }
    for qtype, dtype in expected.items():
        assert numerics.storage_dtype(qtype) == dtype
        assert numerics.convert_to(jnp.ones(2), qtype).dtype == dtype


def test_formats_are_equal_however_they_are_written():
    for name in ("int4", "int8", "float8_e4m3fn", "float4_e2m1fn"):
        forms = [name, getattr(jnp, name), np.dtype(name)]
        for a, b in itertools.product(forms, forms):
            assert numerics.canonical_qtype(a) == numerics.canonical_qtype(b) == b
        assert len({numerics.canonical_qtype(form) for form in forms}) == 1
    assert numerics.canonical_qtype("nf4") == "nf4"
    # The name is stored as int4, the dtype is a dtype of its own.
    assert numerics.storage_dtype("int2") != numerics.storage_dtype(jnp.int2)


def test_which_arrays_are_quantized():
    quantized = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
    others = (jnp.int8, jnp.int32, jnp.bool_, jnp.float8_e4m3fn, jnp.complex64)
    assert all(map(numerics.should_quantize, quantized))
    assert not any(map(numerics.should_quantize, others))


def test_what_is_dequantized_after_a_matmul():
    assert not numerics.can_dequant_on_output("nf4")
    for qtype in (jnp.int8, jnp.int16, "int3", jnp.float8_e5m2, "mxfp4", "nvfp4"):
        assert numerics.can_dequant_on_output(qtype)


def test_convert_from_keeps_numbers():
    for qtype in (jnp.int8, "int3", "mxfp4", jnp.float8_e4m3fn):
        x = numerics.convert_to(jnp.arange(3.0), qtype)
        assert numerics.convert_from(x, qtype) is x


class TestNoise:
    def test_it_is_added_in_float32_before_rounding(self):
        seen = []

        def noise(shape):
            seen.append(shape)
            return jnp.full(shape, 0.4, jnp.float32)

        # In bfloat16, whose step is 0.5 here, 100.2 would lose the noise.
        x = jnp.array([[100.0, -3.0]], jnp.bfloat16) + jnp.bfloat16(0.5)
        assert numerics.convert_to(x, jnp.int8, noise).tolist() == [[101, -2]]
        assert seen == [(1, 2)]

    def test_it_still_saturates(self):
        noise = functools.partial(jnp.full, fill_value=0.4)
        assert numerics.convert_to(jnp.array([127.4]), jnp.int8, noise).tolist() == [127]

    @pytest.mark.parametrize("qtype", ["nf4", jnp.float8_e4m3fn, "mxfp4"])
    def test_formats_without_steps_of_one_say_that_they_ignore_it(self, qtype):
        x = jnp.array([0.1])
        with pytest.warns(UserWarning, match="noise_fn is ignored"):
            noisy = numerics.convert_to(x, qtype, jnp.ones)
        np.testing.assert_array_equal(noisy, numerics.convert_to(x, qtype))
