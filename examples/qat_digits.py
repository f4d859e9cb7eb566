"""Quantization-aware training of a small convolutional network on scikit-learn's digits, in NNX and in Linen.

A float network is trained, rounded to int4 (weights and activations) as it is, and then trained on with the same
quantization in its forward, in int4 and in int2. Prints the accuracy of each on held-out images, and draws them.

    python examples/qat_digits.py [--steps N] [--qat-steps N] [--seeds N] [--bits N ...] [--plot FILE]
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

import qwix

BATCH = 64


class NnxCnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.out(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(nn.relu(nn.Conv(16, (3, 3))(x))))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


# A network is (float parameters, function of parameters and images), whichever framework it was written in.
Apply = Callable[[Any, jax.Array], jax.Array]


def nnx_network(provider: qwix.QuantizationProvider | None, x: jax.Array, seed: int) -> tuple[Any, Apply]:
    model = NnxCnn(nnx.Rngs(seed))
    if provider is not None:
        model = qwix.quantize_model(model, provider, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graphdef, params, rest)(x)


def linen_network(provider: qwix.QuantizationProvider | None, x: jax.Array, seed: int) -> tuple[Any, Apply]:
    model = LinenCnn() if provider is None else qwix.quantize_model(LinenCnn(), provider)
    return model.init(jax.random.key(seed), x), model.apply


def rounded_nnx(params: Any, rule: dict[str, Any], x: jax.Array) -> Apply:
    """Post-training quantization of trained parameters."""
    provider = qwix.PtqProvider([qwix.QuantizationRule(**rule)])
    model = NnxCnn(nnx.Rngs(0))
    nnx.update(model, params)
    model = qwix.quantize_model(model, provider, x)
    return lambda _, x: model(x)


def rounded_linen(params: Any, rule: dict[str, Any], x: jax.Array) -> Apply:
    model = qwix.quantize_model(LinenCnn(), qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    quantized = qwix.quantize_params(params["params"], abstract)
    return lambda _, x: model.apply({"params": quantized}, x)


def train(params: Any, apply: Apply, data: Any, steps: int, rate: float, seed: int) -> Any:
    images, labels = data
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, state, key):
        batch = jax.random.randint(key, (BATCH,), 0, len(images))

        def loss(params):
            logits = apply(params, images[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    # Not a scan: in a loop, XLA's CPU backend (jaxlib 0.10) runs convolutions on one thread.
    for key in jax.random.split(jax.random.key(seed), steps):
        params, state = step(params, state, key)
    return params


def accuracy(params: Any, apply: Apply, data: Any) -> float:
    """Per cent of the images that are classified as labelled."""
    images, labels = data
    return 100 * float((jax.jit(apply)(params, images).argmax(-1) == labels).mean())


def split_digits() -> tuple[Any, Any]:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.images[order, :, :, None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target[order])
    held_out = len(order) // 3
    return (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


def compare(framework: str, steps: int, qat_steps: int, seed: int, formats: list[int]) -> dict[str, float]:
    """Accuracies by row of the table."""
    network, rounded = (nnx_network, rounded_nnx) if framework == "NNX" else (linen_network, rounded_linen)
    training, held_out = split_digits()
    x = training[0][:1]
    params, apply = network(None, x, seed)
    params = train(params, apply, training, steps, 2e-3, seed)
    found = {"float": accuracy(params, apply, held_out)}
    for bits in formats:
        rule = {"weight_qtype": f"int{bits}", "act_qtype": f"int{bits}"}
        found[f"PTQ int{bits}"] = accuracy(None, rounded(params, rule, x), held_out)
        _, apply = network(qwix.QtProvider([qwix.QtRule(**rule)]), x, seed)
        # Trained on from the float parameters: the same tree, for QAT leaves them as they are.
        tuned = train(params, apply, training, qat_steps, 1e-3, seed + 1)
        found[f"QAT int{bits}"] = accuracy(tuned, apply, held_out)
    return found


def draw(results: dict[str, dict[str, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    width = 0.8 / len(results)
    rows = list(next(iter(results.values())))
    for i, (framework, found) in enumerate(results.items()):
        bars = axes.bar(np.arange(len(rows)) + i * width, list(found.values()), width, label=framework)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(np.arange(len(rows)) + 0.4 - width / 2, rows)
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title("Digits: weights and activations in few bits")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of float training")
    parser.add_argument("--qat-steps", type=int, default=400, help="of training on with quantization")
    parser.add_argument("--seeds", type=int, default=3, help="average over this many networks")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], help="formats to compare")
    parser.add_argument("--plot", default="qat_digits.png")
    args = parser.parse_args(argv)
    results = {}
    for framework in ("NNX", "Linen"):
        runs = []
        for seed in range(args.seeds):
            runs.append(compare(framework, args.steps, args.qat_steps, seed, args.bits))
            print(f"{framework}, seed {seed}: " + ", ".join(f"{row} {a:.2f} %" for row, a in runs[-1].items()))
        results[framework] = {row: float(np.mean([run[row] for run in runs])) for row in runs[0]}
        print(f"{framework}, mean: " + ", ".join(f"{row} {a:.2f} %" for row, a in results[framework].items()))
    draw(results, args.plot)
    print(f"wrote {args.plot}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
