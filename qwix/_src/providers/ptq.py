"""Post-training quantization: the provider, and the quantization of a float parameter tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import averaging, interception, provenance
from qwix._src.core import pytree, qarray
from qwix._src.core import ragged_dot as core_ragged_dot
from qwix._src.providers import boxed_param, quantized_param
from qwix._src.providers.input_transform import WithInputTransform
from qwix._src.utils import flax_util

# Programs find these here.
WithAux = boxed_param.WithAux
create_quantized_param = boxed_param.create_quantized_param
quantize_act = boxed_param.quantize_act


class PtqProvider(boxed_param.BoxedParamProvider):
    """Post-training quantization: weights are quantized once, activations in each call.

    A rule with only `weight_qtype` is weight-only quantization; with `act_qtype` as well the op runs on quantized
    operands, with ranges computed in each call (dynamic) or taken from statistics (`act_static_scale`).

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> rules = [qwix.QuantizationRule(weight_qtype=jnp.int8)]
    >>> quantized = qwix.quantize_model(model, PtqProvider(rules), jnp.ones((1, 8)))
    >>> quantized.kernel.array.qvalue.dtype
    dtype('int8')
    """

    # The op on quantized operands; an attribute, for providers with QArrays of their own.
    _ragged_dot_fn = staticmethod(core_ragged_dot.ragged_dot)

    def ragged_dot(
        self,
        lhs: Any,
        rhs: Any,
        group_sizes: jax.Array,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
        group_offset: jax.Array | None = None,
    ) -> jax.Array:
        """`jax.lax.ragged_dot`, quantized as the rule says: each expert has scales of its own, and each row."""
        rule, op_id = self._get_current_rule_and_op_id("ragged_dot")

        def get_how(index: int, tile_size: int | float | None, **kwargs: Any) -> qarray.HowToQuantize:
            tiled = {1: tile_size} if tile_size else {}
            return qarray.HowToQuantize(channelwise_axes=(0, 2) if index else (0,), tiled_axes=tiled, **kwargs)

        operands = self._quantize_operands([lhs, rhs], get_how, rule, op_id)
        kwargs: dict[str, Any] = {"precision": precision, "preferred_element_type": preferred_element_type}
        if operands is None:
            lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
            return jax.lax.ragged_dot(lhs, rhs, group_sizes, group_offset=group_offset, **kwargs)
        operands = [*operands, group_sizes, group_offset]
        return self._run_op(_RaggedDotOf(self._ragged_dot_fn), operands, self._qarray_module, **kwargs)

    def linear(self, x: Any, kernel: Any, bias: Any, activation: str | None) -> jax.Array:
        """`qwix.cpu.linear`: one kernel where the weight is packed for it, else the `dot_general` of this provider."""
        from qwix.cpu import ops  # which imports this module

        # A provider with a `dot_general` of its own does something before or after it.
        is_own = type(self).dot_general is not boxed_param.BoxedParamProvider.dot_general
        if is_own or type(kernel) is not WithAux or kernel.value.array.own_ops is not ops:
            return ops.unfused_linear(x, kernel, bias, activation)
        operands = self._operands_of_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        assert operands is not None  # as one of them is quantized
        bias = None if bias is None else provenance.unwrapped(bias)
        return self._run_op(ops.matmul, [*operands, bias], self._qarray_module, activation=activation)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        return super().get_intercept_map() | {
            "jax.lax.ragged_dot": self.ragged_dot,
            "qwix.cpu.ops._linear": interception.reentrant(self.linear),
        }


@dataclasses.dataclass(frozen=True)
class _RaggedDotOf:
    """A ragged_dot whose arrays are its positional arguments."""

    ragged_dot: Callable[..., Any]

    def __call__(self, lhs: Any, rhs: Any, group_sizes: Any, group_offset: Any, **kwargs: Any) -> jax.Array:
        return self.ragged_dot(lhs, rhs, group_sizes, group_offset=group_offset, **kwargs)


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = flax.core.FrozenDict({}),  # noqa: B008
    *,
    allow_extra_params: bool = False,
    _qarray_module: ModuleType | Any = qarray,
) -> Any:
    """Quantizes a float parameter tree as a quantized model wants it, without running the model.

    One parameter is quantized after the other, so beyond the two trees only the largest parameter has to fit in memory
    twice. Sharded parameters stay sharded.

    Args:
      params: pure nested dict of float arrays, maybe a subtree of the model's: `nn.unbox(variables['params'])` in
        Linen, `nnx.to_pure_dict(nnx.state(model, nnx.Param))` in NNX. A weight that stands transformed in the quantized
        model (`contrib.rotation`) may be given as it is there, or as it was before.
      abstract_quantized_params: what `jax.eval_shape(quantized_model.init, ...)['params']` gives in Linen; the
        quantized model itself in NNX, maybe abstract.
      quant_stats: pure nested dict of the statistics of static-range activations: {count, sum_of_absmax}, or {count,
        sum_of_min, sum_of_max}, at '<module>/<op id>_lhs'.
      allow_extra_params: leave parameters that the quantized model does not have as they are.

    Returns:
      The tree with quantized leaves. Linen: `WithAux` of unboxed arrays. NNX: the nested dict that `nnx.update(model,
      ...)` takes.

    Raises:
      ValueError: for a path that the quantized model does not have, a parameter of the wrong size or in a box
        (`nn.Partitioned`), or a statistic with a count of zero.

    >>> import jax.numpy as jnp, qwix
    >>> from flax import nnx
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> provider = PtqProvider([qwix.QuantizationRule(weight_qtype=jnp.int8)])
    >>> abstract = nnx.eval_shape(lambda: qwix.quantize_model(model, provider, jnp.ones((1, 8))))
    >>> nnx.update(abstract, quantize_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)), abstract))
    >>> abstract.kernel.array.scale.shape
    (1, 4)
    """
    template = Template(abstract_quantized_params)
    result: dict[tuple[str | int, ...], Any] = {}
    for path, value, target, _ in template.weights(params):
        where = "/".join(map(str, path))
        if target is None:
            if not allow_extra_params:
                raise ValueError(
                    f"{where} is not found in the abstract_quantized_params: it is no parameter of the quantized "
                    "model. Pass allow_extra_params=True to keep such parameters as they are."
                )
            result[path] = value
        elif isinstance(target, WithAux) and isinstance(target.array, qarray.QArray):
            result[path] = quantize_like(value, target, where, _qarray_module)
        else:
            if getattr(target, "shape", value.shape) != value.shape:
                raise ValueError(f"{where} has shape {value.shape}, the quantized model wants {target.shape}")
            result[path] = value
    for path, scale, zero_point in static_scales(quant_stats, template):
        result[(*path[:-1], f"{path[-1]}_scale")] = scale
        if zero_point is not None:
            result[(*path[:-1], f"{path[-1]}_zero_point")] = zero_point
    return template.restore(result)


def quantize_like(value: Any, target: WithAux, where: str, qarray_module: Any = qarray) -> WithAux:
    """A float parameter quantized as `target`, which may be abstract, is: same shape, granularity and format."""
    shape = tuple(target.array.shape)
    if math.prod(value.shape) != math.prod(shape):
        raise ValueError(
            f"{where} has shape {tuple(value.shape)}, which cannot become the {shape} of the quantized model"
        )
    how = how_of(target)
    array = quantized_param.quantize_value(quantized_param.reshape_value(value, shape), how, qarray_module)
    return target.replace(array=jax.tree.map(lambda x: quantized_param.rebox(value, x, shape), array))


def how_of(target: WithAux) -> qarray.HowToQuantize:
    """How a quantized parameter was quantized, in terms of its stored axes.

    The granularity is read off the scale's shape: under Linen's lifted transforms `how` was written down for the slice
    that the op saw, without the stacked axes.
    """
    tiles = list(enumerate(zip(target.array.shape, target.array.scale_tile_shape, strict=True)))
    return dataclasses.replace(
        target.how,
        channelwise_axes=tuple(i for i, (_, tile) in tiles if tile == 1),
        tiled_axes={i: tile for i, (size, tile) in tiles if tile not in (1, size)},
    )


def static_scales(
    quant_stats: Any, template: Template
) -> Iterator[tuple[tuple[str | int, ...], WithAux, jax.Array | None]]:
    """(path of the activation, scale, zero point) of each statistic that the model has a place for."""
    for path, stat in flatten(quant_stats, is_leaf=lambda x: "count" in x):
        where = "/".join(map(str, path))
        target = template.get((*path[:-1], f"{path[-1]}_scale"))
        if target is None:
            continue
        if not isinstance(stat["count"], jax.core.Tracer) and int(stat["count"]) == 0:
            raise ValueError(
                f"quant_stats is not initialized for {where}: its count is 0. Run the calibration or QAT model with "
                "the collection 'quant_stats' mutable first."
            )
        calibration = averaging.SimpleMovingAverage().get_calibration(stat)
        scale, zero_point = qarray.compute_scale_zero_point(calibration, target.how.qtype)
        if tuple(scale.shape) != tuple(target.array.shape):
            raise ValueError(
                f"the statistic {where} has shape {scale.shape}, the quantized model wants {target.array.shape}"
            )
        yield path, target.replace(array=scale.astype(jnp.float32)), zero_point


def flatten(tree: Any, is_leaf: Any = lambda _: False) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(path, leaf) of a nested mapping; `is_leaf` may stop at an inner mapping."""
    if not isinstance(tree, Mapping):
        yield (), tree
        return
    for key, value in tree.items():
        if isinstance(value, Mapping) and not is_leaf(value):
            yield from (((key, *path), leaf) for path, leaf in flatten(value, is_leaf))
        else:
            yield (key,), value


