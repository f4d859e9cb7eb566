"""HQQ against round-to-nearest and brute force, in its own objective and in weight error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix.contrib import hqq, rotation


def weight(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_t(4, size=shape), jnp.float32)


def how(qtype, method="absmax", tile=32) -> qarray.HowToQuantize:
    return qarray.HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: tile}, calibration_method=method)


def loss(w, q, p):
    """In float64 NumPy, by group of 32 rows."""
    error = np.abs(np.asarray(w, np.float64) - np.asarray(qwix.dequantize(q), np.float64)) ** p
    return error.reshape(-1, 32, w.shape[1]).sum(1)


@pytest.mark.parametrize(
    ("qtype", "method", "share"),
    [
        ("int3", "absmax", 0.9),
        ("int4", "absmax", 0.95),
        ("int4", "minmax", 0.97),
        ("int8", "absmax", 1),
        ("nf4", "absmax", 1),
    ],
)
def test_never_worse_in_its_objective(qtype, method, share):
    w, settings = weight(64, 16), how(qtype, method)
    nearest, found = qwix._src.core.qarray.quantize(w, settings), hqq.quantize_weight(w, settings, p=0.7)
    assert (found.qtype, found.scale.shape, found.qvalue.dtype) == (
        nearest.qtype,
        nearest.scale.shape,
        nearest.qvalue.dtype,
    )
    assert (found.zero_point is None) == (method == "absmax")
    before, after = loss(w, nearest, 0.7), loss(w, found, 0.7)
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() <= share * before.sum()
    np.testing.assert_allclose(hqq.objective(w, found, 0.7), after, rtol=1e-4)


@pytest.mark.parametrize("qtype", ["int3", "int4"])
def test_least_squares_improves_the_weight_error(qtype):
    w, settings = weight(64, 16), how(qtype)
    found = hqq.quantize_weight(w, settings, p=2.0)
    before, after = loss(w, qarray.quantize(w, settings), 2), loss(w, found, 2)
    assert after.sum() < 0.9 * before.sum()
    # Brute force over scales: HQQ is a local search, and near the best of them.
    scales = np.linspace(0.3, 1.1, 161)[:, None, None] * np.asarray(qarray.quantize(w, settings).scale)[None]
    top = {"int3": 3, "int4": 7}[qtype]
    x = np.asarray(w, np.float64).reshape(-1, 32, 16)
    best = np.min(
        [((x - s[:, None] * np.clip(np.round(x / s[:, None]), -top - 1, top)) ** 2).sum(1) for s in scales], 0
    )
    assert after.sum() < 1.06 * best.sum()


def test_model_and_params():
    layer, x = nnx.Linear(64, 16, rngs=nnx.Rngs(0)), weight(8, 64)
    layer.kernel.set_value(weight(64, 16))
    rules = [qwix.QuantizationRule(weight_qtype="int3", tile_size=32, act_qtype="int8")]
    quantized = hqq.quantize(layer, rules, x)
    direct = hqq.quantize_weight(layer.kernel.get_value(), how("int3"))
    np.testing.assert_allclose(quantized.kernel.value.array.scale, direct.scale, rtol=1e-5)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert set(hqq.quantize_params(params, quantized)["kernel"]["array"]) == {"qvalue", "scale"}
    nearest = qwix.quantize_model(layer, ptq.PtqProvider(rules), x)
    assert jnp.linalg.norm(quantized(x) - layer(x)) < 1.1 * jnp.linalg.norm(nearest(x) - layer(x))
    rotated = hqq.quantize(rotation.rotate(layer, x), rules, x)
    assert isinstance(rotated.kernel, rotation.WithInputTransform)


def test_nan_stays():
    w = weight(64, 4).at[3, 1].set(jnp.nan)
    values = np.asarray(qwix.dequantize(hqq.quantize_weight(w, how("int4"))))
    assert np.isnan(values[:32, 1]).all()
    assert np.isfinite(np.delete(values, 1, axis=1)).all()


def test_errors():
    with pytest.raises(ValueError, match="mxfp4 does not allow"):
        hqq.quantize_weight(weight(64, 4), how("mxfp4"))
    with pytest.raises(ValueError, match="p=0"):
        hqq.Hqq(p=0)
