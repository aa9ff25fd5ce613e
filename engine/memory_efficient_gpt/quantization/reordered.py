"""Linear layers whose quantized weight has its inputs in another order.

Purpose: compute with groups of inputs that are not contiguous ("activation order"): columns of codes are
sorted by group, activations are gathered in the same order.
Does not know: how codes and the order were chosen.
Invariant: `weight` and `dequantize` have the model's order of inputs; only the codes are sorted.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from memory_efficient_gpt.quantization.modules import PREFIX, QuantizedLinear, hold
from memory_efficient_gpt.quantization.storage import QuantizedWeight

ORDER_NAME: Final = PREFIX + "order"


class ReorderedLinear(QuantizedLinear):
    """As QuantizedLinear; column j of its codes is of input `weight_order[j]`, `[K] int32`."""

    weight_order: torch.Tensor

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` in the order of the codes."""
        return x.index_select(-1, self.weight_order)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[N, K]`, its inputs in the model's order."""
        return super().dequantize(dtype).index_select(1, self.weight_order.argsort())


def hold_reordered(module: nn.Module, weight: QuantizedWeight, order: torch.Tensor) -> ReorderedLinear:
    """As `hold`, for a linear layer. order: `[K]`, the input that each column of `weight` is of."""
    held = hold(module, ReorderedLinear, weight)
    assert isinstance(held, ReorderedLinear), "hold makes a subclass of the kind"
    held.register_buffer(ORDER_NAME, order.int())
    return held
