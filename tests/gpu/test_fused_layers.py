"""Norms, gated activations, rotary positions and merged products on a CUDA device, alone and in models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from memory_efficient_gpt.attention.context import AttentionBackend, StepContext
from memory_efficient_gpt.attention.interface import forward_packed
from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.triton import TritonBackend
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.fusion.merge import MergeReport, merge_linears
from memory_efficient_gpt.fusion.trial_run import packed_logits
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.native.ops import Activation, NormStyle
from memory_efficient_gpt.triton_kernels.availability import can_overlap
from tests.engine.architectures.configs import CASES

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of one layer's result, by its largest element: one rounding that falls the other way."""
STYLES: list[NormStyle] = ["round_then_scale", "one_plus_weight", "scale_then_round"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
}
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@pytest.fixture(scope="module")
def kernels() -> Any:
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    return TritonKernels()


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 2).to(device=DEVICE, dtype=dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, *, roundings: int = 1) -> None:
    assert got.dtype is want.dtype and got.shape == want.shape
    worst = float((got.float() - want.float()).abs().max()) / float(want.float().abs().max())
    assert worst <= roundings * LIMITS[want.dtype]


def normed(x: torch.Tensor, weight: torch.Tensor, style: NormStyle) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    if style == "round_then_scale":
        return weight * wide.to(x.dtype)
    return (wide * (weight.float() + (1.0 if style == "one_plus_weight" else 0.0))).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [1, 20, 64, 127, 128, 896, 4096, 5120, 16384])
def test_norms_equal_torchs(kernels: Any, size: int, style: NormStyle, dtype: torch.dtype) -> None:
    weight = numbers(size, dtype=dtype)
    wide = numbers(1, 5, 3 * size + 8, dtype=dtype)
    views = {
        "contiguous": numbers(2, 3, size, dtype=dtype),
        "heads of a merged product": wide[..., 8 : 8 + 2 * size].unflatten(-1, (2, size)),
        "part of each row": wide[..., 3 : 3 + size],
        "heads before tokens": numbers(1, 2, 5, size, dtype=dtype).transpose(1, 2),
        "columns": numbers(size, 4, dtype=dtype).t(),
    }
    for x in views.values():
        assert_near(kernels.rms_norm(x, weight, 1e-6, style), normed(x, weight, style), roundings=2)


@DTYPES
@pytest.mark.parametrize("size", [128, 4096])
def test_a_norms_row_is_the_same_alone_and_among_others(kernels: Any, size: int, dtype: torch.dtype) -> None:
    x, weight = numbers(67, size, dtype=dtype), numbers(size, dtype=dtype)
    together = kernels.rms_norm(x, weight, 1e-6, "round_then_scale")
    for row in (0, 1, 33, 66):
        alone = kernels.rms_norm(x[row : row + 1], weight, 1e-6, "round_then_scale")
        assert torch.equal(alone, together[row : row + 1])


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 20, 112, 1500, 14336])
def test_gated_activations_equal_torchs(
    kernels: Any, size: int, activation: Activation, dtype: torch.dtype
) -> None:
    halves = numbers(1, 5, 2 * size, dtype=dtype).chunk(2, dim=-1)
    apart = numbers(3, size, dtype=dtype), numbers(size, 3, dtype=dtype).t()
    for gate, up in (halves, apart):
        got = kernels.gated(gate, up, activation)
        assert_near(got, ACTIVATIONS[activation](gate) * up, roundings=2)
        assert torch.equal(kernels.gated(gate[..., -1:, :], up[..., -1:, :], activation), got[..., -1:, :])


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "size", "part"),
    [(1, 6, 2, 16, 16), (7, 32, 8, 128, 128), (3, 5, 1, 20, 20), (4, 3, 3, 96, 72), (2, 4, 2, 256, 64)],
)
def test_rotary_positions_equal_transformers_bit_for_bit(
    kernels: Any, tokens: int, query_heads: int, key_heads: int, size: int, part: int, dtype: torch.dtype
) -> None:
    merged = numbers(1, tokens, (query_heads + 2 * key_heads) * size, dtype=dtype)
    query = merged[..., : query_heads * size].unflatten(-1, (query_heads, size)).transpose(1, 2)
    key = merged[..., query_heads * size : (query_heads + key_heads) * size]
    key = key.unflatten(-1, (key_heads, size)).transpose(1, 2)
    kept = merged.clone()
    cos, sin = numbers(2, 1, tokens, part, dtype=dtype)
    got = kernels.rotate(query, key, cos, sin)
    for turned, want in zip(got, apply_rotary_pos_emb(query, key, cos, sin), strict=True):
        assert torch.equal(turned, want)
    assert torch.equal(merged, kept)
    last = slice(tokens - 1, tokens)
    alone = kernels.rotate(query[:, :, last], key[:, :, last], cos[:, last], sin[:, last])
    assert torch.equal(alone[0], got[0][:, :, last]) and torch.equal(alone[1], got[1][:, :, last])


