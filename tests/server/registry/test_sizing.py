"""From the engine's estimate to what the registry books, asleep and awake; what a KV cache may grow to."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.memory.figures import MemoryEstimate
from memory_efficient_gpt.memory.workspace import CUDA_CONTEXT_BYTES, WORKER_BYTES
from memory_efficient_gpt_server.budgeted_hosting import _budgets
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.sizing import registry_estimate, sized
from memory_efficient_gpt_server.registry.variants import HOST, KvLimits, per_device

SIZES: dict[str, Any] = {"weights_bytes": 16_000_000_000, "kv_cache_bytes": 4_000_000_000}
BLOCK = 24_576
CONTEXT = 129 * BLOCK
"""A request of the demo model's 2,048 tokens, and the trash block."""
DEMO = EngineConfig(model="demo", device="cpu", max_num_seqs=8)
FULL = (8 * 128 + 1) * BLOCK

moves = pytest.mark.skipif(sys.platform != "linux", reason="KV caches move on Linux")


def test_on_a_gpu_all_but_the_context_can_be_given_back_for_a_copy_on_the_host() -> None:
    predicted = MemoryEstimate(device="cuda:0", workspace_bytes=CUDA_CONTEXT_BYTES + 90_000_000, **SIZES)
    estimate = registry_estimate(predicted, predicted.kv_cache_bytes)
    assert per_device(estimate.awake()) == {"cuda:0": predicted.total_bytes, HOST: WORKER_BYTES}
    assert estimate.can_sleep and estimate.parked_bytes == 16_000_000_000
    freed = per_device(estimate.to_wake())
    assert freed == {"cuda:0": predicted.total_bytes - CUDA_CONTEXT_BYTES}


@pytest.mark.skipif(sys.platform != "linux", reason="gives no pages back")
@pytest.mark.parametrize("kv_bytes", [0, 4_000_000_000])
def test_on_a_cpu_only_the_kv_cache_can_be_given_back(kv_bytes: int) -> None:
    sizes = {**SIZES, "kv_cache_bytes": kv_bytes}
    predicted = MemoryEstimate(device="cpu", workspace_bytes=110_000_000, **sizes)
    estimate = registry_estimate(predicted, kv_bytes)
    assert per_device(estimate.awake()) == {HOST: 16_110_000_000 + kv_bytes}
    assert estimate.can_sleep is (kv_bytes > 0) and estimate.parked_bytes == 0
    assert per_device(estimate.to_wake()) == ({HOST: kv_bytes} if kv_bytes else {})


def test_the_hosts_budget_is_its_own_beside_a_gpu_and_the_models_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = "cuda:0"
    monkeypatch.setattr("memory_efficient_gpt_server.budgeted_hosting.compute_device", lambda config: device)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    chosen: list[Any] = [(None, None)]
    assert _budgets(chosen, 80, None) == {"cuda:0": Budget(80), HOST: Budget(2_048_000)}
    assert _budgets(chosen, 80, 30) == {"cuda:0": Budget(80), HOST: Budget(30)}
    device = "cpu"
    assert _budgets(chosen, 80, 30) == {HOST: Budget(80)}


@moves
def test_an_automatic_cache_begins_with_its_share_and_grows_to_what_its_sequences_fill() -> None:
    config, estimate = sized(DEMO, 80_000_000)
    assert config.kv_cache_bytes == 20_000_000 and estimate.kv_bytes == 20_000_000 // BLOCK * BLOCK
    assert estimate.kv_most_bytes == config.kv_reserve_bytes == FULL
    assert estimate.kv_least_bytes == CONTEXT
    assert sized(DEMO, 22_000_000)[1].kv_most_bytes == 22_000_000


@moves
def test_it_begins_with_its_soft_limit_but_holds_one_request() -> None:
    assert sized(DEMO, 80_000_000, KvLimits(10_000_000))[0].kv_cache_bytes == 10_000_000
    assert sized(DEMO, 80_000_000, KvLimits(1000))[0].kv_cache_bytes == CONTEXT
    assert sized(DEMO, 80_000_000, KvLimits(80_000_000))[0].kv_cache_bytes == FULL


def test_a_soft_limit_that_the_cache_cannot_come_to_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_soft_limit_bytes of demo is 80,000,001.*80,000,000"):
        sized(DEMO, 80_000_000, KvLimits(80_000_001))
    given = EngineConfig(model="demo", device="cpu", num_kv_blocks=200)
    with pytest.raises(ConfigError, match=r"kv_soft_limit_bytes of demo is 60,000,000.*kv_hard_limit_bytes"):
        sized(given, 80_000_000, KvLimits(60_000_000))


def test_a_hard_limit_that_is_too_small_is_named_itself() -> None:
    with pytest.raises(ConfigError, match=r"^kv_hard_limit_bytes is 1,000"):
        sized(DEMO, 80_000_000, KvLimits(hard_bytes=1000))


@moves
def test_a_hard_limit_bounds_beginning_and_growth() -> None:
    config, estimate = sized(DEMO, 80_000_000, KvLimits(hard_bytes=5_000_000))
    assert config.kv_cache_bytes == config.kv_reserve_bytes == estimate.kv_most_bytes == 5_000_000


@moves
def test_a_cache_of_a_given_size_grows_only_with_a_hard_limit() -> None:
    given = EngineConfig(model="demo", device="cpu", num_kv_blocks=200)
    assert sized(given, 80_000_000)[1].kv_most_bytes == 201 * BLOCK
    assert sized(given, 80_000_000, KvLimits(hard_bytes=9_000_000))[1].kv_most_bytes == 9_000_000
    with pytest.raises(ConfigError, match=r"begins with 4,939,776 bytes; its kv_hard_limit_bytes is 10"):
        sized(given, 80_000_000, KvLimits(hard_bytes=10))


@moves
def test_on_a_gpu_a_cache_has_whole_granules_from_the_first_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "memory_efficient_gpt.memory.estimation.resolve_device", lambda name: torch.device("cuda", 0)
    )
    monkeypatch.setattr("memory_efficient_gpt.kv_cache.pool_size._has_cuda_bindings", lambda: True)
    granules = 12 * (2 << 20)  # of 256 blocks; eight full requests are 257
    config, estimate = sized(DEMO, 1 << 40)
    assert estimate.device == "cuda:0" and estimate.kv_least_bytes == granules
    assert estimate.kv_bytes == estimate.kv_most_bytes == config.kv_cache_bytes == 2 * granules
    config, estimate = sized(replace(DEMO, max_num_seqs=64), 200_000_000)
    assert (config.kv_cache_bytes, estimate.kv_bytes) == (50_000_000, granules)
    assert estimate.kv_most_bytes == config.kv_reserve_bytes == 200_000_000
    config, estimate = sized(DEMO, 1 << 40, KvLimits(hard_bytes=granules - 1))
    assert estimate.kv_most_bytes is None, "it is smaller than what moves at a time"


@moves
def test_a_cache_that_transformers_owns_keeps_its_size() -> None:
    _, estimate = sized(EngineConfig(model="demo", device="cpu", tier="C"), 80_000_000)
    assert estimate.kv_most_bytes is None and estimate.kv_least_bytes is None
