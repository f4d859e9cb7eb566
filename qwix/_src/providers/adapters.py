"""Where adapters live: beside the weight that they adapt, in its dtype, sharded as it is.

A weight `kernel` has `kernel_lora_a`, `kernel_lora_b` and, with DoRA, `kernel_lora_m`: parameters of a Linen module,
`nnx.LoRAParam`s of an NNX module. An NNX module has `kernel_lora` as well, an `AdaptedWeight` that says what they mean;
an adapter with a name has it in theirs (`kernel_lora_a_french`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src import provenance
from qwix._src.core import low_rank, qarray
from qwix._src.providers.with_aux import WithAux
from qwix._src.utils import flax_util

# The adapter without a name.
DEFAULT = ""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of a weight.

    Attributes:
      name: '' for the one that `apply_lora_to_model` makes.
      rank: of A and B.
      scaling: what A B is multiplied by: alpha / rank (LoRA) or alpha / √rank (rsLoRA).
      dropout: rate on the input.
      use_dora: whether there is a magnitude.
    """

    name: str
    rank: int
    scaling: float
    dropout: float = 0.0
    use_dora: bool = False

    def attribute(self, weight: str, part: str) -> str:
        """The name of its 'a', 'b' or 'm'.

        >>> Adapter('fr', 4, 1.0).attribute('kernel', 'a')
        'kernel_lora_a_fr'
        """
        return f"{weight}_lora_{part}" + (f"_{self.name}" if self.name else "")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("a", "b", "m") if self.use_dora else ("a", "b")


@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """What the adapters of a weight mean; a static attribute of its NNX module.

    Attributes:
      op: the op that it is a weight of.
      factors: how A and B relate to the operand of that op.
      views: the steps from the stored weight to the operand.
      shape: of the weight before it was quantized, without stacked axes.
      adapters: all of them.
      keys: from its module to the weight.
      not_mergeable: why no weight of this shape does what weight and adapter do; '' if one does.
      active: (name, share) of those that are added to the output; their updates are multiplied by the shares.
    """

    op: str
    factors: low_rank.Factors
    views: tuple[provenance.View, ...]
    shape: tuple[int, ...]
    adapters: tuple[Adapter, ...]
    keys: tuple[str | int, ...] = ()
    not_mergeable: str = ""
    active: tuple[tuple[str, float], ...] = ((DEFAULT, 1.0),)

    def adapter(self, name: str) -> Adapter | None:
        """The adapter of a name, if there is one."""
        return next((a for a in self.adapters if a.name == name), None)

    def same_use(self, other: AdaptedWeight) -> bool:
        """Whether another op uses the weight in the same way, so that it has the same A and B."""
        same = (self.op, self.factors, self.views)
        return same == (other.op, other.factors, other.views)

    def with_adapter(self, adapter: Adapter) -> AdaptedWeight:
        """With one more adapter, or another one of that name."""
        others = tuple(a for a in self.adapters if a.name != adapter.name)
        return dataclasses.replace(self, adapters=(*others, adapter))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored weight, without stacked axes."""
        return self.views[0].in_shape if self.views else self.factors.shape

    def to_operand(self, stored: jax.Array) -> jax.Array:
        """The operand of the op, given the stored weight, which may be stacked along leading axes."""

        def change(array: jax.Array) -> jax.Array:
            for view in self.views:
                array = view.apply(array)
            return array

        return over_leading(change, stored.ndim - len(self.stored_shape))(stored)

    def to_stored(self, operand: jax.Array) -> jax.Array:
        """An operand, or a change of it, in the layout of the stored weight: the inverse of `to_operand`."""

        def change(array: jax.Array) -> jax.Array:
            for view in reversed(self.views):
                if view.kind == "transpose":
                    array = array.transpose([view.arg.index(i) for i in range(len(view.arg))])
                else:
                    array = array.reshape(view.in_shape)
            return array

        return over_leading(change, operand.ndim - len(self.factors.shape))(operand)

    def merged(self, stored: jax.Array, values: dict[str, dict[str, jax.Array]]) -> jax.Array:
        """The stored weight with its active adapters in it, float32.

        Args:
          stored: the float weight in the layout that it is stored in.
          values: name of an adapter -> its 'a', 'b' and maybe 'm'.
        """
        base = self.to_operand(stored.astype(jnp.float32))
        extra = base.ndim - len(self.factors.shape)
        total = base
        for name, share in self.active:
            adapter = self.adapter(name)
            if adapter is None:
                continue
            a, b = (values[name][part].astype(jnp.float32) for part in "ab")
            total = total + share * adapter.scaling * self.factors.product(a, b)
            if adapter.use_dora:
                norms = self.norms(base, a, b, adapter.scaling)
                ratio = values[name]["m"].astype(jnp.float32).reshape(norms.shape) / norms
                total = over_leading(self.factors.scale_columns, extra)(total, ratio)
        return self.to_stored(total)

    def norms(self, operand: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
        """`low_rank.column_norms` of the operand of the op, which may be stacked along leading axes."""
        norms = lambda w, a, b: low_rank.column_norms(self.factors, w, a, b, scaling)  # noqa: E731
        return over_leading(norms, operand.ndim - len(self.factors.shape))(operand, a, b)


def over_leading(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A function mapped over `count` leading axes of its arguments."""
    for _ in range(count):
        function = jax.vmap(function)
    return function


