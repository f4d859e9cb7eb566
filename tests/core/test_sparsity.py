"""N:M masks against NumPy, and against what Qwix 0.1.8 gave as a black box."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix._src.core import sparsity

# fmt: off
X = np.array([[1, 12, 0, -8, 6, 4, 18, 16], [10, 3, 14, -5, 7, -2, 20, 15],
              [13, -9, 21, -4, -6, 8, 19, 9], [-1, -3, 17, -7, -10, 11, 5, 2]], np.float32)
# (n, m, order, block size, offset) -> the mask that Qwix 0.1.8 gives, a row a string
RECORDED = {
    (2, 4, "R", 0, 0): "01010011 10100011 10100011 00111100",
    (1, 4, "R", 0, 0): "01000010 00100010 00100010 00100100",
    (2, 4, "C", 0, 0): "01010001 10001011 11100110 00111100",
    (1, 4, "R", 0, 2): "00000011 00000011 01100000 00100100",
    (1, 4, "R", 0, 8): "01010001 00000010 10100000 00001100",
    (1, 4, "C", 0, 2): "00000000 10000010 10100110 00100100",
    (1, 2, "C", 0, 8): "11000011 00110011 01100011 00111100",
    (1, 2, "R", 2, 0): "11000011 00110011 00110011 00111100",
    (1, 2, "R", 8, 0): "00000000 11111111 11111111 00000000",
    (1, 2, "C", 2, 0): "01010011 01010011 10101100 10101100",
    (1, 2, "C", 4, 0): "01101010 01101010 01101010 01101010",
}
# fmt: on


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_recorded_masks(case):
    mask = sparsity.get_sparsity_mask(jnp.asarray(X), *case)
    assert mask.dtype == bool
    assert " ".join("".join(str(int(e)) for e in row) for row in mask) == RECORDED[case]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (20, 40)])
def test_keeps_the_largest(n, m):
    x = np.random.default_rng(0).normal(size=(6, 2 * m)).astype(np.float32)
    groups = np.abs(x).reshape(-1, m)
    expected = groups >= np.sort(groups, 1)[:, m - n : m - n + 1]
    np.testing.assert_array_equal(sparsity.get_sparsity_mask(jnp.asarray(x), n, m), expected.reshape(x.shape))


def test_ties_nan_and_extremes():
    def rows(x, *args):
        return np.asarray(sparsity.get_sparsity_mask(jnp.asarray(x), *args)).astype(int).tolist()

    assert rows(np.ones((1, 4)), 2, 4) == [[1, 1, 0, 0]]
    assert rows(np.array([[np.nan, 1, 2, 3]]), 2, 4) == [[1, 0, 0, 1]]
    assert rows(X[:1], 4, 4) == [[1] * 8]
    assert rows(X[:1], 0, 4) == [[0] * 8]


def test_prune_and_apply():
    x = jnp.asarray(X)
    pruned = sparsity.prune_inputs_n_m(x, n=2, m=4)
    np.testing.assert_array_equal(pruned[0], [0, 12, 0, -8, 0, 0, 18, 16])
    np.testing.assert_array_equal(sparsity.apply_sparsity(x, x > 5), np.where(X > 5, X, 0))
    scaled = sparsity.apply_sparsity(x, x > 5, pruned_value=jnp.array(-1.0))
    np.testing.assert_array_equal(scaled, np.where(X > 5, X, -X))
    channels = jnp.array([1, 0, 1, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(sparsity.apply_sparsity(x, channels, is_channelwise=True), X * channels)
    gradient = jax.grad(lambda x: (3 * sparsity.apply_sparsity(x, x > 5)).sum())(x)
    np.testing.assert_array_equal(gradient, 3.0 * (X > 5))


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_quantized(method):
    q = qwix.quantize(jnp.asarray(X), jnp.int8, channelwise_axes=(0,), calibration_method=method)
    pruned = sparsity.prune_inputs_n_m(q, n=2, m=4)
    expected = sparsity.prune_inputs_n_m(qwix.dequantize(q), n=2, m=4)
    np.testing.assert_allclose(qwix.dequantize(pruned), expected, atol=1e-6)
    assert np.sum(np.asarray(qwix.dequantize(pruned)) == 0) >= 16


def test_unstructured():
    x = jnp.asarray(np.random.default_rng(0).permutation(16).reshape(2, 8) + 1.0)
    for rate, kept in ((8, 14), (25, 12), (50, 8)):  # as Qwix 0.1.8
        mask = sparsity.get_sparsity_mask_unstructured(x, None, rate)
        assert mask.sum() == kept
        np.testing.assert_array_equal(mask, x > np.percentile(x, rate))
    again = sparsity.get_sparsity_mask_unstructured(x, x > 12, 50)
    assert not np.any(again & ~(np.asarray(x) > 12))


def test_errors():
    x = jnp.asarray(X)
    with pytest.raises(ValueError, match=r"N must be lower than M for N:M \(5:4\) sparsity"):
        sparsity.get_sparsity_mask(x, 5, 4)
    with pytest.raises(AssertionError):
        sparsity.get_sparsity_mask(x, 5, 4)
    with pytest.raises(ValueError, match="provided 32 and 3"):
        sparsity.get_sparsity_mask(x, 2, 3)
    with pytest.raises(ValueError, match="order X not supported"):
        sparsity.get_sparsity_mask(x, 2, 4, "X")
    with pytest.raises(ValueError, match="no multiple"):
        sparsity.get_sparsity_mask(x, 1, 4, "R", 0, 16)
    with pytest.raises(ValueError, match="two axes"):
        sparsity.get_sparsity_mask(x[0], 1, 4, "C")
