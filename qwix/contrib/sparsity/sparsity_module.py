"""Training with N:M sparsity: an NNX module that prunes the operands of an op on a schedule.

    self.sparsity = SparsityModule((64, 128), (None, None), SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4))
    ...
    x, kernel = self.sparsity(x, self.kernel[...])
    return x @ kernel

The mask of the weight is state: it starts as all ones, is found from the weight at step `weight_sparsity_start_step`
and then every `weight_sparsity_update_step` steps, and goes through `nnx.jit`, checkpoints and sharding as other state
does. A call is a step, except in eval mode. Gradients are those of the kept elements (arXiv 2104.08378 without its
regularization); what is pruned keeps its value in the parameter, and may come back with the next mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwix._src.core import qarray, sparsity
from qwix._src.core.sparsity import SparsityRule


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
        if sparsity_rule is not None and sparsity_rule.weight_sparsity_update_step < 1:
            raise ValueError(
                f"weight_sparsity_update_step={sparsity_rule.weight_sparsity_update_step}: a mask is found anew every "
                "1 or more steps; eval_mode=True keeps it"
            )
        self.sparsity_rule = sparsity_rule
        self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))
        # Without a mesh the names are kept for later; NNX would look for one.
        on_mesh = not jax.sharding.get_abstract_mesh().empty
        mask = jnp.ones(shape, jnp.bool_)
        self.mask = nnx.BatchStat(mask, out_sharding=sharding_axes, eager_sharding=on_mesh)

    def __call__(
        self, inputs: jax.Array | qarray.QArray, weight: jax.Array | qarray.QArray
    ) -> tuple[jax.Array | qarray.QArray, jax.Array | qarray.QArray]:
        """Pruned activations and weight, each an array or a QArray as given.

        Raises:
          ValueError: the weight does not have the module's shape, or m does not divide an array.
        """
        rule = self.sparsity_rule
        if rule is None:
            return inputs, weight
        if rule.activation_sparsity_n and rule.activation_sparsity_m:
            inputs = sparsity.apply_sparsity(inputs, _mask(inputs, rule, "activation"))
        if rule.weight_sparsity_n and rule.weight_sparsity_m:
            if tuple(weight.shape) != tuple(self.mask.shape):
                raise ValueError(f"a weight of shape {weight.shape} in a SparsityModule of shape {self.mask.shape}")
            if not rule.eval_mode:
                self._update(weight, rule)
            weight = sparsity.apply_sparsity(weight, self.mask.get_value())
        return inputs, weight

    def _update(self, weight: jax.Array | qarray.QArray, rule: SparsityRule) -> None:
        step = self.step.get_value()
        since = step - rule.weight_sparsity_start_step
        is_due = (since >= 0) & (since % rule.weight_sparsity_update_step == 0)
        mask = self.mask.get_value()
        self.mask.set_value(jax.lax.cond(is_due, lambda: _mask(weight, rule, "weight"), lambda: mask))
        self.step.set_value(step + 1)


def _mask(x: Any, rule: SparsityRule, kind: str) -> jax.Array:
    n, m, order, block_size, offset = (
        getattr(rule, f"{kind}_sparsity_{name}") for name in ("n", "m", "order", "block_size", "offset")
    )
    return sparsity.get_sparsity_mask(x, n, m, order, block_size, offset)
