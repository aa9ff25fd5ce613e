"""Keys, entries and estimates."""

from __future__ import annotations

import pytest

from memory_efficient_gpt_server.registry.variants import (
    HOST,
    Amount,
    Estimate,
    Kind,
    ModelEntry,
    VariantKey,
    find_entry,
    per_device,
)


def test_a_key_tells_its_options_and_nothing_that_is_default() -> None:
    assert str(VariantKey("m")) == "m"
    assert str(VariantKey("m", "int4", "int8", 8192)) == "m[quantization=int4,kv=int8,len=8192]"


def test_options_that_affect_the_load_make_another_variant() -> None:
    keys = {VariantKey("m"), VariantKey("m", "int4"), VariantKey("m", kv_cache_dtype="int8"), VariantKey("m")}
    assert len(keys) == 3


def test_an_estimate_lists_what_is_not_zero_on_its_devices() -> None:
    estimate = Estimate(device="cuda:0", weights_bytes=7, kv_bytes=2, host_bytes=1)
    assert per_device(estimate.awake()) == {"cuda:0": 9, HOST: 1}
    assert estimate.by_kind() == {Kind.WEIGHTS: 7, Kind.KV: 2, Kind.PROCESS: 1}


def test_waking_needs_neither_the_context_nor_the_process_again() -> None:
    estimate = Estimate(
        device="cuda:0", weights_bytes=7, graphs_bytes=1, context_bytes=3, host_bytes=4, can_sleep=True
    )
    assert per_device(estimate.to_wake()) == {"cuda:0": 8}
    assert estimate.parked() == (Amount(HOST, Kind.PARKED, 7),)


def test_negative_bytes_and_pointless_sleep_are_errors() -> None:
    with pytest.raises(ValueError, match="negative"):
        Estimate(device="cuda:0", weights_bytes=-1)
    with pytest.raises(ValueError, match="no KV cache to free"):
        Estimate(device=HOST, weights_bytes=1, can_sleep=True)


def test_on_the_host_a_sleep_frees_the_kv_cache_and_parks_nothing() -> None:
    estimate = Estimate(device=HOST, weights_bytes=7, kv_bytes=5, workspace_bytes=2, can_sleep=True)
    assert estimate.parked() == () and estimate.parked_bytes == 0
    assert estimate.to_wake() == (Amount(HOST, Kind.KV, 5),)


def test_an_entry_that_keeps_more_kv_than_it_may_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="kv_soft_limit_bytes is 9, more than kv_hard_limit_bytes, 8"):
        ModelEntry(id="m", source="m", kv_soft_limit_bytes=9, kv_hard_limit_bytes=8)
    assert ModelEntry(id="m", source="m", kv_soft_limit_bytes=8, kv_hard_limit_bytes=8).id == "m"
    with pytest.raises(ValueError, match="times"):
        ModelEntry(id="m", source="m", ttl_s=-1.0)


def test_an_id_wins_over_an_alias() -> None:
    entries = {
        "a": ModelEntry(id="a", source="a", aliases=("b", "latest")),
        "b": ModelEntry(id="b", source="b"),
    }
    assert find_entry(entries, "b") is entries["b"]
    assert find_entry(entries, "latest") is entries["a"]
    assert find_entry(entries, "c") is None
