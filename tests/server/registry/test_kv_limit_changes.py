"""Limits of KV memory that administrators change: what is refused, and what engines are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from memory_efficient_gpt.errors import ConfigError, InvalidRequestError
from memory_efficient_gpt_server.errors import KvLimitTooSmallError, LoadFailedError
from memory_efficient_gpt_server.registry.changes import add_model, change_model
from memory_efficient_gpt_server.registry.choice import Choices, Wish
from memory_efficient_gpt_server.registry.hosted import Provision
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import KvLimits, VariantKey
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, leased

SOFT, HARD = "kv_soft_limit_bytes", "kv_hard_limit_bytes"
INT4 = VariantKey("A", "int4")


def _host() -> FakeHost:
    """A begins with 30 KV bytes and may have 80; a request needs 5. B's cache keeps its size."""
    host = FakeHost(sizes={"A": 10, "B": 10})
    host.kv["A"], host.kv_least["A"] = (30, 80), 5
    host.choices["A"] = Choices((INT4,))
    return host


def _kv(registry: Registry) -> int:
    return kv_bytes(registry.state.ledger, VariantKey("A"))


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)


async def test_a_loaded_model_gives_back_what_is_beyond_and_a_later_load_begins_within() -> None:
    host = _host()
    async with host.registry() as registry:
        await leased(registry, "A")
        await change_model(registry, "A", {HARD: 12, "priority": 3})
        assert registry.entry("A").kv_limits == KvLimits(None, 12) and registry.entry("A").priority == 3
        await _until(lambda: _kv(registry) == 12)
        assert host.engine("A").kv_limits == [12] and registry.engine("A").state == State.READY
        await (await registry.unload("A"))
        await leased(registry, "A")
        assert len(host.engines["A"]) == 2 and _kv(registry) == 12 and host.engine("A").kv_limits == []
        info = host.engine("A").info
        assert info is not None and info.kv_most_bytes == 12, "it reserves no more than it may have"
        await change_model(registry, "A", {HARD: None})
        await (await registry.unload("A"))
        await leased(registry, "A")
        info = host.engine("A").info
        assert _kv(registry) == 30 and info is not None and info.kv_most_bytes == 80


async def test_what_requests_hold_comes_back_when_they_end() -> None:
    host = _host()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        host.engine("A").kv_in_use = 25
        await change_model(registry, "A", {HARD: 12})
        await _until(lambda: _kv(registry) == 25)
        await asyncio.sleep(0.6)
        assert host.engine("A").kv_limits == [12], "it is not pestered while it is in use"
        host.engine("A").kv_in_use = 0
        await end(using)
        await _until(lambda: _kv(registry) == 12)
        await reaches(registry, "A", State.READY)


async def test_an_idle_engine_that_still_holds_some_is_asked_again() -> None:
    host = _host()
    async with host.registry() as registry:
        await leased(registry, "A")
        host.engine("A").kv_in_use = 25  # of a request that was cancelled just now
        await change_model(registry, "A", {HARD: 12})
        await _until(lambda: _kv(registry) == 25)
        host.engine("A").kv_in_use = 0
        await _until(lambda: _kv(registry) == 12)


async def test_a_soft_limit_decides_what_the_next_load_begins_with() -> None:
    host = _host()
    async with host.registry() as registry:
        await leased(registry, "A")
        await change_model(registry, "A", {SOFT: 50})
        assert _kv(registry) == 30
        await (await registry.unload("A"))
        assert (await registry.plan("A")).needed == {"cpu": 60}
        await leased(registry, "A")
        assert _kv(registry) == 50 == registry.state.ledger.used["cpu"] - 10


