"""Does Hugging Face's `peft` compute what we compute, with an adapter that we saved?

A tiny Llama of random weights gets adapters (LoRA, rsLoRA, DoRA), which `qwix.interop.peft.save` writes. Another
interpreter, in whose environment `peft`, `transformers` and `torch` are installed, reads them and prints its logits;
they are compared with ours.

    python benchmarks/peft_roundtrip.py --peft PYTHON
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from flax import nnx

import qwix
from qwix.interop import peft, safetensors
from qwix.models import llama_weights

DATA = pathlib.Path(__file__).parents[1] / "tests" / "data"
REFERENCE = json.loads((DATA / "peft_reference.json").read_text())
CASES = {
    "LoRA": {"rank": 3, "alpha": 6.0},
    "rsLoRA": {"rank": 4, "alpha": 6.0, "use_rslora": True},
    "DoRA": {"rank": 3, "alpha": 6.0, "use_dora": True},
}


def write_base(directory: pathlib.Path) -> None:
    """A model that both libraries read."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in sorted(REFERENCE["shapes"].items()):
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        tensors[name] = 1 + np.abs(values) if "norm" in name else values
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(REFERENCE["config"]))
    safetensors.write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", required=True, metavar="PYTHON", help="an interpreter with peft and torch")
    args = parser.parse_args()
    ids = np.array([REFERENCE["ids"]])
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        write_base(directory / "base")
        base = llama_weights.load(directory / "base")
        print(f"{'':8} {'largest difference of logits':>30} {'what the adapter changes':>26}")
        for name, fields in CASES.items():
            provider = qwix.LoraProvider(
                module_path=r"layers/\d+/(attn/[qv]_proj|mlp/down_proj)",
                lora_b_initializer=nnx.initializers.normal(0.2),
                **fields,
            )
            model = qwix.apply_lora_to_model(base, provider, ids, rngs=nnx.Rngs(0))
            if "use_dora" in fields:
                state = qwix.lora_params(model)
                is_magnitude = lambda path: str(path[-1]).endswith("_m")  # noqa: E731
                flat = nnx.to_flat_state(state)
                state = nnx.from_flat_state((p, v.replace(1.5 * v[...]) if is_magnitude(p) else v) for p, v in flat)
                nnx.update(model, state)
            peft.save(model, directory / name, rename=peft.hugging_face_llama, task_type="CAUSAL_LM")
            command = [args.peft, str(DATA / "make_peft_reference.py"), str(directory / name), str(directory / "base")]
            output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
            ours, before = (np.asarray(jax.device_get(m(ids)))[0, -1] for m in (model, base))
            difference = np.abs(ours - np.array(json.loads(output.splitlines()[-1]))).max()
            print(f"{name:8} {difference:30.1e} {np.abs(ours - before).max():26.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
