"""Where settings are written: the YAML file and the environment, read as they are.

Purpose: names and raw values, and a sentence for whatever can't be read.
Does not know: what values are right; which source wins.
Invariant: nothing that is written there is dropped in silence: an unknown name or a name that stands twice is
a problem.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ENV_PREFIX: Final = "MEGPT_"
CONFIG_FILE_ENV: Final = "MEGPT_CONFIG"
NO_SETTINGS: Final = frozenset({CONFIG_FILE_ENV, "MEGPT_CACHE_DIR", "MEGPT_NATIVE_ISA"})
"""Variables with the prefix that others read: the settings file's path; the native kernels' build."""

_MERGE_TAG: Final = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML says that keys are unique, PyYAML takes the last one: an operator would never know."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Also note keys that stand twice. Merged keys (`<<`), which may be overridden, are not in it yet."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            line = key.start_mark.line + 1
            if (name := (key.tag, key.value)) in first:
                where = f"lines {first[name]} and {line}" if first[name] != line else f"line {line}"
                self.repeated.append(f"{key.value} stands twice ({where}). Keep one.")
            first.setdefault(name, line)
        return node


def read_yaml(path: Path, known: Collection[str], problems: list[str]) -> dict[str, Any] | None:
    """The settings of a file; None if there is no telling what it sets."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        raw = loader.get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        problems.append(f"config file {path} can't be read: {' '.join(str(error).split())}")
        return None
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        problems.append(f"config file {path} must hold a mapping of settings, got {type(raw).__name__}.")
        return None
    problems += [f"config file {path}: {sentence}" for sentence in loader.repeated]
    problems += [f"{name} ({path}): there is no such setting." for name in raw if name not in known]
    return {name: value for name, value in raw.items() if name in known}


def read_environ(
    environ: Mapping[str, str], known: Collection[str], problems: list[str]
) -> dict[str, str | None]:
    """The settings among environment variables."""
    values: dict[str, str | None] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in NO_SETTINGS:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in known:
            problems.append(f"{variable} (environment): there is no such setting.")
        elif value or name == "api_keys":
            values[name] = None if value == "null" else value
    return values
