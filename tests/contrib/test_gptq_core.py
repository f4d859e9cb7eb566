"""GPTQ against a float64 NumPy version written from the paper, column by column and without blocks."""

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import qarray
from qwix.contrib import gptq_core

DATA = pathlib.Path(__file__).parents[1] / "data"


def gptq_of_the_paper(W, H, group, codes, bound, percdamp=0.01):
    """arXiv 2210.17323, section 3, steps 1 and 3: Q and the scales; absmax scales of the updated columns."""
    W, H = W.astype(np.float64).copy(), H.astype(np.float64).copy()
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    columns = W.shape[1]
    H += np.eye(columns) * percdamp * np.mean(np.diag(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    Q, scales = np.zeros_like(W), []
    for j in range(columns):
        if j % group == 0:
            scale = 1.02 * np.abs(W[:, j : j + group]).max(axis=1) / bound
            scales.append(np.where(scale == 0, 1, scale))
        q = np.clip(np.rint(W[:, j] / scales[-1]), *codes) * scales[-1]
        error = (W[:, j] - q) / U[j, j]
        W[:, j:] -= np.outer(error, U[j, j:])
        Q[:, j] = q
    return Q, np.stack(scales, axis=1)


def problem(rows, columns, seed=0, samples=None):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(rows, columns)).astype(np.float32)
    X = (rng.normal(size=(columns, columns)) @ rng.normal(size=(columns, samples or 4 * columns))).astype(np.float32)
    return W, X, (X @ X.T).astype(np.float32)


def per_row(qtype, group=None, calibration_method="absmax,1.02"):
    # With plain absmax the largest element lies on a rounding tie, where float32 and float64 need not agree.
    return qarray.HowToQuantize(
        qtype=qtype,
        channelwise_axes=(0,),
        tiled_axes={} if group is None else {1: group},
        calibration_method=calibration_method,
    )


def output_error(W, Q, X):
    return np.linalg.norm((W - np.asarray(Q, np.float64)) @ X)


@pytest.mark.parametrize(
    ("shape", "group", "blocksize"),
    [
        ((8, 16), 8, 128),
        ((8, 32), 32, 16),
        ((16, 48), 48, 16),
        ((5, 60), 12, 32),
        ((4, 30), 10, 7),
        ((6, 24), 8, 8),
        ((5, 96), 4, 8),  # parts of 48 columns, of 8, and blocks of 4
        ((4, 100), 4, 8),  # the last part is not full
        ((4, 100), 100, 8),
    ],
)
def test_equals_the_paper(shape, group, blocksize):
    W, X, H = problem(*shape)
    q, losses = gptq_core.quantize_weight(jnp.array(W), jnp.array(H), per_row(jnp.int4, group), blocksize=blocksize)
    Q, scales = gptq_of_the_paper(W, H, group, (-8, 7), 7.5)
    np.testing.assert_allclose(q.scale, scales, rtol=1e-4)
    np.testing.assert_allclose(qarray.dequantize(q), Q, atol=1e-4)
    damped = H + np.eye(len(H)) * 0.01 * np.mean(np.diag(H))
    E = W - Q
    np.testing.assert_allclose(losses.sum(), np.trace(E @ damped @ E.T), rtol=1e-3)


def test_factor_by_halves(monkeypatch):
    """V V^T is the inverse, V is triangular, and the damping grows for the whole matrix if one part has no factor."""
    monkeypatch.setattr(gptq_core, "_SMALL", 16)
    _, _, H = problem(1, 90)
    V = np.asarray(gptq_core._inverse_factor(jnp.array(H), jnp.diag(H) * 1.01), np.float64)
    np.testing.assert_array_equal(V, np.tril(V))
    np.testing.assert_allclose(V @ V.T @ (H + 0.01 * np.diag(np.diag(H))), np.eye(90), atol=1e-3)
    H[:3, :3] = [[1, 2, 0], [2, 1, 0], [0, 0, 1]]  # the part that comes last
    V, share = gptq_core.inverse_factor.__wrapped__(jnp.array(H), False, jnp.float32(1e-6))
    assert share > 1e-5 and np.isfinite(np.asarray(V)).all()


@pytest.mark.parametrize("bits", [4, 3])
def test_as_good_as_another_library(bits):
    """512 x 512, groups of 128, against llm-compressor (scales are static); the recipes' options are far better."""
    spec = importlib.util.spec_from_file_location("make_gptq_reference", DATA / "make_gptq_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    W, X = reference.problem()
    theirs = json.loads((DATA / "gptq_reference.json").read_text())["relative_output_error"][f"int{bits}"]
    for options, limit in (({"static_scales": True}, 1.01), ({"act_order": True, "scale_search": 20}, 0.65)):
        H, how = jnp.asarray(X @ X.T, jnp.float32), per_row(f"int{bits}", 128, "absmax")
        q, _ = gptq_core.quantize_weight(jnp.asarray(W, jnp.float32), H, how, **options)
        assert reference.output_error(W, np.asarray(qarray.dequantize(q), np.float64), X) < limit * theirs


@pytest.mark.parametrize("qtype", [jnp.int8, "int3", "nf4", jnp.float8_e4m3fn, "mxfp4"])
def test_identity_hessian_is_round_to_nearest(qtype):
    W, _, _ = problem(6, 32)
    how = per_row(qtype, 16)
    q, _ = gptq_core.quantize_weight(jnp.array(W), jnp.eye(32), how, percdamp=0.0)
    expected = qarray.quantize(jnp.array(W), how)
    np.testing.assert_array_equal(np.asarray(q.scale), np.asarray(expected.scale))
    np.testing.assert_array_equal(q.qvalue.astype(jnp.float32), expected.qvalue.astype(jnp.float32))
    assert q.qvalue.dtype == expected.qvalue.dtype


@pytest.mark.parametrize("qtype", ["int3", jnp.int4, "nf4", jnp.float8_e4m3fn, "mxfp4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_less_output_error_than_round_to_nearest(qtype, act_order):
    W, X, H = problem(16, 64, seed=1)
    how = per_row(qtype, 32)
    q, _ = gptq_core.quantize_weight(jnp.array(W), jnp.array(H), how, act_order=act_order)
    nearest = qarray.dequantize(qarray.quantize(jnp.array(W), how))
    assert output_error(W, qarray.dequantize(q), X) < 0.9 * output_error(W, nearest, X)


def test_asymmetric():
    W, X, H = problem(8, 32, seed=2)
    how = per_row(jnp.int4, 16, calibration_method="minmax")
    W = np.abs(W)
    q, _ = gptq_core.quantize_weight(jnp.array(W), jnp.array(H), how)
    assert q.zero_point.shape == (8, 2) and q.zero_point.dtype == q.qvalue.dtype
    nearest = qarray.dequantize(qarray.quantize(jnp.array(W), how))
    assert output_error(W, qarray.dequantize(q), X) < output_error(W, nearest, X)


def test_per_tensor_scale():
    W, _, H = problem(8, 16)
    q, _ = gptq_core.quantize_weight(jnp.array(W), jnp.array(H), qarray.HowToQuantize(qtype=jnp.int8))
    assert q.scale.shape == (1, 1)


def test_dead_columns_become_zero():
    W, X, _ = problem(4, 16)
    X[3] = 0
    q, _ = gptq_core.quantize_weight(jnp.array(W), jnp.array(X @ X.T), per_row(jnp.int4, 8))
    dequantized = np.asarray(qarray.dequantize(q))
    assert (dequantized[:, 3] == 0).all() and np.isfinite(dequantized).all()
    Q, _ = gptq_of_the_paper(W, X @ X.T, 8, (-8, 7), 7.5)
    np.testing.assert_allclose(dequantized, Q, atol=1e-4)


def test_damping_grows_until_there_is_a_factor():
    W, _, _ = problem(4, 8)
    indefinite = np.diag([1.0, 1, 1, 1, 1, 1, 1, -0.5]).astype(np.float32)
    with pytest.warns(UserWarning, match="no Cholesky factor with a damping of 0.01"):
        q, losses = gptq_core.quantize_weight(jnp.array(W), jnp.array(indefinite), per_row(jnp.int4))
    assert np.isfinite(np.asarray(losses)).all() and np.isfinite(np.asarray(q.scale)).all()


def test_cholesky_inverse_and_hessian():
    _, X, H = problem(2, 12)
    np.testing.assert_allclose(gptq_core.compute_hessian(jnp.array(X)), X.astype(np.float64) @ X.T, rtol=1e-4)
    A = H / np.linalg.norm(H) + np.eye(12, dtype=np.float32)
    inverse = gptq_core.cholesky_inverse(jnp.linalg.cholesky(jnp.array(A)))
    np.testing.assert_allclose(inverse, np.linalg.inv(A.astype(np.float64)), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "hessian", "how"),
    [
        ((4, 8), (4, 4), per_row(jnp.int4)),
        ((4, 8, 2), (8, 8), per_row(jnp.int4)),
        ((4, 8), (8, 8), qarray.HowToQuantize(qtype=jnp.int4, tiled_axes={0: 2})),
        ((4, 8), (8, 8), per_row(jnp.int4, 3)),
    ],
)
def test_what_does_not_fit_is_an_error(shape, hessian, how):
    with pytest.raises(ValueError, match="GPTQ|tiled"):
        gptq_core.quantize_weight(jnp.ones(shape), jnp.ones(hessian), how)
