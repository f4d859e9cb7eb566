"""Training with sparsity: a module, for NNX and for Linen, that prunes the operands of an op on a schedule.

    self.sparsity = SparsityModule((64, 128), (None, None), SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4))
    ...
    x, kernel = self.sparsity(x, self.kernel[...])
    return x @ kernel

The mask of the weight is state: it starts as all ones, is found from the weight at step `weight_sparsity_start_step`
and then every `weight_sparsity_update_step` steps, and goes through `nnx.jit`, checkpoints and sharding as other state
does. A call is a step, except in eval mode. Gradients are those of the kept elements (arXiv 2104.08378 without its
regularization); what is pruned keeps its value in the parameter, and may come back with the next mask.

In Linen, `LinenSparsityModule` does the same with the collection `batch_stats`, where it is mutable:

    x, kernel = LinenSparsityModule(rule)(x, self.param("kernel", init, (64, 128)))
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src.core import qarray, sparsity
from qwix._src.core.sparsity import SparsityRule

Operand = jax.Array | qarray.QArray


class SparsityModule(nnx.Module):
    """Prunes activations and a weight as a `SparsityRule` says.

    Args:
      shape: of the weight.
      sharding_axes: names of mesh axes that the mask is sharded over, as those of the weight.
      sparsity_rule: None leaves both alone.

    Attributes:
      step: `nnx.BatchStat`, int32: how many calls there were.
      mask: `nnx.BatchStat`, bool, of the weight's shape.

    >>> rule = SparsityRule(weight_sparsity_n=1, weight_sparsity_m=2)
    >>> module = SparsityModule((1, 2), (None, None), rule)
    >>> module(jnp.ones((1, 1)), jnp.array([[3.0, 4.0]]))[1].tolist(), module.mask.get_value().tolist()
    ([[0.0, 4.0]], [[False, True]])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sharding_axes: tuple[jax.P | str | None, ...],
        sparsity_rule: SparsityRule | None = None,
    ):
        _check(sparsity_rule)
        self.sparsity_rule = sparsity_rule
        self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))
        # Without a mesh the names are kept for later; NNX would look for one.
        on_mesh = not jax.sharding.get_abstract_mesh().empty
        mask = jnp.ones(shape, jnp.bool_)
        self.mask = nnx.BatchStat(mask, out_sharding=sharding_axes, eager_sharding=on_mesh)

    def __call__(self, inputs: Operand, weight: Operand) -> tuple[Operand, Operand]:
        """Pruned activations and weight, each an array or a QArray as given.

        Raises:
          ValueError: the weight does not have the module's shape, or m does not divide an array.
        """
        rule = self.sparsity_rule
        if rule is None:
            return inputs, weight
        inputs = _pruned_inputs(inputs, rule)
        if not rule.prunes("weight"):
            return inputs, weight
        if tuple(weight.shape) != tuple(self.mask.shape):
            raise ValueError(f"a weight of shape {weight.shape} in a SparsityModule of shape {self.mask.shape}")
        if not rule.eval_mode:
            step = self.step.get_value()
            self.mask.set_value(_mask_at(step, self.mask.get_value(), weight, rule))
            self.step.set_value(step + 1)
        return inputs, sparsity.apply_sparsity(weight, self.mask.get_value())


class LinenSparsityModule(nn.Module):
    """`SparsityModule` for Linen: `step` and `mask` are variables of the collection `batch_stats`.

    A call is a step where the collection is mutable, but for that of `init`; elsewhere, and in eval mode, the mask
    stays as it is.

    Attributes:
      sparsity_rule: None leaves both operands alone.
      sharding_axes: names of mesh axes for the mask (an `nn.Partitioned`), as those of the weight; None: none.

    >>> module = LinenSparsityModule(SparsityRule(weight_sparsity_n=1, weight_sparsity_m=2))
    >>> x, kernel = jnp.ones((1, 1)), jnp.array([[3.0, 4.0]])
    >>> variables = module.init({}, x, kernel)
    >>> (_, pruned), variables = module.apply(variables, x, kernel, mutable=['batch_stats'])
    >>> pruned.tolist(), variables['batch_stats']['mask'].tolist()
    ([[0.0, 4.0]], [[False, True]])
    """

    sparsity_rule: SparsityRule | None = None
    sharding_axes: tuple[str | None, ...] | None = None

    @nn.compact
    def __call__(self, inputs: Operand, weight: Operand) -> tuple[Operand, Operand]:
        """Pruned activations and weight, each an array or a QArray as given.

        Raises:
          ValueError: the weight does not have the mask's shape, or m does not divide an array.
        """
        rule = self.sparsity_rule
        _check(rule)
        if rule is None:
            return inputs, weight
        inputs = _pruned_inputs(inputs, rule)
        if not rule.prunes("weight"):
            return inputs, weight
        make: Any = lambda: jnp.ones(weight.shape, jnp.bool_)  # noqa: E731
        if self.sharding_axes is not None:
            make = nn.with_partitioning(make, self.sharding_axes)
        mask = self.variable("batch_stats", "mask", make)
        step = self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.int32))
        if tuple(weight.shape) != tuple(mask.value.shape):
            raise ValueError(f"a weight of shape {weight.shape} where the mask has shape {mask.value.shape}")
        if not rule.eval_mode and not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            mask.value = _mask_at(step.value, mask.value, weight, rule)
            step.value = step.value + 1
        return inputs, sparsity.apply_sparsity(weight, mask.value)


def _check(rule: SparsityRule | None) -> None:
    if rule is not None and rule.weight_sparsity_update_step < 1:
        raise ValueError(
            f"weight_sparsity_update_step={rule.weight_sparsity_update_step}: a mask is found anew every 1 or more "
            "steps; eval_mode=True keeps it"
        )


def _pruned_inputs(inputs: Operand, rule: SparsityRule) -> Operand:
    if not rule.prunes("activation"):
        return inputs
    return sparsity.apply_sparsity(inputs, rule.mask("activation", inputs))


def _mask_at(step: jax.Array, mask: jax.Array, weight: Operand, rule: SparsityRule) -> jax.Array:
    """The mask that a step uses: a new one where it is due, else the one before."""
    since = step - rule.weight_sparsity_start_step
    is_due = (since >= 0) & (since % rule.weight_sparsity_update_step == 0)
    return jax.lax.cond(is_due, lambda: rule.mask("weight", weight, step), lambda: mask)
