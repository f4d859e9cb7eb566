r"""Rotation: models whose activations have no outliers, and the same outputs (QuaRot, arXiv 2404.00456).

A few features of a language model's activations are tens of times larger than the others, and the scale that they need
leaves the others with few steps of a number format. With M orthonormal,

    y = x W = (x M^T) (M W)                     (section 3: computational invariance)

and the elements of x M^T, with M a randomized Hadamard matrix (`contrib.hadamard`), are all about as large. So are
those of M W along the same axis. The product is exact in float; what changes is the error of quantizing both sides::

    rotated = rotation.rotate(model, x)                                     # still float, the same outputs
    quantized = qwix.quantize_model(rotated, qwix.PtqProvider(rules), x)    # or GPTQ, AWQ, ...

- The weights are rotated once, offline: M W stands in the model as a `WithInputTransform`.
- The activations are rotated in each call by a fast transform, O(n log n), and once for all weights that share an
  input, since M depends on width and seed alone and XLA computes equal things once.
- Along several contracted axes (heads and their width), each is rotated by a matrix of its own.
"""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from qwix._src import model as model_lib
from qwix._src import provenance, qconfig
from qwix._src.core import einsum as core_einsum
from qwix._src.core import einsum_info, numerics, qarray
from qwix._src.core import operands as core_operands
from qwix._src.providers import boxed_param, ptq, quantized_param
from qwix._src.providers.input_transform import WithInputTransform
from qwix._src.utils import flax_util
from qwix.contrib import hadamard

