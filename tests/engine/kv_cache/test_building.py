"""Caches that are made for engines: memory that moves as on a GPU, and what is told where it can't."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.kv_cache import building, cuda_driver, pool_size
from memory_efficient_gpt.kv_cache.block_sizes import BlockSizes
from memory_efficient_gpt.kv_cache.building import build_cache
from tests.engine.kv_cache.fake_cuda import FakeCuda, fake_memory
from tests.engine.kv_cache.test_limit import BLOCK, ask, drain, make_engine
from tests.engine.kv_cache.test_pool import CPU, layers

CUDA = torch.device("cuda", 0)
GRANULES = 6 * 4096
"""Of a granule in each tensor of the tiny model: two of its blocks."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="memory moves on Linux")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Engines on the CPU get memory as on a GPU: blocks without memory hold NaN, and must stay untouched."""
    fake = FakeCuda()
    monkeypatch.setattr(building, "HostMemory", lambda movable: fake_memory(fake))
    return fake


@linux_only
@pytest.mark.parametrize("options", [{}, {"native_kernels": False}, {"overlap": True}], ids=str)
def test_texts_are_the_same_while_the_limit_moves_at_every_step(
    cuda: FakeCuda, options: dict[str, Any]
) -> None:
    rng = random.Random(0)
    alone, engine = make_engine(kv_reserve_bytes=None, **options), make_engine(**options)
    expected: dict[str, list[int]] = {}
    for number in range(8):
        ask(alone, str(number), start=10 + number)
        expected |= drain(alone)
        ask(engine, str(number), start=10 + number)
    texts: dict[str, list[int]] = {}
    sizes = set()
    while engine.has_work:
        cuda.capacity = len(cuda.created) + rng.choice([0, 6, 10**6])
        engine.set_kv_limit(rng.randrange(34) * BLOCK)
        sizes.add(len(cuda.created))
        for event in engine.step():
            texts.setdefault(event.request_id, []).extend(event.token_ids)
        cuda.check()
    assert texts == expected and len(sizes) > 4


@linux_only
def test_it_begins_with_its_blocks_memory_and_tells_what_is_held(cuda: FakeCuda) -> None:
    engine = make_engine()
    info = engine.info
    assert info.num_kv_blocks == 8 and info.kv_block_bytes == BLOCK and info.kv_granule_bytes == GRANULES
    assert info.kv_cache_bytes == 5 * GRANULES == len(cuda.created) * 4096  # nine blocks, in pairs
    assert (info.kv_least_bytes, info.kv_most_bytes) == (3 * GRANULES, 16 * GRANULES)  # of 16.5


@linux_only
def test_a_size_in_bytes_is_filled_with_whole_granules_and_not_exceeded(cuda: FakeCuda) -> None:
    engine = make_engine(num_kv_blocks=None, kv_cache_bytes=4 * GRANULES + BLOCK)
    assert engine.info.kv_cache_bytes == 4 * GRANULES and engine.info.num_kv_blocks == 7
    assert engine.set_kv_limit(6 * GRANULES - 1) == 5 * GRANULES
    assert engine.stats().num_kv_blocks == 9


@linux_only
def test_shrinking_keeps_the_cached_blocks_of_the_granules_that_stay(cuda: FakeCuda) -> None:
    engine = make_engine(num_kv_blocks=32)
    for number in range(8):
        ask(engine, str(number), start=10 + number)
    texts = drain(engine)
    cached = engine.stats().num_cached_blocks
    assert engine.set_kv_limit(6 * GRANULES) == 6 * GRANULES
    assert 4 < engine.stats().num_cached_blocks < cached
    for number in range(8):
        ask(engine, str(number), start=10 + number)
    assert drain(engine) == texts
    cuda.check()


