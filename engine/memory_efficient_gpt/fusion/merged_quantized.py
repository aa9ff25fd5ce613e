"""Quantized linear layers of the same input, computed in one product by the Triton kernels.

Purpose: hold their codes as one tensor; the rest is as for layers that are not quantized (merged_linear.py).
Does not know: which layers of a model belong together, the kernels.
Invariant: a layer's codes are a view of the product's; dequantized or saved, it is what it was. The product
has scales in a common unit, a power of two, so that its numbers are the same; a layer of another unit keeps
its own scales beside them.

Letters: K inputs, N outputs of all layers together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, cast

import torch
from torch import nn

from memory_efficient_gpt.fusion.merged_linear import MergedProduct, become_merged
from memory_efficient_gpt.fusion.structures import own_parameter
from memory_efficient_gpt.quantization.modules import QuantizedLinear, QuantizedModule
from memory_efficient_gpt.quantization.triton_weights import multiply_packed
from memory_efficient_gpt.triton_kernels.packing import OUTPUT_MULTIPLE, TritonWeight, contiguous

_MOST_UNITS: Final = 2.0**6
"""Largest ratio of two units: scales are at least 2^-4 in theirs, and float16's are exact down to 2^-14."""


def packed_of(layer: nn.Linear) -> TritonWeight | None:
    """The layer's weight if it is a plain quantized one on the Triton kernels."""
    if not isinstance(layer, QuantizedModule) or type(layer).forward is not QuantizedLinear.forward:
        return None
    if type(layer).arrange is not QuantizedModule.arrange:  # such as inputs in another order
        return None
    packed = layer.packed_weight
    return packed if isinstance(packed, TritonWeight) else None


def quantized_obstacle(weights: Sequence[TritonWeight]) -> str | None:
    """Why these can't be one product, or None."""
    first = weights[0]
    kinds = {
        (w.code, w.group_size, w.num_inputs, w.offsets is None, w.codes.device, w.deterministic)
        for w in weights
    }
    if len(kinds) > 1:
        return "quantized differently"
    if any(w.num_outputs % OUTPUT_MULTIPLE for w in weights):
        return f"quantized, and their outputs are no multiple of {OUTPUT_MULTIPLE}"
    units = [w.unit for w in weights]
    if max(units) > _MOST_UNITS * min(units) or min(units) <= 0 or first.num_inputs == 0:
        return "quantized, and of too different sizes"
    return None


class TritonProduct(MergedProduct):
    """Of weights in the Triton kernels' layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """layers: in the order in which they are called, none of which `quantized_obstacle` names."""
        weights = [cast(TritonWeight, packed_of(layer)) for layer in layers]
        super().__init__([weight.num_outputs for weight in weights])
        self._weight = _joined(weights)
        biases = [bias.data for layer in layers if (bias := own_parameter(layer, "bias")) is not None]
        self._bias = torch.cat(biases) if biases else None
        self._parts = _parts_of(self._weight, weights, self._sizes)
        for place, (layer, part) in enumerate(zip(layers, self._parts, strict=True)):
            cast(QuantizedModule, layer).packed_weight = part
            become_merged(layer, self, place)

    def holds(self, layer: nn.Linear) -> bool:
        """Whether the layer's weight is still the part that it was given."""
        packed = cast(QuantizedModule, layer).packed_weight
        return any(packed is part for part in self._parts)

    def release(self, layer: nn.Linear) -> None:
        """Codes of its own."""
        module = cast(QuantizedModule, layer)
        packed = cast(TritonWeight, module.packed_weight)
        module.packed_weight = contiguous(packed)

    def _multiply(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        if self.mode == "whole":
            return multiply_packed(x, self._weight, self._bias)
        biases = self._bias.split(self._sizes) if self._bias is not None else [None] * self.layers
        parts = [multiply_packed(x, w, b) for w, b in zip(self._parts, biases, strict=True)]
        return torch.cat(parts, dim=-1)


def _parts_of(
    whole: TritonWeight, weights: Sequence[TritonWeight], sizes: Sequence[int]
) -> list[TritonWeight]:
    """Each weight as a part of the whole: its codes; where the unit is the same, mostly the rest, too."""
    parts = []
    ends = itertools.accumulate(sizes)
    for weight, size, end in zip(weights, sizes, ends, strict=True):
        rows = slice(end - size, end)
        part = replace(weight, codes=whole.codes[:, rows])
        if weight.unit == whole.unit:
            offsets = None if whole.offsets is None else whole.offsets[:, rows]
            part = replace(part, scales=whole.scales[:, rows], offsets=offsets)
        # of one span, a part's codes are in one piece, by which kernels take the rest to be so, too
        parts.append(contiguous(part) if part.codes.is_contiguous() else part)
    return parts


def _joined(weights: Sequence[TritonWeight]) -> TritonWeight:
    """One weight of all outputs, in the largest unit."""
    unit = max(weight.unit for weight in weights)
    offsets = None
    if weights[0].offsets is not None:
        offsets = torch.cat([_in_unit(cast(torch.Tensor, w.offsets), w.unit / unit) for w in weights], dim=1)
    return replace(
        weights[0],
        codes=torch.cat([weight.codes for weight in weights], dim=1),
        scales=torch.cat([_in_unit(weight.scales, weight.unit / unit) for weight in weights], dim=1),
        offsets=offsets,
        unit=unit,
        num_outputs=sum(weight.num_outputs for weight in weights),
    )


def _in_unit(numbers: torch.Tensor, factor: float) -> torch.Tensor:
    """float16 numbers times a power of two."""
    return numbers if factor == 1.0 else (numbers.float() * factor).to(numbers.dtype)
