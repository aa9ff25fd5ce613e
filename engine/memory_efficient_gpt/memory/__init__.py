"""What a model will take in memory, before any weight is read.

Public names are imported on first use, so that naming an estimate's type never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from memory_efficient_gpt.memory.estimation import estimate as estimate
    from memory_efficient_gpt.memory.estimation import estimate_config as estimate_config
    from memory_efficient_gpt.memory.figures import MemoryEstimate as MemoryEstimate
    from memory_efficient_gpt.memory.workspace import SERVER_BYTES as SERVER_BYTES

_PACKAGE: Final = "memory_efficient_gpt"
_HOMES: Final = {
    "MemoryEstimate": "memory.figures",
    "SERVER_BYTES": "memory.workspace",
    "estimate": "memory.estimation",
    "estimate_config": "memory.estimation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{_PACKAGE}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
