"""The stacked weights of routed experts, quantized.

Purpose: stand in for a 3-D parameter of an experts module: `stack[expert]` is that expert's weight.
Does not know: how experts are routed or activated; the module's own code does that.
Invariant: every expert is quantized by itself; indexing gives the dequantized weight in the dtype it had.

transformers writes an experts module as a loop over experts that indexes its parameters; its faster
implementations take the whole stack at once and must be switched off (see model.py).

Letters: E experts, N and K the two dimensions of one expert's weight, K being what groups run along.
"""

from __future__ import annotations

import torch
from torch import nn

from memory_efficient_gpt.native.expert_stacks import NativeStack
from memory_efficient_gpt.native.packed_weight import BLOCK, PackedWeight
from memory_efficient_gpt.quantization.modules import QuantizedModule, dequantize_packed
from memory_efficient_gpt.quantization.storage import QuantizedWeight


class QuantizedStack(QuantizedModule):
    """`[E, N, K]` as one quantized weight of E * N outputs."""

    def __init__(self, weight: QuantizedWeight, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.num_inputs, self.compute_dtype = weight.scheme, weight.num_inputs, dtype
        self.packed_weight = self.native_kernels = None
        self.num_experts = num_experts
        self.set_weight(weight)

    @property
    def shape(self) -> torch.Size:
        """`[E, N, K]`."""
        return torch.Size((self.num_experts, self.num_outputs // self.num_experts, self.num_inputs))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that indexing gives."""
        return self.compute_dtype

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """One expert's weight `[N, K]`."""
        size = self.num_outputs // self.num_experts
        first = int(expert) * size
        packed = self.packed_weight
        if packed is not None:
            rows = torch.arange(first, first + size, device=packed.codes.device)
            return dequantize_packed(packed, rows, self.compute_dtype)
        weight = self.quantized_weight
        rows = torch.arange(first, first + size, device=weight.codes.device)
        return weight.select(rows).dequantize(self.compute_dtype)

    @property
    def can_be_packed(self) -> bool:
        """Whether every expert begins a block of the native layout."""
        return self.scheme.kind == "int" and self.shape[1] % BLOCK == 0

    def native_stack(self) -> NativeStack | None:
        """As the native library takes it; None where it is not packed for it."""
        packed = self.packed_weight
        return NativeStack(packed, self.num_experts) if isinstance(packed, PackedWeight) else None

    def __len__(self) -> int:
        return self.num_experts


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own 3-D parameters: weights of experts that no linear layer holds.

    A one-dimensional convolution's weight has three dimensions, too; it is tiny, and stays as it is.
    """
    if isinstance(module, nn.Conv1d):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    }


def hold_stack(module: nn.Module, name: str, weight: QuantizedWeight) -> QuantizedStack:
    """Put a quantized stack in place of the module's parameter `name`."""
    parameter = module.get_parameter(name)
    stack = QuantizedStack(weight, parameter.shape[0], parameter.dtype)
    delattr(module, name)
    module.add_module(name, stack)
    return stack
