"""How much memory does a training step of SmolLM2-135M need: all weights, LoRA, QLoRA?

What XLA reserves for one compiled step of Adam at a batch of 4 x 128 tokens: arguments, results that are no donated
arguments, and temporaries at their peak. Nothing is run and no weight is there: the models are abstract. XLA's CPU
backend is told to schedule for memory, as those of GPU and TPU do by themselves; its default computes what it can as
early as it can, and so dequantizes all layers at once. (JAX holds nf4 one element a byte on the CPU, so that a GPU or
TPU needs 51 MiB less for that base than what is shown.)

    python benchmarks/qlora_memory.py [--layers 30] [--json FILE]
"""

import argparse
import json
import os
from typing import Any

# JAX reads the flag once, when its backend starts.
_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_SCHEDULER}".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import qwix  # noqa: E402
from qwix.models.llama import Llama, LlamaConfig  # noqa: E402

BATCH, LENGTH = 4, 128
MIB = 2**20
CASES: dict[str, dict[str, Any] | None] = {
    "all weights": None,
    "LoRA, float32 base": {},
    "QLoRA, int8 base": {"weight_qtype": "int8"},
    "QLoRA, nf4 base": {"weight_qtype": "nf4", "tile_size": 32},
}


def measure(config: LlamaConfig, rule: dict[str, Any] | None) -> dict[str, float]:
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)

    def make() -> nnx.Module:
        model = Llama(config, rngs=nnx.Rngs(0))
        if rule is None:
            return model
        provider = qwix.LoraProvider(module_path=r"layers/.*", rank=8, alpha=16.0, **rule)
        return qwix.apply_lora_to_model(model, provider, jnp.zeros((1, LENGTH), jnp.int32), rngs=nnx.Rngs(1))

    trained = nnx.Param if rule is None else nnx.LoRAParam
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), trained, ...)
    optimizer = optax.adam(1e-4)
    state = jax.eval_shape(optimizer.init, params)

    def loss(params: Any, rest: Any, ids: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest)(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(params: Any, state: Any, rest: Any, ids: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, rest, ids)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, rest, ids).compile().memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / MIB  # noqa: E731
    return {
        "trained": sum(x.size for x in jax.tree.leaves(params)),
        "weights": size(params) + size(rest),
        "optimizer": size(state),
        "temporary": memory.temp_size_in_bytes / MIB,
        "peak": (memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    results = {}
    print(f"{'':20} {'trained':>12} {'weights':>9} {'optimizer':>9} {'temporary':>9} {'peak':>9}   MiB")
    for name, rule in CASES.items():
        found = results[name] = measure(config, rule)
        numbers = " ".join(f"{found[k]:9.0f}" for k in ("weights", "optimizer", "temporary", "peak"))
        print(f"{name:20} {found['trained']:12,} {numbers}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
