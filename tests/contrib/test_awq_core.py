"""The search for AWQ scales, against the paper's formulas in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import qarray
from qwix.contrib import awq_core

ROWS, COLUMNS = 8, 32
INT4 = {"qtype": "int4", "channelwise_axes": (0,)}


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight whose rows differ in size, and activation magnitudes with outliers."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(ROWS, COLUMNS)) * np.exp(rng.normal(size=(ROWS, 1)))
    return w.astype(np.float32), np.exp(1.5 * rng.normal(size=COLUMNS)).astype(np.float32)


def int4_round_trip(w: np.ndarray, tile: int) -> np.ndarray:
    tiles = w.reshape(len(w), -1, tile)
    scale = np.abs(tiles).max(-1, keepdims=True) / 7.5
    # Just below a tie, which is where the largest element lies in exact arithmetic.
    return (np.clip(np.round(tiles / scale * (1 - 1e-9)), -8, 7) * scale).reshape(w.shape)


def candidates(a: np.ndarray, n_grid: int) -> list[np.ndarray]:
    base = np.maximum(a.astype(np.float64) / a.max(), 1e-4)
    scales = [base**alpha for alpha in np.linspace(0, 1, n_grid)]
    return [s / np.sqrt(s.max() * s.min()) for s in scales]


def loss(w: np.ndarray, a: np.ndarray, s: np.ndarray, tile: int) -> float:
    return float(np.mean(((int4_round_trip(w * s, tile) / s - w) * a) ** 2))


def test_act_scale():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(awq_core.compute_act_scale(jnp.asarray(x)), np.abs(x).mean(0), rtol=1e-6)
    np.testing.assert_allclose(awq_core.compute_act_scale(jnp.asarray(x), 1), np.abs(x).mean(1), rtol=1e-6)


def test_act_scale_is_averaged_in_float32():
    x = jnp.full((4096, 1), 1.0078125, jnp.bfloat16)  # in bfloat16, such a sum stops growing at 256
    scale = awq_core.compute_act_scale(x)
    assert scale.dtype == jnp.float32
    assert scale.tolist() == [1.0078125]


@pytest.mark.parametrize("tile", [COLUMNS, 8])
@pytest.mark.parametrize("seed", range(6))
def test_search_finds_the_grid_point_of_least_loss(seed, tile):
    w, a = problem(seed)
    how = qarray.HowToQuantize(**INT4, tiled_axes={1: tile})
    found = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(a), how)
    assert found.shape == (1, COLUMNS)
    assert found.dtype == jnp.float32
    grid = candidates(a, 20)
    distances = [np.abs(s / found[0] - 1).max() for s in grid]
    assert min(distances) < 1e-5
    losses = [loss(w, a, s, tile) for s in grid]
    # Rounding in float32 may decide between two that are nearly as good.
    assert losses[int(np.argmin(distances))] <= min(losses) * 1.03


def test_salient_features_are_rounded_more_finely():
    w, a = problem(0)
    a[5] = 100 * a.max()
    how = qarray.HowToQuantize(**INT4)
    scales = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(a), how)
    assert int(jnp.argmax(scales)) == 5
    array, scales = awq_core.quantize_weight(jnp.asarray(w), jnp.asarray(a), how)
    nearest = qarray.dequantize(qarray.quantize(jnp.asarray(w), how))
    error = lambda found: float(jnp.mean(((found - w) * a) ** 2))  # noqa: E731
    assert error(qarray.dequantize(array) / scales) < 0.5 * error(nearest)


@pytest.mark.parametrize("qtype", ["int4", "int3", "int8", "nf4", "mxfp4", "float8_e4m3fn"])
@pytest.mark.parametrize("tiled_axes", [{}, {1: 8}])
def test_one_grid_point_is_round_to_nearest(qtype, tiled_axes):
    w, a = problem(1)
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes=tiled_axes)
    array, scales = awq_core.quantize_weight(jnp.asarray(w), jnp.asarray(a), how, n_grid=1)
    assert np.all(scales == 1)
    expected = qarray.quantize(jnp.asarray(w), how)
    assert jax.tree.structure(array) == jax.tree.structure(expected)
    for found, leaf in zip(jax.tree.leaves(array), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(found, leaf)


@pytest.mark.parametrize(
    ("qtype", "method"),
    [
        *itertools.product(["int4", "nf4"], ["absmax", "absmax,0.9", "rms,3"]),
        *itertools.product(["int3", "mxfp4", "nvfp4", "float8_e5m2"], ["absmax"]),
        ("int4", "minmax"),
    ],
)
def test_the_searched_error_is_that_of_the_result(qtype, method):
    w, a = problem(2)
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: 8}, calibration_method=method)
    round_trip = awq_core.round_trip(jnp.asarray(w), how)
    np.testing.assert_allclose(round_trip, qarray.dequantize(qarray.quantize(jnp.asarray(w), how)), rtol=1e-6)
    errors = []
    for n_grid in (1, 20):
        array, scales = awq_core.quantize_weight(jnp.asarray(w), jnp.asarray(a), how, n_grid)
        errors.append(float(jnp.mean(((qarray.dequantize(array) / scales - w) * a) ** 2)))
    assert errors[1] <= errors[0]


def test_calls_are_independent_of_the_scale_of_activations():
    w, a = problem(3)
    how = qarray.HowToQuantize(**INT4)
    expected = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(a), how)
    for factor in (1e-20, 1e20):
        found = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(a * np.float32(factor)), how)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_features_that_are_never_active():
    w, a = problem(4)
    how = qarray.HowToQuantize(**INT4)
    dead = a.copy()
    dead[[3, 5]] = 0
    scales = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(dead), how)
    assert bool(jnp.isfinite(scales).all())
    assert scales[0, 3] == scales[0, 5] == scales.min()
    all_dead = awq_core.search_optimal_scales(jnp.asarray(w), jnp.zeros(COLUMNS), how)
    assert np.all(all_dead == 1)


def test_min_scale():
    w, a = problem(0)
    a[0] = 1e-9
    how = qarray.HowToQuantize(**INT4)
    spread = lambda s: float(s.max() / s.min())  # noqa: E731
    wide = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(a), how, min_scale=1e-6)
    narrow = awq_core.search_optimal_scales(jnp.asarray(w), jnp.asarray(a), how, min_scale=0.5)
    assert spread(narrow) <= 2.001 < spread(wide)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n_grid", [1, 20])
def test_what_is_not_finite_stays_so(bad, n_grid):
    w, a = problem(0)
    how = qarray.HowToQuantize(**INT4)
    a[7] = bad
    array, scales = awq_core.quantize_weight(jnp.asarray(w), jnp.asarray(a), how, n_grid)
    assert np.isnan(scales).all()
    assert np.isnan(qarray.dequantize(array)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_weights_keep_their_dtype(dtype):
    w, a = problem(0)
    how = qarray.HowToQuantize(**INT4)
    array, scales = awq_core.quantize_weight(jnp.asarray(w, dtype), jnp.asarray(a, dtype), how)
    assert array.dtype == dtype
    assert scales.dtype == jnp.float32
    step = np.abs(w).max(1, keepdims=True) / 7.5 / np.asarray(scales)
    assert np.all(np.abs(qarray.dequantize(array).astype(jnp.float32) / scales - w) < 3 * step)


def test_wrong_arguments():
    w, a = map(jnp.asarray, problem(0))
    how = qarray.HowToQuantize(**INT4)
    with pytest.raises(ValueError, match=r"\(8, 32\) and activation_scales of shape \(31,\) do not fit"):
        awq_core.search_optimal_scales(w, a[:-1], how)
    with pytest.raises(ValueError, match="do not fit"):
        awq_core.search_optimal_scales(w[None], a, how)
    with pytest.raises(ValueError, match="n_grid=0"):
        awq_core.quantize_weight(w, a, how, n_grid=0)


def test_the_grid_is_a_loop_of_the_compiled_program():
    w, a = map(jnp.asarray, problem(0))
    how = qarray.HowToQuantize(**INT4)

    def program(n_grid: int) -> str:
        return str(jax.make_jaxpr(lambda w, a: awq_core.search_optimal_scales(w, a, how, n_grid))(w, a))

    assert program(200).count("\n") == program(20).count("\n")
    assert "scan[" in program(20)


def test_under_vmap_and_jit():
    w, a = map(jnp.asarray, problem(0))
    how = qarray.HowToQuantize(**INT4)
    search = lambda w, a: awq_core.search_optimal_scales(w, a, how)  # noqa: E731
    expected = jnp.stack([search(w, a), search(w * 2, a[::-1])])
    found = jax.jit(jax.vmap(search))(jnp.stack([w, w * 2]), jnp.stack([a, a[::-1]]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
