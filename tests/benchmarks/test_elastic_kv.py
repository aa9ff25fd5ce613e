"""A small run of bursts: the budget is kept, nothing is loaded twice, and the report can be written."""

from __future__ import annotations

import argparse

import pytest
from rich.console import Console

from benchmarks.elastic_kv import KV_BYTES, MODELS, measure, settings_for, sound, table


def test_both_arms_have_the_same_models_and_budget() -> None:
    split, elastic = settings_for("split", 100), settings_for("elastic", 100)
    assert split["memory_budget_bytes"] == elastic["memory_budget_bytes"] == 100
    assert [m["id"] for m in split["models"]] == [m["id"] for m in elastic["models"]] == list(MODELS)
    assert sum(m["kv_cache_bytes"] for m in split["models"]) == KV_BYTES
    for model in elastic["models"]:
        assert model["kv_soft_limit_bytes"] + model["kv_hard_limit_bytes"] == KV_BYTES


@pytest.mark.slow
async def test_bursts_keep_to_the_budget_and_load_nothing_twice() -> None:
    options = argparse.Namespace(repetitions=1, clients=16, requests=24)
    record = await measure(options, Console(quiet=True))
    for arm in (record["split"], record["elastic"]):
        assert sound(arm), arm
        assert [burst["tokens"] for burst in arm["bursts"]] == [24 * 112] * 2
    assert record["elastic"]["memory"]["most_bytes"]["kv_booked"] > 0
    assert "tokens_per_s, burst on right" in table(record)
