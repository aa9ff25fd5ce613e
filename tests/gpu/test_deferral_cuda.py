"""Calls that wait on a CUDA device: one kernel gives what two give, bit for bit, alone and in captured steps.

Run on a machine with a GPU: python -m pytest -m gpu tests/gpu/test_deferral_cuda.py
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention.triton import TritonBackend
from memory_efficient_gpt.fusion.deferral_trial import try_deferral
from memory_efficient_gpt.fusion.trial_run import WritesOnly, packed_logits
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.native.deferral import Deferral, DeferredKind
from memory_efficient_gpt.native.deferred_calls import DeferredHeadNorm, DeferredSum, DeferredTurn
from memory_efficient_gpt.native.ops import NormStyle
from memory_efficient_gpt.native.rotary import unturned
from memory_efficient_gpt.request import Request, SamplingParams
from tests.engine.architectures.configs import CASES
from tests.gpu.test_engine_cuda import make_engine, run
from tests.gpu.test_fused_layers import (
    DEVICE,
    DTYPES,
    FUSED,
    LIMITS,
    STYLES,
    merge_and_fuse,
    numbers,
    prepared,
    step,
)

pytestmark = pytest.mark.gpu

KINDS: tuple[DeferredKind, ...] = ("sums", "turns", "head_norms")
EXACT: tuple[DeferredKind, ...] = ("sums", "turns")
"""The order of a head's sum of squares may be another one in the kernel that turns it."""
MODELS = [name for name in FUSED if name != "mixtral"]  # whose sums of experts are not repeatable
JOINED: dict[str, dict[str, int]] = {
    "qwen3": {"sums": 4, "turns": 2, "head_norms": 4},
    "gemma3_text": {"sums": 4, "turns": 2, "head_norms": 4},
    "olmo2": {"sums": 1},  # its cosines are float32 in every dtype: it turns by its own function
    "starcoder2": {"turns": 2},
    "gpt2": {},
}
"""{"sums": 4, "turns": 2} for the others."""
CACHES = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@pytest.fixture(scope="module")
def kernels() -> Any:
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    return TritonKernels()


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [1, 20, 64, 127, 896, 1024, 4096, 5120, 16384])
def test_a_sum_and_its_norm_are_those_of_two_kernels(
    kernels: Any, size: int, style: str, dtype: torch.dtype
) -> None:
    left, right = numbers(2, 3, 7, size, dtype=dtype)[0], numbers(3, 7, size, dtype=dtype)
    weight = numbers(size, dtype=dtype)
    out = torch.full_like(left, torch.nan)
    got = kernels.sum_rms_norm(DeferredSum(left, right, out), weight, 1e-6, style)
    assert same_bits(out, left + right)
    assert same_bits(got, kernels.rms_norm(left + right, weight, 1e-6, style))


