"""Routed experts in one call, against each token's experts one by one in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch.nn import functional

from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.expert_stacks import NativeStack
from memory_efficient_gpt.native.ops import Activation, Kernels, load_kernels
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.modules import pack_weight
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme

HIDDEN, INNER, EXPERTS = 48, 32, 5


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)


def choices(tokens: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts, one of which nobody chooses and one of which is "none"; shares."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    index[index == 2] = EXPERTS
    return index, torch.rand((tokens, k), generator=generator)


def one_by_one(
    x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    activation: Literal["silu", "gelu"],
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros_like(x, dtype=torch.float64)
    act: Callable[[torch.Tensor], torch.Tensor] = functional.silu if activation == "silu" else functional.gelu
    for token in range(len(x)):
        for expert, share in zip(index[token].tolist(), shares[token].double(), strict=True):
            if expert < EXPERTS:
                gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
                out[token] += share * (down[expert].double() @ (act(gate) * up))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (7, 2), (40, 4)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_results_are_the_experts_weighted(
    kernels: Kernels, dtype: torch.dtype, tokens: int, k: int, activation: Literal["silu", "gelu"]
) -> None:
    gate_up, down = (
        numbers(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype),
        numbers(EXPERTS, HIDDEN, INNER, dtype=dtype),
    )
    x, (index, shares) = numbers(tokens, HIDDEN, dtype=dtype, seed=1), choices(tokens, k)
    name: Activation = activation
    got = kernels.experts(x, index, shares, NativeStack(gate_up, EXPERTS), NativeStack(down, EXPERTS), name)
    want = one_by_one(x, index, shares, gate_up, down, activation)
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    assert got.dtype is dtype
    assert float((got.double() - want).abs().max()) <= limit * max(1e-3, float(want.abs().max()))


@pytest.mark.parametrize("scheme", ["int4-g32", "int8", "int4-asym-g32"])
def test_packed_stacks_give_what_their_numbers_give(kernels: Kernels, scheme: str) -> None:
    stacks = []
    for seed, shape in ((1, (EXPERTS, 2 * INNER, HIDDEN)), (2, (EXPERTS, HIDDEN, INNER))):
        weight = quantize_weight(numbers(*shape, seed=seed).flatten(0, 1), parse_scheme(scheme))
        stack = QuantizedStack(weight, EXPERTS, torch.float32)
        numbers_of = torch.stack([stack[e] for e in range(EXPERTS)])
        stack.use_kernels(kernels, pack_weight(weight, kernels))
        native = stack.native_stack()
        assert native is not None
        stacks.append((native, numbers_of))
    x, (index, shares) = numbers(9, HIDDEN, seed=3), choices(9, 2)
    got = kernels.experts(x, index, shares, stacks[0][0], stacks[1][0], "silu")
    want = one_by_one(x, index, shares, stacks[0][1], stacks[1][1], "silu")
    assert float((got.double() - want).norm() / want.norm()) <= 0.02  # x is rounded to 8 bits on the way


def test_a_token_gives_the_same_bits_alone_and_among_others(kernels: Kernels) -> None:
    gate_up, down = (NativeStack(numbers(*shape), EXPERTS) for shape in
                     ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)))  # fmt: skip
    x, (index, shares) = numbers(30, HIDDEN, seed=1), choices(30, 3)
    together = kernels.experts(x, index, shares, gate_up, down, "silu")
    for token in (0, 11, 29):
        row = slice(token, token + 1)
        assert torch.equal(
            kernels.experts(x[row], index[row], shares[row], gate_up, down, "silu"), together[row]
        )


def test_what_does_not_fit_is_named(kernels: Kernels) -> None:
    gate_up, down = NativeStack(numbers(2, 8, 6), 2), NativeStack(numbers(2, 6, 4), 2)
    index, shares = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"experts need x \[T, D\]"):
        kernels.experts(numbers(3, 5), index, shares, gate_up, down, "silu")
    with pytest.raises(ValueError, match="contiguous weights"):
        kernels.experts(
            numbers(3, 6), index, shares, gate_up, NativeStack(numbers(2, 4, 6).transpose(1, 2), 2), "silu"
        )