@linux_only
def test_without_memory_to_grow_the_limit_stays_and_the_log_says_why(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    ask(engine, "a")
    engine.step()
    held = engine.info.kv_cache_bytes
    cuda.capacity = len(cuda.created) + 3
    assert engine.set_kv_limit(33 * BLOCK) == held and engine.stats().num_kv_blocks == 8
    (record,) = caplog.records
    assert f"The KV cache stays at {held:,} bytes instead of" in record.getMessage()
    assert "CUDA_ERROR_OUT_OF_MEMORY" in record.getMessage()
    cuda.capacity = 10**6
    assert engine.set_kv_limit(33 * BLOCK) == 16 * GRANULES
    assert len(drain(engine)["a"]) == 39


@linux_only
def test_an_engine_asleep_has_no_kv_memory_and_wakes_with_its_limit(cuda: FakeCuda) -> None:
    engine = make_engine()
    ask(engine, "a")
    before = drain(engine)
    held = engine.info.kv_cache_bytes
    assert engine.sleep().kv_bytes == held and not cuda.created
    assert engine.set_kv_limit(12 * BLOCK) == 6 * GRANULES and not cuda.created
    engine.wake()
    assert len(cuda.created) * 4096 == 6 * GRANULES
    ask(engine, "a")
    assert drain(engine) == before
    cuda.check()


@linux_only
@pytest.mark.parametrize("call", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_driver_that_refuses_leaves_a_cache_of_fixed_size_and_its_reason(
    call: str, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.fails[call] = 9 if call == "cuMemCreate" else 2
    engine = make_engine()
    (note,) = [note for note in engine.info.notes if "keeps its size" in note]
    assert note.startswith("the KV cache keeps its size: ") and call in note
    assert [note in record.getMessage() for record in caplog.records] == [True]
    assert cuda.is_empty
    assert engine.info.kv_most_bytes is None and engine.set_kv_limit(0) == engine.info.kv_cache_bytes
    ask(engine, "a")
    assert len(drain(engine)["a"]) == 40


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model="m", kv_reserve_bytes=1 << 30, **fields)


@linux_only
def test_without_bindings_the_cache_keeps_its_size_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_size, "_has_cuda_bindings", lambda: False)
    monkeypatch.setattr(building, "load_driver", pytest.fail)
    reason = pool_size.moving_obstacle(config(), layers(2), 64, torch.bfloat16, CUDA, 2 << 20)
    assert reason == "the package cuda-bindings is not installed"
    assert pool_size.moving_obstacle(config(), layers(2), 64, torch.bfloat16, CPU, 1) is None


def test_bindings_that_can_not_be_imported_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match="the package cuda-bindings can't be imported"):
        cuda_driver.load_driver(CUDA)


@linux_only
def test_a_cache_smaller_than_moves_at_a_time_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_size, "_has_cuda_bindings", lambda: True)
    small = config(kv_cache_bytes=(8 << 20) - 1)  # two layers: four tensors
    reason = pool_size.moving_obstacle(small, layers(2), 64, torch.bfloat16, CUDA, 2 << 20)
    assert reason == "its 8,388,607 bytes are less than the 8,388,608 that move at a time"
    larger = replace(small, kv_cache_bytes=8 << 20)
    assert pool_size.moving_obstacle(larger, layers(2), 64, torch.bfloat16, CUDA, 2 << 20) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("granule", [1, 4096, 2 << 20])
def test_blocks_within_are_the_most_that_do_not_take_more(dtype: torch.dtype, granule: int) -> None:
    sizes = BlockSizes(layers(3, key_dim=64, value_dim=24), 16, dtype)
    for num_bytes in (0, 1, sizes.block_bytes, 10**6, 10**8 + 7, sizes.bytes_of(77, granule)):
        blocks = sizes.blocks_within(num_bytes, granule)
        assert blocks == 0 or sizes.bytes_of(blocks, granule) <= num_bytes
        assert sizes.bytes_of(blocks + 1, granule) > num_bytes


@linux_only
def test_a_reserve_below_the_beginning_is_no_obstacle(cuda: FakeCuda) -> None:
    small = EngineConfig(model="m", num_kv_blocks=10, kv_reserve_bytes=1, block_size=16)
    cache = build_cache(small, layers(1), torch.float32, CPU, wanted_len=32, free_bytes=0)
    assert cache.limit is not None and cache.pool.num_blocks == cache.num_blocks == 11
    with pytest.raises(ConfigError, match="two blocks take"):
        build_cache(
            EngineConfig(model="m", kv_reserve_bytes=1), layers(1), torch.float32, CPU,
            wanted_len=32, free_bytes=9,
        )  # fmt: skip