@DTYPES
@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "size", "part", "value_size"),
    [
        (1, 32, 8, 128, 128, 128),
        (7, 6, 2, 16, 16, 16),
        (3, 5, 1, 20, 20, 12),
        (4, 3, 3, 96, 72, 96),
        (130, 40, 12, 64, 32, 80),
        (2, 4, 2, 256, 64, 256),
    ],
)
def test_turns_and_the_write_are_those_of_two_kernels(
    kernels: Any, tokens: int, query_heads: int, key_heads: int, size: int, part: int, value_size: int,
    cache_dtype: torch.dtype, dtype: torch.dtype,
) -> None:  # fmt: skip
    from memory_efficient_gpt.triton_kernels.attention_launch import write_kv
    from memory_efficient_gpt.triton_kernels.turned_write import turn_and_write

    widths = [query_heads * size, key_heads * size, key_heads * value_size]
    merged = numbers(1, tokens, sum(widths), dtype=dtype).split(widths, dim=-1)
    query, key = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in merged[:2])
    value = merged[2].unflatten(-1, (-1, value_size))[0]
    cos, sin = numbers(2, 1, tokens, part, dtype=dtype)
    slots = torch.randperm(160, generator=torch.Generator().manual_seed(0))[:tokens].to(DEVICE)

    def cache() -> Any:
        scales = [torch.zeros(10, 16, key_heads, device=DEVICE) for _ in range(2)]
        has_scales = cache_dtype.itemsize == 1
        return SimpleNamespace(
            key=torch.zeros(10, 16, key_heads, size, device=DEVICE).to(cache_dtype),
            value=torch.zeros(10, 16, key_heads, value_size, device=DEVICE).to(cache_dtype),
            key_scale=scales[0] if has_scales else None,
            value_scale=scales[1] if has_scales else None,
        )

    apart, joined = cache(), cache()
    turned = kernels.rotate(query, key, cos, sin)
    write_kv(turned[1][0].transpose(0, 1), value, apart, slots, CACHES[cache_dtype])
    out = unturned(query), unturned(key)
    turn_and_write(query, key, value, cos, sin, out, joined, slots, CACHES[cache_dtype])
    assert same_bits(out[0], turned[0]) and same_bits(out[1], turned[1])
    for name in ("key", "value", "key_scale", "value_scale"):
        want = getattr(apart, name)
        assert want is None or same_bits(getattr(joined, name), want), name


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("tokens", "query_heads", "key_heads", "size", "part"),
    [(1, 16, 8, 128, 128), (5, 6, 2, 16, 16), (3, 5, 1, 20, 20), (9, 4, 4, 96, 72), (2, 4, 2, 256, 256)],
)
@pytest.mark.parametrize("heads_first", [True, False])
def test_norms_before_turns_and_the_write_are_those_of_four_kernels(
    kernels: Any, heads_first: bool, tokens: int, query_heads: int, key_heads: int, size: int, part: int,
    cache_dtype: torch.dtype, style: NormStyle, dtype: torch.dtype,
) -> None:  # fmt: skip
    widths = [query_heads * size, key_heads * size, key_heads * size]
    parts = [
        x.unflatten(-1, (-1, size)) for x in numbers(1, tokens, sum(widths), dtype=dtype).split(widths, -1)
    ]
    heads = [x.transpose(1, 2) if heads_first else x for x in parts[:2]]
    weights = numbers(2, size, dtype=dtype)
    cos, sin = numbers(2, 1, tokens, part, dtype=dtype)
    context: Any = SimpleNamespace(slots=torch.arange(tokens, device=DEVICE) + 3)
    backend = TritonBackend()

    def results(joined: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        scales = [torch.zeros(2, 16, key_heads, device=DEVICE) for _ in range(2)]
        pages = [torch.zeros(2, 16, key_heads, size, device=DEVICE).to(cache_dtype) for _ in range(2)]
        scale = scales if cache_dtype is torch.int8 else [None, None]
        cache: Any = SimpleNamespace(key=pages[0], value=pages[1], key_scale=scale[0], value_scale=scale[1])
        norms = [
            DeferredHeadNorm(kernels, x, w, 1e-6, style, torch.full_like(x.contiguous(), torch.nan))
            for x, w in zip(heads, weights, strict=True)
        ]
        query, key = (norm.out if heads_first else norm.out.transpose(1, 2) for norm in norms)
        out = unturned(query), unturned(key)
        turn = DeferredTurn(kernels, query, key, cos, sin, out, (norms[0], norms[1]))
        if joined:
            backend.turn_and_write(turn, parts[2][0], cache, context)
        else:
            turn.compute()
            backend.write(out[1][0].transpose(0, 1), parts[2][0], cache, context)
        return [*(norm.out for norm in norms), *out, *scales], pages

    (numbers_got, pages_got), (numbers_want, pages_want) = results(joined=True), results(joined=False)
    for got, want in zip(numbers_got, numbers_want, strict=True):
        largest = float(want.float().abs().max())
        assert float((got.float() - want.float()).abs().max()) <= 2 * LIMITS[dtype] * largest
    # a code may change by one for its number's rounding, and by one for that of its head's scale
    step_of_cache = 2.0 if cache_dtype is torch.int8 else 2 * LIMITS[cache_dtype]
    for got, want in zip(pages_got, pages_want, strict=True):
        limit = step_of_cache * max(1.0, float(want.float().abs().max()) if step_of_cache < 1 else 1.0)
        assert float((got.float() - want.float()).abs().max()) <= limit


def test_the_joined_kernels_name_what_they_do_not_take(kernels: Any) -> None:
    x = numbers(3, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight \[8\] of torch.bfloat16"):
        kernels.sum_rms_norm(DeferredSum(x, x, x.clone()), x[0].float(), 1e-6, "round_then_scale")


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_trial_finds_what_may_wait(name: str, kv_dtype: torch.dtype) -> None:
    model, layers = prepared(name, torch.bfloat16), probe_geometry(CASES[name].config())
    merge_and_fuse(name, model)
    backend = WritesOnly(TritonBackend())
    report = try_deferral(lambda: packed_logits(model, layers, DEVICE, backend, kv_dtype), KINDS)
    assert not report.dropped
    assert dict(report.joined) == JOINED.get(name, {"sums": 4, "turns": 2})


def replayed(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a captured `run` gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_step_whose_calls_wait_gives_the_same_bits(name: str) -> None:
    model = prepared(name, torch.bfloat16)
    merge_and_fuse(name, model)
    with torch.inference_mode():
        run = step(name, model, TritonBackend())
        want = replayed(run).clone()

        def waiting() -> torch.Tensor:
            with Deferral(frozenset(EXACT)):
                return run()

        assert torch.equal(replayed(waiting), want)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_captured_step_whose_norms_of_heads_wait_computes_what_it_did(name: str) -> None:
    model = prepared(name, torch.bfloat16)
    merge_and_fuse(name, model)
    with torch.inference_mode():
        run = step(name, model, TritonBackend())
        want = replayed(run).clone()

        def waiting() -> torch.Tensor:
            with Deferral(frozenset(KINDS)):
                return run()

        assert float((replayed(waiting) - want).abs().max()) <= 2**-4 * float(want.abs().max())


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_an_engine_says_what_waits_and_gives_the_same_tokens(
    kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "max_batched_tokens": 64}
    engine = make_engine("llama", "cuda", **options)
    notes = "; ".join(engine.info.notes)
    assert "4 residual sums computed by norms" in notes and "2 rotary turns by the cache's write" in notes
    monkeypatch.setattr("memory_efficient_gpt.assembly._try_deferral", lambda *_: (frozenset(), ""))
    apart = make_engine("llama", "cuda", **options)
    assert "residual sums" not in "; ".join(apart.info.notes)
    for _ in range(2):  # by calls, then by graphs
        assert run(engine) == run(apart)


def test_in_steps_that_keep_the_device_busy_calls_wait_without_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from memory_efficient_gpt import runner
    from memory_efficient_gpt.native.deferral import deferring

    seen: list[bool] = []

    def watched(kinds: frozenset[DeferredKind]) -> Any:
        seen.append(bool(kinds))
        return deferring(kinds)

    def tokens() -> list[int]:
        seen.clear()
        engine = make_engine("llama", "cuda", max_batched_tokens=64)
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=1)
        engine.submit(Request(id="0", prompt_token_ids=tuple(range(2, 42)), params=params))
        found: list[int] = []
        while engine.has_work:
            found += [token for event in engine.step() for token in event.token_ids]
        return found

    monkeypatch.setattr(runner, "deferring", watched)
    usual = tokens()
    assert seen == [False], "such a step is never captured, and too small to keep the device busy"
    monkeypatch.setattr(runner, "_BUSY", 0.0)
    assert tokens() == usual
    assert seen == [True]