async def test_variants_have_the_limits_of_their_model() -> None:
    host = _host()
    async with host.registry() as registry:
        int4 = await registry.choose("A", Wish("int4"))
        await change_model(registry, "A", {HARD: 9})
        for key in (int4, VariantKey("A")):
            await (await registry.load(key))
            assert kv_bytes(registry.state.ledger, key) == 9


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        (
            {SOFT: 13, HARD: 12},
            HARD,
            "kv_soft_limit_bytes is 13, more than kv_hard_limit_bytes, 12. Lower it.",
        ),
        ({SOFT: 1_000}, SOFT, "kv_soft_limit_bytes is 1,000, more than kv_hard_limit_bytes, 60"),
        ({HARD: 10}, HARD, "kv_soft_limit_bytes is 20, more than kv_hard_limit_bytes, 10"),
    ],
)
async def test_limits_that_contradict_each_other_change_nothing(
    settings: dict[str, Any], param: str, said: str
) -> None:
    host = _host()
    host.entries["A"] = {SOFT: 20, HARD: 60}
    async with host.registry() as registry:
        with pytest.raises(InvalidRequestError, match=said) as refused:
            await change_model(registry, "A", {"pinned": True, **settings})
        assert refused.value.param == param
        assert registry.entry("A").kv_limits == KvLimits(20, 60) and not registry.entry("A").pinned


@pytest.mark.parametrize("loaded", [True, False])
async def test_a_limit_below_what_one_request_needs_is_refused_with_figures(loaded: bool) -> None:
    async with _host().registry() as registry:
        if loaded:
            await leased(registry, "A")
        with pytest.raises(
            KvLimitTooSmallError, match="is 4, but one request of full length needs 5"
        ) as refused:
            await change_model(registry, "A", {HARD: 4})
        assert refused.value.details == {"variant": "A", HARD: 4, "kv_least_bytes": 5}
        assert registry.entry("A").kv_limits == KvLimits()
        await change_model(registry, "A", {HARD: 5})


async def test_a_cache_that_keeps_its_size_takes_no_limits_but_loses_them() -> None:
    host = _host()
    host.entries["B"] = {SOFT: 3}
    async with host.registry() as registry:
        with pytest.raises(
            InvalidRequestError, match="keeps its size, so it can have no kv_hard_limit_bytes"
        ):
            await change_model(registry, "B", {HARD: 50})
        await change_model(registry, "B", {"priority": 1, SOFT: 3})
        await change_model(registry, "B", {SOFT: None})
        assert registry.entry("B").kv_limits == KvLimits() and registry.entry("B").priority == 1


async def test_what_settings_could_not_have_either_is_refused_in_their_words() -> None:
    host = _host()
    provide = host._provide

    def given_size(key: VariantKey, limits: KvLimits) -> Provision:
        if limits.hard_bytes is not None and limits.hard_bytes < 30:
            raise ConfigError(["the KV cache of A begins with 30 bytes. Make it smaller."])
        return provide(key, limits)

    host._provide = given_size  # type: ignore[method-assign]
    async with host.registry() as registry:
        await leased(registry, "A")
        with pytest.raises(InvalidRequestError, match=r"begins with 30 bytes\. Make it smaller") as refused:
            await change_model(registry, "A", {HARD: 20})
        assert refused.value.param == HARD and registry.entry("A").kv_limits == KvLimits()
        await change_model(registry, "A", {HARD: 30})


async def test_limits_of_what_cannot_be_looked_at_are_refused() -> None:
    host = _host()
    host.broken = {"C"}
    async with host.registry() as registry:
        with pytest.raises(LoadFailedError, match="truncated"):
            await change_model(registry, "C", {HARD: 20})


async def test_a_model_that_was_added_has_limits_of_its_own_that_change() -> None:
    host = _host()
    async with host.registry() as registry:
        host.sizes["D"], host.kv["D"], host.entries["D"] = 10, (30, 80), {HARD: 20}
        await add_model(registry, host.hosted("D"))
        assert (await registry.plan("D")).needed == {"cpu": 30}
        await change_model(registry, "D", {HARD: 7})
        assert (await registry.plan("D")).needed == {"cpu": 17}
