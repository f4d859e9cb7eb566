"""Quantization for JAX models, Flax NNX first.

The public names of the library; everything here is defined in a module of `qwix._src`.
"""

from qwix._src.adapted_model import add_adapter, init_lora_params, lora_params, merge_lora, set_adapter
from qwix._src.core.conv_general import conv_general_dilated
from qwix._src.core.dot import dot
from qwix._src.core.dot_general import dot_general
from qwix._src.core.einsum import einsum
from qwix._src.core.qarray import QArray, dequantize
from qwix._src.core.qarray import quantize_api as quantize
from qwix._src.core.ragged_dot import ragged_dot, ragged_dot_general
from qwix._src.model import quantize_model
from qwix._src.providers.boxed_param import BoxedParamProvider
from qwix._src.providers.lora import LoraProvider, LoraRule, apply_lora_to_model
from qwix._src.providers.ptq import PtqProvider, quantize_params
from qwix._src.providers.qt import QtProvider, QtRule
from qwix._src.qconfig import QuantizationProvider, QuantizationRule, QuantizationWarning
from qwix._src.summary import summarize
from qwix._src.utils.checkpoint_util import process_prequantized_params, restore_quantization_rules
from qwix._src.utils.flax_util import QuantStat
from qwix.applying import apply_recipe
from qwix.cpu.optimize import optimize_for_inference
from qwix.version import __version__ as __version__

__all__ = [
    "BoxedParamProvider",
    "LoraProvider",
    "LoraRule",
    "PtqProvider",
    "QArray",
    "QtProvider",
    "QtRule",
    "QuantStat",
    "QuantizationProvider",
    "QuantizationRule",
    "QuantizationWarning",
    "add_adapter",
    "apply_lora_to_model",
    "apply_recipe",
    "conv_general_dilated",
    "dequantize",
    "dot",
    "dot_general",
    "einsum",
    "init_lora_params",
    "lora_params",
    "merge_lora",
    "optimize_for_inference",
    "process_prequantized_params",
    "quantize",
    "quantize_model",
    "quantize_params",
    "ragged_dot",
    "ragged_dot_general",
    "restore_quantization_rules",
    "set_adapter",
    "summarize",
]
