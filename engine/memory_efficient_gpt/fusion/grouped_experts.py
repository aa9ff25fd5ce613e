"""Routed experts that compute by grouped Triton kernels, as a class to mix into their own one.

Purpose: what an experts module looks like, which settings of the kernels might fit it, its `forward` by them.
Does not know: how a kernel is judged (apply.py), how tokens are sorted or multiplied (triton_kernels).
Invariant: parameters stay where they are; with gradients enabled, on another device or in another dtype, the
module computes with its own class's `forward`. Triton is imported only where it runs.

Letters: T tokens, k experts of a token, E experts, D hidden size, I inner size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.fusion.structures import (
    Kind,
    activation_settings,
    device_of,
    draw,
    own_parameter,
    stack_of,
)
from memory_efficient_gpt.native.layers import NativeLayer
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.triton_kernels.expert_tiles import ROW_CLASSES, least_tokens
from memory_efficient_gpt.triton_kernels.packing import TritonWeight

if TYPE_CHECKING:
    from memory_efficient_gpt.triton_kernels.experts import Stack

_STACKS: Final = ("gate_up_proj", "down_proj")
_BIASES: Final = tuple(f"{name}_bias" for name in _STACKS)
_LIMIT_NAMES: Final = ("limit", "swiglu_limit")
_ALPHA_NAMES: Final = ("alpha", "swiglu_alpha")
_TRIED_CHOICES: Final = 8


class GroupedExperts(NativeLayer):
    """Routed gated MLPs on stacks gate_up_proj `[E, 2 I, D]` and down_proj `[E, D, I]`, floats or packed.

    Where the settings say transposed, the last two dimensions are the other way round. Biases `[E, 2 I]` and
    `[E, D]`, if there are any, have the stacks' names and `_bias`.
    """

    gate_up_proj: torch.Tensor | QuantizedStack
    down_proj: torch.Tensor | QuantizedStack

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x `[T, D]`, index and weights `[T, k]` to `[T, D]`; a token's experts are summed in float32."""
        if x.dim() != 2 or not self.can_compute(x, self.down_proj):
            return cast(torch.Tensor, super().forward(x, index, weights))
        from memory_efficient_gpt.triton_kernels.experts import Gate, routed_mlp

        settings = dict(self.native_settings)
        transposed = settings.pop("transposed")
        gate_up, down = (self._stack(name, transposed=transposed) for name in _STACKS)
        return routed_mlp(x, index, weights, gate_up, down, Gate(**settings))

    def _stack(self, name: str, *, transposed: bool) -> Stack:
        from memory_efficient_gpt.triton_kernels.experts import Stack

        held, bias = stack_of(self, name), own_parameter(self, f"{name}_bias")
        assert held is not None, "recognised experts have both stacks"
        if isinstance(held, QuantizedStack):
            return Stack(cast(TritonWeight, held.packed_weight), held.num_experts, bias)
        return Stack(held.transpose(1, 2) if transposed else held, held.shape[0], bias)


def is_grouped_experts(module: nn.Module) -> object | None:
    """Shapes of stacked experts whose weights are floats or packed for Triton; None for other structures."""
    merged, down = (stack_of(module, name) for name in _STACKS)
    if merged is None or down is None or len(merged.shape) != 3 or len(down.shape) != 3:
        return None
    if merged.dtype is not down.dtype or not _layouts(merged, down):
        return None
    if not all(_can_be_multiplied(stack) for stack in (merged, down)):
        return None
    names = {name for name, _ in module.named_parameters()} - set(_STACKS)
    if names not in (set(), set(_BIASES)):
        return None
    kinds = tuple(isinstance(stack, QuantizedStack) for stack in (merged, down))
    return (*merged.shape, *down.shape, down.dtype, *kinds, len(names), *_constants(module))


def _can_be_multiplied(stack: torch.Tensor | QuantizedStack) -> bool:
    return not isinstance(stack, QuantizedStack) or isinstance(stack.packed_weight, TritonWeight)


def _layouts(merged: torch.Tensor | QuantizedStack, down: torch.Tensor | QuantizedStack) -> list[bool]:
    """Whether inputs come before outputs: what shapes allow; both of it for experts of equal sides."""
    experts = merged.shape[0]
    found = []
    for transposed in (False, True):
        inner, hidden = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
        wanted = (experts, hidden, 2 * inner) if transposed else (experts, 2 * inner, hidden)
        quantized = isinstance(merged, QuantizedStack) or isinstance(down, QuantizedStack)
        if tuple(merged.shape) == wanted and down.shape[0] == experts and not (transposed and quantized):
            found.append(transposed)
    return found


def _constants(module: nn.Module) -> tuple[float, float]:
    """The limit and the alpha that its gates have, 0 for none."""
    found = []
    for names in (_LIMIT_NAMES, _ALPHA_NAMES):
        values = (getattr(module, name, None) for name in names)
        found.append(next((float(v) for v in values if isinstance(v, int | float) and v > 0), 0.0))
    return found[0], found[1]


def gate_settings(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What the module's gates might be; transformers' own marks of its layout are taken where it has them."""
    limit, alpha = _constants(module)
    gates: list[dict[str, Any]] = []
    for known in activation_settings(module):
        gates += [{**known, "limit": value, "alpha": 0.0} for value in {0.0, limit}]
    if limit and alpha:
        gates.append({"activation": "sigmoid", "limit": limit, "alpha": alpha})
    concatenated, marked = getattr(module, "is_concatenated", None), getattr(module, "is_transposed", None)
    stacks = [cast("torch.Tensor | QuantizedStack", stack_of(module, name)) for name in _STACKS]
    for transposed in _layouts(*stacks):
        if marked is not None and marked is not transposed:
            continue
        for interleaved in (False, True) if concatenated is None else (not concatenated,):
            yield from ({**gate, "interleaved": interleaved, "transposed": transposed} for gate in gates)


def routed_batches(module: nn.Module) -> Iterable[tuple[torch.Tensor, ...]]:
    """Tokens and their experts, so many that each size of tiles is tried; large numbers too, for clamps."""
    stack, other = (cast("torch.Tensor | QuantizedStack", stack_of(module, name)) for name in _STACKS)
    experts = stack.shape[0]
    hidden = stack.shape[1] if _layouts(stack, other)[0] else stack.shape[2]
    like = torch.empty(0, dtype=stack.dtype, device=device_of(module))
    choices = min(_TRIED_CHOICES, experts)
    counts = [1, 5, *(least_tokens(rows, choices, experts) for rows in ROW_CLASSES[1:])]
    for tokens, scale in zip(counts, (0.3, 30.0, *(0.3,) * len(counts)), strict=False):
        first = torch.arange(tokens)[:, None] * 3
        index = (first + torch.arange(choices)[None, :]) % experts
        shares = torch.linspace(0.1, 0.9, tokens * choices).view(tokens, choices).to(like)
        yield draw(tokens, hidden, like=like, scale=scale), index.to(like.device), shares


GROUPED_EXPERTS: Final = Kind(
    "experts", GroupedExperts, is_grouped_experts, gate_settings, routed_batches, cuda_only=True
)
