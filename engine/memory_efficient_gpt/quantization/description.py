"""The `quantization_config` of this library's folders, as it was read from config.json.

Purpose: check it before anything relies on it.
Does not know: the model it belongs to, how modules are made.
Invariant: what is damaged is refused by the file's and the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.quantization.scheme import Scheme, parse_scheme

METHOD: Final = "megpt"
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Description:
    """modules: scheme of each; shared: module -> whose weight it uses; reordered: those of reordered.py."""

    modules: Mapping[str, Scheme]
    shared: Mapping[str, str]
    reordered: frozenset[str]


def read_description(settings: Mapping[str, Any], folder: str) -> Description:
    """Check `settings`; `folder` is for people. Raises CheckpointError."""
    where = f"{PurePath(folder) / 'config.json'}: quantization_config"
    version = settings.get("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointError(f"{where}.version is {version!r}, not a whole number. Save the folder again.")
    if version > VERSION:
        raise CheckpointError(
            f"{where} has version {version} of the quantized format, this release reads up to {VERSION}. "
            "Update memory-efficient-gpt."
        )
    modules = _schemes(settings.get("modules"), f"{where}.modules")
    shared = settings.get("shared") or {}
    if not isinstance(shared, Mapping) or any(
        name not in modules or not isinstance(owner, str) or owner not in modules or owner == name
        for name, owner in shared.items()
    ):
        raise CheckpointError(
            f"{where}.shared must say for quantized modules which other one's weight they use, got "
            f"{shared!r}. Save the folder again."
        )
    reordered = settings.get("reordered") or []
    if not isinstance(reordered, list | tuple) or any(name not in modules for name in reordered):
        raise CheckpointError(
            f"{where}.reordered must list quantized modules, got {reordered!r}. Save the folder again."
        )
    return Description(modules, dict(shared), frozenset(reordered))


def _schemes(modules: object, where: str) -> dict[str, Scheme]:
    if not isinstance(modules, Mapping):
        raise CheckpointError(
            f"{where} must map names of modules to schemes, got {modules!r}. Save the folder again."
        )
    schemes: dict[str, Scheme] = {}
    for name, scheme in modules.items():
        if not isinstance(scheme, str):
            raise CheckpointError(
                f"{where}[{name!r}] must be a scheme's name, got {scheme!r}. Save the folder again."
            )
        try:
            schemes[name] = parse_scheme(scheme, stored=True)
        except ConfigError as error:
            raise CheckpointError(f"{where}[{name!r}]: {error.message}") from error
        if schemes[name].kind not in ("int", "fp8"):
            raise CheckpointError(f"{where}[{name!r}]: {scheme} is no scheme of this library's folders.")
    return schemes
