"""The native kernels, each instruction set of this CPU, against NumPy in float64."""

import concurrent.futures
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import qarray
from qwix._src.core.qarray import HowToQuantize
from qwix.contrib import padded_ptq
from qwix.cpu import native, packed

KERNELS = range(len(native.kernels()))

# (format, tile, calibration method)
WEIGHTS = [
    ("int8", None, "absmax"),
    ("int8", 24, "minmax"),
    ("int4", None, "minmax"),
    ("int4", 32, "absmax"),
    ("int4", 20, "minmax"),
    ("mxfp4", 32, "absmax"),
    ("nf4", 40, "absmax"),
    ("float8_e4m3fn", None, "absmax"),
    ("float8_e5m2", 16, "absmax"),
]
# Rows, and their dtype. Kernels take groups of 1 to 16 rows, some two of 16 at once.
ROWS = ((1, np.float32), (2, np.float32), (23, np.float32), (52, np.float32), (3, jnp.bfloat16), (19, jnp.bfloat16))


def weight(rng: np.random.Generator, k: int, n: int, qtype: Any, tile: int | None, method: str) -> qarray.QArray:
    how = HowToQuantize(
        qtype=qtype, channelwise_axes=(1,), tiled_axes={0: tile} if tile else {}, calibration_method=method
    )
    return qarray.quantize(jnp.asarray(rng.standard_normal((k, n)), jnp.float32), how)


def run(x: Any, p: packed.PackedQArray, mode: int, kernel: int, **kwargs: Any) -> np.ndarray:
    format_ = packed.format_of(p.qtype)
    assert format_ is not None
    options = {"dtype": np.dtype(np.float32), "factor": 1.0, "bias": None, "x_scale": None} | kwargs
    return native.matmul(
        x,
        options.pop("x_scale"),
        p.qvalue,
        p.scale,
        p.zero_point,
        options.pop("bias"),
        format_number=format_.number,
        mode=mode,
        columns=p.layout.n,
        tile=p.layout.tile,
        kernel=kernel,
        **options,
    )


def in_float64(array: qarray.QArray) -> np.ndarray:
    return np.asarray(qarray.dequantize(array.astype(jnp.float32)), np.float64)


def assert_product(actual: Any, x: np.ndarray, w: np.ndarray, epsilon: float = 2e-6) -> None:
    """actual = x w, but for rounding in proportion to the sum of magnitudes."""
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - x @ w), epsilon * (np.abs(x) @ np.abs(w)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("qtype", "tile", "method"), WEIGHTS)
def test_float_activations(kernel: int, qtype: Any, tile: int | None, method: str) -> None:
    rng = np.random.default_rng(0)
    q = weight(rng, 120 if tile not in (16, 32) else 160, 37, qtype, tile, method)
    p = packed.pack(q)
    for m, dtype in ROWS:
        x = rng.standard_normal((m, q.shape[0])).astype(dtype)
        y = run(jnp.asarray(x), p, native.FLOAT, kernel)
        assert_product(y, x.astype(np.float64), in_float64(q))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("qtype", "tile", "method"), WEIGHTS[:6])
