"""A small run of bursts: the budget is kept, nothing is loaded twice, and the report can be written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.elastic_kv import CPU, CUDA, MODELS, Case, measure, settings_for, sound, table
from benchmarks.engine_gpu import SHAPES
from memory_efficient_gpt_server.settings import load_settings


@pytest.mark.parametrize("case", [CPU, *CUDA.values()], ids=lambda case: f"{case.model}-{case.device}")
def test_both_arms_have_the_same_models_and_budget(case: Case) -> None:
    split, elastic = (settings_for(case, arm, 10**12) for arm in ("split", "elastic"))
    assert split["memory_budget_bytes"] == elastic["memory_budget_bytes"] == 10**12
    assert [m["id"] for m in split["models"]] == [m["id"] for m in elastic["models"]] == list(MODELS)
    assert sum(m["kv_cache_bytes"] for m in split["models"]) == case.kv_bytes
    for model in elastic["models"]:
        assert model["kv_soft_limit_bytes"] + model["kv_hard_limit_bytes"] == case.kv_bytes
    load_settings(elastic, {})
    assert case.prompt_tokens + case.output_tokens <= case.max_len


def test_on_a_gpu_memory_is_counted_in_what_moves_there() -> None:
    for name, case in CUDA.items():
        shape: dict[str, Any] = dict(SHAPES.get(name, {"num_hidden_layers": 6}))
        granules = 2 * shape["num_hidden_layers"] * (2 << 20)
        assert case.context_bytes == granules and case.kv_bytes % (2 * granules) == 0


@pytest.mark.slow
async def test_bursts_keep_to_the_budget_and_load_nothing_twice() -> None:
    case = replace(CPU, clients=16, requests=24)
    record = await measure(case, 1, Console(quiet=True), ceiling=True)
    for arm in (record["split"], record["elastic"]):
        assert sound(arm), arm
        assert [burst["tokens"] for burst in arm["bursts"]] == [24 * 112] * 2
    assert record["elastic"]["memory"]["most_bytes"]["kv_booked"] > 0
    assert (
        record["ceiling"]["memory"]["budget_bytes"]
        == case.kv_bytes + record["split"]["memory"]["budget_bytes"]
    )
    assert "tokens_per_s, burst on right" in table(record) and "ceiling / split" in table(record)