# --- a weight's place -----------------------------------------------------------------------------


def owner_of(model: Any, keys: tuple[str | int, ...]) -> tuple[Any, str, tuple[str | int, ...]]:
    """The innermost module on the way to a parameter, the parameter's name in the names beside it, its keys there.

    The name is the parameter's own name, unless it stands in a list or a mapping: `w/0` gives 'w_0'.
    """
    owner, start, node = model, 0, model
    for i, key in enumerate(keys[:-1], 1):
        node = flax_util.get_value_from_path(node, (key,))
        if isinstance(node, nnx.Module) and not isinstance(node, (nnx.List, nnx.Dict)):
            owner, start = node, i
    return owner, "_".join(map(str, keys[start:])), keys[start:]


def adapted_weights(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any, str, AdaptedWeight]]:
    """(path of its module, its module, name, what its adapters mean) of each weight with adapters."""
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Module):
            for name, value in list(vars(module).items()):
                if isinstance(value, AdaptedWeight):
                    yield path, module, name.removesuffix("_lora"), value


def stored_axes(views: tuple[provenance.View, ...], shape: tuple[int, ...]) -> list[int | None]:
    """For each axis of an operand the axis of the stored weight (of this shape) whose partition name it has."""
    axes: list[int | None] = list(range(len(shape)))
    for view in views:
        if view.kind == "transpose":
            axes = [axes[i] for i in view.arg]
            continue
        # The first of the axes that were split or merged keeps the name.
        starts = {math.prod(view.in_shape[:i]): i for i in reversed(range(len(view.in_shape)))}
        found = [starts.get(math.prod(view.arg[:j])) for j in range(len(view.arg))]
        axes = [axes[i] if i is not None and i not in found[:j] else None for j, i in enumerate(found)]
    return axes


def boxed_like(weight: Any, value: Any, axes: list[int | None]) -> Any:
    """A new parameter in the box of a weight, `axes` saying which of the weight's axes each of its own is.

    In NNX the box becomes an `nnx.LoRAParam`. An array lies on the devices as the weight does.
    """
    raw = flax_util.unbox(weight)
    sharding = getattr(raw, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(value, jax.Array):
        spec = flax_util.update_sharding(sharding.spec, transpose=axes, shape=value.shape, mesh=sharding.mesh)
        if not isinstance(value, jax.core.Tracer):
            value = jax.device_put(value, jax.sharding.NamedSharding(sharding.mesh, jax.P(*spec)))
    boxed = flax_util.update_boxed(weight, value=value, transpose=axes)
    if isinstance(boxed, nnx.Variable):
        return nnx.LoRAParam.from_metadata(value, dict(boxed.get_metadata()))
    return boxed


def explicit_sharding(weight: Any, axes: list[int | None], shape: tuple[int, ...]) -> dict[str, Any]:
    """`out_sharding` for an initializer, where the weight's mesh has explicit axes; otherwise nothing."""
    raw = flax_util.unbox(weight)
    if not isinstance(raw, jax.Array):
        return {}
    sharding = jax.typeof(raw).sharding
    if not any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types):
        return {}
    spec = flax_util.update_sharding(sharding.spec, transpose=axes, shape=shape, mesh=sharding.mesh)
    return {"out_sharding": jax.NamedSharding(sharding.mesh, jax.P(*spec))}