__all__ = ["RotationProvider", "RotationRule", "WithInputTransform", "rotate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationRule(qconfig.QuantizationRule):
    """A rule whose weights are rotated, with the activations that they are multiplied with.

    Attributes:
      seed: of the signs of the Hadamard matrix. Weights with a common input should have a common seed.
      block_size: width of the blocks of a block-diagonal rotation, see `hadamard.HadamardTransform`; None: the whole
        axis. A divisor of what a device holds of a sharded axis keeps the rotation on the device.
    """

    seed: int = 0
    block_size: int | None = None


def rotate(
    model: nn.Module | nnx.Module,
    *model_inputs: Any,
    variables: Mapping[str, Any] | None = None,
    rules: Sequence[qconfig.QuantizationRule] | None = None,
    seed: int = 0,
    block_size: int | None = None,
    methods: Collection[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> Any:
    """A rotated float model with the outputs of the given one, to be quantized next.

    Args:
      model: a float model; it is not changed.
      *model_inputs: what the model is called with; the values do not matter.
      variables: of a Linen model.
      rules: what to rotate; None: all, with `seed` and `block_size`, which are not used otherwise.
      seed, block_size: see `RotationRule`.
      methods: as in `qwix.quantize_model`; in Linen, the first one initializes.
      **model_inputs_kwargs: likewise.

    Returns:
      The rotated model, of which `qwix.quantize_model` takes a copy; in Linen, that and its variables, unboxed.

    Raises:
      ValueError: a rule matched nothing; or variables are missing (Linen) or given (NNX).

    >>> from flax import nnx
    >>> layer, x = nnx.Linear(12, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 12))
    >>> bool(jnp.allclose(rotate(layer, x)(x), layer(x), atol=1e-5))
    True
    """
    provider = RotationProvider(rules or [RotationRule(seed=seed, block_size=block_size)])
    if isinstance(model, nn.Module) != (variables is not None):
        raise ValueError("give the variables of a Linen model, and of no other")
    if variables is None:
        rotated: Any = model_lib.quantize_model(model, provider, *model_inputs, methods=methods, **model_inputs_kwargs)
    else:
        rotated_model = model_lib.quantize_model(model, provider, methods=methods)

        def init(*args: Any) -> Any:
            key = jax.random.key(0)
            rngs = {name: key for name in ("params", "dropout")}
            return rotated_model.init(rngs, *args, method=next(iter(methods)), **model_inputs_kwargs)

        abstract = jax.eval_shape(init, *model_inputs)
        params = ptq.quantize_params(nn.unbox(variables["params"]), abstract["params"])
        rotated = rotated_model, {**variables, "params": params}
    if unused := provider.get_unused_rules():
        raise ValueError(f"{unused[0]} matched nothing in this model: mend its module_path or op_names, or drop it")
    return rotated


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """Rotates a parameter in the place of quantizing it: a `_qarray_module` and a `Replacement.make` in one.

    The axes that are not channelwise in a `HowToQuantize` are rotated.
    """

    seed: int
    block_size: int | None

    def quantize(self, value: jax.Array, how: qarray.HowToQuantize) -> jax.Array:
        for axis, transform in self.transforms(value.shape, how):
            value = transform(value, axis)
        return value

    def transforms(
        self, shape: Sequence[int], how: qarray.HowToQuantize
    ) -> tuple[tuple[int, hadamard.HadamardTransform], ...]:
        rank = len(shape)
        channelwise = {axis % rank for axis in how.channelwise_axes}
        return tuple(
            (axis - rank, hadamard.HadamardTransform(size, self.seed, self.block_size))
            for axis, size in enumerate(shape)
            if axis not in channelwise and size > 1
        )

    def __call__(self, array: Any, how: qarray.HowToQuantize, stacked: int) -> WithInputTransform:
        del stacked  # axes are counted from the end
        return WithInputTransform(array, how, transforms=self.transforms(array.shape, how))


class RotationProvider(boxed_param.BoxedParamProvider):
    """Rotates weights once, and runs ops on rotated activations; everything stays in float.

    `rotate` is the shorter way. Rules may be of any type: number formats in them are not looked at. A rule matches ops
    as everywhere; of a `RotationRule` seed and block size are used, of another one their defaults.

    Ops: dot_general, einsum (in each index that two operands share and the output does not have), convolutions (in
    their input features, unless these are grouped) and ragged_dot. A weight stays as it is if its contracted axes are
    not axes of the stored parameter, with a warning, or if both operands are weights.

    In a quantized model of a rotated one this provider still rotates the activations, and passes the op with what is
    inside of the `WithInputTransform` on to the other.

    >>> import qwix
    >>> from flax import nnx
    >>> layer = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 64)).at[0, 7].set(50.0)
    >>> rotated = qwix.quantize_model(layer, RotationProvider([RotationRule()]), x)
    >>> type(rotated.kernel).__name__, bool(jnp.allclose(rotated(x), layer(x), atol=1e-4))
    ('WithInputTransform', True)
    """

    def _rotated(
        self, op_name: str, operands: Sequence[Any], labels: Sequence[Sequence[Any]], out: Sequence[Any]
    ) -> list[Any]:
        """The operands of a sum of products, with weights and activations rotated.

        Args:
          op_name: such as 'dot_general'.
          operands: arrays, variables and weights.
          labels: the index that each axis of each operand runs over; None for one that cannot be rotated.
          out: the indices that are not summed over.
        """
        operands = [provenance.unwrapped(x) for x in operands]
        self._rotate_weight(op_name, operands, labels, out)
        for i, weight in enumerate(operands):
            if not isinstance(weight, WithInputTransform):
                continue
            takers = [_taker(i, labels[i][axis], operands, labels, out) for axis, _ in weight.transforms]
            if None in takers:  # no activations could take the rotation
                operands[i] = weight.__jax_array__()
                continue
            for (_, transform), (j, axis) in zip(weight.transforms, takers, strict=True):  # type: ignore[misc]
                x = operands[j]
                x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(weight.dtype)
                operands[j] = transform(x, axis)
            operands[i] = weight.inner()
        return operands

    def _rotate_weight(
        self, op_name: str, operands: list[Any], labels: Sequence[Sequence[Any]], out: Sequence[Any]
    ) -> None:
        """Rotates the one float weight of an op that a rule matches, where it stands."""
        index = self._find_rule(self._relative_module_path(), op_name)
        if index is None:
            return
        self._rule_matches[index] += 1
        if any(isinstance(x, ptq.WithAux | qarray.QArray) for x in operands):
            return
        refs = [flax_util.find_ref(x) for x in operands]
        found = [i for i, ref in enumerate(refs) if ref is not None and numerics.should_quantize(operands[i].dtype)]
        if len(found) != 1:
            return
        (i,) = found
        weight, rule = operands[i], self._rules[index]
        ref: Any = refs[i]
        rotation = _Rotation(getattr(rule, "seed", 0), getattr(rule, "block_size", None))
        axes = [axis for axis, label in enumerate(labels[i]) if _taker(i, label, operands, labels, out) is not None]
        how = qarray.HowToQuantize(
            qtype=weight.dtype, channelwise_axes=[axis for axis in range(weight.ndim) if axis not in axes]
        )
        if axes and _can_follow(ref, axes):
            operands[i] = _replaced(ref, weight, how, rotation)

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: jax.lax.DotDimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.dot_general`, rotated."""
        (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = core_operands.canonical_dimension_numbers(
            dimension_numbers, (lhs.ndim, rhs.ndim)
        )
        labels = [[("lhs", axis) for axis in range(lhs.ndim)], [("rhs", axis) for axis in range(rhs.ndim)]]
        for lhs_axis, rhs_axis in zip((*lhs_ca, *lhs_ba), (*rhs_ca, *rhs_ba), strict=True):
            labels[1][rhs_axis] = labels[0][lhs_axis]
        out = [label for label in labels[0] if label[1] not in lhs_ca]
        lhs, rhs = self._rotated("dot_general", [lhs, rhs], labels, out)
        return jax.lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    def einsum(self, einsum_str: str, *operands: Any, **kwargs: Any) -> jax.Array:
        """`jax.numpy.einsum`, rotated."""
        einsum_str, operands = core_einsum.split_args(einsum_str, *operands)
        if len(operands) == 1:
            return self._einsum_of_one(einsum_str, operands[0], kwargs)
        labels, out = einsum_info.parse_subscripts(einsum_str, tuple(x.ndim for x in operands))
        return jnp.einsum(einsum_str, *self._rotated("einsum", operands, labels, out), **kwargs)

    def conv_general_dilated(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """`jax.lax.conv_general_dilated`, rotated in the input features; its arguments by position or by name."""
        names = ["window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"]
        names += ["feature_group_count", "batch_group_count"]
        options = dict(zip(names, args, strict=False)) | kwargs
        numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
        labels: list[list[Any]] = [[None] * lhs.ndim, [None] * rhs.ndim]
        if options.get("feature_group_count", 1) == 1 and options.get("batch_group_count", 1) == 1:
            labels[0][numbers.lhs_spec[1]] = labels[1][numbers.rhs_spec[1]] = "features"
        lhs, rhs = self._rotated("conv_general_dilated", [lhs, rhs], labels, ())
        return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    def ragged_dot(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """`jax.lax.ragged_dot`, rotated."""
        lhs, rhs = self._rotated("ragged_dot", [lhs, rhs], ["mk", "gkn"], "mgn")
        return jax.lax.ragged_dot(lhs, rhs, *args, **kwargs)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        return super().get_intercept_map() | {
            "jax.lax.conv_general_dilated": self.conv_general_dilated,
            "jax.lax.ragged_dot": self.ragged_dot,
        }


def _taker(
    i: int, label: Any, operands: Sequence[Any], labels: Sequence[Sequence[Any]], out: Sequence[Any]
) -> tuple[int, int] | None:
    """Which axis of which other operand the rotation of an index can be moved to; None if to none.

    An index can be rotated if it is summed over, and if just two operands have it, once each.
    """
    places = [(j, axis) for j, of_one in enumerate(labels) for axis, other in enumerate(of_one) if other == label]
    if label is None or label in out or len(places) != 2:
        return None
    others = [(j, axis) for j, axis in places if j != i]
    if len(others) != 1 or isinstance(operands[others[0][0]], ptq.WithAux | qarray.QArray):
        return None
    return others[0]


def _can_follow(ref: provenance.ParamRef | provenance.ConcatRef, axes: Sequence[int]) -> bool:
    """Whether rotated axes of an operand are axes of the stored parameters as well; warns if not."""
    parts = (ref,) if isinstance(ref, provenance.ParamRef) else ref.parts
    # A reshape before anything else is no obstacle: the parameter is then stored in that shape.
    reshaped = [part for part in parts if any(view.kind == "reshape" for view in part.views[1:])]
    if not reshaped and (isinstance(ref, provenance.ParamRef) or ref.axis not in axes):
        return True
    warnings.warn(
        f"{', '.join(part.path for part in parts)}: not rotated, because what the op contracts are no whole axes of "
        "the stored parameter. Store it in the shape that the op uses.",
        qconfig.QuantizationWarning,
        stacklevel=2,
    )
    return False


def _replaced(
    ref: provenance.ParamRef | provenance.ConcatRef, weight: jax.Array, how: qarray.HowToQuantize, rotation: _Rotation
) -> Any:
    """Has a weight rotated where it stands; what the op takes in this call.

    NNX rotates after its first run, which goes on in float. Linen rotates at once, and whoever comes after (another
    provider, at initialization) has to know the parameter in the rotated weight.
    """
    if isinstance(ref, provenance.ConcatRef):
        stops = np.cumsum(ref.sizes)
        for part, stop, size in zip(ref.parts, stops, ref.sizes, strict=True):
            _replaced(part, jax.lax.slice_in_dim(weight, int(stop - size), int(stop), axis=ref.axis), how, rotation)
        return weight
    if ref.module is None:
        quantized_param.quantize_param(ref, weight, how, rotation, rotation)
        return weight
    _, view = quantized_param.replacement_for(ref, tuple(weight.shape), how, rotation, rotation)
    stored = flax_util.unbox(ref.module.get_variable("params", ref.name))
    if not isinstance(stored, WithInputTransform) or stored.array is ref.value:  # not yet by an earlier op
        quantized_param.quantize_param(ref, weight, how, rotation, rotation)
        stored = flax_util.unbox(ref.module.get_variable("params", ref.name))
    if not isinstance(stored, WithInputTransform):  # it waits until a trace is left
        return weight
    inner = stored.inner()
    rotated = view.apply(inner).astype(weight.dtype)
    provenance.track(rotated, dataclasses.replace(view, value=inner))
    return WithInputTransform(rotated, how, transforms=rotation.transforms(weight.shape, how))
