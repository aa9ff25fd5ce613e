"""The config groups of compressed-tensors: which layer has which scheme.

Purpose: parse `config_groups` and `ignore`, find the group of a layer, refuse schemes we do not have.
Does not know: tensors' contents, models.
Invariant: the most specific target decides: a module's name before a pattern before a class.

    "config_groups": {"group_0": {"targets": ["Linear", "re:.*q_proj", "model.layers.0.mlp.up_proj"],
                                  "weights": {"num_bits": 4, "type": "int", "symmetric": true,
                                              "strategy": "group", "group_size": 128},
                                  "input_activations": null, "format": "pack-quantized"}},
    "ignore": ["lm_head"], "format": "pack-quantized"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt.quantization.foreign.formats import Settings, setting, unsupported
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors

TITLE: Final = "compressed-tensors"
_PATTERN: Final = "re:"
_FORMATS: Final = (
    "dense", "pack-quantized", "naive-quantized", "int-quantized", "float-quantized", "mixed-precision",
)  # fmt: skip
_INTEGER_BITS: Final = (2, 4, 8)
_STRATEGIES: Final = {"int": ("tensor", "channel", "group"), "float": ("tensor", "channel")}


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How a weight is quantized. per_tensor: one scale for all; group_size: None is one scale a row."""

    num_bits: int
    is_float: bool
    symmetric: bool
    per_tensor: bool
    group_size: int | None

    @classmethod
    def parse(cls, name: str, weights: Mapping[str, Any]) -> Self:
        """From a group's "weights". Raises UnsupportedModelError naming what is not supported."""
        where = f"config_groups.{name}.weights."
        kind = setting(weights, "type", str, "int")
        bits = setting(weights, "num_bits", int, 8)
        size = setting(weights, "group_size", int)
        strategy = setting(weights, "strategy", str) or _implied_strategy(size)
        if kind == "int" and bits not in _INTEGER_BITS:
            raise unsupported(TITLE, where + "num_bits", bits, "Supported are 2, 4 and 8 for integers.")
        if kind == "float" and bits != 8:
            raise unsupported(TITLE, where + "num_bits", bits, "Supported is 8 (e4m3) for floats.")
        if strategy not in _STRATEGIES.get(kind, ()):
            remedy = f"Supported are {', '.join(_STRATEGIES.get(kind, ('types int and float',)))} for {kind}."
            raise unsupported(TITLE, where + "strategy", strategy, remedy)
        if weights.get("dynamic"):
            raise unsupported(TITLE, where + "dynamic", weights["dynamic"], "Supported is false.")
        if strategy == "group" and (size is None or size <= 0):
            raise CheckpointError(f"config.json: {where}group_size is {size}, must be positive for groups.")
        symmetric = setting(weights, "symmetric", bool, True)
        if kind == "float" and not symmetric:
            raise unsupported(TITLE, where + "symmetric", symmetric, "Supported is true for floats.")
        return cls(
            bits, kind == "float", symmetric, strategy == "tensor", size if strategy == "group" else None
        )


@dataclass(frozen=True, slots=True)
class ConfigGroups:
    """All groups of a checkpoint, as (target, scheme), and what users should know of them."""

    targets: tuple[tuple[str, WeightScheme], ...]
    notes: tuple[str, ...]

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        """Raises CheckpointError or UnsupportedModelError naming the group's field."""
        _check_format("format", settings.get("format"))
        targets: list[tuple[str, WeightScheme]] = []
        notes: list[str] = []
        for name, group in setting(settings, "config_groups", dict, {}).items():
            if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
                raise CheckpointError(
                    f"config.json: config_groups.{name} is {group!r}, must be an object with targets."
                )
            _check_format(f"config_groups.{name}.format", group.get("format"))
            if isinstance(weights := group.get("weights"), dict):
                scheme = WeightScheme.parse(name, weights)
                targets += [(_checked_target(name, target), scheme) for target in group["targets"]]
            notes += _notes_on_activations(group)
        if settings.get("kv_cache_scheme"):
            notes.append("the checkpoint's KV cache scales are not used: kv_cache_dtype decides")
        return cls(tuple(targets), tuple(dict.fromkeys(notes)))

    def scheme_of(self, tensors: LayerTensors, class_name: str) -> WeightScheme:
        """The scheme of a layer that has quantized tensors. Raises CheckpointError if no target is it."""
        by_name = [scheme for target, scheme in self.targets if target == tensors.name]
        by_pattern = [scheme for target, scheme in self.targets if _matches(target, tensors.name)]
        by_class = [scheme for target, scheme in self.targets if target == class_name]
        for scheme in (*by_name, *by_pattern, *by_class):
            return scheme
        raise tensors.error(tensors.marker, "is quantized, and no target of config_groups matches the layer")


def _implied_strategy(size: int | None) -> str:
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _check_format(name: str, value: object) -> None:
    if value is not None and value not in _FORMATS:
        raise unsupported(TITLE, name, value, f"Supported are {', '.join(_FORMATS)}.")


def _checked_target(group: str, target: object) -> str:
    """Raises CheckpointError for what is neither a name nor a pattern."""
    try:
        if isinstance(target, str):
            re.compile(target.removeprefix(_PATTERN))
            return target
        problem = "is not a text"
    except re.error as error:
        problem = f"is not a pattern: {error}"
    raise CheckpointError(f"config.json: target {target!r} of config_groups.{group} {problem}.")


def _matches(pattern: str, module_name: str) -> bool:
    return pattern.startswith(_PATTERN) and re.match(pattern.removeprefix(_PATTERN), module_name) is not None


def _notes_on_activations(group: Mapping[str, Any]) -> list[str]:
    """What users should know of a group whose activations the checkpoint quantizes."""
    names = ("input_activations", "output_activations")
    found = {name: args for name in names if isinstance(args := group.get(name), dict)}
    return [
        f"the checkpoint's {name} ({args.get('num_bits')}-bit {args.get('type', 'int')}) are not quantized "
        "its way: weights load, activations are computed as for any quantized model"
        for name, args in found.items()
    ]
