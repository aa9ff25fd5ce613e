"""Memory-Efficient GPT: run many language models in little memory.

The library's public names. They are imported on first use, so that importing one torch-free part
never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_efficient_gpt.api import LLM, Completion
    from memory_efficient_gpt.config import EngineConfig
    from memory_efficient_gpt.quantized_model import (
        QuantizedModel,
        use_flash_attention_if_available,
        use_paged_kv_cache_if_available,
    )
    from memory_efficient_gpt.request import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Completion",
    "EngineConfig",
    "QuantizedModel",
    "SamplingParams",
    "__version__",
    "use_flash_attention_if_available",
    "use_paged_kv_cache_if_available",
]

_HOMES = {
    "LLM": "api",
    "Completion": "api",
    "EngineConfig": "config",
    "QuantizedModel": "quantized_model",
    "SamplingParams": "request",
    "use_flash_attention_if_available": "quantized_model",
    "use_paged_kv_cache_if_available": "quantized_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
