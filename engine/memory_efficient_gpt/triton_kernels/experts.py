"""Routed experts on a CUDA device: tokens sorted by expert, two grouped products, a weighted sum.

Purpose: launch the kernels of expert_routing.py, expert_kernels.py and expert_quantized.py.
Does not know: models, modules, how experts are chosen.
Invariant: no host synchronization, and every shape follows from the number of tokens, so launches can be
captured in a CUDA graph once they ran before. Tiles follow from the number of tokens, too: a row's result
depends on that number, and on nothing else of what is beside it.

Letters: T tokens, k experts of a token, E experts, D hidden size, I inner size, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton

from memory_efficient_gpt.triton_kernels.availability import can_overlap
from memory_efficient_gpt.triton_kernels.expert_kernels import float_experts_kernel
from memory_efficient_gpt.triton_kernels.expert_quantized import quantized_experts_kernel
from memory_efficient_gpt.triton_kernels.expert_routing import combine_kernel, route_kernel
from memory_efficient_gpt.triton_kernels.expert_tiles import (
    ASYMMETRIC_TILES,
    FLOAT_TILES,
    FULL_TILES,
    QUANTIZED_TILES,
    ExpertTile,
    most_tiles,
    row_class,
)
from memory_efficient_gpt.triton_kernels.packing import SPAN, TritonWeight

ACTIVATIONS: Final = ("silu", "gelu_tanh", "gelu", "sigmoid")
_COMBINE_BLOCK: Final = 1024
_ROUTE_BLOCK: Final = 1024
_LEAST_BINS: Final = 128


@dataclass(frozen=True, slots=True)
class Stack:
    """The weights `[E, N, K]` of E experts, of any strides, or quantized as one weight of E * N outputs.

    bias: `[E, N]`, contiguous, or None.
    """

    weight: torch.Tensor | TritonWeight
    num_experts: int
    bias: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        """N."""
        weight = self.weight
        if isinstance(weight, TritonWeight):
            return weight.num_outputs // self.num_experts
        return weight.shape[1]

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.weight.num_inputs if isinstance(self.weight, TritonWeight) else self.weight.shape[2]


@dataclass(frozen=True, slots=True)
class Gate:
    """What gate and its partner become: activation(gate) * partner.

    activation: "silu", "gelu", "gelu_tanh", or "sigmoid": gate * sigmoid(alpha * gate), the partner plus 1.
    limit: where above 0, gates are at most that, partners between it and its negative. interleaved: output
    2 i of the first product is gate i and 2 i + 1 its partner, instead of all gates first.
    """

    activation: str = "silu"
    interleaved: bool = False
    limit: float = 0.0
    alpha: float = 0.0


@dataclass(frozen=True, slots=True)
class _Routes:
    """Which rows go together. order and tiles: of route_kernel; unused where direct."""

    index: torch.Tensor
    order: torch.Tensor
    tile_experts: torch.Tensor
    tile_starts: torch.Tensor
    tile_ends: torch.Tensor
    num_experts: int
    num_tiles: int
    direct: bool

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As kernels take them."""
        return (self.index, self.order, self.tile_experts, self.tile_starts, self.tile_ends)


