"""The HTTP server of Memory-Efficient GPT: an OpenAI-shaped API over worker processes.

Public names are imported on first use, so that importing one part never imports all of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_efficient_gpt_server.app import create_app
    from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
    from memory_efficient_gpt_server.settings import Settings

__all__ = ["ModelCatalog", "ServedModel", "Settings", "create_app"]

_HOMES = {"create_app": "app", "ModelCatalog": "models", "ServedModel": "models", "Settings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
