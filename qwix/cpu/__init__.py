"""Native kernels for inference on a CPU, and the packed layout of weights that they read. See docs/cpu.md."""

from qwix.cpu.native import is_available, kernels
from qwix.cpu.ops import matmul
from qwix.cpu.optimize import NothingToPackError, optimize_for_inference, restore
from qwix.cpu.packed import PackedQArray, pack, unpack, why_not_packed

__all__ = [
    "NothingToPackError",
    "PackedQArray",
    "is_available",
    "kernels",
    "matmul",
    "optimize_for_inference",
    "pack",
    "restore",
    "unpack",
    "why_not_packed",
]