def test_dynamic_int8_activations(kernel: int, qtype: Any, tile: int | None, method: str) -> None:
    rng = np.random.default_rng(1)
    q = weight(rng, 120 if tile != 32 else 160, 37, qtype, tile, method)
    p = packed.pack(q)
    k = p.layout.tile
    for m, dtype in ROWS:
        x = jnp.asarray(rng.standard_normal((m, q.shape[0])).astype(dtype))
        how = HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: k})
        xq = qarray.quantize(x, how)
        # The scales are the same bits; a code at a tie may be one step off, as XLA divides in several ways.
        y = run(x, p, native.DYNAMIC, kernel)
        step = np.abs(np.asarray(xq.scale, np.float64)).max() * np.abs(in_float64(q)).max()
        assert np.abs(np.asarray(y, np.float64) - in_float64(xq) @ in_float64(q)).max() < 1e-5 + step
        y = run(xq.qvalue, p, native.QUANTIZED, kernel, x_scale=xq.scale.astype(jnp.float32))
        assert_product(y, in_float64(xq), in_float64(q), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("qtype", "tile", "k"),
    [
        ("int8", 48, 109),
        ("int8", 1100, 2100),
        ("int4", 128, 345),
        ("int4", 2100, 2070),
        ("mxfp4", 32, 65),
        ("nf4", 40, 50),
    ],
)
def test_a_last_tile_that_is_cut_short(kernel: int, qtype: Any, tile: int, k: int) -> None:
    """K ends within the last tile: nothing is read beyond it, and what a weight has there counts for nothing."""
    rng = np.random.default_rng(10)
    q = weight(rng, -(-k // tile) * tile, 37, qtype, tile, "absmax")
    p, w = packed.pack(q, (0,)), in_float64(q)[:k]
    for m, dtype in ROWS:
        x = rng.standard_normal((m, k)).astype(dtype)
        assert_product(run(jnp.asarray(x), p, native.FLOAT, kernel), x.astype(np.float64), w)
        if qtype == "nf4":
            continue
        how = HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: tile})
        xq = padded_ptq.quantize(jnp.asarray(x), how)
        x_scale = xq.scale.astype(jnp.float32)
        rounded = np.asarray(padded_ptq.dequantize(xq.astype(jnp.float32)), np.float64)
        y = run(xq.qvalue, p, native.QUANTIZED, kernel, x_scale=x_scale)
        assert_product(y, rounded, w, 1e-6)
        step = np.asarray(x_scale).max() * np.abs(w).max()  # a code at a tie may be one off
        y = run(jnp.asarray(x), p, native.DYNAMIC, kernel)
        assert np.abs(np.asarray(y, np.float64) - rounded @ w).max() < 1e-5 + step


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("qtype", ["int8", "int4", "mxfp4"])
def test_extreme_codes_do_not_saturate(kernel: int, qtype: str) -> None:
    k, n = 512, 16
    low, high = {"int8": (-128, 127), "int4": (-8, 7), "mxfp4": (-6, 6)}[qtype]
    dtype = {"int8": jnp.int8, "int4": jnp.int4, "mxfp4": jnp.float4_e2m1fn}[qtype]
    for code, act in itertools.product((low, high), (-128, 127)):
        q = qarray.QArray(jnp.full((k, n), code).astype(dtype), jnp.ones((1, n)), None, qtype)
        for m in (5, 17):
            x = jnp.full((m, k), act, jnp.int8)
            y = run(x, packed.pack(q), native.QUANTIZED, kernel, x_scale=jnp.ones((m, 1)))
            np.testing.assert_array_equal(y, np.full((m, n), k * code * act))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "float8_e5m2", "nf4", "mxfp4"])
