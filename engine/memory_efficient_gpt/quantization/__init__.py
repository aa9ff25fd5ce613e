"""Quantized weights: schemes, how codes are chosen, modules that compute with them, files.

Public names are imported on first use, so that reading a scheme's name never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

_PACKAGE: Final = "memory_efficient_gpt"
_HOMES: Final = {
    "QuantizationReport": "quantization.model",
    "QuantizedWeight": "quantization.storage",
    "Scheme": "quantization.scheme",
    "find_layers": "quantization.layers",
    "parse_scheme": "quantization.scheme",
    "quantize_model": "quantization.model",
    "quantize_weight": "quantization.rounding",
    "register_format": "quantization.checkpoint",
    "save_quantized": "quantization.checkpoint",
    "uniform_plan": "quantization.plans",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{_PACKAGE}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
