"""Rotary positions by the kernel: bit for bit the model's own in bfloat16, and only where both agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from memory_efficient_gpt.fusion.apply import _judge_rotary, fuse
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.native.rotary import native_rotary, rotary_function, with_native_rotary


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


class Counted:
    """A rotary function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*inputs, **options)


def heads(tokens: int, count: int, size: int, dtype: torch.dtype, *, batch: int = 1) -> torch.Tensor:
    """`[B, H, T, D]` as models have it: a view of `[B, T, H, D]`."""
    return torch.randn(batch, tokens, count, size).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (7, 64), (33, 20)])
def test_queries_and_keys_turn_as_the_model_turns_them(
    kernels: Kernels, tokens: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query, key = heads(tokens, 6, size, dtype), heads(tokens, 2, size, dtype)
    cos, sin = torch.randn(2, 1, tokens, size).to(dtype)
    kept = query.clone(), key.clone()
    own = Counted(modeling_llama.apply_rotary_pos_emb)
    with torch.inference_mode():
        got = native_rotary(kernels, own)(query, key, cos, sin)
    assert own.calls == 0
    limit = 0.0 if dtype is torch.bfloat16 else 1e-6
    for turned, want in zip(got, own.function(query, key, cos, sin), strict=True):
        torch.testing.assert_close(turned, want, rtol=0, atol=limit)
    assert torch.equal(query, kept[0]) and torch.equal(key, kept[1])


@pytest.mark.parametrize("case", ["batch", "gradients", "part of a head", "float16", "option"])
def test_what_the_kernel_does_not_take_goes_to_the_models_function(kernels: Kernels, case: str) -> None:
    dtype = torch.float16 if case == "float16" else torch.float32
    batch, size = 2 if case == "batch" else 1, 8 if case == "part of a head" else 16
    query, key = heads(3, 2, 16, dtype, batch=batch), heads(3, 2, 16, dtype, batch=batch)
    cos, sin = torch.randn(2, batch, 3, size).to(dtype)
    own = Counted(lambda q, k, *rest, **options: (q, k))
    options = {"unsqueeze_dim": 1} if case == "option" else {}
    with torch.set_grad_enabled(case == "gradients"):
        native_rotary(kernels, own)(query, key, cos, sin, **options)
    assert own.calls == 1


def test_a_part_of_each_head_turns_as_the_model_turns_it(kernels: Kernels) -> None:
    torch.manual_seed(0)
    query, key = heads(7, 6, 16, torch.bfloat16), heads(7, 2, 16, torch.bfloat16)
    cos, sin = torch.randn(2, 1, 7, 12).bfloat16()
    own = Counted(modeling_phi3.apply_rotary_pos_emb)
    with torch.inference_mode():
        got = native_rotary(kernels, own, partial=True)(query, key, cos, sin)
    assert own.calls == 0
    for turned, want in zip(got, own.function(query, key, cos, sin), strict=True):
        assert torch.equal(turned, want)


def first_part_alone(query: Any, key: Any, cos: Any, sin: Any) -> Any:
    """Turns whole heads as Llama does, parts of heads in its own way."""
    if cos.shape[-1] == query.shape[-1]:
        return modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    return -query, -key


@pytest.mark.parametrize(
    ("own", "partial"),
    [
        (modeling_phi3.apply_rotary_pos_emb, True),
        (modeling_llama.apply_rotary_pos_emb, False),
        (first_part_alone, False),
    ],
)
def test_parts_of_heads_take_the_kernel_only_if_the_function_does_the_same(
    kernels: Kernels, own: Any, partial: bool
) -> None:
    with torch.no_grad():
        assert _judge_rotary(own, kernels, torch.empty(0)) == {"partial": partial}


def test_transformers_own_module_is_left_alone(kernels: Kernels) -> None:
    before = modeling_llama.apply_rotary_pos_emb
    fused = with_native_rotary(modeling_llama.LlamaAttention, kernels)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert rotary_function(modeling_llama.LlamaAttention) is before
    assert issubclass(fused, modeling_llama.LlamaAttention)
    assert with_native_rotary(modeling_llama.LlamaAttention, kernels) is fused


def test_a_model_that_pairs_neighbours_keeps_its_own_function(kernels: Kernels) -> None:
    """Cohere turns elements 2i and 2i + 1 together, the kernel i and i + D/2."""
    config = CohereConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    holder = nn.ModuleDict({"attention": modeling_cohere.CohereAttention(config, layer_idx=0)})
    report = fuse(holder, kernels)
    assert report.replaced["rotary"] == 0
    assert any(kind == "rotary" and "differs" in why for kind, why in report.dropped)
