"""Convolutions with quantized gradients: the formulas of `core/qt.py`, and every kind of convolution in int16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwix._src.core import qarray
from qwix._src.core.conv_general_qt import (
    ConvGeneralQtConfig,
    conv_general_qt,
    conv_general_qt_bwd,
    conv_general_qt_fwd,
)
from tests.core import oracle

NHWC = ("NHWC", "HWIO", "NHWC")
QAT = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
INT8 = QAT | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
INT16 = {f"{part}_qtype": "int16" for part in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def normal(rng, shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def gradients(config, x, w, g, **kwargs):
    def conv(x, w):
        return conv_general_qt(x, w, ConvGeneralQtConfig(**config), **kwargs)

    @jax.jit
    def run(x, w, g):
        out, vjp = jax.vjp(conv, x, w)
        return out, *vjp(g)

    return run(x, w, g)


CASES = {
    "same, strided, dilated": ((2, 6, 6, 4), (3, 3, 4, 6), {"window_strides": (2, 1), "rhs_dilation": (1, 2)}),
    "feature groups": ((2, 6, 6, 4), (3, 3, 2, 6), {"window_strides": (1, 1), "feature_group_count": 2}),
    "batch groups": ((4, 5, 5, 3), (2, 2, 3, 6), {"window_strides": (1, 1), "batch_group_count": 2}),
    "transposed": ((2, 4, 4, 3), (3, 3, 3, 2), {"window_strides": (1, 1), "lhs_dilation": (2, 2)}),
}


@pytest.mark.parametrize("name", CASES)
def test_in_int16_the_gradients_are_those_of_the_float_op(rng, name):
    x_shape, w_shape, kwargs = CASES[name]
    x, w = normal(rng, x_shape), normal(rng, w_shape)
    kwargs = {"padding": ((1, 1), (0, 2)) if name == "transposed" else "SAME", "dimension_numbers": NHWC} | kwargs
    conv = functools.partial(lax.conv_general_dilated, **kwargs)
    out, vjp = jax.vjp(conv, x, w)
    g = normal(rng, out.shape)
    for found, truth in zip(gradients(INT16, x, w, g, **kwargs), (out, *vjp(g)), strict=True):
        np.testing.assert_allclose(found, truth, atol=1e-3 * float(jnp.abs(truth).max()))


def test_formulas(rng):
    """Of a conv with one window, which is a product of matrices."""
    x, w = normal(rng, (6, 3, 4)), normal(rng, (3, 4, 5))
    g = normal(rng, (6, 1, 5))
    kwargs = {"window_strides": (1,), "padding": "VALID", "dimension_numbers": ("NWC", "WIO", "NWC")}
    x2, w2, g2 = (np.asarray(a, np.float64).reshape(s) for a, s in ((x, (6, 12)), (w, (12, 5)), (g, (6, 5))))

    def quantize(a, axis):
        q = qarray.quantize_api(jnp.asarray(a, jnp.float32), "int8", channelwise_axes=(axis,))
        return oracle.dequantize(q), np.asarray(q.scale, np.float64)

    (xq, xs), (wq, ws) = quantize(x2, 0), quantize(w2, 1)
    truths = {
        "qat": (QAT, (g2 @ wq.T, xq.T @ g2), 2e-5),
        "int8": (INT8, (quantize(g2 * ws, 0)[0] @ (wq / ws).T, (xq / xs).T @ quantize(g2 * xs, 1)[0]), 2e-2),
        "original": (
            INT8 | {"use_original_residuals": True},
            (quantize(g2, 0)[0] @ w2.T, x2.T @ quantize(g2, 1)[0]),
            1e-4,
        ),
    }
    for config, truth, tolerance in truths.values():
        _, *found = gradients(config, x, w, g, **kwargs)
        for a, b in zip(found, truth, strict=True):
            b = b.reshape(a.shape)
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
            assert np.median(np.abs(a - b)) < 1e-5  # but for a few elements on the other side of a tie


def test_forward_and_backward_alone_and_static_range(rng):
    x, w = normal(rng, (2, 8, 3)), normal(rng, (3, 3, 4))
    seen = []

    def collect(calibration):
        seen.append(calibration["absmax"].shape)
        return calibration

    config = ConvGeneralQtConfig(**INT8, lhs_collect_quant_stat=collect)
    args = ((1,), "SAME", None, None, ("NWC", "WIO", "NWC"), 1, 1)
    out, residuals = conv_general_qt_fwd(x, w, config, *args)
    dx, dw = conv_general_qt_bwd(config, *args, None, residuals, out)
    truth = gradients(INT8, x, w, out, window_strides=(1,), padding="SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    for a, b in zip((out, dx, dw), truth, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert seen == [(2, 1, 1)]
