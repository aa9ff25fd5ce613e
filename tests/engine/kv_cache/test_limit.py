"""A pool whose share of memory changes under its user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.host_memory import HostMemory
from memory_efficient_gpt.kv_cache.limit import KVLimit
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.request import Request, SamplingParams
from tests.engine.kv_cache.test_pool import CPU, layers, present_bytes, tensors_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory moves as on Linux")

BLOCK = 12_288
"""Bytes of a block of the tiny model below: 3 layers, 16 tokens, 2 heads of 32, float32."""


def make_engine(**options: Any) -> Engine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, eos_token_id=1,
    )  # fmt: skip
    defaults = dict(num_kv_blocks=8, kv_reserve_bytes=BLOCK * 33, debug_checks=True, device="cpu")
    return Engine.from_model(LlamaForCausalLM(config), EngineConfig(model="tiny", **{**defaults, **options}))


def ask(engine: Engine, name: str, *, tokens: int = 40, start: int = 2) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.submit(Request(id=name, prompt_token_ids=(start, 3, 4, 5), params=params))


def drain(engine: Engine) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            texts.setdefault(event.request_id, []).extend(event.token_ids)
    return texts


def test_a_movable_pool_says_between_what_it_moves() -> None:
    info = make_engine().info
    assert (info.num_kv_blocks, info.kv_cache_bytes) == (8, 9 * BLOCK)
    assert (info.kv_least_bytes, info.kv_most_bytes) == (5 * BLOCK, 33 * BLOCK)
    assert info.max_model_len == 64


def test_without_a_reserve_the_pool_keeps_its_size() -> None:
    engine = make_engine(kv_reserve_bytes=None)
    assert engine.info.kv_least_bytes is None and engine.info.kv_most_bytes is None
    assert (
        engine.set_kv_limit(33 * BLOCK) == engine.set_kv_limit(0) == engine.info.kv_cache_bytes == 9 * BLOCK
    )
    assert engine.stats().num_kv_blocks == 8


def test_a_pool_that_can_not_move_says_so_in_the_notes() -> None:
    note = "the KV cache keeps its size: transformers owns it"
    assert note in make_engine(tier="C", num_kv_blocks=None).info.notes
    assert not any("keeps its size" in note for note in make_engine().info.notes)


def test_growing_lets_more_sequences_run_at_once_and_their_text_is_the_same() -> None:
    engine = make_engine()
    for number in range(8):
        ask(engine, str(number), start=10 + number)
    for _ in range(25):
        events = engine.step()
    crowded = engine.stats()
    assert crowded.num_waiting_for_blocks > 0 and crowded.num_running < 8 and events
    assert engine.set_kv_limit(33 * BLOCK) == 33 * BLOCK
    engine.step()
    assert engine.stats().num_running == 8 and engine.stats().num_waiting_for_blocks == 0
    assert engine.stats().num_kv_blocks == 32
    drain(engine)
    alone, texts = make_engine(), make_engine()
    texts.set_kv_limit(33 * BLOCK)
    for number in range(8):
        ask(texts, str(number), start=10 + number)
    together = drain(texts)
    for number in range(8):
        ask(alone, str(number), start=10 + number)
        assert drain(alone)[str(number)] == together[str(number)]


def test_shrinking_takes_free_and_cached_blocks_and_keeps_one_full_sequence() -> None:
    engine = make_engine()
    engine.set_kv_limit(33 * BLOCK)
    for number in range(6):
        ask(engine, str(number), start=10 + number)
    drain(engine)
    assert engine.stats().num_cached_blocks > 8
    assert engine.set_kv_limit(0) == 5 * BLOCK
    assert engine.stats().num_kv_blocks == engine.stats().num_free_blocks == 4
    ask(engine, "full", tokens=60)
    assert len(drain(engine)["full"]) == 60


def test_shrinking_takes_no_block_in_use_and_loses_no_token() -> None:
    engine, alone = make_engine(), make_engine()
    engine.set_kv_limit(33 * BLOCK)
    for number in range(6):
        ask(engine, str(number), start=10 + number)
    first: dict[str, list[int]] = {}
    for _ in range(20):
        for event in engine.step():
            first.setdefault(event.request_id, []).extend(event.token_ids)
    used = engine.stats().num_kv_blocks - engine.stats().num_free_blocks
    assert used > 4
    # two blocks share a page of this model: beside one in use, a free one's memory may have to stay
    assert (used + 1) * BLOCK <= engine.set_kv_limit(0) <= 2 * used * BLOCK
    assert engine.stats().num_kv_blocks == used and engine.stats().num_free_blocks == 0
    rest = drain(engine)
    for number in range(6):
        ask(alone, str(number), start=10 + number)
        assert first[str(number)] + rest[str(number)] == drain(alone)[str(number)]


def test_it_grows_no_further_than_its_address_space() -> None:
    engine = make_engine()
    assert engine.set_kv_limit(10**9) == 33 * BLOCK
    assert engine.set_kv_limit(20 * BLOCK + 5) == 20 * BLOCK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_what_is_told_is_never_less_than_what_is_in_memory(dtype: torch.dtype) -> None:
    """Blocks smaller than a page, taken and released at random."""
    rng = np.random.default_rng(1)
    pool = KVPool(layers(3, key_dim=8, value_dim=16), 401, 16, dtype, CPU, memory=HostMemory(movable=True))
    allocator = BlockAllocator(401, 16)
    limit = KVLimit(pool, allocator, 201, max_len=64)
    rounding = 4096 * len(tensors_of(pool))
    owned: list[int] = []
    for _ in range(60):
        while allocator.num_free and rng.random() < 0.97:
            owned.append(allocator.allocate())
            for tensor in tensors_of(pool):
                tensor[owned[-1]] = 1
        rng.shuffle(owned)
        count = int(rng.integers(0, len(owned) + 1))
        allocator.release(owned[:count])
        del owned[:count]
        wanted = int(rng.integers(0, pool.num_bytes))
        told = limit.set(wanted)
        assert told == limit.held_bytes and present_bytes(pool) <= told + rounding
        assert told <= wanted or allocator.limit == max(4, len(owned)), "it could have given more"
        for block in owned:
            assert all((tensor[block] == 1).all() for tensor in tensors_of(pool))


def test_the_reserve_takes_no_memory() -> None:
    def committed_and_resident() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before = committed_and_resident()
    pool = KVPool(layers(4), 50_000, 16, torch.bfloat16, CPU, memory=HostMemory(movable=True))
    assert pool.num_bytes > 2_000_000_000
    pool.caches[0].key[7] = 1
    assert present_bytes(pool) <= 4 * 4096
    assert committed_and_resident() - before < 20_000_000
