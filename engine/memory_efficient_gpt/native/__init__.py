"""C++ kernels for the CPU, compiled on first use; `load_kernels()` gives them or the reason why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_efficient_gpt.native.build import Unavailable
    from memory_efficient_gpt.native.ops import Kernels, load_kernels

__all__ = ["Kernels", "Unavailable", "load_kernels"]


def __getattr__(name: str) -> Any:
    if name == "Unavailable":
        from memory_efficient_gpt.native import build

        return build.Unavailable
    if name in __all__:
        from memory_efficient_gpt.native import ops

        return getattr(ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
