"""The torch backend against a float64 oracle: every feature, number format and kind of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention import torch_backend, torch_layout
from memory_efficient_gpt.attention.context import AttentionOptions
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from tests.engine.attention.oracle import Shape, expected, make_step

STEPS = {
    "prefill": ([5, 9, 1], [5, 9, 1]),
    "chunk": ([4, 7], [11, 7 + 12]),
    "decode": ([1, 1, 1], [3, 14, 8]),
    "ragged decode": ([1, 1, 1, 1, 1], [2, 1, 60, 3, 4]),
    "mixed": ([1, 6, 1, 3, 2], [9, 6, 1, 13, 22]),
}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "everything": {"window": 6, "softcap": 2.0, "sinks": True, "alibi": True},
}
# The oracle sees the numbers as stored, so only the arithmetic differs: float32 throughout, or bfloat16
# probabilities and outputs (2^-9 relative) with up to 60 keys.
TOLERANCES = {torch.float32: 2e-6, torch.int8: 2e-6, torch.float8_e4m3fn: 2e-6, torch.bfloat16: 2e-2}


def options_for(feature: str, query_heads: int) -> AttentionOptions:
    wanted = dict(FEATURES[feature])
    sinks, alibi = wanted.pop("sinks", False), wanted.pop("alibi", False)
    return AttentionOptions(
        scale=0.3,
        sinks=torch.linspace(-1, 2, query_heads) if sinks else None,
        alibi_slopes=torch.linspace(0.1, 0.5, query_heads) if alibi else None,
        **wanted,
    )


@pytest.mark.parametrize("cache_dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", STEPS)
def test_equals_the_oracle(kind: str, heads: str, feature: str, cache_dtype: torch.dtype) -> None:
    query_heads, kv_heads = HEADS[heads]
    dtype = torch.bfloat16 if cache_dtype == torch.bfloat16 else torch.float32
    backend = TorchBackend()
    step = make_step(
        backend, *STEPS[kind], shape=Shape(query_heads, kv_heads), dtype=dtype, cache_dtype=cache_dtype
    )
    options = options_for(feature, query_heads)
    got = step.run(backend, options)
    assert got.dtype == dtype
    assert got.shape == (sum(step.query_lens), query_heads, 16)
    torch.testing.assert_close(
        got.double(), expected(step, options), rtol=TOLERANCES[cache_dtype], atol=TOLERANCES[cache_dtype]
    )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", STEPS)
def test_keys_and_values_may_have_different_sizes(kind: str, feature: str) -> None:
    backend = TorchBackend()
    step = make_step(backend, *STEPS[kind], shape=Shape(4, 2, key_dim=24, value_dim=10))
    options = options_for(feature, 4)
    torch.testing.assert_close(
        step.run(backend, options).double(), expected(step, options), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("kind", STEPS)
def test_host_lengths_are_optional(kind: str) -> None:
    backend = TorchBackend()
    options = options_for("window", 4)
    step = make_step(backend, *STEPS[kind], host_lengths=False)
    torch.testing.assert_close(
        step.run(backend, options).double(), expected(step, options), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("feature", FEATURES)
def test_small_working_memory_gives_the_same(
    kind: str, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_layout, "MAX_GATHERED", 1)
    monkeypatch.setattr(torch_backend, "MAX_SCORES", 100)
    backend = TorchBackend()
    options = options_for(feature, 4)
    step = make_step(backend, *STEPS[kind])
    torch.testing.assert_close(
        step.run(backend, options).double(), expected(step, options), rtol=2e-6, atol=2e-6
    )


def test_layers_with_different_windows_share_a_step() -> None:
    backend = TorchBackend()
    step = make_step(backend, *STEPS["mixed"])
    for feature in ("plain", "window", "plain", "everything"):
        options = options_for(feature, 4)
        torch.testing.assert_close(
            step.run(backend, options).double(), expected(step, options), rtol=2e-6, atol=2e-6
        )


def test_window_of_one_sees_only_the_token_itself() -> None:
    backend = TorchBackend()
    step = make_step(backend, *STEPS["mixed"])
    options = AttentionOptions(scale=0.3, window=1)
    got = step.run(backend, options)
    torch.testing.assert_close(got, step.value.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 0.05), (torch.float8_e4m3fn, 0.2)], ids=str)
def test_quantized_caches_stay_close_to_the_unquantized_one(dtype: torch.dtype, limit: float) -> None:
    backend = TorchBackend()
    options = options_for("plain", 4)
    exact = make_step(backend, *STEPS["mixed"])
    rounded = make_step(backend, *STEPS["mixed"], cache_dtype=dtype)
    error = rounded.run(backend, options) - exact.run(backend, options)
    assert 0 < error.abs().max() < limit


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_caches_store_zero_vectors_exactly(dtype: torch.dtype) -> None:
    backend = TorchBackend()
    step = make_step(backend, [2], [2], cache_dtype=dtype)
    step.key.zero_()
    step.value.zero_()
    assert torch.equal(step.run(backend, options_for("plain", 4)), torch.zeros(2, 4, 16))


def test_tokens_of_no_row_come_out_as_zeros() -> None:
    backend = TorchBackend()
    step = make_step(backend, *STEPS["mixed"])
    wanted = expected(step, options_for("plain", 4))
    backend.write(step.key, step.value, step.cache, step.context)
    padded = torch.cat((step.query, torch.ones(3, 4, 16)))
    got = backend.attend(padded, step.cache, step.context, options_for("plain", 4))
    torch.testing.assert_close(got[:-3].double(), wanted, rtol=2e-6, atol=2e-6)
    assert not got[-3:].any()


def test_padding_rows_of_a_decode_batch_change_nothing() -> None:
    backend = TorchBackend()
    step = make_step(backend, *STEPS["decode"])
    wanted = expected(step, options_for("plain", 4))
    backend.write(step.key, step.value, step.cache, step.context)
    context = step.context
    context.block_tables = torch.cat((context.block_tables, torch.zeros(2, 4, dtype=torch.int32)))
    context.context_lens = torch.cat((context.context_lens, torch.zeros(2, dtype=torch.int32)))
    context.host_context_lens = None
    padded = torch.cat((step.query, torch.ones(2, 4, 16)))
    got = backend.attend(padded, step.cache, context, options_for("plain", 4))
    torch.testing.assert_close(got[:-2].double(), wanted, rtol=2e-6, atol=2e-6)
