"""Quantized weights: schemes, how codes are chosen, modules that compute with them, files.

Public names are imported on first use, so that reading a scheme's name never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from memory_efficient_gpt.quantized_model import QuantizedModel as QuantizedModel

_PACKAGE: Final = "memory_efficient_gpt"
_HOMES: Final = {
    "MixedPlan": "quantization.budget",
    "QuantizationReport": "quantization.model",
    "QuantizedWeight": "quantization.storage",
    "QuantizedModel": "quantized_model",
    "Quantizer": "quantization.sensitivity",
    "Reference": "quantization.sensitivity",
    "Scheme": "quantization.scheme",
    "choose_schemes": "quantization.budget",
    "find_layers": "quantization.layers",
    "group_layers": "quantization.groups",
    "measure": "quantization.sensitivity",
    "parse_scheme": "quantization.scheme",
    "quantize_model": "quantization.model",
    "quantize_weight": "quantization.rounding",
    "register_format": "quantization.checkpoint",
    "save_quantized": "quantization.checkpoint",
    "second_moments": "quantization.calibration",
    "self_generated": "quantization.calibration",
    "split_text": "quantization.calibration",
    "uniform_plan": "quantization.plans",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{_PACKAGE}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
