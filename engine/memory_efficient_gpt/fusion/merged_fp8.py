"""Linear layers of the same input that multiply fp8 by fp8, computed in one product.

Purpose: hold their codes as one tensor and round their input once; the rest is as for layers that are not
quantized (merged_linear.py).
Does not know: which layers of a model belong together, how fp8 is multiplied.
Invariant: a layer's codes are a view of the product's, its own scales and unit stay beside them; dequantized
or saved, it is what it was.

Letters: K inputs, N outputs of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from memory_efficient_gpt.fusion.merged_linear import MergedProduct, become_merged
from memory_efficient_gpt.fusion.structures import own_parameter
from memory_efficient_gpt.quantization.fp8 import fp8_linear, output_scales
from memory_efficient_gpt.quantization.modules import PREFIX, QuantizedLinear, QuantizedModule
from memory_efficient_gpt.quantization.storage import QuantizedWeight

_CODES = PREFIX + "codes"


def fp8_weight_of(layer: nn.Linear) -> QuantizedWeight | None:
    """The layer's weight if it is a plain one that multiplies fp8 by fp8, with a scale for each output."""
    if not isinstance(layer, QuantizedModule) or type(layer).forward is not QuantizedLinear.forward:
        return None
    if type(layer).arrange is not QuantizedModule.arrange or not layer.scheme.dynamic:
        return None
    weight = layer.quantized_weight
    return weight if layer.packed_weight is None and len(weight.scales) == weight.num_outputs else None


class Fp8Product(MergedProduct):
    """Of fp8 weights."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """layers: in the order in which they are called; `fp8_weight_of` gives a weight `[n, K]` for each."""
        weights = [cast(QuantizedWeight, fp8_weight_of(layer)) for layer in layers]
        super().__init__([weight.num_outputs for weight in weights])
        self._deterministic = all(cast(QuantizedModule, layer).deterministic for layer in layers)
        biases = [bias.data for layer in layers if (bias := own_parameter(layer, "bias")) is not None]
        self._bias = torch.cat(biases) if biases else None
        self._scales = torch.cat([output_scales(weight) for weight in weights], dim=1)
        codes = torch.cat([weight.codes.view(torch.uint8) for weight in weights])
        codes = codes.view(torch.float8_e4m3fn)
        unit = torch.ones((), device=codes.device)
        self._weight = QuantizedWeight(
            weights[0].scheme, weights[0].num_inputs, codes, self._scales.view(-1, 1), None, unit
        )
        self._parts = list(codes.split(self._sizes))
        for place, (layer, part) in enumerate(zip(layers, self._parts, strict=True)):
            layer.register_buffer(_CODES, part)
            become_merged(layer, self, place)

    def holds(self, layer: nn.Linear) -> bool:
        """Whether the layer's codes are still the part that it was given."""
        codes = layer._buffers.get(_CODES)
        return any(codes is part for part in self._parts)

    def release(self, layer: nn.Linear) -> None:
        """Codes of its own."""
        codes = layer._buffers[_CODES]
        assert codes is not None, "it holds a part"
        layer.register_buffer(_CODES, codes.clone())

    def _multiply(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        if self.mode == "whole":
            return self._product(x, self._weight, self._bias, self._scales)
        biases = self._bias.split(self._sizes) if self._bias is not None else [None] * self.layers
        parts = []
        for codes, scales, bias in zip(
            self._parts, self._scales.split(self._sizes, dim=1), biases, strict=True
        ):
            weight = QuantizedWeight(
                self._weight.scheme,
                self._weight.num_inputs,
                codes,
                scales.view(-1, 1),
                None,
                self._weight.unit,
            )
            parts.append(self._product(x, weight, bias, scales))
        return torch.cat(parts, dim=-1)

    def _product(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, scales: torch.Tensor
    ) -> torch.Tensor:
        return fp8_linear(x, weight, bias, scales, deterministic=self._deterministic)
