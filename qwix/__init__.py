"""Quantization for JAX models, Flax NNX first.

The public names of the library; everything here is defined in a module of `qwix._src`.
"""

from qwix._src.core.qarray import QArray, dequantize
from qwix._src.core.qarray import quantize_api as quantize
from qwix.version import __version__ as __version__

__all__ = [
    "QArray",
    "dequantize",
    "quantize",
]
