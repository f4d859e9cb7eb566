"""ragged_dot with quantized gradients: each group is a matrix product, whose truth is that of dot_general_qt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import qarray
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt
from qwix._src.core.ragged_dot_qt import RaggedDotQtConfig, ragged_dot_qt, ragged_dot_qt_bwd, ragged_dot_qt_fwd
from tests.core import oracle

MATMUL = (((1,), (0,)), ((), ()))
SIZES = (3, 0, 4)
QAT = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
GRADIENTS = {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    shapes = (8, 16), (len(SIZES), 16, 5), (8, 5)  # the last row is in no group
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


@functools.partial(jax.jit, static_argnums=0)
def _by_group(config, x, w, g):
    """The same with one dot_general a group, but for what quantizes a gradient, which all groups share."""
    op = functools.partial(dot_general_qt, dimension_numbers=MATMUL, config=config)
    outs, dxs, dws, start = [], [], [], 0
    for i, size in enumerate(SIZES):
        rows = slice(start, start + size)
        out, vjp = jax.vjp(op, x[rows], w[i])
        dx, dw = vjp(g[rows])
        start += size
        outs, dxs, dws = [*outs, out], [*dxs, dx], [*dws, dw]
    rest = x.shape[0] - start
    return (
        jnp.concatenate([*outs, jnp.zeros((rest, 5))]),
        jnp.concatenate([*dxs, jnp.zeros((rest, 16))]),
        jnp.stack(dws),
    )


def by_group(config, x, w, g):
    return _by_group(DotGeneralQtConfig(**config), x, w, g)


def run(config, x, w, g, **kwargs):
    @jax.jit
    def run(x, w, g):
        op = lambda x, w: ragged_dot_qt(x, w, jnp.array(SIZES), RaggedDotQtConfig(**config), **kwargs)  # noqa: E731
        out, vjp = jax.vjp(op, x, w)
        return out, *vjp(g)

    return run(x, w, g)


@pytest.mark.parametrize(
    "config",
    [
        QAT,
        QAT | {"lhs_calibration_method": "absmax,0.5", "rhs_calibration_method": "rms,1"},
        QAT | {"tile_size": 8},
        QAT | {"dlhs_grad_qtype": "int8"},
    ],
    ids=["qat", "clipped", "tiled", "dlhs"],
)
def test_each_group_is_a_product(data, config):
    for found, truth in zip(run(config, *data), by_group(config, *data), strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-4)


def test_in_int16_the_gradients_are_those_of_the_float_op(data):
    config = {f"{part}_qtype": "int16" for part in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
    for found, truth in zip(run(config, *data), by_group({}, *data), strict=True):
        np.testing.assert_allclose(found, truth, atol=1e-3 * float(jnp.abs(truth).max()))


def test_int8_gradients_are_near(data):
    for found, truth in zip(run(QAT | GRADIENTS, *data), by_group({}, *data), strict=True):
        assert 1e-4 < np.linalg.norm(found - truth) / np.linalg.norm(truth) < 0.03


@pytest.mark.parametrize("tile_size", [None, 8])
def test_static_range(data, tile_size):
    x, w, g = data
    config = QAT | {"lhs_collect_quant_stat": lambda c: {"absmax": jnp.full((1, 1), 1.0)}, "tile_size": tile_size}
    out, dx, _ = run(config, x, w, g)
    scale = np.float32(1) / np.float32(127.5)
    xq = np.clip(np.round(np.asarray(x) / scale), -128, 127).astype(np.float64) * scale
    tiles = {} if tile_size is None else {"tiled_axes": {1: tile_size}}
    wq = oracle.dequantize(qarray.quantize_api(w, "int8", channelwise_axes=(0, 2), **tiles))
    wd = np.asarray(w, np.float64) if tile_size else wq  # a tiled residual is the float operand
    start = 0
    for i, size in enumerate(SIZES):
        rows = slice(start, start + size)
        np.testing.assert_allclose(out[rows], xq[rows] @ wq[i], rtol=1e-5, atol=1e-5)
        expected = np.asarray(g[rows], np.float64) @ wd[i].T * (np.abs(x[rows]) <= 1)
        np.testing.assert_allclose(dx[rows], expected, rtol=1e-5, atol=1e-5)
        start += size
    assert not np.any(dx[start:]) and not np.any(out[start:])


def test_group_offset(data):
    x, w, g = data
    config, offset = RaggedDotQtConfig(**QAT), jnp.array([1])

    def op(x, w):
        return ragged_dot_qt(x, w[1:], jnp.array(SIZES), config, group_offset=offset)

    out, vjp = jax.vjp(op, x, w)
    dx, dw = vjp(g)
    # Rows of the first group are zero, all else is as with all groups.
    inside = (np.arange(8) >= SIZES[0])[:, None]
    truth = run(QAT, x, w, g * inside)
    np.testing.assert_allclose(out, truth[0] * inside, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, truth[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, truth[2], rtol=1e-5, atol=1e-5)


def test_forward_and_backward_alone(data):
    x, w, g = data
    config = RaggedDotQtConfig(**QAT, **GRADIENTS)
    out, residuals = ragged_dot_qt_fwd(x, w, jnp.array(SIZES), config)
    dx, dw, none = ragged_dot_qt_bwd(config, None, None, None, residuals, g)
    assert none is None
    for a, b in zip((out, dx, dw), run(QAT | GRADIENTS, x, w, g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="use ragged_dot_qt"):
        ragged_dot_qt_fwd(x, w, jnp.array(SIZES), config, group_offset=jnp.array([1]))
