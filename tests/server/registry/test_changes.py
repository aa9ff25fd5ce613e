"""Changes of a running registry: settings, budgets, models that come and go."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt.errors import InvalidRequestError, ModelNotFoundError
from memory_efficient_gpt_server.errors import (
    BudgetTooSmallError,
    DrainingError,
    InsufficientMemoryError,
    ModelBusyError,
    ModelExistsError,
)
from memory_efficient_gpt_server.registry.changes import (
    add_model,
    change_budget,
    change_model,
    remove_model,
)
from memory_efficient_gpt_server.registry.events import Patched
from memory_efficient_gpt_server.registry.states import State
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, leased


async def test_settings_change_at_once_and_the_others_stay() -> None:
    host = FakeHost()
    host.entries["A"]["priority"] = 3
    async with host.registry() as registry:
        await leased(registry, "A")
        await change_model(registry, "A", {"pinned": True})
        assert registry.entry("A").pinned and registry.entry("A").priority == 3
        with pytest.raises(InsufficientMemoryError):
            await leased(registry, "B")
        await change_model(registry, "A", {"pinned": False, "ttl_s": 0.01})
        await reaches(registry, "A", State.UNLOADED)
        with pytest.raises(ModelNotFoundError):
            await change_model(registry, "D", {"pinned": True})


async def test_changes_at_the_same_time_lose_nothing() -> None:
    async with FakeHost().registry() as registry:
        changes = ({"pinned": True}, {"ttl_s": 9.0}, {"priority": 2}, {"min_residency_s": 1.0})
        await asyncio.gather(*(change_model(registry, "A", change) for change in changes))
        entry = registry.entry("A")
        assert (entry.pinned, entry.ttl_s, entry.priority, entry.min_residency_s) == (True, 9.0, 2, 1.0)


async def test_a_change_that_fails_is_not_called_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    async with FakeHost().registry() as registry:
        monkeypatch.setattr("memory_efficient_gpt_server.registry.owner.step", broken)
        with pytest.raises(RuntimeError, match="Patched"):
            await change_model(registry, "A", {"pinned": True})
        monkeypatch.undo()
        assert not registry.entry("A").pinned


async def test_a_closed_registry_takes_no_changes() -> None:
    async with FakeHost().registry() as registry:
        await registry.close()
        async with asyncio.timeout(5):
            with pytest.raises(DrainingError):
                await change_model(registry, "A", {"pinned": True})
            with pytest.raises(DrainingError):
                await remove_model(registry, "A")


async def test_a_change_under_way_ends_with_the_registry() -> None:
    registry = FakeHost().make()
    registry.start()
    async with asyncio.timeout(5):
        change = asyncio.create_task(registry.consider(Patched(registry.entry("A"))))
        await asyncio.sleep(0)
        await registry.close()
        with pytest.raises(DrainingError):
            await change


# ---- budgets


async def test_a_smaller_budget_evicts_the_idle_and_drains_the_busy() -> None:
    host = FakeHost(sizes={"A": 40, "B": 50})
    async with host.registry() as registry:
        await leased(registry, "A")
        using = await holder(registry, "B")
        await change_budget(registry, "cpu", 60)
        await reaches(registry, "A", State.UNLOADED)
        assert registry.engine("B").state == "ready"
        await change_budget(registry, "cpu", 45)
        await reaches(registry, "B", State.DRAINING)
        await end(using)
        await reaches(registry, "B", State.UNLOADED)
        await change_budget(registry, "cpu", 100)
        await leased(registry, "B")


async def test_a_budget_below_what_is_pinned_is_refused_with_figures() -> None:
    host = FakeHost(sizes={"A": 40, "B": 50})
    host.entries["A"]["pinned"] = True
    async with host.registry() as registry:
        await leased(registry, "A")
        await leased(registry, "B")
        with pytest.raises(BudgetTooSmallError, match=r"39, but 40 bytes of cpu .*\(A 40\)") as refused:
            await change_budget(registry, "cpu", 39)
        assert refused.value.details == {
            "device": "cpu", "least_budget_bytes": 40, "staying_bytes": {"A": 40},
        }  # fmt: skip
        assert registry.state.ledger.budgets["cpu"].total_bytes == 100
        await change_budget(registry, "cpu", 40)
        await reaches(registry, "B", State.UNLOADED)
        assert registry.engine("A").state == "ready"
        with pytest.raises(InvalidRequestError, match="Devices: cpu") as unknown:
            await change_budget(registry, "cuda:7", 40)
        assert unknown.value.param == "device"


async def test_kv_memory_that_a_pinned_model_can_spare_does_not_stay() -> None:
    host = FakeHost(sizes={"A": 40})
    host.kv["A"] = (30, 50)
    host.entries["A"] = {"pinned": True, "kv_soft_limit_bytes": 10}
    async with host.registry() as registry:
        await leased(registry, "A")
        with pytest.raises(BudgetTooSmallError, match="49, but 50 bytes"):
            await change_budget(registry, "cpu", 49)
        await change_budget(registry, "cpu", 50)
        async with asyncio.timeout(5):
            while registry.state.ledger.used["cpu"] > 50:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.005)
        assert host.engine("A").kv_limits == [10] and registry.engine("A").state == "ready"


async def test_a_larger_budget_lets_those_in_who_wait() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        waiting = asyncio.create_task(leased(registry, "B"))
        await reaches(registry, "B", State.QUEUED)
        assert not host.engines["B"]
        await change_budget(registry, "cpu", 120)
        await waiting
        await end(using)


# ---- models that come and go


async def test_a_model_that_was_added_is_loaded_evicted_and_removed_as_others() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await leased(registry, "A")
        host.sizes["D"] = 60
        await add_model(registry, host.hosted("D"))
        await leased(registry, "D")
        assert {i: registry.engine(i).state for i in "AD"} == {"A": "unloaded", "D": "ready"}
        with pytest.raises(ModelBusyError, match="POST /admin/models/D/unload"):
            await remove_model(registry, "D")
        await (await registry.unload("D"))
        engine = registry.engine("D")
        assert await remove_model(registry, "D") == "D"
        assert list(registry.models) == ["A", "B", "C"] and engine.state == "unloaded"
        assert not registry.needs("D")
        for refused in (leased(registry, "D"), remove_model(registry, "D"), registry.load("D")):
            with pytest.raises(ModelNotFoundError):
                await refused
        await add_model(registry, host.hosted("D"))
        await leased(registry, "D")
        assert len(host.engines["D"]) == 2


async def test_ids_are_unique_however_many_come_at_once() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        host.sizes["D"] = 10
        with pytest.raises(ModelExistsError, match="DELETE /admin/models/A"):
            await add_model(registry, host.hosted("A"))
        adding = [add_model(registry, host.hosted("D")) for _ in range(2)]
        first, second = await asyncio.gather(*adding, return_exceptions=True)
        assert first is None and isinstance(second, ModelExistsError)


async def test_one_that_is_waited_for_is_not_removed() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        waiting = asyncio.create_task(leased(registry, "B"))
        await reaches(registry, "B", State.QUEUED)
        with pytest.raises(ModelBusyError):
            await remove_model(registry, "B")
        await end(using)
        await waiting


async def test_what_was_found_out_about_a_removed_model_is_not_believed_of_the_next() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        host.sizes["D"] = 10
        await add_model(registry, host.hosted("D"))
        assert (await registry.plan("D")).needed == {"cpu": 10}
        await remove_model(registry, "D")
        host.sizes["D"] = 20
        await add_model(registry, host.hosted("D"))
        assert (await registry.plan("D")).needed == {"cpu": 20}
