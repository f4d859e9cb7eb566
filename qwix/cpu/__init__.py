"""Native kernels for inference on a CPU, and the packed layout of weights that they read. See docs/cpu.md."""

from qwix.cpu.native import activate, is_available, kernels
from qwix.cpu.ops import dot_product_attention, linear, matmul
from qwix.cpu.optimize import NothingToPackError, optimize_for_inference, restore
from qwix.cpu.packed import PackedQArray, is_packed, pack, unpack, why_not_packed

__all__ = [
    "NothingToPackError",
    "PackedQArray",
    "activate",
    "dot_product_attention",
    "is_available",
    "is_packed",
    "kernels",
    "linear",
    "matmul",
    "optimize_for_inference",
    "pack",
    "restore",
    "unpack",
    "why_not_packed",
]
