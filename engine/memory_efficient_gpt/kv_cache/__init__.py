"""The KV cache: which block belongs to whom, the tensors, and their exact geometry.

Public names are imported on first use, so that allocating blocks never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from memory_efficient_gpt.quantized_model import (
        use_paged_kv_cache_if_available as use_paged_kv_cache_if_available,
    )

_PACKAGE: Final = "memory_efficient_gpt"
_HOMES: Final = {
    "BlockAllocator": "kv_cache.blocks",
    "KVPool": "kv_cache.pool",
    "LayerCache": "kv_cache.pool",
    "LayerKV": "kv_cache.geometry",
    "probe_geometry": "kv_cache.geometry",
    "use_paged_kv_cache_if_available": "quantized_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{_PACKAGE}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