def test_every_code_is_decoded_exactly(kernel: int, qtype: str) -> None:
    bits = packed.format_of(qtype).bits  # type: ignore[union-attr]
    codes = np.arange(2**bits, dtype=np.uint8)
    values = packed._from_codes(jnp.asarray(codes)[None, :], qtype)
    q = qarray.QArray(jnp.tile(values, (8, 1)), jnp.ones((1, values.shape[1])), None, qtype)
    # A sum of eight equal eighths is exact but for nf4; 0 inf would be NaN.
    row = np.eye(8)[5] if qtype == "nf4" else np.full(8, 0.125)
    for m in (1, 6, 12):
        x = jnp.asarray(np.tile(row, (m, 1)), jnp.float32)
        y = np.asarray(run(x, packed.pack(q, (0,)), native.FLOAT, kernel))
        np.testing.assert_array_equal(y[-1], np.asarray(qarray.dequantize(q))[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_bfloat16_output_and_calibration_factor(kernel: int) -> None:
    rng = np.random.default_rng(2)
    q = weight(rng, 64, 21, "int8", None, "absmax")
    bias = jnp.asarray(rng.standard_normal(21), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    y = run(x, packed.pack(q), native.FLOAT, kernel, bias=bias, dtype=np.dtype(jnp.bfloat16))
    expected = np.asarray(x, np.float64) @ in_float64(q) + np.asarray(bias)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)
    how = HowToQuantize(qtype="int8", channelwise_axes=(0,), calibration_method="absmax,0.5")
    y = run(x, packed.pack(q), native.DYNAMIC, kernel, factor=0.5)
    np.testing.assert_allclose(y, in_float64(qarray.quantize(x, how)) @ in_float64(q), rtol=1e-4, atol=1e-4)


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x / (1 + math.exp(min(700, -2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions(kernel: int, activation: str) -> None:
    """Of numbers that a weight of ones on the diagonal leaves as they are, to some units in the last place."""
    identity = qarray.QArray(jnp.eye(20, dtype=jnp.int8), jnp.ones((1, 20), jnp.float32))
    p = packed.pack(identity, (0,))
    x = np.linspace(-10, 10, 20 * 23, dtype=np.float32)
    x[:8] = [0.0, -0.0, 1e-30, -1e-6, 1e-6, 87.0, 30.0, -30.0]
    expected = np.array([ACTIVATIONS[activation](float(v)) for v in x])
    for rows in (x.reshape(23, 20), x[:20].reshape(1, 20)):
        actual = run(jnp.asarray(rows), p, native.FLOAT, kernel, activation=activation)
        want = expected[: rows.size].reshape(rows.shape)
        # exp(-x^2 / 2) has the rounding of x^2 times x^2; a tanh near -1 is a difference.
        np.testing.assert_allclose(actual, want, rtol=1e-5, atol=1e-30)
        near = np.abs(rows) < 3
        np.testing.assert_allclose(np.asarray(actual)[near], want[near], rtol=2e-6)
    # After the bias, and before the result is rounded.
    kwargs: dict[str, Any] = {"bias": jnp.full((20,), 0.5), "dtype": np.dtype(jnp.bfloat16)}
    actual = run(jnp.asarray(x.reshape(23, 20)), p, native.FLOAT, kernel, activation=activation, **kwargs)
    with_bias = np.array([ACTIVATIONS[activation](float(v)) for v in x + np.float32(0.5)]).reshape(23, 20)
    np.testing.assert_allclose(np.asarray(actual, np.float64), with_bias, rtol=2**-8 * 1.01, atol=1e-30)


@pytest.mark.parametrize("kernel", KERNELS)
def test_activation_functions_of_what_is_not_finite(kernel: int) -> None:
    identity = qarray.QArray(jnp.eye(16, dtype=jnp.int8), jnp.ones((1, 16), jnp.float32))
    p = packed.pack(identity, (0,))
    for value in (np.inf, -np.inf, np.nan, 3e38, -3e38):
        bias = jnp.zeros((16,)).at[0].set(value)  # a sum with 0 * inf is NaN, so the bias brings it
        for activation in ACTIVATIONS:
            actual = np.asarray(run(jnp.zeros((1, 16)), p, native.FLOAT, kernel, bias=bias, activation=activation))
            np.testing.assert_array_equal(actual[0, 0], np.float32(0 if value < 0 else value))
            np.testing.assert_array_equal(actual[0, 1:], 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_without_a_finite_range(kernel: int) -> None:
    rng = np.random.default_rng(3)
    q = weight(rng, 32, 16, "int8", None, "absmax")
    x = np.asarray(rng.standard_normal((5, 32)), np.float32)
    x[0, 3], x[1, 4], x[2], x[3] = np.nan, np.inf, 0, x[3] * 1e30
    y = np.asarray(run(jnp.asarray(x), packed.pack(q), native.DYNAMIC, kernel))
    xq = qarray.quantize(jnp.asarray(x), HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    expected = np.asarray(qarray.dequantize(xq)) @ in_float64(q)
    assert np.isnan(y[:2]).all() and np.isnan(expected[:2]).all()
    np.testing.assert_array_equal(y[2], 0)
    np.testing.assert_allclose(y[3:], expected[3:], rtol=1e-4)


@hypothesis.given(
    m=st.sampled_from([1, 4, 5, 9, 37]),
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    scale=st.sampled_from([1e-20, 1, 1e15]),
)
@hypothesis.settings(max_examples=12)
def test_any_shape_and_scale(m: int, k: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(m * k * n)
    q = weight(rng, k, n, "int8", None, "absmax")
    q = q.replace(scale=q.scale * scale)
    x = rng.standard_normal((m, k)).astype(np.float32)
    p = packed.pack(q, (0,))
    for kernel in KERNELS:
        assert_product(run(jnp.asarray(x), p, native.FLOAT, kernel), x.astype(np.float64), in_float64(q))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("qtype", "tile"), [("int8", None), ("int4", None), ("int4", 1100), ("nf4", None)])
def test_a_long_contraction(kernel: int, qtype: str, tile: int | None) -> None:
    """It goes in parts, of which the last is none of a whole number of what is multiplied at once."""
    rng = np.random.default_rng(6)
    q = weight(rng, 2200, 40, qtype, tile, "absmax")
    p = packed.pack(q, (0,))
    x = rng.standard_normal((40, 2200)).astype(np.float32)
    for m in (5, 40):
        assert_product(run(jnp.asarray(x[:m]), p, native.FLOAT, kernel), x[:m].astype(np.float64), in_float64(q))
        if qtype != "nf4":
            how = HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})
            xq = qarray.quantize(jnp.asarray(x[:m]), how)
            y = run(xq.qvalue, p, native.QUANTIZED, kernel, x_scale=xq.scale)
            assert_product(y, in_float64(xq), in_float64(q), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("qtype", ["int8", "nf4", "float8_e4m3fn", "float8_e5m2"])
def test_floats_of_any_magnitude(kernel: int, qtype: str) -> None:
    rng = np.random.default_rng(7)
    q = weight(rng, 48, 20, qtype, None, "absmax")
    x = rng.standard_normal((21, 48)) * 10.0 ** np.linspace(-30, 34, 21)[:, None]
    x = x.astype(np.float32)
    p = packed.pack(q)
    assert_product(run(jnp.asarray(x), p, native.FLOAT, kernel), x.astype(np.float64), in_float64(q))
    # inf and NaN go to the results of their rows, and to no others.
    x[2, 3], x[5, 4], x[17, 5] = np.inf, np.nan, -np.inf
    y = np.asarray(run(jnp.asarray(x), p, native.FLOAT, kernel))
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ in_float64(q)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(y), np.isposinf(expected))
    np.testing.assert_array_equal(np.isneginf(y), np.isneginf(expected))


def test_calls_from_several_threads() -> None:
    """Threads of XLA's pool that have helped one call wait a moment for the next, of whoever makes it."""
    rng = np.random.default_rng(8)
    p = packed.pack(q := weight(rng, 512, 512, "int4", 32, "absmax"))
    xs = [rng.standard_normal((24, 512)).astype(np.float32) for _ in range(4)]
    expected = [x.astype(np.float64) @ in_float64(q) for x in xs]

    def call(i: int) -> None:
        x = jnp.asarray(xs[i % 4])
        for _ in range(10):
            np.testing.assert_allclose(run(x, p, native.FLOAT, 0), expected[i % 4], atol=1e-3)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(12)))


def test_a_large_product_on_several_threads() -> None:
    rng = np.random.default_rng(4)
    q = weight(rng, 1024, 530, "int4", 64, "absmax")
    x = jnp.asarray(rng.standard_normal((300, 1024)), jnp.float32)
    p = packed.pack(q)
    assert_product(run(x, p, native.FLOAT, 0), np.asarray(x, np.float64), in_float64(q))
    xq = qarray.quantize(x, HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: 64}))
    y = run(xq.qvalue, p, native.QUANTIZED, 0, x_scale=xq.scale)
    assert_product(y, in_float64(xq), in_float64(q))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_more_rows_and_columns_than_one_pass_takes(kernel: int, qtype: str) -> None:
    rng = np.random.default_rng(9)
    q = weight(rng, 520, 150, qtype, None, "absmax")
    x = rng.standard_normal((300, 520)).astype(np.float32)
    p = packed.pack(q)
    xq = qarray.quantize(jnp.asarray(x), HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    for m in (129, 300):
        y = run(jnp.asarray(x[:m]), p, native.FLOAT, kernel)
        assert_product(y, x[:m].astype(np.float64), in_float64(q))
        y = run(xq.qvalue[:m], p, native.QUANTIZED, kernel, x_scale=xq.scale[:m])
        assert_product(y, in_float64(xq)[:m], in_float64(q), 1e-6)


def test_empty_batch() -> None:
    q = weight(np.random.default_rng(5), 16, 8, "int8", None, "absmax")
    assert run(jnp.zeros((0, 16)), packed.pack(q), native.DYNAMIC, 0).shape == (0, 8)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    q = packed.pack(weight(np.random.default_rng(5), 16, 8, "int8", None, "absmax"))
    with pytest.raises(ValueError, match="K = 24 is not 1 tiles of 16"):
        run(jnp.zeros((2, 24)), q, native.FLOAT, 0)


def test_a_library_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """And no silent use of another one: a test of a special build would say nothing."""
    code = "from qwix.cpu import native; native.is_available()"
    env = os.environ | {"QWIX_CPU_LIBRARY": str(tmp_path / "none.so")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode and "QWIX_CPU_LIBRARY is" in done.stderr


def test_the_build_is_a_program() -> None:
    """That nothing has imported before it runs, which Python would warn of."""
    done = subprocess.run(
        [sys.executable, "-m", "qwix.cpu.build", "--help"], capture_output=True, text=True, check=True
    )
    assert "--sanitize" in done.stdout and "RuntimeWarning" not in done.stderr
