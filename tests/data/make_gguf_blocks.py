"""Writes gguf_blocks.json: blocks of each type as the package gguf packs them, and the values that it reads in them.

python tests/data/make_gguf_blocks.py
"""

import importlib.metadata
import json
import pathlib

import numpy as np
from gguf import GGMLQuantizationType, quants

ROWS, COLUMNS = 2, 64


def main() -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    result = {"gguf": importlib.metadata.version("gguf"), "shape": [ROWS, COLUMNS]}
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"):
        kind = GGMLQuantizationType[name]
        data = quants.quantize(values, kind)
        result[name] = {"bytes": data.tobytes().hex(), "values": quants.dequantize(data, kind).ravel().tolist()}
    path = pathlib.Path(__file__).with_name("gguf_blocks.json")
    path.write_text(json.dumps(result).replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    main()
