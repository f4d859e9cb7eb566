"""Ops on packed weights, by the kernels and on XLA, against the unpacked weights."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwix._src.core import conv_general, dot_general, einsum, qarray
from qwix._src.core.qarray import HowToQuantize
from qwix.contrib import padded_ptq
from qwix.cpu import native, ops, packed

INT8 = HowToQuantize(qtype="int8", channelwise_axes=(0,))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weight(k: int, n: int, qtype: str = "int8", tile: int | None = None, method: str = "absmax") -> qarray.QArray:
    how = HowToQuantize(
        qtype=qtype, channelwise_axes=(1,), tiled_axes={0: tile} if tile else {}, calibration_method=method
    )
    return qarray.quantize(normal(k * n, k, n), how)


def assert_close(actual: jax.Array, expected: jax.Array, rtol: float = 2e-6) -> None:
    """To float rounding of the largest results; NaN and infinities in the same places."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * largest)


def calls(function: Any, *args: Any) -> int:
    """How many times the kernels are called in a function."""
    return str(jax.make_jaxpr(function)(*args)).count(native.MATMUL)


def rows_with(kind: str, m: int, k: int) -> jax.Array:
    x = normal(m + k, m, k)
    if kind in ("nan", "inf") and m:
        return x.at[m // 2, k // 2].set(float(kind))
    factor = {"zero": 0.0, "tiny": 1e-30, "huge": 1e30}.get(kind)
    return x if factor is None else x.at[::2].multiply(factor)


# Sizes from short lists, so that examples share their compiled programs.
@hypothesis.given(
    m=st.sampled_from([0, 1, 5]),
    k=st.sampled_from([24, 72]),
    n=st.sampled_from([3, 40]),
    what=st.sampled_from(["int8", "int4", "mxfp4", "nf4", "float8_e4m3fn"]),
    method=st.sampled_from(["absmax", "minmax"]),
    tile=st.sampled_from([None, 24]),
    act=st.sampled_from(["float", "dynamic", "static"]),
    kind=st.sampled_from(["normal", "zero", "tiny", "huge", "nan", "inf"]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@hypothesis.example(1, 24, 3, "int8", "minmax", None, "float", "inf", jnp.float32)  # inf - inf of a zero point
@hypothesis.settings(max_examples=20)
def test_any_product_is_that_of_the_unpacked_weight(
    m: int, k: int, n: int, what: str, method: str, tile: int | None, act: str, kind: str, dtype: Any
) -> None:
    integers = what in ("int8", "int4")
    w = weight(k, n, what, tile or (32 if what == "mxfp4" and k == 32 else None), method if integers else "absmax")
    x: Any = rows_with(kind, m, k).astype(dtype)
    if act == "static":
        x = qarray.quantize_with_scale_zero_point(x, jnp.int8, jnp.full((1, 1), 0.02, dtype), None)
    elif act == "dynamic" and m:
        x = qarray.quantize(x, INT8)
    dims = (((1,), (0,)), ((), ()))
    actual = dot_general.dot_general(x, packed.pack(w, (0,)), dims)
    # In float32: the kernels round a result in bfloat16 once.
    expected = dot_general.dot_general(x, w.astype(jnp.float32), dims, preferred_element_type=jnp.float32)
    assert actual.shape == (m, n) and actual.dtype == jnp.float32
    assert_close(actual, expected, 5e-6 if dtype == jnp.float32 else 2**-8)


def test_activations_with_one_given_scale_are_quantized_before_the_kernel() -> None:
    """XLA does it where the activation is computed, and the kernel reads a byte of each."""
    x = qarray.quantize_with_scale_zero_point(normal(0, 3, 64), jnp.int8, jnp.full((1, 1), 0.03), None)
    mode, values, scale, _ = ops._activations(x, [0, 1], 1, packed.pack(weight(64, 20, "int4", 32)))
    assert (mode, values.dtype) == (native.QUANTIZED, jnp.int8)
    assert scale is not None and scale.shape == (3, 1)


def test_a_bias_is_added_before_rounding() -> None:
    w, x, bias = weight(40, 21), normal(1, 2, 3, 40), normal(2, 21)
    expected = np.asarray(x, np.float64) @ np.asarray(qarray.dequantize(w), np.float64) + np.asarray(bias)
    assert_close(ops.matmul(x, packed.pack(w), bias), expected)
    in_bfloat16 = ops.matmul(x, packed.pack(w), bias, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(in_bfloat16, np.float64), expected, rtol=2**-8)
    assert_close(ops.matmul(x.astype(jnp.float16), packed.pack(w)), x.astype(jnp.float16) @ qarray.dequantize(w), 2e-3)
    product = ops._Product(native.FLOAT, "", np.dtype(np.float32))
    on_xla = ops._reference(x[0], None, packed.pack(w), bias, product)
    assert_close(on_xla, expected[0])
    with pytest.raises(ValueError, match="have to be"):
        ops.matmul(x, packed.pack(w), bias[:4])


# (image, window, strides, padding, lhs dilation, rhs dilation)
CONVS = {
    "1x1": ((2, 5, 6, 8), (1, 1), (1, 1), "SAME", None, None),
    "1x1-strided": ((2, 5, 6, 8), (1, 1), (2, 3), "VALID", None, None),
    "3x3": ((2, 7, 6, 5), (3, 3), (1, 1), "SAME", None, None),
    "dilated": ((1, 9, 8, 3), (3, 2), (2, 1), ((2, 1), (0, 3)), None, (2, 3)),
    "transposed": ((1, 4, 5, 3), (3, 3), (1, 1), ((2, 2), (1, 2)), (2, 1), None),
    "patches": ((2, 8, 8, 3), (4, 4), (4, 4), "VALID", None, None),
    "cropped": ((1, 6, 6, 3), (2, 2), (1, 1), ((-1, 0), (0, -2)), None, None),
    "empty": ((1, 2, 6, 3), (3, 3), (1, 1), "VALID", None, None),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str) -> None:
    shape, window, strides, padding, lhs_dilation, rhs_dilation = CONVS[name]
    numbers = ("NCHW", "OIHW", "NHWC") if name == "3x3" else ("NHWC", "HWIO", "NCHW" if name == "1x1" else "NHWC")
    image, kernel = normal(0, *shape), normal(1, *window, shape[-1], 21)
    if name == "3x3":
        image, kernel = image.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    dims = lax.conv_dimension_numbers(image.shape, kernel.shape, numbers)
    how = functools.partial(conv_general.get_how_to_quantize, dimension_numbers=dims, qtype="int8")
    w = qarray.quantize(kernel, how(for_lhs=False))
    p = packed.pack(w, [axis for axis in range(4) if axis != dims.rhs_spec[0]])
    arguments = dict(zip(("lhs_dilation", "rhs_dilation"), (lhs_dilation, rhs_dilation), strict=True))
    conv = functools.partial(
        conv_general.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=dims,
        **arguments,
    )
    for x in (image, qarray.quantize(image, how(for_lhs=True)), qarray.UnquantizedQArray(image, how(for_lhs=True))):
        expected = conv(qarray.unwrap(x), w)
        actual = conv(x, p)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert_close(actual, expected)
    assert calls(lambda x: conv(x, p), image) == 1


def test_convolutions_that_no_kernel_does_run_on_the_unpacked_weight() -> None:
    image, kernel = normal(0, 1, 5, 5, 4), normal(1, 3, 3, 2, 8)
    w = qarray.quantize(kernel, HowToQuantize(qtype="int8", channelwise_axes=(3,)))
    conv = functools.partial(
        conv_general.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    p = packed.pack(w, (0, 1, 2))
    assert calls(lambda x: conv(x, p), image) == 0
    assert_close(conv(image, p), conv(image, w))
    conv = functools.partial(conv, feature_group_count=1)
    large, how = jnp.ones((1, 30, 30, 2)), HowToQuantize(qtype="int8", channelwise_axes=(0,))
    assert calls(lambda x: conv(x, p), large) == 0  # XLA copies less
    assert calls(lambda x: conv(qarray.quantize(x, how), p), large) == 1


@pytest.mark.parametrize("qtype", ["int4", "int8"])
def test_padded_tiles(qtype: str) -> None:
    how = HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: 32})
    w = padded_ptq.quantize(normal(0, 75, 20), how)
    p, x = packed.pack(w), normal(1, 3, 75)
    assert (p.shape, p.layout.tile, p.layout.tiles, p.layout.padded_k) == ((75, 20), 32, 3, 96)
    back = packed.unpack(p)
    assert isinstance(back, padded_ptq.PaddedQArray) and back.shape == w.shape and back.padded_shape == w.padded_shape
    jax.tree.map(np.testing.assert_array_equal, back.replace(qtype=w.qtype), w)
    dims = (((1,), (0,)), ((), ()))
    assert_close(padded_ptq.dot_general(x, p, dims), padded_ptq.dot_general(x, w, dims))
    assert_close(padded_ptq.einsum("mk,kn->nm", x, p), padded_ptq.einsum("mk,kn->nm", x, w))
    how_x = HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: 32})
    deferred = qarray.UnquantizedQArray(x, how_x, padded_ptq)
    expected = padded_ptq.dot_general(padded_ptq.quantize(x, how_x), w, dims)
    assert_close(padded_ptq.dot_general(deferred, p, dims), expected)
    assert_close(padded_ptq.dot_general(padded_ptq.quantize(x, how_x), p, dims), expected)
    assert ops._activations(deferred, [0, 1], 1, p)[0] == native.DYNAMIC
    product = ops._Product(native.DYNAMIC, "absmax", np.dtype(np.float32))
    assert_close(ops._reference(x, None, p, None, product), expected)
    np.testing.assert_array_equal(p[:, jnp.array([3, 1])].qvalue, w.qvalue[:, jnp.array([3, 1])])


