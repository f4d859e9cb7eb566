"""`jax.numpy.dot` on arrays and QArrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src.core import dot_general as _dot_general
from qwix._src.core import operands


def dot(
    a: operands.MaybeQArray,
    b: operands.MaybeQArray,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    _qwix_dot_general: Callable[..., jax.Array] = _dot_general.dot_general,
) -> jax.Array:
    """`jax.numpy.dot` that takes QArrays: the last axis of `a` with the second to last (or only)
    one of `b`.

    Args:
      a: an array or a QArray of any rank. If it or `b` has no axes, the operands are multiplied.
      b: likewise.
      precision: of float arithmetic.
      preferred_element_type: the result's dtype. Default: the promotion of the (dequantized)
        operands' dtypes.
      out_sharding: of the result.
      _qwix_dot_general: called as `jax.lax.dot_general` is, with operands of one or more axes.

    >>> from qwix._src.core import qarray
    >>> w = qarray.quantize_api(jnp.array([[1.0, -2.0], [3.0, 4.0]]), jnp.int8)
    >>> dot(jnp.array([1.0, 1.0]), w).round(1)
    Array([4., 2.], dtype=float32)
    """
    a, b = (x if hasattr(x, "ndim") else jnp.asarray(x) for x in operands.unwrap(a, b))
    kwargs = {} if out_sharding is None else {"out_sharding": out_sharding}
    if a.ndim == 0 or b.ndim == 0:
        operands.result_dtype(a, b, preferred_element_type=preferred_element_type)
        a, b = operands.float_operands(a, b)
        # Without axes this is an outer product, in the order that a product of a and b has.
        return lax.dot_general(a, b, (((), ()), ((), ())), precision, preferred_element_type, **kwargs)
    dims = (((a.ndim - 1,), (max(0, b.ndim - 2),)), ((), ()))
    return _qwix_dot_general(
        a,
        b,
        dims,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **kwargs,
    )


def matmul(
    a: Any,
    b: Any,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    _qwix_dot_general: Callable[..., jax.Array] = _dot_general.dot_general,
) -> jax.Array:
    """`jax.numpy.matmul` that takes QArrays, without broadcasting them: axes of size 1 are dropped, the others batched.

    Args:
      a: an array or a QArray of one or more axes, or anything that can be indexed and that `_qwix_dot_general` takes.
      b: likewise.
      precision, preferred_element_type, out_sharding, _qwix_dot_general: as for `dot`.

    Raises:
      ValueError: if an operand has no axes, or the shapes do not fit.

    >>> from qwix._src.core import qarray
    >>> w = qarray.quantize_api(jnp.ones((3, 4, 2)), jnp.int8, channelwise_axes=(0, 2))
    >>> matmul(jnp.ones((5, 4)), w).shape
    (3, 5, 2)
    """
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul of shapes {a.shape} and {b.shape}: use multiply for scalars")
    batch_shape = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    # An axis is named by its place in the output; 'k' is contracted.
    names = list(range(len(batch_shape)))
    a, a_names = _drop_broadcast_axes(a, batch_shape, ["m", "k"] if a.ndim > 1 else ["k"])
    b, b_names = _drop_broadcast_axes(b, batch_shape, ["k", "n"] if b.ndim > 1 else ["k"])
    shared = [n for n in a_names if n in b_names and n != "k"]
    dims = (
        ((a_names.index("k"),), (b_names.index("k"),)),
        (tuple(a_names.index(n) for n in shared), tuple(b_names.index(n) for n in shared)),
    )
    kwargs = {} if out_sharding is None else {"out_sharding": out_sharding}
    out = _qwix_dot_general(a, b, dims, precision=precision, preferred_element_type=preferred_element_type, **kwargs)
    out_names = shared + [n for n in (*a_names, *b_names) if n not in shared and n != "k"]
    missing = [n for n in names if n not in out_names]  # of size 1 in both
    out = lax.expand_dims(out, range(len(missing)))
    out_names = missing + out_names
    order = [n for n in (*names, "m", "n") if n in out_names]
    return lax.transpose(out, [out_names.index(n) for n in order])


def _drop_broadcast_axes(x: Any, batch_shape: tuple[int, ...], last: list[str]) -> tuple[Any, list]:
    names: list[Any] = [*range(len(batch_shape) - (x.ndim - len(last)), len(batch_shape)), *last]
    ones = [i for i, n in enumerate(names) if n not in last and x.shape[i] == 1]
    if ones:
        x = x[tuple(0 if i in ones else slice(None) for i in range(x.ndim))]
    return x, [n for i, n in enumerate(names) if i not in ones]
