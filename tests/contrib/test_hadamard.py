"""The fast Hadamard transform against its matrix, and the matrix against what defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix.contrib import hadamard, hadamard_rot
from qwix.contrib.hadamard import HadamardTransform

# Powers of two, Paley's first (12) and second construction (36), Hartley's (86), a product of two, a prime.
SIZES = (1, 256, 12, 36, 86, 576, 131)


@pytest.mark.parametrize("size", SIZES)
def test_is_its_matrix_and_orthonormal(size):
    transform = HadamardTransform(size, seed=3)
    matrix = transform.matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    x = np.random.default_rng(0).normal(size=(3, size))
    y = transform(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(transform.inverse(y), x, atol=1e-5)


@pytest.mark.parametrize(("size", "largest"), [(4096, 1), (576, 1), (1536, 1), (768, 1), (11008, 2**0.5), (14336, 1)])
def test_elements_are_as_even_as_can_be(size, largest):
    orders = hadamard.factors(size)
    assert np.prod(orders) == size
    product = np.prod([np.abs(hadamard._factor(order)).max() for order in orders])
    assert product <= largest / np.sqrt(size) * (1 + 1e-9)


@pytest.mark.parametrize("order", [12, 20, 24, 28, 36, 44, 52, 60, 68])
def test_paley(order):
    if hadamard._paley_prime(order) is None:
        assert order in (28, 52)  # of prime powers, which are not built
        return
    matrix = hadamard._factor(order) * np.sqrt(order)
    np.testing.assert_allclose(np.abs(matrix), 1, atol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, order * np.eye(order), atol=1e-9)


def test_sylvester_order():
    matrix = HadamardTransform(128, seed=None).matrix()
    expected = [[(-1) ** bin(i & j).count("1") for j in range(128)] for i in range(128)]
    np.testing.assert_allclose(matrix * 128**0.5, expected, atol=1e-12)


def test_blocks():
    assert HadamardTransform(4096).blocks() == ((4096, 1),)
    assert HadamardTransform(64 * 131).blocks() == ((64, 131),)
    assert HadamardTransform(4099).blocks() == ((4096, 1), (2, 1), (1, 1))
    blocks = HadamardTransform(96, block_size=32)
    assert blocks.blocks() == ((32, 3),)
    x = jax.random.normal(jax.random.key(0), (2, 96))
    np.testing.assert_allclose(blocks(x), np.asarray(x) @ blocks.matrix().T, atol=1e-5)
    assert np.all(blocks.matrix()[:32, 32:] == 0)


def test_any_axis_and_dtype():
    x = jax.random.normal(jax.random.key(0), (4, 24, 3))
    transform = HadamardTransform(24)
    along = transform(x, axis=1)
    np.testing.assert_allclose(along, np.einsum("ij,ajb->aib", transform.matrix(), np.asarray(x)), atol=1e-5)
    half = transform(x.astype(jnp.bfloat16), axis=-2)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, along, atol=0.05)


def test_signs_never_change():
    # A model that was rotated and saved depends on them.
    assert HadamardTransform(8, seed=0).signs().tolist() == [-1, -1, 1, -1, -1, 1, 1, -1]
    assert HadamardTransform(8, seed=1).signs().tolist() != HadamardTransform(8, seed=0).signs().tolist()
    assert abs(HadamardTransform(4096, seed=5).signs().sum()) < 4 * 64
    assert HadamardTransform(8, seed=None).signs().tolist() == [1] * 8


def test_spreads_an_outlier():
    x = jnp.zeros(576).at[100].set(24.0)
    np.testing.assert_allclose(jnp.abs(HadamardTransform(576)(x)), 1.0, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="block_size=5 does not divide the axis of 12"):
        HadamardTransform(12, block_size=5)
    with pytest.raises(ValueError, match="size=0"):
        HadamardTransform(0)
    with pytest.raises(ValueError, match=r"size 12 does not fit axis 0 of \(3, 12\)"):
        HadamardTransform(12)(jnp.ones((3, 12)), axis=0)


# --- hadamard_rotate_inputs


def rotate(act, weight, key=None, row=True, col=True, lhs=1, rhs=0):
    return hadamard_rot.hadamard_rotate_inputs(
        act, weight, key, row_sign_flip=row, col_sign_flip=col, lhs_reduction_dim=lhs, rhs_reduction_dim=rhs
    )


@pytest.mark.parametrize(("row", "col"), [(False, False), (True, False), (True, True)])
def test_rotated_inputs_have_the_same_product(row, col):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 8, 3)), rng.normal(size=(5, 8))
    xr, wr, key = rotate(jnp.asarray(x), jnp.asarray(w), jax.random.key(1), row, col, lhs=1, rhs=1)
    np.testing.assert_allclose(np.einsum("aib,oi->abo", xr, wr), np.einsum("aib,oi->abo", x, w), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(xr), 8**0.5 * np.linalg.norm(x), rtol=1e-5)
    assert (key != jax.random.key(1)) == (row or col)


def test_rotated_inputs_without_signs():
    # What Qwix 0.1.8 gives for act = weight = eye(4), as a black box.
    act, weight, key = rotate(jnp.eye(4), jnp.eye(4), row=False, col=False)
    np.testing.assert_allclose(act, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    np.testing.assert_allclose(4 * weight, np.asarray(act).T)
    assert key is None


def test_rotated_inputs_errors():
    eye = jnp.eye(4)
    with pytest.raises(ValueError, match="key is needed"):
        rotate(eye, eye)
    with pytest.raises(ValueError, match="power of two"):
        rotate(jnp.eye(6), jnp.eye(6), row=False, col=False)
    with pytest.raises(ValueError, match="have 4 .* and 8"):
        rotate(eye, jnp.eye(8), row=False, col=False)
