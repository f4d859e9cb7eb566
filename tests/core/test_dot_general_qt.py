"""dot_general with quantized gradients against the formulas of `core/qt.py`, written in NumPy float64.

The truth takes the elements as `qarray.quantize` makes them (tested elsewhere) and does all else by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import contraction, qarray
from qwix._src.core.dot_general_qt import (
    DotGeneralQtConfig,
    dot_general_qt,
    dot_general_qt_bwd,
    dot_general_qt_fwd,
    dot_general_qt_fwd_bwd,
)
from qwix._src.core.sparsity import SparsityRule
from qwix._src.core.stochastic_rounding import get_noise_fn
from tests.core import oracle

MATMUL = (((1,), (0,)), ((), ()))
QAT = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
INT8 = QAT | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 256), (256, 10), (6, 10)))


def run(config, x, w, g, dims=MATMUL, **kwargs):
    @jax.jit
    def run(x, w, g):
        out, vjp = jax.vjp(lambda x, w: dot_general_qt(x, w, dims, DotGeneralQtConfig(**config), **kwargs), x, w)
        return out, *vjp(g.astype(out.dtype))

    return run(x, w, g)


def fake_quant(x, qtype, channelwise_axes=(), **kwargs):
    """Quantized and dequantized, float64."""
    return oracle.dequantize(
        qarray.quantize_api(jnp.asarray(x, jnp.float32), qtype, channelwise_axes=channelwise_axes, **kwargs)
    )


def scale_of(x, qtype, channelwise_axes=(), **kwargs):
    q = qarray.quantize_api(x, qtype, channelwise_axes=channelwise_axes, **kwargs)
    return np.asarray(q.scale, np.float64)


def assert_all_close(found, truth, atol=0.0):
    for a, b in zip(found, truth, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-5, atol=2e-5 * np.abs(b).max() + atol)


def assert_nearly_all_close(found, truth, step):
    """As `assert_all_close`, but for a few elements that float32 puts on the other side of a tie, one step away."""
    error = np.abs(np.asarray(found, np.float64) - truth)
    assert np.median(error) < 2e-6 * np.abs(truth).max() and error.max() < step


# ------------------------------------------------------------------ straight through


def test_qat_is_the_straight_through_formula(data):
    x, w, g = data
    xq, wq, gd = fake_quant(x, "int8", (0,)), fake_quant(w, "int8", (1,)), np.asarray(g, np.float64)
    assert_all_close(run(QAT, x, w, g), (xq @ wq, gd @ wq.T, xq.T @ gd))


def test_weight_only(data):
    x, w, g = data
    xd, wq, gd = np.asarray(x, np.float64), fake_quant(w, "int4", (1,)), np.asarray(g, np.float64)
    assert_all_close(run({"rhs_qtype": "int4"}, x, w, g), (xd @ wq, gd @ wq.T, xd.T @ gd))


@pytest.mark.parametrize("gradient_clipping", [True, False])
def test_clipping_masks(data, gradient_clipping):
    x, w, g = data
    methods = {"lhs_calibration_method": "absmax,0.5", "rhs_calibration_method": "rms,1.5"}
    config = QAT | methods | {"disable_gradient_clipping": not gradient_clipping}
    xd, wd, gd = (np.asarray(a, np.float64) for a in data)
    xq = fake_quant(x, "int8", (0,), calibration_method="absmax,0.5")
    wq = fake_quant(w, "int8", (1,), calibration_method="rms,1.5")
    x_inside = np.abs(xd) <= 0.5 * np.abs(xd).max(1, keepdims=True)
    w_inside = np.abs(wd) <= 1.5 * np.sqrt((wd**2).mean(0, keepdims=True))
    assert 0 < x_inside.sum() < x_inside.size and 0 < w_inside.sum() < w_inside.size
    if not gradient_clipping:
        x_inside, w_inside = np.ones_like(x_inside), np.ones_like(w_inside)
    assert_all_close(run(config, x, w, g), (xq @ wq, (gd @ wq.T) * x_inside, (xq.T @ gd) * w_inside))


def test_asymmetric_fixed_range(data):
    x, w, g = data
    config = QAT | {"lhs_calibration_method": "fixed,-1,2"}
    xd, gd = np.asarray(x, np.float64), np.asarray(g, np.float64)
    xq, wq = fake_quant(x, "int8", calibration_method="fixed,-1,2"), fake_quant(w, "int8", (1,))
    inside = (xd >= -1) & (xd <= 2)
    assert_all_close(run(config, x, w, g), (xq @ wq, (gd @ wq.T) * inside, xq.T @ gd), atol=1e-4)


def test_a_static_range_clips_what_lies_outside(data):
    x, w, g = data
    seen = []

    def collect(calibration):
        seen.append(calibration["absmax"].shape)
        return {"absmax": jnp.full((1, 1), 1.5)}

    config = QAT | {"lhs_collect_quant_stat": collect, "lhs_disable_channelwise_axes": True}
    xd, gd = np.asarray(x, np.float64), np.asarray(g, np.float64)
    scale = np.float32(1.5) / np.float32(127.5)
    xq = np.clip(np.round(np.asarray(x) / scale), -128, 127).astype(np.float64) * np.float64(scale)
    wq = fake_quant(w, "int8", (1,))
    found = run(config, x, w, g)
    assert_all_close(found, (xq @ wq, (gd @ wq.T) * (np.abs(xd) <= 1.5), xq.T @ gd))
    assert set(seen) == {(1, 1)}
    # The same with calibrations that are given.
    op = functools.partial(dot_general_qt_fwd_bwd, dimension_numbers=MATMUL, config=DotGeneralQtConfig(**QAT))
    out, vjp = jax.vjp(lambda x: op(x, w, {"absmax": jnp.full((1, 1), 1.5)}, None), x)
    assert_all_close((out, *vjp(g)), found[:2])


# ------------------------------------------------------------------ quantized gradients


def test_residuals_are_reused(data):
    x, w, g = data
    xs, ws = scale_of(x, "int8", (0,)), scale_of(w, "int8", (1,))
    xq, wq, gd = fake_quant(x, "int8", (0,)), fake_quant(w, "int8", (1,)), np.asarray(g, np.float64)
    _, dx, dw = run(INT8, x, w, g)
    assert_nearly_all_close(dx, fake_quant(gd * ws, "int8", (0,)) @ (wq / ws).T, 0.2)
    assert_nearly_all_close(dw, (xq / xs).T @ fake_quant(gd * xs, "int8", (1,)), 0.2)


def test_the_products_run_on_integers(data):
    x, w, g = data
    jaxpr = jax.make_jaxpr(lambda *data: run(INT8, *data))(x, w, g)
    dots = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert [str(v.aval.dtype) for eqn in dots for v in eqn.invars] == ["int8"] * 6


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None and eqn.primitive.name != "custom_vjp_call":
                yield from _equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(
    "config",
    [
        INT8 | {"use_original_residuals": True},
        INT8 | {"tile_size": 128},
        INT8 | {"lhs_qtype": None, "rhs_qtype": None},
    ],
    ids=["original", "tiled", "float"],
)
def test_residuals_that_are_not_reused(data, config):
    """The float operand; quantized for the derivative if it has a format of its own."""
    x, w, g = data
    xd, wd = np.asarray(x, np.float64), np.asarray(w, np.float64)
    gx, gw = fake_quant(g, "int8", (0,)), fake_quant(g, "int8", (1,))
    assert_all_close(run(config, x, w, g)[1:], (gx @ wd.T, xd.T @ gw))
    config = config | {"dlhs_residual_qtype": "int4", "drhs_residual_qtype": "int4"}
    config |= {"dlhs_residual_calibration_method": "absmax,0.8", "drhs_residual_disable_channelwise_axes": True}
    w4 = fake_quant(w, "int4", (0,), calibration_method="absmax,0.8")
    assert_all_close(run(config, x, w, g)[1:], (gx @ w4.T, fake_quant(x, "int4").T @ gw))


def test_a_reused_residual_keeps_its_format(data):
    formats = {"dlhs_residual_qtype": "int4", "drhs_residual_qtype": "int4"}
    for config in (INT8, QAT):
        assert_all_close(run(config | formats, *data), run(config, *data))


def test_formats_without_stored_numbers_are_dequantized(data):
    x, w, g = data
    config = INT8 | {"lhs_calibration_method": "minmax", "rhs_qtype": "nf4"}
    xq, wq = fake_quant(x, "int8", (0,), calibration_method="minmax"), fake_quant(w, "nf4", (1,))
    truth = fake_quant(g, "int8", (0,)) @ wq.T, xq.T @ fake_quant(g, "int8", (1,))
    assert_all_close(run(config, x, w, g)[1:], truth)


def test_gradient_granularity_and_range(data):
    x, w, g = data
    xs, ws = scale_of(x, "int8"), scale_of(w, "int8")
    xq, wq, gd = fake_quant(x, "int8"), fake_quant(w, "int8"), np.asarray(g, np.float64)
    config = INT8 | {f"{part}_disable_channelwise_axes": True for part in ("lhs", "rhs", "dlhs_grad")}
    config |= {"dlhs_grad_calibration_method": "absmax,0.5", "dlhs_tile_size": 5, "drhs_tile_size": 0.5}
    _, dx, dw = run(config, x, w, g)
    gx = fake_quant(gd * ws, "int8", tiled_axes={1: 5}, calibration_method="absmax,0.5")
    gw = fake_quant(gd * xs, "int8", (1,), tiled_axes={0: 3})
    assert_nearly_all_close(dx, gx @ (wq / ws).T, 0.5)
    assert_nearly_all_close(dw, (xq / xs).T @ gw, 0.5)


# Largest magnitude, bits of mantissa, and exponent of the smallest normal number.
FLOATS = {"float8_e4m3fn": (448, 3, -6), "float8_e5m2": (57344, 2, -14), "mxfp8": (448, 3, -6)}
INTEGERS = {"int4": 7.5, "int16": 32768}


def expected_error(x, qtype, axis):
    """Root mean square of the rounding error, as a share of that of x; up to +-1/2 step, it is step / sqrt 12.

    With a scale for each index of `axis`, such that the largest magnitude there becomes the format's.
    """
    absmax = np.abs(x).max(1 - axis, keepdims=True)
    if qtype in INTEGERS:
        step = absmax / INTEGERS[qtype]
    else:
        largest, mantissa, smallest = FLOATS[qtype]
        scale = absmax / largest
        if qtype == "mxfp8":  # outlier-aware scaling, down to a power of two
            scale = 2.0 ** np.floor(np.log2(scale * 60 / 31))
        step = scale * 2.0 ** (np.maximum(np.floor(np.log2(np.abs(x) / scale)), smallest) - mantissa)
    return np.sqrt((np.broadcast_to(step, x.shape) ** 2 / 12).sum() / (x**2).sum())


@pytest.mark.parametrize(
    ("forward", "gradient"),
    [("float8_e4m3fn", "float8_e5m2"), ("mxfp8", "mxfp8"), ("int4", "int4"), ("int16", "int16")],
)
def test_formats(data, forward, gradient):
    """The error of a product is that of its operands, by the steps of their formats; independent, so squares add up."""
    x, w, g = data
    config = {"lhs_qtype": forward, "rhs_qtype": forward}
    config |= {"dlhs_grad_qtype": gradient, "drhs_grad_qtype": gradient}
    xd, wd, gd = (np.asarray(a, np.float64) for a in data)
    # The cotangent is quantized with the other operand's scale in it.
    scaled = {"x": gd * np.abs(wd).max(0), "w": gd * np.abs(xd).max(1, keepdims=True)}
    of_x, of_w = expected_error(xd, forward, 0), expected_error(wd, forward, 1)
    expected = (
        np.hypot(of_x, of_w),
        np.hypot(expected_error(scaled["x"], gradient, 0), of_w),
        np.hypot(expected_error(scaled["w"], gradient, 1), of_x),
    )
    for found, truth, error in zip(run(config, x, w, g), run({}, x, w, g), expected, strict=True):
        assert 0.75 < np.linalg.norm(found - truth) / np.linalg.norm(truth) / error < 1.25


DIMS = {
    "dense": ((2, 3, 8), (8, 5), (((2,), (0,)), ((), ()))),
    "weight first": ((8, 5), (2, 3, 8), (((0,), (2,)), ((), ()))),
    "attention": ((2, 3, 4, 8), (2, 5, 4, 8), (((3,), (3,)), ((0, 2), (0, 2)))),
    "several contracting axes": ((2, 6, 4, 3), (4, 6, 5), (((1, 2), (1, 0)), ((), ()))),
    "outer product": ((3,), (4,), (((), ()), ((), ()))),
}


@pytest.mark.parametrize("name", DIMS)
def test_any_dimension_numbers(name):
    """In int16 the gradients are those of the float op, wherever its axes stand."""
    lhs_shape, rhs_shape, dims = DIMS[name]
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (lhs_shape, rhs_shape))
    config = {"lhs_qtype": "int16", "rhs_qtype": "int16", "dlhs_grad_qtype": "int16", "drhs_grad_qtype": "int16"}
    g = jnp.asarray(rng.normal(size=jax.lax.dot_general(x, w, dims).shape), jnp.float32)
    for found, truth in zip(run(config, x, w, g, dims), run({}, x, w, g, dims), strict=True):
        np.testing.assert_allclose(found, truth, atol=1e-3 * float(jnp.abs(truth).max()))


@pytest.mark.parametrize(
    ("name", "lhs", "rhs", "out"), [("weight first", "kf", "btk", "fbt"), ("attention", "bqhd", "bkhd", "bhqk")]
)
def test_int8_formulas_wherever_the_axes_stand(name, lhs, rhs, out):
    """Positive numbers, so that none lies on the tie at -127.5 and all gradients can be compared."""
    rng = np.random.default_rng(3)
    sizes = {c: n for c, n in zip(lhs + rhs, DIMS[name][0] + DIMS[name][1], strict=True)}
    x, w, g = (np.abs(rng.normal(size=[sizes[c] for c in labels])) for labels in (lhs, rhs, out))

    def quantize(array, labels, others):
        """Stored elements, and the scale for each index of the axes that the output, or operand, has as well."""
        axes = tuple(i for i, c in enumerate(labels) if c in others)
        q = qarray.quantize_api(jnp.asarray(array, jnp.float32), "int8", channelwise_axes=axes)
        return np.asarray(q.qvalue, np.float64), np.asarray(q.scale, np.float64)

    def derivative(own, other, other_labels):
        """Of the operand with the axes `own`."""
        q, scale = quantize(other, other_labels, out)
        kept = "".join(c for c in other_labels if c in out)
        scaled = np.einsum(f"{out},{kept}->{out}", g, scale.reshape([sizes[c] for c in kept]))
        gq, g_scale = quantize(scaled, out, own)
        return np.einsum(f"{out},{other_labels}->{own}", gq * g_scale, q)

    arrays = (jnp.asarray(a, jnp.float32) for a in (x, w, g))
    _, *found = run(INT8, *arrays, DIMS[name][2])
    assert_all_close(found, (derivative(lhs, w, rhs), derivative(rhs, x, lhs)))


@pytest.mark.parametrize("width", [3, 24])
def test_the_gradient_of_rhs_contracts_its_smaller_operand_first(width):
    """Precisions change places with the operands."""
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 6, 12), (2, 12, width)))
    dims = (((2,), (1,)), ((0,), (0,)))
    high, highest = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
    op = contraction.DotGeneral(dims, (high, highest))
    derivative = contraction.transpose(op, False, x, w)
    assert derivative.g_is_lhs == (width == 3)
    assert derivative.contraction.precision == ((high, highest) if width == 3 else (highest, high))
    g = jnp.asarray(rng.normal(size=(2, 6, width)), jnp.float32)
    np.testing.assert_allclose(derivative.run(g, x), np.einsum("btd,btf->bdf", x, g), rtol=1e-5, atol=1e-5)


def test_dtypes(data):
    x, w, g = data
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    for config in (QAT, INT8):
        assert [str(a.dtype) for a in run(config, x, w, g)] == ["bfloat16"] * 3
        found = run(config, x, w, g, preferred_element_type=jnp.float32)
        assert [str(a.dtype) for a in found] == ["float32", "bfloat16", "bfloat16"]
        found = run(config, x, w.astype(jnp.float32), g)
        assert [str(a.dtype) for a in found] == ["float32", "bfloat16", "float32"]


def test_precision_reaches_the_float_products(data):
    x, w, g = data
    highest = jax.lax.Precision.HIGHEST
    jaxpr = jax.make_jaxpr(lambda *data: run(QAT, *data, precision=highest))(x, w, g)
    precisions = [e.params["precision"] for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert precisions.count((highest, highest)) == 2  # the third is on integers


# ------------------------------------------------------------------ sparsity


def test_single_elements_are_pruned(data):
    x, w, g = data
    rule = SparsityRule(weight_prune_rate=70, activation_prune_rate=20)
    xd, wd, gd = (np.asarray(a, np.float64) for a in data)
    x_kept, w_kept = (np.abs(a) > np.percentile(np.abs(a), rate) for a, rate in ((xd, 20), (wd, 70)))
    xq, wq = fake_quant(xd * x_kept, "int8", (0,)), fake_quant(wd * w_kept, "int8", (1,))
    truth = xq @ wq, (gd @ wq.T) * x_kept, (xq.T @ gd) * w_kept
    assert_all_close(run(QAT | {"sparsity_rule": rule}, x, w, g), truth)


@pytest.mark.parametrize("formats", [{}, QAT])
def test_what_is_pruned_is_zero_and_gets_no_gradient(data, formats):
    x, w, g = data
    rule = SparsityRule(
        weight_sparsity_n=2,
        weight_sparsity_m=4,
        weight_sparsity_order="C",
        activation_sparsity_n=1,
        activation_sparsity_m=2,
    )
    xd, wd, gd = (np.asarray(a, np.float64) for a in data)
    # Of two neighbours in a row the larger stays, of four in a column the larger two.
    x_kept = np.abs(xd) >= np.repeat(np.abs(xd).reshape(6, 128, 2).max(-1), 2, axis=1)
    threshold = np.sort(np.abs(wd).reshape(64, 4, 10), axis=1)[:, 2]
    w_kept = np.abs(wd) >= np.repeat(threshold, 4, axis=0)
    assert x_kept.mean() == w_kept.mean() == 0.5
    xq, wq = xd * x_kept, wd * w_kept
    if formats:
        xq, wq = fake_quant(xq, "int8", (0,)), fake_quant(wq, "int8", (1,))
    truth = xq @ wq, (gd @ wq.T) * x_kept, (xq.T @ gd) * w_kept
    assert_all_close(run(formats | {"sparsity_rule": rule}, x, w, g), truth)


# ------------------------------------------------------------------ stochastic rounding


def test_stochastic_gradients_are_unbiased(data):
    """The mean over n keys is the derivative with float g; its standard error is known, 6 of them are allowed for."""
    x, w, g = data
    n = 400

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def gradients(key):
        noise = get_noise_fn("uniform", key, (0, 1))
        config = INT8 | {"dlhs_grad_qtype": "int4", "drhs_grad_qtype": "int4"}
        config |= {"dlhs_stochastic_rounding_noise_fn": noise, "drhs_stochastic_rounding_noise_fn": noise}
        # Of half the range, so that noise takes nothing beyond its end.
        config |= {"dlhs_grad_calibration_method": "absmax,1.2", "drhs_grad_calibration_method": "absmax,1.2"}
        return run(config, x[:, :16], w[:16], g)[1:]

    found = gradients(jax.random.split(jax.random.key(0), n))
    xq, wq = fake_quant(x[:, :16], "int8", (0,)), fake_quant(w[:16], "int8", (1,))
    gd = np.asarray(g, np.float64)
    for samples, truth in zip(found, (gd @ wq.T, xq.T @ gd), strict=True):
        samples = np.asarray(samples, np.float64)
        error = np.abs(samples.mean(0) - truth)
        standard_error = samples.std(0) / np.sqrt(n)
        assert np.all(error <= 6 * standard_error + 1e-5)
        assert np.median(standard_error) > 0


# ------------------------------------------------------------------ transformations


def test_forward_and_backward_alone(data):
    x, w, g = data
    config = DotGeneralQtConfig(**INT8)
    out, residuals = dot_general_qt_fwd(x, w, None, None, MATMUL, config)
    dx, dw, *rest = dot_general_qt_bwd(MATMUL, residuals, g)
    assert rest == [None] * 3
    assert_all_close((out, dx, dw), run(INT8, x, w, g))
    assert len(jax.tree.leaves(config)) == 0 and hash(config) == hash(DotGeneralQtConfig(**INT8))


@pytest.mark.parametrize("config", [QAT, INT8])
def test_remat_scan_and_vmap_give_the_same_numbers(data, config):
    x, w, g = data
    ws = jnp.stack([w[:10], w[10:20]])
    x = x[:, :10]
    noise = {"dlhs_stochastic_rounding_noise_fn": get_noise_fn("uniform", jax.random.key(0))} if config is INT8 else {}
    op = functools.partial(dot_general_qt, dimension_numbers=MATMUL, config=DotGeneralQtConfig(**config, **noise))

    def unrolled(x, ws):
        return (op(op(x, ws[0]), ws[1]) * g).sum()

    def scanned(x, ws, layer=op):
        return (jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0] * g).sum()

    rematerialized = functools.partial(scanned, layer=jax.checkpoint(op))
    truth = jax.jit(jax.grad(unrolled, (0, 1)))(x, ws)
    for function in (scanned, rematerialized):
        found = jax.jit(jax.grad(function, (0, 1)))(x, ws)
        jax.tree.map(np.testing.assert_array_equal, found, truth)
    batched = jax.vmap(jax.grad(lambda x, w: (op(x, w) * g).sum(), (0, 1)))(jnp.stack([x, x]), ws)
    single = jax.grad(lambda x, w: (op(x, w) * g).sum(), (0, 1))(x, ws[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-5), batched, single)


def test_errors(data):
    x, w, g = data
    with pytest.raises(ValueError, match="cannot be tiled by 100"):
        run({"lhs_qtype": "int8", "tile_size": 100}, x, w, g)
    rule = SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4, weight_sparsity_start_step=5)
    with pytest.raises(ValueError, match="SparsityModule"):
        run(QAT | {"sparsity_rule": rule}, x, w, g)