def routed_mlp(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    gate: Gate,
    *,
    tiles: tuple[ExpertTile, ExpertTile] | None = None,
) -> torch.Tensor:
    """Sum over k of weights times down(gated(gate_up(x))) of a token's experts: x `[T, D]` to `[T, D]`.

    index `[T, k]` int64: experts, E for none; weights `[T, k]`. gate_up `[E, 2 I, D]`, down `[E, D, I]`.
    tiles: what to use instead of the table's choice for both products, with equal rows (benchmarks, tests).
    Raises ValueError for another activation, quantized experts in float32, and tiles that differ in rows.
    """
    tokens, choices = index.shape
    if gate.activation not in ACTIVATIONS:
        raise ValueError(f"an activation must be of {ACTIVATIONS}; got {gate.activation!r}")
    if tokens == 0:
        return torch.empty_like(x)
    if tiles is None:
        tiles = _tiles(gate_up, down, x.dtype, row_class(tokens, choices, gate_up.num_experts))
    if tiles[0].rows != tiles[1].rows:  # the products share the sorted rows' tiles
        raise ValueError("both products need tiles of equal rows")
    x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
    early = can_overlap(x.device)
    with torch.cuda.device(x.device):
        routes = _route(index, gate_up.num_experts, tiles[0].rows, early)
        inner = x.new_empty((index.numel(), gate_up.num_outputs // 2))
        _multiply(x, gate_up, inner, routes, choices, gate, tiles[0], early)
        rows_out = x.new_empty((index.numel(), down.num_outputs))
        _multiply(inner, down, rows_out, routes, choices, None, tiles[1], early)
        return _combine(rows_out, weights, index, gate_up.num_experts, early)


def _tiles(gate_up: Stack, down: Stack, dtype: torch.dtype, rows: int) -> tuple[ExpertTile, ExpertTile]:
    """Of equal rows, which one stack in floats and one quantized may want differently for few tokens."""
    first, second = _tile(gate_up, dtype, rows), _tile(down, dtype, rows)
    if first.rows != second.rows:
        return _tiles(gate_up, down, dtype, max(first.rows, second.rows))
    return first, second


def _tile(stack: Stack, dtype: torch.dtype, rows: int) -> ExpertTile:
    if isinstance(stack.weight, TritonWeight):
        if dtype is torch.float32:
            raise ValueError("no Triton kernel multiplies quantized experts in float32")
        return QUANTIZED_TILES[rows] if stack.weight.offsets is None else ASYMMETRIC_TILES[rows]
    return FULL_TILES[rows] if dtype is torch.float32 else FLOAT_TILES[rows]


def _route(index: torch.Tensor, num_experts: int, rows: int, early: bool) -> _Routes:
    """One token's choices are tiles already: no two are alike."""
    pairs = index.numel()
    if index.shape[0] == 1:
        return _Routes(index, index, index, index, index, num_experts, pairs, direct=True)
    slots = most_tiles(pairs, num_experts, rows)
    sizes = (pairs, slots, slots, slots)
    order, tile_experts, tile_starts, tile_ends = (
        torch.empty(size, dtype=torch.int32, device=index.device) for size in sizes
    )
    route_kernel[(num_experts,)](
        index, order, tile_experts, tile_starts, tile_ends, pairs, slots, E=num_experts,
        BINS=max(_LEAST_BINS, triton.next_power_of_2(num_experts + 1)), BM=rows,
        BLOCK=min(_ROUTE_BLOCK, max(128, triton.next_power_of_2(pairs))), early=early, num_warps=4,
        launch_pdl=early,
    )  # fmt: skip
    return _Routes(index, order, tile_experts, tile_starts, tile_ends, num_experts, slots, direct=False)


def _multiply(
    x: torch.Tensor, stack: Stack, y: torch.Tensor, routes: _Routes, choices: int, gate: Gate | None,
    tile: ExpertTile, early: bool,
) -> None:  # fmt: skip
    """Fill y `[S, N]`, or with a gate `[S, N / 2]`."""
    weight, inputs, shown = stack.weight, stack.num_inputs, gate or Gate()
    outputs = stack.num_outputs
    grid = (routes.num_tiles, -(-outputs // tile.outputs))
    if gate is not None and not gate.interleaved:  # each half is cut by itself
        grid = (routes.num_tiles, -(-(outputs // 2) // (tile.outputs // 2)))
    constants: dict[str, Any] = dict(
        gated=gate is not None, interleaved=shown.interleaved,
        has_bias=stack.bias is not None, activation=shown.activation, limit=shown.limit, alpha=shown.alpha,
        direct=routes.direct, early=early, BN=tile.outputs, BM=tile.rows, num_warps=tile.warps,
        num_stages=tile.stages, launch_pdl=early,
    )  # fmt: skip
    bias = stack.bias if stack.bias is not None else x
    sizes = stack.num_experts, choices, y.shape[1], inputs
    if isinstance(weight, TritonWeight):
        spans, padded, _ = weight.codes.shape
        quantized_experts_kernel[grid](
            x, weight.codes, weight.scales, weight.offsets if weight.offsets is not None else weight.scales,
            bias, y, *routes.tensors(), *sizes, padded, spans, weight.unit, code=weight.code,
            group=weight.group_size or 0, asymmetric=weight.offsets is not None, even_k=inputs % SPAN == 0,
            W=tile.spans, **constants,
        )  # fmt: skip
    else:
        float_experts_kernel[grid](
            x, weight, bias, y, *routes.tensors(), *sizes, *weight.stride(), BK=tile.inputs,
            transposed=weight.stride(1) == 1 and weight.stride(2) != 1,
            even_k=inputs % tile.inputs == 0, **constants,
        )  # fmt: skip


def _combine(
    rows: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, num_experts: int, early: bool
) -> torch.Tensor:
    tokens, choices = index.shape
    size = rows.shape[1]
    out = rows.new_empty((tokens, size))
    block = min(_COMBINE_BLOCK, triton.next_power_of_2(size))
    if tokens < 64:  # more programs
        block = min(block, 256)
    combine_kernel[(tokens, -(-size // block))](
        rows, weights, index, out, size, num_experts, k=choices, BLOCK=block, early=early,
        num_warps=max(1, block // 256), launch_pdl=early,
    )  # fmt: skip
    return out
