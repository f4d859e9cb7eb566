"""Both operands of a matmul rotated by one randomized Hadamard matrix, so that quantizing them loses less.

    act weight = (act M) (M^-1 weight),        M = diag(r) H diag(c),  H_ij = -1 or 1

`contrib.hadamard` has the transform of any width, and `contrib.rotation` applies it to whole models.
"""

import jax
import jax.numpy as jnp

from qwix.contrib import hadamard


def hadamard_rotate_inputs(
    act: jax.Array,
    weight: jax.Array,
    key: jax.Array | None,
    *,
    row_sign_flip: bool,
    col_sign_flip: bool,
    lhs_reduction_dim: int,
    rhs_reduction_dim: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rotates activations and a weight along the axis that they are contracted over; their product stays.

    Args:
      act: a float array.
      weight: a float array.
      key: for the signs; may be None without any.
      row_sign_flip: random signs r before H.
      col_sign_flip: random signs c after H. They only change the signs of what is quantized.
      lhs_reduction_dim: the contracted axis of `act`.
      rhs_reduction_dim: the contracted axis of `weight`.

    Returns:
      act M with elements of H unscaled, so n^1/2 times as large; M^-1 weight = M^T weight / n, in the same proportion
      smaller; and a key that has not been used yet.

    Raises:
      ValueError: the contracted sizes differ or are no power of two, or signs are wanted without a key.

    >>> x, w = jnp.array([[100.0, 1.0, 1.0, 1.0]]), jnp.ones((4, 2))
    >>> kwargs = dict(row_sign_flip=False, col_sign_flip=False, lhs_reduction_dim=1, rhs_reduction_dim=0)
    >>> x_rotated, w_rotated, _ = hadamard_rotate_inputs(x, w, None, **kwargs)
    >>> x_rotated.tolist(), (x_rotated @ w_rotated).tolist()
    ([[103.0, 99.0, 99.0, 99.0]], [[103.0, 103.0]])
    """
    size, rhs_size = act.shape[lhs_reduction_dim], weight.shape[rhs_reduction_dim]
    if size != rhs_size:
        raise ValueError(
            f"the contracted axes have {size} (axis {lhs_reduction_dim} of act) and {rhs_size} elements (axis "
            f"{rhs_reduction_dim} of weight): they must be of one size"
        )
    if size & (size - 1) or not size:
        raise ValueError(
            f"the contracted axes have {size} elements, which is no power of two: use qwix.contrib.hadamard, which "
            "takes any size"
        )
    if key is None and (row_sign_flip or col_sign_flip):
        raise ValueError("a key is needed for random signs: pass one, or set row_sign_flip and col_sign_flip to False")
    signs = []
    for wanted in (row_sign_flip, col_sign_flip):
        if wanted:
            key, used = jax.random.split(key)  # type: ignore[arg-type]
        signs.append(jax.random.rademacher(used, (size,), jnp.float32) if wanted else None)

    def rotated(x: jax.Array, axis: int, factor: float) -> jax.Array:
        y = jnp.moveaxis(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis, -1)
        for i, sign in enumerate(signs):
            y = y if sign is None else y * sign
            if i == 0:
                y = hadamard.HadamardTransform(size, seed=None)(y) * factor
        return jnp.moveaxis(y, -1, axis).astype(x.dtype)

    root = size**0.5
    return rotated(act, lhs_reduction_dim, root), rotated(weight, rhs_reduction_dim, 1 / root), key