def part_axes(weight: AdaptedWeight, extra: int = 0) -> dict[str, list[int | None]]:
    """For each axis of A, B and the magnitude, the axis of the stored weight whose partition name it has."""
    stored = stored_axes(weight.views, weight.stored_shape)

    def axes(groups: tuple[low_rank.Axes, ...]) -> list[int | None]:
        firsts = [stored[group[0]] if group else None for group in groups]
        return [*range(extra), *(None if i is None else i + extra for i in firsts)]

    factors = weight.factors
    return {"a": axes(factors.a), "b": axes(factors.b), "m": axes(tuple(g for g in factors.b if g is not None))}


# --- creation in NNX ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Addition:
    """Creates the adapter of an NNX weight, once the model has been traced.

    Attributes:
      weight: what it is for.
      adapter: which.
      rule: the `LoraRule`, for its initializers.
    """

    weight: AdaptedWeight
    adapter: Adapter
    rule: Any

    def __call__(
        self,
        model: nnx.Module,
        keys: tuple[str | int, ...],
        replacement: Callable[[Any], WithAux] | None,
        rngs: nnx.Rngs | None,
    ) -> None:
        """Puts the adapter beside the weight at `keys`; `replacement` is what will quantize the weight."""
        path = "/".join(map(str, keys))
        if rngs is None:
            raise ValueError(f"{path} needs random numbers for its adapter: pass rngs=nnx.Rngs(...)")
        owner, name, own_keys = owner_of(model, keys)
        parts = self.parts(model, keys, replacement, rngs.params if "params" in rngs else rngs)
        for part, value in parts.items():
            setattr(owner, self.adapter.attribute(name, part), value)
        views = self.weight.views
        if replacement is not None and views and views[0].kind == "reshape":
            views = views[1:]  # that is done before it is quantized
        before = getattr(owner, f"{name}_lora", dataclasses.replace(self.weight, views=views, keys=own_keys))
        setattr(owner, f"{name}_lora", before.with_adapter(self.adapter))
        if self.adapter.dropout:
            if not hasattr(owner, "deterministic"):
                owner.deterministic = False  # what `model.eval()` and `model.train()` set
            if not hasattr(owner, "lora_rngs"):
                dropout = nnx.Rngs(dropout=(rngs.dropout if "dropout" in rngs else rngs)())
                shape = flax_util.unbox(parts["a"]).shape
                leading = shape[: len(shape) - len(self.weight.factors.a)]
                owner.lora_rngs = nnx.data(dropout.split(leading) if leading else dropout)

    def parts(
        self,
        model: Any,
        keys: tuple[str | int, ...],
        replacement: Callable[[Any], WithAux] | None,
        draw: Callable[[], jax.Array],
    ) -> dict[str, Any]:
        """A, B and maybe the magnitude, boxed as the weight at `keys` is; `draw` gives random keys.

        `model` is an NNX model, or the float parameters of a Linen model as a nested dict. If the adapter leaves a
        residue of the weight, that is put there instead.
        """
        path = "/".join(map(str, keys))
        stored = flax_util.get_value_from_path(model, keys)
        boxed = stored.array.qvalue if isinstance(stored, WithAux) else stored
        shape = tuple(flax_util.unbox(boxed).shape)
        extra = len(shape) - len(self.weight.stored_shape)
        if shape[max(extra, 0) :] != self.weight.stored_shape:
            raise ValueError(
                f"{path} of shape {shape} was seen by its op as {self.weight.stored_shape}: only stacking along "
                "leading axes (in_axes=0 of nnx.scan and nnx.vmap) can have adapters"
            )
        leading = shape[:extra]
        axes = part_axes(self.weight, extra)
        dtype = jnp.dtype(flax_util.unbox(stored).dtype)
        values: dict[str, Any] = {}
        initializers = {"a": self.rule.lora_a_initializer, "b": self.rule.lora_b_initializer}
        for part, own in zip("ab", self.weight.factors.shapes(self.adapter.rank), strict=True):
            sharding = explicit_sharding(boxed, axes[part], (*leading, *own))
            initialize = functools.partial(
                stacked_initializer, initializers[part], draw(), leading, own, dtype, sharding
            )
            is_abstract = isinstance(flax_util.unbox(boxed), jax.ShapeDtypeStruct)
            values[part] = jax.eval_shape(initialize) if is_abstract else initialize()
        if self.rule.init_lora_weights is not None or self.adapter.use_dora:
            if self.weight.not_mergeable:
                raise ValueError(
                    f"{path}: {self.weight.not_mergeable}. Leave use_dora and init_lora_weights out of its rule"
                )
            values |= self._from_weight(model, keys, path, stored, replacement, extra, dtype, values)
        return {part: boxed_like(boxed, value, axes[part]) for part, value in values.items()}

    def _from_weight(
        self,
        model: Any,
        keys: tuple[str | int, ...],
        path: str,
        stored: Any,
        replacement: Callable[[Any], WithAux] | None,
        extra: int,
        dtype: jnp.dtype,
        values: dict[str, Any],
    ) -> dict[str, Any]:
        """The parts of an adapter that depend on the weight. Writes the residue into the model, if it leaves one."""
        weight, factors, scaling = self.weight, self.weight.factors, self.adapter.scaling
        if isinstance(flax_util.unbox(stored), WithAux):
            base, exact = qarray.dequantize(flax_util.unbox(stored).array), None
        else:
            exact = flax_util.unbox(stored)
            base = exact
        if isinstance(base, jax.ShapeDtypeStruct) or isinstance(exact, jax.ShapeDtypeStruct):
            raise ValueError(f"{path} is abstract, and its adapter is made from its values: pass the trained model")

        def as_stored(x: jax.Array) -> jax.Array:
            """What the base holds, once `x` stands in it."""
            if replacement is None:
                return x
            quantized = flax_util.unbox(replacement(flax_util.update_boxed(stored, value=x))).array
            return qarray.dequantize(quantized).reshape(x.shape)

        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            return scaling * weight.to_stored(factors.product(a, b))

        def factorize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            split = over_leading(lambda w: factors.factorize(w, self.adapter.rank), extra)
            a, b = split(weight.to_operand(x.astype(jnp.float32) / scaling))
            return a.astype(dtype), b.astype(dtype)

        method = self.rule.init_lora_weights
        result = {}
        if method is not None:
            if exact is None:
                raise ValueError(
                    f"{path} is quantized already, so that init_lora_weights={method!r} has no float weight to start "
                    "from: apply the adapters to the float model, with weight_qtype in the rule"
                )
            name, steps = parse_init(method)
            rest = exact
            if name == "pissa":
                a, b = factorize(exact)
                rest = exact - product(a, b)
            else:
                for _ in range(steps):
                    base = as_stored(rest.astype(dtype))
                    a, b = factorize(exact - base)
                    last, rest = rest, exact - product(a, b)
                rest = last  # its quantized form is what A and B complete
            result = {"a": a, "b": b}
            base = rest.astype(dtype)
            set_at(model, keys, flax_util.update_boxed(stored, value=base))
            values = result
        if self.adapter.use_dora:
            operand = weight.to_operand(base if exact is None else as_stored(base))
            m = weight.norms(operand, values["a"], values["b"], scaling)
            lead = m.shape[:extra]
            result["m"] = m.reshape(*lead, *magnitude_shape(factors)).astype(dtype)
        return result


