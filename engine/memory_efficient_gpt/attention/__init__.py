"""Attention over the paged KV cache: one interface to the models, one backend for each kind of device."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from memory_efficient_gpt.quantized_model import (
        use_flash_attention_if_available as use_flash_attention_if_available,
    )

_PACKAGE: Final = "memory_efficient_gpt"
_HOMES: Final = {
    "ATTENTION_NAME": "attention.interface",
    "AttentionBackend": "attention.context",
    "AttentionOptions": "attention.context",
    "LayerCache": "attention.context",
    "StepContext": "attention.context",
    "TorchBackend": "attention.torch_backend",
    "current_context": "attention.context",
    "forward_packed": "attention.interface",
    "prepare_model": "attention.model_setup",
    "register": "attention.interface",
    "step_context": "attention.context",
    "use_flash_attention_if_available": "quantized_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{_PACKAGE}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