def test_padding_that_no_kernel_reads_is_refused() -> None:
    how = HowToQuantize(qtype="int4", channelwise_axes=(2,), tiled_axes={0: 4})
    w = padded_ptq.quantize(normal(0, 5, 3, 8), how)
    assert "padded along (0,)" in packed.why_not_packed(w, (0, 1))
    tile = packed.MAX_TILE_ASYMMETRIC + 1
    long = qarray.QArray(jnp.zeros((tile, 1), jnp.int8), jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int8))
    assert "overflow" in packed.why_not_packed(long, (0,))
    assert not packed.why_not_packed(long.replace(zero_point=None), (0,))


def test_vmap_and_scan() -> None:
    ws = [weight(32, 19, "int4", 16) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *ws)
    one, many, x = packed.pack(ws[0]), packed.pack(stacked, (1,)), normal(1, 3, 2, 32)

    def product(x: jax.Array, w: Any) -> jax.Array:
        deferred = qarray.UnquantizedQArray(x, HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: 16}))
        return dot_general.dot_general(deferred, w, (((1,), (0,)), ((), ())))

    expected = jnp.stack([product(x[i], ws[i]) for i in range(3)])
    assert_close(jax.vmap(product)(x, many), expected)
    assert_close(jax.jit(jax.vmap(product, (None, 0)))(x[1], many)[1], expected[1])
    assert_close(jax.vmap(product, (0, None))(x, one)[0], expected[0])
    assert_close(jax.vmap(jax.vmap(product, (0, None)), (None, 0))(x, many)[2, 2], expected[2])
    both = jax.vmap(jax.vmap(product, (None, 0)), (0, None))
    assert_close(both(x, many)[1, 1], expected[1])
    assert calls(both, x, many) == 1
    _, scanned = lax.scan(lambda carry, xw: (carry, product(*xw)), 0, (x, many))
    assert_close(scanned, expected)
    mixed = einsum.einsum("bmk,bkn->bmn", x, many)
    assert_close(mixed, einsum.einsum("bmk,bkn->bmn", x, stacked))


def test_gradients_are_an_error() -> None:
    p = packed.pack(weight(16, 8))
    loss = lambda x: ops.matmul(x, p).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"packed for inference.*has no gradients"):
        jax.grad(loss)(jnp.ones((2, 16)))
    with pytest.raises(NotImplementedError, match="has no gradients"):
        jax.jvp(loss, (jnp.ones((2, 16)),), (jnp.ones((2, 16)),))
