"""A small language model trained from scratch with int8 forward and backward, beside the same one in float.

Text: the docstrings of Python's standard library, as bytes. Both models start from the same parameters, see the same
batches, and are compared on held-out text. Prints the losses as they go, and draws them.

    python examples/int8_training.py [--steps N] [--layers N] [--plot FILE]
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qwix
from qwix.data import stdlib_docstrings

WIDTH, HEADS, LENGTH, BATCH, VOCABULARY = 128, 4, 64, 16, 256
RULE = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8, "bwd_qtype": jnp.int8}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class LanguageModel(nnx.Module):
    def __init__(self, layers: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x))


def loss_of(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next byte, in nats."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    return loss


evaluate = nnx.jit(loss_of)


def text(part: Any, size: int) -> np.ndarray:
    """The first bytes of the docstrings of one half of the library's modules."""
    pieces: list[bytes] = []
    for _, docstring in stdlib_docstrings(part):
        pieces.append(docstring.encode() + b"\n\n")
        if sum(map(len, pieces)) > size:
            break
    return np.frombuffer(b"".join(pieces)[:size], np.uint8)


def draw(losses: dict[str, list[float]], held_out: dict[str, float], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        window = min(20, len(values))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=f"{name} (held-out: {held_out[name]:.3f})")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a byte")
    axes.set_title("A language model from scratch: float, and int8 forward and backward")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--plot", default="int8_training.png")
    args = parser.parse_args(argv)
    training, evaluation = text("calibration", 400_000), text("evaluation", 64 * (LENGTH + 1))
    held_out_batch = jnp.asarray(evaluation.reshape(-1, LENGTH + 1), jnp.int32)

    provider = qwix.QtProvider([qwix.QtRule(**RULE)])
    float_model = LanguageModel(args.layers, nnx.Rngs(0))
    # A copy with the same parameters, whose ops are quantized.
    models = {"float": float_model, "int8": qwix.quantize_model(float_model, provider, held_out_batch[:1, :-1])}
    optimizers = {
        name: nnx.Optimizer(
            model, optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, 20, args.steps)), wrt=nnx.Param
        )
        for name, model in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    rng = np.random.default_rng(0)
    for step in range(args.steps):
        starts = rng.integers(0, len(training) - LENGTH - 1, BATCH)
        tokens = jnp.asarray(training[starts[:, None] + np.arange(LENGTH + 1)], jnp.int32)
        for name, model in models.items():
            losses[name].append(float(train_step(model, optimizers[name], tokens)))
        if step % 50 == 0 or step == args.steps - 1:
            print(
                f"step {step}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items()), flush=True
            )
    held_out = {name: float(evaluate(model, held_out_batch)) for name, model in models.items()}
    print("held-out loss, nats a byte: " + ", ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
    draw(losses, held_out, args.plot)
    print(f"wrote {args.plot}")
    return held_out


if __name__ == "__main__":
    main(sys.argv[1:])
