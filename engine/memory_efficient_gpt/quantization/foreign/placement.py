"""Where the quantized layers of a checkpoint belong in a model.

Purpose: rename layers as transformers renames their weights, and find the model's weight that each one is.
Does not know: formats, tensors' contents.
Invariant: transformers' own table of renamings decides; a layer that it would convert in a way that codes
cannot follow is refused by name.

Experts that a checkpoint has one by one are stacked by transformers: gate and up of an expert one below the
other, experts in their order. Codes are rows of outputs, so they can be stacked the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.quantization.layers import Layer, find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer of a checkpoint goes.

    module: in the model, the experts' own module for experts. class_name: of the module it was made from.
    layer: None if the model's module cannot hold codes. expert, part: of a stack, part 1 is below part 0.
    """

    module: str
    class_name: str
    shape: tuple[int, int]
    layer: Layer | None
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


class ModelNames:
    """A model's weights under a checkpoint's names. `model` may be on meta."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._state: dict[str, Any] = model.state_dict()
        self._modules = dict(model.named_modules())
        self._layers = {name: layer for layer in find_layers(model) for name in layer.names}
        self._prefix = model.base_model_prefix
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def parameter(self, name: str) -> str | None:
        """The model's name of a checkpoint's tensor; None if the model has no such tensor."""
        renamed, _ = self._rename(name)
        return renamed if renamed in self._state else None

    def place(self, layer_name: str) -> Place | None:
        """Where a checkpoint's layer goes; None if the model has no such layer.

        Raises UnsupportedModelError for a layer whose weight transformers would rearrange.
        """
        renamed, pattern = self._rename(f"{layer_name}.weight")
        if renamed not in self._state:
            return None
        if pattern is not None:
            return self._place_expert(layer_name, renamed, pattern)
        module = renamed.removesuffix(".weight")
        layer = self._layers.get(module)
        n, k = layer.shape if layer is not None else self._state[renamed].shape
        return Place(module, _plain_class(self._modules[module]), (n, k), layer)

    def tied(self) -> Iterable[Layer]:
        """Weights that several modules share."""
        return {id(layer): layer for layer in self._layers.values() if len(layer.names) > 1}.values()

    def _rename(self, name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if renamed not in self._state and name in self._state:
            return name, None
        return renamed, pattern

    def _place_expert(self, layer_name: str, renamed: str, pattern: str) -> Place:
        """A layer that becomes a part of a stack of experts."""
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        layer, indices = self._layers.get(renamed), re.findall(r"\.(\d+)\.", layer_name)
        if layer is None or layer.role != "experts" or not indices or not _stacks(converter):
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            raise UnsupportedModelError(
                f"quantized layer {layer_name}: transformers makes {renamed} of it by {operations}, which is "
                "not supported for quantized weights. Give a checkpoint that is not quantized."
            )
        experts, outputs, inputs = self._state[renamed].shape
        parts = len(converter.source_patterns)
        expert, part = int(indices[-1]), converter.source_patterns.index(pattern)
        if expert >= experts or outputs % parts:
            raise UnsupportedModelError(
                f"quantized layer {layer_name}: {renamed} has {experts} experts of {outputs} outputs."
            )
        return Place(renamed, "Linear", (outputs // parts, inputs), layer, expert, part, parts)


def _stacks(converter: WeightConverter) -> bool:
    """Whether the converter only stacks experts, and parts of an expert below each other."""
    merge, *rest = converter.operations
    if not isinstance(merge, MergeModulelist) or merge.dim != 0:
        return False
    if len(converter.source_patterns) == 1:
        return not rest
    return len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1


def _plain_class(module: nn.Module) -> str:
    """The class that formats know the module by: torch's own where it is one of its subclasses."""
    for kind in (nn.Linear, nn.Embedding):
        if isinstance(module, kind):
            return kind.__name__
    return type(module).__name__
