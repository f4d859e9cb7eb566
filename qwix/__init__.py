"""Quantization for JAX models, Flax NNX first.

The public names of the library; everything here is defined in a module of `qwix._src`.
"""

from qwix.version import __version__ as __version__

__all__: list[str] = []
