"""mxfp_dot_general: the emulation against float64, and what the hardware path hands to JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import dot_general, mxfp_dot
from qwix._src.core.mxfp_dot import mxfp_dot_general
from tests.core import oracle

BLOCKS = {"mxfp8": 32, "mxfp8_16": 16, "mxfp4": 32, "nvfp4": 16}
BATCHED = (((1,), (3,)), ((2,), (0,)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def batched_pair(rng, qtype, dtype="float32", channelwise=True):
    """lhs (m, k, b), rhs (b, n1, n2, k)."""
    block = BLOCKS[qtype]
    lhs_axes, rhs_axes = ((0, 2), (0, 1, 2)) if channelwise else ((), ())
    lhs = oracle.quantized(rng, (3, 64, 2), qtype, dtype=dtype, channelwise_axes=lhs_axes, tiled_axes={1: block})
    rhs = oracle.quantized(rng, (2, 2, 3, 64), qtype, dtype=dtype, channelwise_axes=rhs_axes, tiled_axes={3: block})
    return lhs, rhs


def check(lhs, rhs, fn=mxfp_dot_general, **kwargs):
    out = fn(lhs, rhs, BATCHED, **kwargs)
    oracle.assert_close(
        out,
        oracle.dot_general(lhs, rhs, BATCHED),
        oracle.dot_general(lhs, rhs, BATCHED, magnitude=True),
    )
    return out


@pytest.mark.parametrize("qtype", BLOCKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_emulation_is_exact(rng, qtype, dtype):
    """Products of an element and a power of two, or of e2m1fn and e4m3fn, fit into bfloat16."""
    lhs, rhs = batched_pair(rng, qtype, dtype)
    assert check(lhs, rhs).dtype == dtype
    assert check(lhs, rhs, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_other_operands(rng):
    lhs, rhs = batched_pair(rng, "mxfp8")
    check(jnp.asarray(oracle.dequantize(lhs), jnp.float32), rhs)
    check(lhs, oracle.quantized(rng, rhs.shape, "int8"))


@pytest.fixture
def hardware(monkeypatch):
    """Blackwell, with `scaled_matmul` as its docstring defines it; records its arguments."""
    calls = []

    def scaled_matmul(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type=jnp.float32):
        calls.append((lhs, rhs, lhs_scales, rhs_scales))

        def scaled(x, scales):
            x, scales = x.astype(jnp.float32), scales.astype(jnp.float32)
            return x * jnp.repeat(scales, x.shape[-1] // scales.shape[-1], axis=-1)

        return jnp.einsum("bmk,bnk->bmn", scaled(lhs, lhs_scales), scaled(rhs, rhs_scales))

    monkeypatch.setattr(jax.nn, "scaled_matmul", scaled_matmul)
    monkeypatch.setattr(mxfp_dot, "_has_scaled_matmul", lambda: True)
    return calls


@pytest.mark.parametrize(("qtype", "scale_dtype"), [("mxfp8", jnp.float8_e8m0fnu), ("nvfp4", jnp.float8_e4m3fn)])
@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("fn", [mxfp_dot_general, dot_general.dot_general])
def test_hardware(rng, hardware, qtype, scale_dtype, channelwise, fn):
    lhs, rhs = batched_pair(rng, qtype, channelwise=channelwise)
    out = check(lhs, rhs, fn)
    assert out.shape == (2, 3, 2, 3)
    ((x, y, x_scales, y_scales),) = hardware
    blocks = 64 // BLOCKS[qtype]
    assert [a.shape for a in (x, y)] == [(2, 3, 64), (2, 6, 64)]
    assert [a.shape for a in (x_scales, y_scales)] == [(2, 3, blocks), (2, 6, blocks)]
    assert (x.dtype, x_scales.dtype) == (lhs.qvalue.dtype, scale_dtype)


@pytest.mark.parametrize("qtype", ["mxfp8_16", "mxfp4"])
def test_what_hardware_lacks_is_emulated(rng, hardware, qtype):
    check(*batched_pair(rng, qtype))
    assert not hardware


def test_precision_is_not_dropped(rng, hardware):
    check(*batched_pair(rng, "mxfp8"), dot_general.dot_general, precision="highest")
    assert not hardware


def test_this_machine_has_no_block_scaled_units():
    expected = jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) >= 10
    assert mxfp_dot._has_scaled_matmul() == expected
