"""Quantization error propagation on one weight matrix (QEP, arXiv 2504.09629).

Earlier layers are quantized, so that a layer sees inputs X_q where the float model has X. It minimizes

    ||W X - W' X_q||_F^2

over W', before W' is quantized. With D = X - X_q, H = X_q X_q^T and H_delta = D X_q^T the minimum is

    W' = W + W H_delta H^-1,

of which a share is taken (the paper's alpha, against fitting the calibration set too closely), with H damped
as GPTQ damps it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qwix.contrib import gptq_core


def compute_qep_stats(X_q: jax.Array, X_float: jax.Array) -> dict[str, jax.Array]:
    """H = X_q X_q^T and H_delta = (X_float - X_q) X_q^T in float32, of inputs (in_features, samples).

    >>> stats = compute_qep_stats(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 2.0]]))
    >>> stats["hessian"].tolist(), stats["hessian_delta"].tolist()
    ([[5.0]], [[1.0]])
    """
    X_q, X_float = X_q.astype(jnp.float32), X_float.astype(jnp.float32)
    delta = jnp.matmul(X_float - X_q, X_q.T, precision=lax.Precision.HIGHEST)
    return {"hessian": gptq_core.compute_hessian(X_q), "hessian_delta": delta}


@jax.jit
def weight_correct(
    W: jax.Array,
    H: jax.Array,
    H_delta: jax.Array,
    *,
    correction_factor: float | jax.Array = 0.5,
    damping_factor: float | jax.Array = 0.01,
) -> jax.Array:
    """W + correction_factor W H_delta (H + damping)^-1.

    Args:
      W: (rows = out_features, columns = in_features).
      H, H_delta: (columns, columns), see `compute_qep_stats`. An input that is always 0 changes nothing.
      correction_factor: share of the correction; 0 leaves W as it is.
      damping_factor: share of H's mean diagonal that is added to its diagonal.

    >>> W, H = jnp.array([[2.0]]), jnp.array([[4.0]])
    >>> weight_correct(W, H, jnp.array([[1.0]]), correction_factor=1.0, damping_factor=0.0).tolist()
    [[2.5]]
    """
    H, H_delta = H.astype(jnp.float32), H_delta.astype(jnp.float32)
    diagonal = jnp.diag(H)
    damping = damping_factor * jnp.mean(diagonal) + (diagonal == 0)
    factor = jax.scipy.linalg.cho_factor(H + jnp.diag(damping), lower=True)
    right = jnp.matmul(W.astype(jnp.float32), H_delta, precision=lax.Precision.HIGHEST)
    change = jax.scipy.linalg.cho_solve(factor, right.T).T
    return (W + correction_factor * change).astype(W.dtype)
