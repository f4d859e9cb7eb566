"""What does sparsity cost, at once and trained on?

The convolutional network of `examples/qat_digits.py` (NNX): trained in float, then with pruned weights, and weights and
activations in int8, as it is and after training on with new masks (`sparsity_rule`) in every step. Prints the accuracy
on held-out digits, in per cent, mean of some networks.

    python benchmarks/sparsity.py [--steps N] [--seeds N]
"""

import argparse
import importlib.util
import pathlib
import statistics
import sys

import qwix
from qwix._src.core.sparsity import SparsityRule

RULES = {
    "int8": SparsityRule(),
    "int8, 2:4": SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4, weight_sparsity_order="C"),
    "int8, 90 % zeros": SparsityRule(weight_prune_rate=90),
}


def example():
    path = pathlib.Path(__file__).parents[1] / "examples" / "qat_digits.py"
    spec = importlib.util.spec_from_file_location("qat_digits", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of float training, and of training on")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    digits = example()
    training, held_out = digits.split_digits()
    x = training[0][:1]
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        params, apply = digits.nnx_network(None, x, seed)
        params = digits.train(params, apply, training, args.steps, 2e-3, seed)
        found.setdefault("float", []).append(digits.accuracy(params, apply, held_out))
        for name, rule in RULES.items():
            config = {"weight_qtype": "int8", "act_qtype": "int8", "additional_qt_config": {"sparsity_rule": rule}}
            _, apply = digits.nnx_network(qwix.QtProvider([qwix.QtRule(**config)]), x, seed)
            found.setdefault(f"{name}: at once", []).append(digits.accuracy(params, apply, held_out))
            if rule.prunes("weight"):
                tuned = digits.train(params, apply, training, args.steps, 1e-3, seed + 1)
                found.setdefault(f"{name}: trained on", []).append(digits.accuracy(tuned, apply, held_out))
        print(f"seed {seed}: " + ", ".join(f"{row} {values[-1]:.2f}" for row, values in found.items()), flush=True)
    for row, values in found.items():
        print(f"{row:30} {statistics.mean(values):6.2f}")


if __name__ == "__main__":
    sys.exit(main())