class Weight(NamedTuple):
    """A float parameter, and its place in a quantized model.

    Attributes:
      path: where it stands there.
      value: what is to be quantized.
      target: what stands there, unboxed; None if nothing does. Of a transformed weight, what is inside.
      given: path and value before a transform.
    """

    path: tuple[str | int, ...]
    value: Any
    target: Any | None
    given: tuple[tuple[str | int, ...], Any]


class Template:
    """A quantized Linen parameter tree or NNX model, as something to look up paths in.

    A `WithInputTransform` is looked up and restored as what is inside of it.
    """

    def __init__(self, tree: Any):
        self._is_nnx = isinstance(tree, nnx.Module)
        self._tree = tree

    def get(self, path: tuple[str | int, ...]) -> Any | None:
        """What stands at a path, unboxed; None if nothing does."""
        found = self._at(path)
        return found.inner() if isinstance(found, WithInputTransform) else found

    def _at(self, path: tuple[str | int, ...]) -> Any | None:
        return flax_util.unbox(flax_util.get_value_from_path(self._tree, path))

    def weights(self, params: Any) -> Iterator[Weight]:
        """The parameters of a nested dict; one that stands transformed in the model but is not yet, is transformed."""
        for path, value in flatten(params):
            given = path, value
            if isinstance(value, flax.core.meta.AxisMetadata):
                where = "/".join(map(str, path))
                raise ValueError(f"{where} is a {type(value).__name__}, not an array: give flax.linen.unbox(params)")
            found = self._at(path)
            if isinstance(value, WithInputTransform):  # of a transformed Linen model
                if not isinstance(found, WithInputTransform) or found.transforms != value.transforms:
                    raise ValueError(
                        f"{'/'.join(map(str, path))} is transformed in another way than the quantized model wants it: "
                        "give its value of before the transform"
                    )
                value = value.inner()
            elif isinstance(found, WithInputTransform):
                value = found.transformed(value)
            elif path[1:] and path[-1] == "array" and isinstance(self._at(path[:-1]), WithInputTransform):
                path = path[:-1]  # of a transformed NNX model
            yield Weight(path, value, self.get(path), given)

    def restore(self, flat: Mapping[tuple[str | int, ...], Any]) -> dict[Any, Any]:
        """The nested dict of a flat one, in the form that the framework takes."""
        nested: dict[Any, Any] = {}
        for path, value in flat.items():
            found = self._at(path)
            value = found.holding(value) if isinstance(found, WithInputTransform) else value
            node = nested
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = as_pure_dict(value) if self._is_nnx else value
        return nested


def as_pure_dict(value: Any) -> Any:
    """An array structure as the nested dict of its arrays, which is how NNX states hold it.

    >>> import jax.numpy as jnp
    >>> sorted(as_pure_dict(qarray.quantize_api(jnp.ones((2, 2)), 'int8')))
    ['qvalue', 'scale']
    """
    if not pytree.is_array_structure(value):
        return value
    fields = {n: getattr(value, n) for n in pytree.field_names(value, is_static=False)}
    return {name: as_pure_dict(leaf) for name, leaf in fields.items() if leaf is not None}
