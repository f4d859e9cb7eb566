"""What calibrated methods (AWQ, GPTQ, SmoothQuant, QEP) have in common.

A *calibration provider* runs the float model as it is, and keeps statistics of the activations that each
weight is multiplied with. They are averaged over calls, in float32, next to the weight:

    blocks/0/attn/kernel         the weight
    blocks/0/attn/kernel_awq     {"count": number of calls, "sum_of_act_scale": (in,)}

in Linen's collection `quant_stats` (pass it as mutable), in NNX in a `QuantStat` variable. A subclass
says what to compute, from activations laid out as (in, samples)::

    class MeanProvider(SinglePassCalibrationProvider):
        def get_rule_type(self):        # it looks at ops under rules of this type
            return MyRule
        def get_stats_suffix(self):     # the name of its statistics
            return "_mean"
        def compute_stats(self, lhs):   # arrays whose axes all run over the input features
            return {"mean": lhs.mean(axis=1)}

`quantize_params_with_calibration` then hands each weight that has statistics, laid out as (out, in), to a
function of the method, and rounds the others to nearest.

*Input features* are the elements of the weight's contracted axes, in row-major order of the axes that the
quantized model stores it in; see `input_features`. An op may contract several axes. Batch axes count as
samples, that is, statistics are shared over them, unless a subclass sets `per_group`: then they are the
first axes of its statistics, aligned with those of the weight, and so are feature groups and experts. Both
operands may be the weight, in any layout that `provenance` can follow, as a tied embedding's transpose.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix._src import averaging, provenance, qconfig
from qwix._src.core import einsum as core_einsum
from qwix._src.core import operands as core_operands
from qwix._src.core import qarray, tiling
from qwix._src.providers import ptq, quantized_param
from qwix._src.utils import flax_util
from qwix.contrib import input_features

_average = averaging.SimpleMovingAverage()

# The name of the statistic that is activations themselves, (in, samples): of one call, since calls are averaged.
SAMPLES = "samples"


# ---------------------------------------------------------------- collecting statistics


class CalibrationProvider(qconfig.QuantizationProvider):
    """Runs the float model, and shows each weight's activations to `_collect_stats`.

    Rules of another type than `get_rule_type()`, or without `weight_qtype`, are passed over. The model's
    outputs are those of the float model.

    Attributes:
      per_group: whether a weight of several matrices has statistics for each of them: along batch axes, in the feature
        groups of a convolution, for the experts of a ragged_dot. Without it batch axes share theirs, and the other two
        ops are not observed.
    """

    per_group: bool = False

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        """The type of the rules whose ops are calibrated."""
        raise NotImplementedError

    def get_stats_suffix(self) -> str:
        """What the name of a weight is followed by in that of its statistics, such as '_awq'."""
        raise NotImplementedError

    def _collect_stats(self, lhs: jax.Array, weight: provenance.ParamRef, op_id: str) -> None:
        """Called for each op with one weight among its operands.

        Args:
          lhs: the activations, (input features, samples).
          weight: which parameter it is.
          op_id: such as 'dot_general0'.
        """
        raise NotImplementedError

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: jax.lax.DotDimensionNumbers,
        *args: Any,
        rule: qconfig.QuantizationRule | None = None,
        op_id: str | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`jax.lax.dot_general`; `rule` and `op_id` are those of the op that it is a part of, if it is one."""
        if op_id is None:
            rule, op_id = self._get_current_rule_and_op_id("dot_general")
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        self._observe(rule, op_id, lambda: input_features.of_dot_general(lhs, rhs, dimension_numbers))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

    def einsum(self, einsum_str: str, *operands: Any, **kwargs: Any) -> jax.Array:
        """`jax.numpy.einsum`, run as the dot_generals of its pairs of operands."""
        einsum_str, operands = core_einsum.split_args(einsum_str, *operands)
        if len(operands) == 1:
            return provenance.follow_views(lambda x: jnp.einsum(einsum_str, x, **kwargs), *operands)
        rule, op_id = self._get_current_rule_and_op_id("einsum")
        contract = kwargs.pop("_dot_general", None) or jax.lax.dot_general

        def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, **options: Any) -> jax.Array:
            self._observe(rule, op_id, lambda: input_features.of_dot_general(lhs, rhs, dimension_numbers))
            lhs, rhs = core_operands.float_operands(lhs, rhs)
            return contract(lhs, rhs, dimension_numbers, **options)

        operands = tuple(map(provenance.unwrapped, operands))
        return core_einsum.einsum(einsum_str, *operands, _qwix_dot_general=dot_general, **kwargs)

    def conv_general_dilated(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """`jax.lax.conv_general_dilated`."""
        rule, op_id = self._get_current_rule_and_op_id("conv_general_dilated")
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        self._observe_groups(rule, op_id, lambda: input_features.of_conv(lhs, rhs, *args, **kwargs))
        return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    def ragged_dot(self, lhs: Any, rhs: Any, group_sizes: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """`jax.lax.ragged_dot`."""
        rule, op_id = self._get_current_rule_and_op_id("ragged_dot")
        lhs, rhs = provenance.unwrapped(lhs), provenance.unwrapped(rhs)
        self._observe_groups(rule, op_id, lambda: input_features.of_ragged_dot(lhs, rhs, group_sizes, *args, **kwargs))
        return jax.lax.ragged_dot(lhs, rhs, group_sizes, *args, **kwargs)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        return super().get_intercept_map() | {
            "jax.lax.conv_general_dilated": self.conv_general_dilated,
            "jax.lax.dot_general": self.dot_general,
            "jax.lax.ragged_dot": self.ragged_dot,
            "jax.numpy.einsum": self.einsum,
        }

    def _observe(
        self,
        rule: qconfig.QuantizationRule | None,
        op_id: str | None,
        find_uses: Callable[[], Iterable[input_features.Use]],
    ) -> None:
        """Hands the uses of weights in one op to `_collect`, if its rule is of the type that is calibrated."""
        if not isinstance(rule, self.get_rule_type()) or rule.weight_qtype is None:
            return
        assert op_id is not None
        for use in find_uses():
            try:
                features = use.features(per_group=self.per_group)
            except ValueError as e:
                warnings.warn(
                    f"{use.ref.path}, {op_id}: no statistics of its activations were taken, so that it will be "
                    f"rounded to nearest: {e}",
                    qconfig.QuantizationWarning,
                    stacklevel=2,
                )
                continue
            self._collect(features, op_id)

    def _observe_groups(
        self,
        rule: qconfig.QuantizationRule | None,
        op_id: str | None,
        find_uses: Callable[[], Iterable[input_features.Use]],
    ) -> None:
        """`_observe` of an op whose weight may have groups: a method that has none for them says so."""
        if self.per_group:
            self._observe(rule, op_id, find_uses)
        elif isinstance(rule, self.get_rule_type()) and rule.weight_qtype is not None:
            for use in find_uses():
                warnings.warn(
                    f"{use.ref.path}, {op_id}: this method has no scales for the inputs of such an op, so that it will "
                    "be rounded to nearest",
                    qconfig.QuantizationWarning,
                    stacklevel=2,
                )

    def _collect(self, features: input_features.Features, op_id: str) -> None:
        """Called for each use of a weight; groups are the business of those who set `per_group`."""
        self._collect_stats(features.x, features.ref, op_id)


class SinglePassCalibrationProvider(CalibrationProvider):
    """A calibration whose statistics are an average over calls; see the module's docstring."""

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        """The statistics of one call.

        Args:
          lhs: the activations, (input features, samples).

        Returns:
          Arrays by name. All of their axes run over the input features: (in,), (in, in). The exception is one named
          `SAMPLES`, (in, samples).
        """
        raise NotImplementedError

    def _collect_stats(self, lhs: jax.Array, weight: provenance.ParamRef, op_id: str) -> None:
        self._collect(input_features.Features(weight, lhs), op_id)

    def _collect(self, features: input_features.Features, op_id: str) -> None:
        weight = features.ref
        stats = features.map_groups(self.compute_stats)
        for name, value in stats.items():
            # Under jit it is only known later, and `quantize_params_with_calibration` looks again.
            if not isinstance(value, jax.core.Tracer) and not bool(jnp.isfinite(value).all()):
                raise ValueError(
                    f"{weight.path}, {op_id}: the activations hold NaN or inf, or overflow their {name}: calibrate "
                    "with other inputs, or find the layer that makes them"
                )
        axes = tuple(axis - len(features.shape) for axis in features.axes)
        # Of a weight that is traced nobody knows where it lies.
        placed = None
        if not isinstance(weight.value, jax.core.Tracer):
            placed = input_features.sharding_of(weight.value, axes, features.groups)
        _accumulate(weight, f"{weight.name}{self.get_stats_suffix()}", stats, features.groups, placed)


def _accumulate(
    weight: provenance.ParamRef,
    name: str,
    stats: Mapping[str, jax.Array],
    groups: tuple[int, ...],
    sharding: jax.sharding.NamedSharding | None,
) -> None:
    """Averages statistics, whose first axes are those of `groups`, into the variable `name` next to a weight."""
    module = weight.module
    if module is not None:
        if not module.is_mutable_collection("quant_stats"):
            return
        stored = module.get_variable("quant_stats", name)
    else:
        module = _nnx_owner(weight)
        variable = getattr(module, name, None)
        stored = None if variable is None else variable.get_value()
    average = init_stats(stats, groups) if stored is None else dict(stored)
    shapes = {name: jnp.shape(value) for name, value in average.items()}
    if stored is not None and shapes != {n: v.shape for n, v in jax.eval_shape(init_stats, stats).items()} | {
        "count": groups
    }:
        raise ValueError(
            f"{weight.path} is used by ops that contract different axes of it, or was calibrated with another shape: "
            f"its statistics have shapes {shapes}. Start with fresh statistics, and give one of the ops a rule of "
            "another type."
        )
    if flax_util.should_update_quant_stats():
        average = input_features.sharded(_average.update(average, stats), sharding)
    if isinstance(module, nnx.Module):
        if stored is None:
            setattr(module, name, flax_util.QuantStat(average))
        else:
            getattr(module, name).set_value(average)
    else:
        module.put_variable("quant_stats", name, average)


def init_stats(stats: Mapping[str, jax.Array], groups: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """Empty statistics; with groups, the count has their shape, which tells that there are groups."""
    return _average.init(stats) | {"count": jnp.zeros(groups, jnp.int32)}


def _nnx_owner(weight: provenance.ParamRef) -> nnx.Module:
    """The module that holds an NNX parameter, as the running code sees it: under nnx.scan that is a copy."""
    # An index of an nnx.List may stand in a path as a number or as a string.
    owner = tuple(map(str, weight.keys[:-1]))
    current = flax_util.get_current_module()
    if isinstance(current, nnx.Module) and _path_of(current) == owner:
        return current
    book = provenance.book()
    for module in reversed(list(book.modules.values()) if book is not None else []):
        if _path_of(module) == owner:
            variable = getattr(module, str(weight.keys[-1]), None)
            if isinstance(variable, nnx.Variable) and variable.get_raw_value() is weight.value:
                return module
    raise ValueError(
        f"{weight.path}: there is no module to keep its statistics in. Store the parameter as an attribute of a "
        "module, not in a list or dict, and run the op in the transform that the module is in."
    )


def _path_of(module: Any) -> tuple[str, ...] | None:
    # An item of a list has no name to put that of its statistics next to.
    has_names = isinstance(module, nnx.Module) and not isinstance(module, nnx.List)
    path = getattr(module, "qwix_path", None) if has_names else None
    return None if path is None else tuple(map(str, path))


# ---------------------------------------------------------------- quantizing with statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedQuantContext:
    """A weight and its statistics, ready for a method to quantize.

    Attributes:
      weight: (out, in). Columns that share a scale are neighbours.
      how: how to quantize `weight`, in terms of its two axes.
      calibration_stats: the averaged statistics, float32, their axes in the order of the columns.
      abs_w: what stands in the quantized model; it may be abstract.
      contracting_axis: the contracted axis of the stored weight, or a tuple if there are several.
      restore_shape: (out, in) array or QArray -> the same in the stored shape; an array may also be
        (1, in), and keeps size 1 in the axes that are not contracted.
      path: of the weight.
    """

    weight: jax.Array
    how: qarray.HowToQuantize
    calibration_stats: dict[str, jax.Array]
    abs_w: ptq.WithAux
    contracting_axis: int | tuple[int, ...]
    restore_shape: Callable[..., Any]
    path: tuple[str | int, ...]


def normalize_weight(x: jax.Array, contraction_axis: int | Sequence[int]) -> tuple[jax.Array, Callable[[Any], Any]]:
    """Lays a weight out as a matrix (rows = out, columns = in).

    Args:
      x: the weight.
      contraction_axis: the axis, or axes, that become the columns.

    Returns:
      The matrix, and a function that undoes it, see `CalibratedQuantContext.restore_shape`.

    >>> matrix, restore = normalize_weight(jnp.arange(24).reshape(2, 3, 4), 1)
    >>> matrix.shape, matrix[0].tolist(), restore(matrix).shape
    ((8, 3), [0, 4, 8], (2, 3, 4))
    """
    axes = (contraction_axis,) if isinstance(contraction_axis, int) else contraction_axis
    layout = _Layout(tuple(x.shape), tuple(sorted(axis % x.ndim for axis in axes)))
    return layout.to_matrix(x), layout.restore


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a weight lies in a matrix (out, in) in which the columns of a group are neighbours.

    A contracted axis is split into (tiles, tile size). The columns run over all numbers of tiles first, then
    over all tile sizes, so that a tile of the weight, of one or of several axes, is a run of columns.

    Attributes:
      shape: of the weight.
      axes: the contracted ones, ascending.
      tiles: the tile size of contracted axes; the others are one tile.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    tiles: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def rest(self) -> list[int]:
        return [axis for axis in range(len(self.shape)) if axis not in self.axes]

    def _split(self) -> tuple[list[int], list[int]]:
        """For each contracted axis the number of tiles, and the tile size."""
        sizes = [self.tiles.get(axis, self.shape[axis]) for axis in self.axes]
        return [self.shape[axis] // size for axis, size in zip(self.axes, sizes, strict=True)], sizes

    @property
    def tile(self) -> int | None:
        """The number of columns in a group; None if all are in one."""
        counts, sizes = self._split()
        return None if math.prod(counts) == 1 else math.prod(sizes)

    def columns(self) -> np.ndarray:
        """For each column, which input feature it is."""
        counts, sizes = self._split()
        features = np.arange(math.prod(counts) * math.prod(sizes))
        pairs = [n for pair in zip(counts, sizes, strict=True) for n in pair]
        order = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
        return features.reshape(pairs).transpose(order).ravel()

    def to_matrix(self, x: jax.Array) -> jax.Array:
        rows = math.prod(self.shape[axis] for axis in self.rest)
        matrix = x.transpose(*self.rest, *self.axes).reshape(rows, -1)
        return self._take_columns(matrix, self.columns())

    def restore(self, x: Any) -> Any:
        """A matrix, or a QArray of one, in the shape of the weight."""
        if isinstance(x, qarray.QArray):
            # A scale has the rows of the weight, and a column for each group.
            counts, _ = self._split()
            found = x.scale.shape[1]
            groups = counts if found == math.prod(counts) else [*[1] * (len(counts) - 1), found]
            return x.replace(
                qvalue=self.restore(x.qvalue),
                scale=self._place(x.scale, groups),
                zero_point=None if x.zero_point is None else self._place(x.zero_point, groups),
            )
        features = self._take_columns(x, np.argsort(self.columns()))
        return self._place(features, [self.shape[axis] for axis in self.axes])

    def _place(self, x: jax.Array, sizes: Sequence[int]) -> jax.Array:
        """(rows, columns) with axes in the order of the weight; `sizes` are those of the contracted ones."""
        rows = [self.shape[axis] for axis in self.rest]
        if x.shape[0] != math.prod(rows):
            rows = [1] * len(rows)
        return x.reshape(*rows, *sizes).transpose(*np.argsort([*self.rest, *self.axes]).tolist())

    def _take_columns(self, matrix: jax.Array, columns: np.ndarray) -> jax.Array:
        return matrix if len(self.axes) < 2 or not self.tiles else matrix[:, columns]


def extract_calibrated_quant_context(
    path: tuple[str | int, ...], weight: jax.Array, abs_w: ptq.WithAux, stats: Mapping[str, jax.Array]
) -> CalibratedQuantContext | None:
    """Prepares a weight for a method.

    Args:
      path: of the weight.
      weight: float, in the shape of the float model or of the quantized one.
      abs_w: the quantized weight in the quantized model; it may be abstract.
      stats: {count, sum_of_<name>: ...} of this weight.

    Returns:
      The context; None if the quantized weight contracts nothing.

    Raises:
      ValueError: the statistics saw no call, are not finite, or do not fit the weight.
    """
    where = "/".join(map(str, path))
    shape = tuple(abs_w.array.shape)
    how = _how_of_shape(abs_w, where)
    axes = tuple(axis for axis in range(len(shape)) if axis not in {a % len(shape) for a in how.channelwise_axes})
    if not axes:
        return None
    if math.prod(weight.shape) != math.prod(shape):
        raise ValueError(
            f"{where} has shape {tuple(weight.shape)}, which cannot become the {shape} of the quantized model"
        )
    tiles = {axis % len(shape): tiling.tile_size(shape, axis, tile) for axis, tile in how.tiled_axes.items()}
    layout = _Layout(shape, axes, tiles)
    columns = layout.columns()
    return CalibratedQuantContext(
        weight=layout.to_matrix(quantized_param.reshape_value(weight, shape)),
        how=dataclasses.replace(how, channelwise_axes=(0,), tiled_axes={} if layout.tile is None else {1: layout.tile}),
        calibration_stats={name: _by_column(x, columns, where, name) for name, x in _averaged(stats, where).items()},
        abs_w=abs_w,
        contracting_axis=axes[0] if len(axes) == 1 else axes,
        restore_shape=layout.restore,
        path=path,
    )


def _how_of_shape(abs_w: ptq.WithAux, where: str) -> qarray.HowToQuantize:
    """How a weight was quantized, in terms of its own axes; of one without padded tiles."""
    if type(abs_w.array) is not qarray.QArray:
        raise ValueError(
            f"{where} is a {type(abs_w.array).__name__}: calibrated methods quantize to plain QArrays. Choose a tile "
            "size that divides the axis, and a provider without padding."
        )
    try:
        # It tells contracted axes of size 1 from others, which the scale's shape does not.
        if qarray.get_scale_shape(abs_w.array.shape, abs_w.how) == tuple(abs_w.array.scale.shape):
            return abs_w.how
    except ValueError:
        pass
    return ptq.how_of(abs_w)


def _averaged(stats: Mapping[str, jax.Array], where: str) -> dict[str, jax.Array]:
    if "count" not in stats or len(stats) < 2:
        raise ValueError(f"the statistics of {where} are {{{', '.join(stats)}}}, but should be {{count, sum_of_...}}")
    if _is_known(stats["count"]) and int(stats["count"]) == 0:
        raise ValueError(
            f"the statistics of {where} are of no call: run the calibration model (with the collection 'quant_stats' "
            "mutable, in Linen), or give the weight a rule that is not calibrated"
        )
    averaged = _average.get_calibration(stats)
    for name, value in averaged.items():
        if _is_known(value) and not bool(jnp.isfinite(value).all()):
            raise ValueError(
                f"the statistic {name} of {where} is not finite: its activations held NaN or inf. Calibrate without "
                "jit to see which op was the first."
            )
    return averaged


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def _by_column(x: jax.Array, columns: np.ndarray, where: str, name: str) -> jax.Array:
    """A statistic with each axis in the order of the columns."""
    axes = range(x.ndim - (name == SAMPLES))
    if any(x.shape[axis] != len(columns) for axis in axes):
        raise ValueError(
            f"the statistic {name} of {where} has shape {x.shape}, the weight has {len(columns)} input features: it "
            "was taken from another model, or in an op that contracts other axes"
        )
    if np.array_equal(columns, np.arange(len(columns))):
        return x
    for axis in axes:
        x = jnp.take(x, columns, axis=axis)
    return x


def quantize_params_with_calibration(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any,
    stats_suffix: str,
    quantize_fn: Callable[[CalibratedQuantContext], ptq.WithAux],
    *,
    allow_extra_params: bool = False,
    default_stats: Callable[[ptq.WithAux], Mapping[str, jax.Array] | None] = lambda _: None,
) -> Any:
    """Quantizes a float parameter tree, with a method for the weights that have statistics.

    Args:
      params, abstract_quantized_params, allow_extra_params: see `ptq.quantize_params`.
      quant_stats: pure nested dict of statistics; those of static-range activations may be among them.
      stats_suffix: of the method's statistics, such as '_awq'.
      quantize_fn: quantizes one weight, see `CalibratedQuantContext`. It returns what stands in the tree, in
        the stored shape, unboxed.
      default_stats: the statistics of a quantized weight that has none; where it gives None too, the weight
        is rounded to nearest.

    Returns:
      The tree, in the form that `ptq.quantize_params` gives.

    Raises:
      ValueError: as `ptq.quantize_params` and `extract_calibrated_quant_context`; or none of the statistics
        is the method's.
    """
    template = ptq.Template(abstract_quantized_params)
    stats = dict(ptq.flatten(quant_stats, is_leaf=lambda x: "count" in x))
    if stats and not any(str(path[-1]).endswith(stats_suffix) for path in stats):
        names = sorted({str(path[-1]) for path in stats})
        raise ValueError(f"quant_stats has no statistic named <weight>{stats_suffix}, but {', '.join(names)}")
    calibrated, others = {}, {}
    for path, value, target, given in template.weights(params):
        quantized = None
        if isinstance(target, ptq.WithAux) and isinstance(target.array, qarray.QArray):
            stat = stats.get((*path[:-1], f"{path[-1]}{stats_suffix}")) or default_stats(target)
            if stat is not None:
                quantized = quantize_weight(path, value, target, stat, quantize_fn)
        if quantized is None:
            others[given[0]] = given[1]
        else:
            place = functools.partial(quantized_param.rebox, value, value_shape=tuple(quantized.array.shape))
            calibrated[path] = quantized.replace(array=jax.tree.map(place, quantized.array))
    result = ptq.quantize_params(
        nested(others), abstract_quantized_params, quant_stats, allow_extra_params=allow_extra_params
    )
    return _merged(result, template.restore(calibrated))


def assemble(
    params: Any,
    abstract_quantized_params: Any,
    calibrated: Mapping[tuple[str | int, ...], ptq.WithAux],
    *,
    allow_extra_params: bool = False,
) -> Any:
    """The tree of `ptq.quantize_params`, with some weights quantized already, by path; the others are rounded."""
    template = ptq.Template(abstract_quantized_params)
    boxed, others = {}, {}
    for path, value, _, given in template.weights(params):
        if path not in calibrated:
            others[given[0]] = given[1]
            continue
        quantized = calibrated[path]
        place = functools.partial(quantized_param.rebox, value, value_shape=tuple(quantized.array.shape))
        boxed[path] = quantized.replace(array=jax.tree.map(place, quantized.array))
    rest = ptq.quantize_params(nested(others), abstract_quantized_params, allow_extra_params=allow_extra_params)
    return _merged(rest, template.restore(boxed))


def quantize_weight(
    path: tuple[str | int, ...],
    weight: jax.Array,
    target: ptq.WithAux,
    stats: Mapping[str, jax.Array],
    quantize_fn: Callable[[CalibratedQuantContext], ptq.WithAux],
) -> ptq.WithAux | None:
    """Quantizes a weight with its statistics; layer by layer or group by group where their count has axes.

    A count with the rank of the weight is of groups. One of a lower rank is of layers that a scan or vmap stacked.
    """
    rank = jnp.ndim(stats["count"])
    if not rank:
        context = extract_calibrated_quant_context(path, weight, target, stats)
        return None if context is None else quantize_fn(context)
    if rank == len(target.array.shape):
        shape = tuple(target.array.shape)
        weight = quantized_param.reshape_value(weight, shape)
        return _quantize_groups(path, weight, target, stats, quantize_fn, axis=0)
    layer = layer_of(target)
    layers = []
    for i in range(stats["count"].shape[0]):
        stats_of_layer = {name: value[i] for name, value in stats.items()}
        quantized = quantize_weight(path, weight[i], layer, stats_of_layer, quantize_fn)
        if quantized is None:
            return None
        layers.append(quantized)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers).replace(how=target.how)


def layer_of(target: ptq.WithAux, axes: int = 1) -> Any:
    """A layer of a quantized weight that is stacked along its first axes, without values."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), target)


def _quantize_groups(
    path: tuple[str | int, ...],
    weight: jax.Array,
    target: ptq.WithAux,
    stats: Mapping[str, jax.Array],
    quantize_fn: Callable[[CalibratedQuantContext], ptq.WithAux],
    axis: int,
) -> ptq.WithAux | None:
    """Quantizes a weight whose statistics have groups along its axes from `axis` on; those before were cut already."""
    if axis == weight.ndim:
        return quantize_weight(path, weight, target, stats, quantize_fn)
    groups = stats["count"].shape[0]
    if weight.shape[axis] % groups:
        raise ValueError(
            f"the statistics of {'/'.join(map(str, path))} have {groups} groups along axis {axis}, which its shape "
            f"{weight.shape} does not: they are of another model"
        )

    def cut(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (*leaf.shape[:axis], max(leaf.shape[axis] // groups, 1), *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    part = jax.tree.map(cut, target) if groups > 1 else target
    size = weight.shape[axis] // groups
    parts = []
    for i in range(groups):
        piece = jax.lax.slice_in_dim(weight, i * size, (i + 1) * size, axis=axis)
        stats_of_group = {name: value[i] for name, value in stats.items()}
        quantized = _quantize_groups(path, piece, part, stats_of_group, quantize_fn, axis + 1)
        if quantized is None:
            return None
        parts.append(quantized)
    if groups == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *parts).replace(how=target.how)


def nested(flat: Mapping[tuple[str | int, ...], Any]) -> dict[Any, Any]:
    """A nested dict of values by path."""
    result: dict[Any, Any] = {}
    for path, value in flat.items():
        node = result
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return result


def _merged(first: dict[Any, Any], second: dict[Any, Any]) -> dict[Any, Any]:
    """Two nested dicts without a common leaf as one."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = _merged(merged[key], value) if key in merged else value
    return merged
