"""`jax.numpy.einsum` on arrays and QArrays."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import opt_einsum
from jax import lax

from qwix._src.core import dot_general as _dot_general
from qwix._src.core import einsum_info, operands
from qwix._src.core.qarray import HowToQuantize, QArray


def get_how_to_quantize(
    *,
    einsum_str: str,
    ndims: tuple[int, int],
    for_lhs: bool,
    tile_size: int | float | None,
    **kwargs: Any,
) -> HowToQuantize:
    """How to quantize an operand of a binary einsum: a scale for each index of every axis not
    contracted.

    Args:
      einsum_str: a binary einsum; of more operands, `einsum_info.contraction_steps` gives the
        pairs.
      ndims: ranks of both operands.
      for_lhs: which operand.
      tile_size: the tile size of this operand's last contracting axis (a float f: 1 / number of
        tiles), or None. It is ignored where nothing is contracted.
      **kwargs: the other fields of `HowToQuantize`, such as `qtype` and `calibration_method`.

    Raises:
      NotImplementedError: not two operands.

    >>> how = get_how_to_quantize(
    ...     einsum_str="btd,dnh->btnh", ndims=(3, 3), for_lhs=False, tile_size=32, qtype=jnp.int4
    ... )
    >>> how.channelwise_axes, how.tiled_axes
    ((1, 2), {0: 32})
    """
    info = einsum_info.parse_binary(einsum_str, tuple(ndims))
    contracting = info.contract_chars
    labels = info.lhs if for_lhs else info.rhs
    contracting_axes = [axis for axis, label in enumerate(labels) if label in contracting]
    return HowToQuantize(
        channelwise_axes=[axis for axis in range(len(labels)) if axis not in contracting_axes],
        tiled_axes={contracting_axes[-1]: tile_size} if tile_size and contracting_axes else {},
        **kwargs,
    )


def einsum(
    *args: Any,
    _qwix_dot_general: Callable[..., jax.Array] = _dot_general.dot_general,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.numpy.einsum` that takes QArrays.

    Args:
      *args: `(subscripts, *operands)`, or `(operand, axes, operand, axes, ..., [output axes])`.
        Operands are arrays or QArrays, any number of each in any place; with ellipses, size-1
        broadcasting, an implicit output, diagonals.
      _qwix_dot_general: contracts each pair; called as `jax.lax.dot_general` is.
      preferred_element_type: the result's dtype. Default: the promotion of the (dequantized)
        operands' dtypes.
      **kwargs: `precision`, `optimize`, `out_sharding` as in `jax.numpy.einsum`, and its
        `_dot_general`, which contracts the pairs of arrays, where `_qwix_dot_general` contracts
        those with a QArray.

    Returns:
      A float array. More than two operands are contracted in pairs, in the order that opt_einsum
      finds, with float results between. An axis of one operand that is summed by itself, or a
      diagonal, dequantizes that operand.

    >>> from qwix._src.core import qarray
    >>> w = qarray.quantize_api(jnp.ones((4, 3)), jnp.int8, channelwise_axes=(1,))
    >>> einsum("...d,df->...f", jnp.ones((2, 5, 4)), w).shape
    (2, 5, 3)
    """
    subscripts, given = split_args(*args)
    arrays = operands.unwrap(*given)
    quantized = any(isinstance(x, QArray) for x in arrays)
    is_default = _qwix_dot_general is _dot_general.dot_general
    if not quantized and is_default:
        return jnp.einsum(subscripts, *arrays, preferred_element_type=preferred_element_type, **kwargs)
    return _einsum(subscripts, arrays, _qwix_dot_general, preferred_element_type, **kwargs)


def _einsum(
    subscripts: str,
    arrays: list[operands.MaybeQArray],
    qwix_dot_general: Callable[..., jax.Array],
    preferred_element_type: Any,
    *,
    optimize: Any = "auto",
    _dot_general: Callable[..., jax.Array] | None = None,
    **kwargs: Any,
) -> jax.Array:
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    out_sharding = kwargs.pop("out_sharding", None)
    arrays = [x if hasattr(x, "ndim") else jnp.asarray(x) for x in arrays]
    inputs, out = einsum_info.parse_subscripts(subscripts, tuple(x.ndim for x in arrays))
    dtype = operands.result_dtype(*arrays, preferred_element_type=preferred_element_type)
    if len(arrays) == 1:
        (array,) = operands.float_operands(*arrays)
        return jnp.einsum(f"{inputs[0]}->{out}", array, preferred_element_type=dtype, out_sharding=out_sharding)
    labels = list(inputs)
    for i in range(len(arrays)):
        elsewhere = set(out).union(*(inputs[j] for j in range(len(inputs)) if j != i))
        kept = "".join(c for c in dict.fromkeys(labels[i]) if c in elsewhere)
        if kept != labels[i]:
            (array,) = operands.float_operands(arrays[i])
            arrays[i], labels[i] = jnp.einsum(f"{labels[i]}->{kept}", array), kept
    arrays = einsum_info.broadcast_operands(arrays, labels)
    if isinstance(optimize, list):
        optimize = tuple(optimize)
    steps = einsum_info.contraction_steps(tuple(labels), out, tuple(tuple(x.shape) for x in arrays), optimize)
    for number, step in enumerate(steps, 1):
        lhs, rhs = arrays[step.lhs], arrays[step.rhs]
        permutation = step.info.output_perm
        options = dict(kwargs)
        if number == len(steps) and out_sharding is not None:
            options["out_sharding"] = _sharding_before(out_sharding, permutation)
        is_float = not isinstance(lhs, QArray) and not isinstance(rhs, QArray)
        contract = _dot_general if is_float and _dot_general is not None else qwix_dot_general
        result = contract(lhs, rhs, step.info.dimension_numbers, preferred_element_type=dtype, **options)
        arrays.append(result if permutation is None else lax.transpose(result, permutation))
    return cast(jax.Array, arrays[-1])


def split_args(*args: Any) -> tuple[str, tuple[Any, ...]]:
    """Subscripts and operands of both of NumPy's forms, `(subscripts, *operands)` and `(operand, axes, ...)`."""
    if isinstance(args[0], str):
        return args[0], args[1:]

    def spell(axes: Sequence[Any]) -> str:
        return "".join("..." if a is Ellipsis else opt_einsum.get_symbol(int(a)) for a in axes)

    pairs = len(args) // 2
    subscripts = ",".join(spell(args[2 * i + 1]) for i in range(pairs))
    if len(args) % 2:
        subscripts += "->" + spell(args[-1])
    return subscripts, tuple(args[2 * i] for i in range(pairs))


def _sharding_before(out_sharding: Any, permutation: tuple[int, ...] | None) -> Any:
    """The sharding that `permutation` of the axes turns into `out_sharding`."""
    if permutation is None:
        return out_sharding
    is_named = isinstance(out_sharding, jax.NamedSharding)
    spec = out_sharding.spec if is_named else out_sharding
    by_axis = dict(zip(permutation, (*spec, *[None] * (len(permutation) - len(spec))), strict=True))
    before = jax.P(*(by_axis[axis] for axis in range(len(permutation))))
    return jax.NamedSharding(out_sharding.mesh, before) if is_named else before