def test_what_the_kernels_do_not_take_is_named(kernels: Any) -> None:
    x = numbers(3, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight \[8\] of torch.bfloat16"):
        kernels.rms_norm(x, x[0].float(), 1e-6, "round_then_scale")
    with pytest.raises(ValueError, match="activation of"):
        kernels.gated(x, x, "relu")
    with pytest.raises(ValueError, match="P <= D even"):
        kernels.rotate(x.view(1, 3, 1, 8), x.view(1, 3, 1, 8), x.view(1, 3, 8), x.view(1, 3, 8))


FUSED = {
    "llama": {"rms_norm": 5, "gated_mlp": 2, "rotary": 2},
    "qwen3": {"rms_norm": 9, "gated_mlp": 2, "rotary": 2},
    "gemma2": {"rms_norm": 9, "gated_mlp": 2, "rotary": 2},
    "gemma3_text": {"rms_norm": 13, "gated_mlp": 2, "rotary": 2},
    "phi3": {"rms_norm": 5, "gated_mlp": 2, "rotary": 2},
    "olmo2": {"rms_norm": 9, "gated_mlp": 2, "rotary": 2},
    "starcoder2": {"rotary": 2},
    "mixtral": {"rms_norm": 5, "rotary": 2, "experts": 2},
    "gpt2": {},
}
DENSE_DTYPES = (torch.bfloat16, torch.float16)
MERGED = {"starcoder2": {3: 2}, "mixtral": {3: 2}, "phi3": {}, "gpt2": {}}
"""Products by number of layers; {3: 2, 2: 2} for the others."""


def prepared(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model = CASES[name].model()
    torch.nn.Module.to(model, DEVICE, dtype)
    prepare_model(model)
    return model


def merge_and_fuse(name: str, model: PreTrainedModel) -> MergeReport:
    layers = probe_geometry(CASES[name].config())
    merged = merge_linears(model, lambda: packed_logits(model, layers, DEVICE))
    products = sum(type(module) is torch.nn.Linear for module in model.modules())
    report = fuse(model)
    expected = dict(FUSED[name])
    if model.dtype in DENSE_DTYPES and can_overlap(DEVICE):
        expected["linear"] = products
    assert dict(report.replaced) == expected and not report.dropped, report.summary()
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_computes_what_it_did(name: str, dtype: torch.dtype) -> None:
    if name == "mixtral" and dtype is not torch.float32:
        pytest.skip("a rounding may choose another expert")
    model, layers = prepared(name, dtype), probe_geometry(CASES[name].config())
    with torch.inference_mode():
        want = packed_logits(model, layers, DEVICE).float()
    merged = merge_and_fuse(name, model)
    assert dict(merged.merged) == MERGED.get(name, {3: 2, 2: 2}) and not merged.dropped
    with torch.inference_mode():
        got = packed_logits(model, layers, DEVICE).float()
    limit = {torch.float32: 1e-4, torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    assert float((got - want).abs().max()) <= limit * float(want.abs().max())


def step(name: str, model: PreTrainedModel, backend: AttentionBackend) -> Callable[[], torch.Tensor]:
    """A decoding step of three sequences with 1, 4 and 9 tokens of context, of tensors that stay."""
    layers = probe_geometry(CASES[name].config())
    pool = KVPool(layers, 4, 16, torch.bfloat16, DEVICE)
    for cache in pool.caches:
        for pages in (cache.key, cache.value):
            pages.copy_(numbers(*pages.shape, dtype=torch.bfloat16))
    pool.attach(model)
    lens = [1, 4, 9]
    context = StepContext(
        backend,
        torch.tensor([16 * (i + 1) + n - 1 for i, n in enumerate(lens)], device=DEVICE),
        torch.tensor([[1], [2], [3]], dtype=torch.int32, device=DEVICE),
        torch.arange(4, dtype=torch.int32, device=DEVICE),
        torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        1, max(lens), [1, 1, 1], lens,
    )  # fmt: skip
    ids, positions = torch.tensor([5, 6, 7], device=DEVICE), torch.tensor(lens, device=DEVICE) - 1
    rows = torch.arange(3, device=DEVICE)
    return lambda: forward_packed(model, ids, positions, context, rows)


@pytest.mark.parametrize("name", [name for name in FUSED if name != "mixtral"])
def test_a_captured_step_of_a_fused_model_computes_what_it_did(name: str) -> None:
    model = prepared(name, torch.bfloat16)
    own = copy.deepcopy(model)
    merge_and_fuse(name, model)
    with torch.inference_mode():
        want = step(name, own, TorchBackend())().float()
        run = step(name, model, TritonBackend())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert float((out.float() - want).abs().max()) <= 2**-4 * float(want.abs().max())