def magnitude_shape(factors: low_rank.Factors) -> tuple[int, ...]:
    """The shape of DoRA's magnitude: B's without the rank."""
    shape = factors.shapes(1)[1]
    return tuple(size for size, group in zip(shape, factors.b, strict=True) if group is not None)


def parse_init(method: str) -> tuple[str, int]:
    """Name and number of steps of a method that makes A and B from the weight.

    >>> parse_init('pissa'), parse_init('loftq'), parse_init('loftq,1')
    (('pissa', 1), ('loftq', 5), ('loftq', 1))
    """
    match = re.fullmatch(r"pissa|loftq(?:,([1-9]\d*))?", method)
    if match is None:
        raise ValueError(f"init_lora_weights={method!r} is none of 'pissa', 'loftq' and 'loftq,<steps>'")
    if method == "pissa":
        return method, 1
    return "loftq", int(match[1] or 5)


def stacked_initializer(
    initializer: Callable[..., jax.Array],
    key: jax.Array,
    leading: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: dict[str, Any],
) -> jax.Array:
    """An initializer's array, or a stack of them, each from a key of its own."""
    if not leading:
        return initializer(key, shape, dtype, **sharding)
    keys = jax.random.split(key, math.prod(leading))
    array = jax.vmap(lambda k: initializer(k, shape, dtype))(keys).reshape(*leading, *shape)
    return jax.device_put(array, sharding["out_sharding"]) if sharding else array


def set_at(model: Any, keys: tuple[Any, ...], value: Any) -> None:
    """Puts something at a path of a model."""
    holder, key = flax_util.get_value_from_path(model, keys[:-1]), keys[-1]
    if isinstance(key, int) or isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, key, value)
