"""From the engine's estimate to what the registry books, asleep and awake."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from memory_efficient_gpt.memory.figures import MemoryEstimate
from memory_efficient_gpt.memory.workspace import CUDA_CONTEXT_BYTES, WORKER_BYTES
from memory_efficient_gpt_server.budgeted_hosting import _budgets
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.sizing import registry_estimate
from memory_efficient_gpt_server.registry.variants import HOST, per_device

SIZES: dict[str, Any] = {"weights_bytes": 16_000_000_000, "kv_cache_bytes": 4_000_000_000}


def test_on_a_gpu_all_but_the_context_can_be_given_back_for_a_copy_on_the_host() -> None:
    predicted = MemoryEstimate(device="cuda:0", workspace_bytes=CUDA_CONTEXT_BYTES + 90_000_000, **SIZES)
    estimate = registry_estimate(predicted)
    assert per_device(estimate.awake()) == {"cuda:0": predicted.total_bytes, HOST: WORKER_BYTES}
    assert estimate.can_sleep and estimate.parked_bytes == 16_000_000_000
    freed = per_device(estimate.to_wake())
    assert freed == {"cuda:0": predicted.total_bytes - CUDA_CONTEXT_BYTES}


@pytest.mark.skipif(sys.platform != "linux", reason="gives no pages back")
@pytest.mark.parametrize("kv_bytes", [0, 4_000_000_000])
def test_on_a_cpu_only_the_kv_cache_can_be_given_back(kv_bytes: int) -> None:
    sizes = {**SIZES, "kv_cache_bytes": kv_bytes}
    estimate = registry_estimate(MemoryEstimate(device="cpu", workspace_bytes=110_000_000, **sizes))
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
