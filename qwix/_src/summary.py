"""`summarize`: what each rule did to each op of a quantized model, and what stayed in float and why."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.table
from flax import linen as nn
from flax import nnx

from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import boxed_param, input_transform, ptq
from qwix._src.utils import flax_util


@dataclasses.dataclass(frozen=True)
class OpRow:
    """One op that a provider saw.

    Attributes:
      path: path of the module, and the op's id.
      rule: the rule that matched, or None.
      shapes: of the operands.
      formats: of the operands as they went into the op.
      params: paths of the operands that are parameters, '' for the others.
      note: why something is in float; '' if all that the rule asks for was done.
    """

    path: str
    rule: qconfig.QuantizationRule | None
    shapes: tuple[tuple[int, ...], ...]
    formats: tuple[str, ...]
    params: tuple[str, ...]
    note: str


@dataclasses.dataclass(frozen=True)
class ParamRow:
    """One parameter of a quantized model.

    Attributes:
      path: where it stands.
      shape: its shape.
      format: number format with its granularity, or the float dtype.
      float_bytes: its bytes in float.
      bytes: its bytes now, with scales and zero points; formats under 8 bits counted as packed.
      note: why it is in float; '' for a quantized one.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    float_bytes: int
    bytes: int
    note: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """What quantization did to a model; `str()` gives two tables and the totals.

    Attributes:
      ops: a row for each op, in the order of the model.
      params: a row for each parameter.
      unused_rules: rules that matched no op.
    """

    ops: tuple[OpRow, ...]
    params: tuple[ParamRow, ...]
    unused_rules: tuple[qconfig.QuantizationRule, ...]

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float."""
        return sum(row.float_bytes for row in self.params)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters now."""
        return sum(row.bytes for row in self.params)

    def __str__(self) -> str:
        console = rich.console.Console(file=io.StringIO(), width=140)
        ops = rich.table.Table("op", "rule", "operands", "note", box=rich.box.SIMPLE, title="Ops")
        for op in self.ops:
            operands = " · ".join(
                f"{fmt}{list(shape)}{' ' + param if param else ''}"
                for fmt, shape, param in zip(op.formats, op.shapes, op.params, strict=True)
            )
            ops.add_row(op.path, "" if op.rule is None else op.rule.module_path, operands, op.note)
        params = rich.table.Table(
            "parameter", "shape", "format", "bytes", "of float", "note", box=rich.box.SIMPLE, title="Parameters"
        )
        for row in self.params:
            share = f"{row.bytes / row.float_bytes:.0%}" if row.float_bytes else ""
            params.add_row(row.path, str(list(row.shape)), row.format, f"{row.bytes:,}", share, row.note)
        console.print(ops)
        if self.params:
            console.print(params)
            total = self.bytes / max(self.float_bytes, 1)
            console.print(f"{self.float_bytes:,} bytes in float, {self.bytes:,} now ({total:.1%})")
        for rule in self.unused_rules:
            console.print(f"matched nothing: {rule}")
        return console.file.getvalue()  # type: ignore[attr-defined]


def summarize(model: nn.Module | nnx.Module, variables: Mapping[str, Any] | None = None) -> Summary:
    """Tells what quantization did to a model: each op with its formats, each parameter with its bytes.

    Args:
      model: what `quantize_model` returned. The ops of a Linen model are those seen since: initialize it first
        (`jax.eval_shape(model.init, ...)` is enough).
      variables: Linen only: its variables, for the parameters' part.

    Raises:
      ValueError: if the model did not go through `quantize_model`.

    >>> import jax.numpy as jnp, qwix
    >>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    >>> provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype='int4', tile_size=32)])
    >>> summary = summarize(qwix.quantize_model(model, provider, jnp.ones((1, 64))))
    >>> summary.ops[0].formats, summary.params[1].format
    (('float32', 'int4'), 'int4 [32, 1]')
    """
    records = getattr(type(model), "_qwix_records", None)
    if records is None:
        raise ValueError(f"{type(model).__name__} is not quantized: give summarize what quantize_model returned")
    ops = tuple(_op_row(record, provider) for provider, of_model in records.items() for record in of_model.values())
    unused = tuple(rule for provider in records for rule in provider.get_unused_rules())
    used = {param for op in ops for param in op.params}
    tree = _params_of(model, variables)
    params = tuple(_param_row(path, value, used) for path, value in tree)
    return Summary(ops, params, unused)


def _op_row(record: qconfig.OpRecord, provider: qconfig.QuantizationProvider) -> OpRow:
    rule = None if record.rule is None else provider._rules[record.rule]
    return OpRow(
        path="/".join(filter(None, (record.module_path, record.op_id))),
        rule=rule,
        shapes=record.shapes,
        formats=record.formats,
        params=record.params,
        note=record.note or _why_float(rule, record),
    )


def _why_float(rule: qconfig.QuantizationRule | None, record: qconfig.OpRecord) -> str:
    if rule is None:
        return "float: no rule matches"
    if rule.weight_qtype is None and rule.act_qtype is None:
        return "float: the rule has no qtype"
    if rule.act_qtype is None and not any(record.params):
        return "float: no operand is a parameter, and the rule has no act_qtype"
    return ""


def _params_of(model: Any, variables: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    if isinstance(model, nn.Module):
        for path, value in ptq.flatten((variables or {}).get("params", {})):
            yield "/".join(map(str, path)), flax_util.unbox(value)
        return
    inside: set[int] = set()
    found: list[tuple[tuple[Any, ...], Any]] = []
    for keys, node in nnx.iter_graph(model):
        if isinstance(node, boxed_param.WithAux):
            inside.update(id(leaf) for leaf in _variables_in(node))
            found.append((keys, node))
        elif isinstance(node, nnx.Param):
            found.append((keys, node))
    for keys, node in found:
        if id(node) not in inside:
            yield "/".join(map(str, keys)), flax_util.unbox(node)


def _variables_in(node: Any) -> list[nnx.Variable]:
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return [x for x in jax.tree.leaves(node, is_leaf=is_variable) if is_variable(x)]


def _param_row(path: str, value: Any, used: set[str]) -> ParamRow:
    shape = tuple(value.shape)
    value = value.inner() if isinstance(value, input_transform.WithInputTransform) else value
    array = value.array if isinstance(value, boxed_param.WithAux) else value
    float_bytes = math.prod(shape) * np.dtype(value.dtype).itemsize
    if isinstance(array, qarray.QArray):
        tiles = list(array.scale_tile_shape)
        return ParamRow(path, shape, f"{_format_name(array)} {tiles}", float_bytes, packed_bytes(array), "")
    note = "float: its rule has no weight_qtype" if path in used else "float: no operand of a quantized op"
    if isinstance(value, boxed_param.WithAux):
        note = "static scale"
    return ParamRow(path, shape, np.dtype(value.dtype).name, float_bytes, packed_bytes(array), note)


def _format_name(array: qarray.QArray) -> str:
    qtype = array.qtype if array.qtype is not None else array.qvalue.dtype
    return qtype if isinstance(qtype, str) else np.dtype(qtype).name


def packed_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, formats under 8 bits packed.

    >>> import jax.numpy as jnp
    >>> packed_bytes([jnp.ones((4, 4), jnp.int4), jnp.ones(2)])
    16
    """
    bits = sum(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree))
    return -(-bits // 8)
