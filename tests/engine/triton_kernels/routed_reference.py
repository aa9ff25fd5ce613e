"""Routed experts by plain torch: what the kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from memory_efficient_gpt.triton_kernels.packing import TritonWeight, codes_of


@dataclass(frozen=True, slots=True)
class Stack:
    """As triton_kernels.experts has it, without Triton."""

    weight: torch.Tensor | TritonWeight
    num_experts: int
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """Likewise."""

    activation: str = "silu"
    interleaved: bool = False
    limit: float = 0.0
    alpha: float = 0.0


def routed_mlp(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: Stack, down: Stack, gate: Gate
) -> torch.Tensor:
    """As triton_kernels.experts has it; computes in float64, gives x's dtype."""
    first, second = floats_of(gate_up), floats_of(down)
    out = torch.zeros(x.shape[0], second.shape[1], dtype=torch.float64, device=x.device)
    for choice in range(index.shape[1]):
        chosen = index[:, choice]
        kept = chosen < gate_up.num_experts
        expert = chosen[kept]
        inner = torch.einsum("tnk,tk->tn", first[expert], x[kept].double())
        if gate_up.bias is not None:
            inner += gate_up.bias[expert].double()
        row = torch.einsum("tnk,tk->tn", second[expert], gated(inner, gate))
        if down.bias is not None:
            row += down.bias[expert].double()
        out[kept] += row * weights[kept, choice, None].double()
    return out.to(x.dtype)


def gated(inner: torch.Tensor, gate: Gate) -> torch.Tensor:
    """`[T, 2 I]` to `[T, I]`."""
    g, u = (inner[:, ::2], inner[:, 1::2]) if gate.interleaved else inner.chunk(2, dim=-1)
    if gate.limit > 0:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    if gate.activation == "sigmoid":
        return g * torch.sigmoid(gate.alpha * g) * (u + 1)
    if gate.activation == "silu":
        return functional.silu(g) * u
    return functional.gelu(g, approximate="tanh" if gate.activation == "gelu_tanh" else "none") * u


def floats_of(stack: Stack) -> torch.Tensor:
    """The weights `[E, N, K]` float64."""
    weight = stack.weight
    if not isinstance(weight, TritonWeight):
        return weight.double()
    rows = torch.arange(weight.num_outputs, device=weight.codes.device)
    size = weight.group_size or weight.num_inputs
    scales, offsets = (
        values[:, : weight.num_outputs].t().double().repeat_interleave(size, 1)[:, : weight.num_inputs]
        if values is not None
        else None
        for values in (weight.scales, weight.offsets)
    )
    assert scales is not None
    if weight.code == "fp8":
        numbers = codes_of(weight, rows).view(torch.float8_e4m3fn).double() * scales
    else:
        middle = 8 if weight.code == "int4" else 128
        numbers = codes_of(weight, rows) * scales - (offsets if offsets is not None else middle * scales)
    return (numbers * weight.unit).view(stack.num_experts, -1, weight.num_inputs)
