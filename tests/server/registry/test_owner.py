"""The owner with fake engines: leases, loads that are shared, evictions, refusals, aborts, its end."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.errors import EngineFailedError, MegptError, ModelNotFoundError
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt_server.errors import (
    ChurnLimitedError,
    DrainingError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelLoadingError,
    ModelsBusyError,
    ServerFullError,
)
from memory_efficient_gpt_server.registry.effects import AbortReason, Effect, RefusalKind, Refuse
from memory_efficient_gpt_server.registry.events import AdminLoad, Asked, Event, LeaseReleased
from memory_efficient_gpt_server.registry.load_queue import FailureRule
from memory_efficient_gpt_server.registry.records import RegistryState
from memory_efficient_gpt_server.registry.reducer import step
from memory_efficient_gpt_server.registry.refusals import abort_error, error_for
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, leased, settle

# ---- loading


async def test_a_lease_loads_the_model_and_gives_its_engine() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        assert registry.engine("A").state == "unloaded" and registry.engine("A").info is None
        async with registry.lease("A") as engine:
            assert engine.state == "ready"
            request = Request(id="r", prompt_token_ids=(1,), params=SamplingParams(max_tokens=2))
            tokens = [t async for event in engine.submit(request) for t in event.token_ids]
        assert tokens == [5, 6]
        assert registry.engine("A").state == "ready"  # nobody needs its room


async def test_all_who_ask_share_one_load() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        asking = [asyncio.create_task(leased(registry, "A")) for _ in range(5)]
        await reaches(registry, "A", State.LOADING)
        host.engine("A").may_load.set()
        await asyncio.gather(*asking)
        assert len(host.engines["A"]) == 1


async def test_a_load_survives_the_client_that_asked_for_it() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        asking = asyncio.create_task(leased(registry, "A"))
        await reaches(registry, "A", State.LOADING)
        await end(asking)
        host.engine("A").may_load.set()
        await reaches(registry, "A", State.READY)
        record = registry.record("A")
        assert record is not None and not record.leases and len(host.engines["A"]) == 1


async def test_what_a_model_really_takes_is_booked() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        entering = registry.lease("A")
        async with entering:
            host.sizes["A"] = 10  # the next one takes less than was estimated
            assert registry.state.ledger.used == {"cpu": 60}
        await (await registry.unload("A"))
        await leased(registry, "A")
        assert registry.state.ledger.used == {"cpu": 10}


async def test_models_at_start_are_loaded_and_needed_until_then() -> None:
    host = FakeHost()
    host.held = host.at_start = {"A"}
    async with host.registry() as registry:
        await reaches(registry, "A", State.LOADING)
        assert registry.needs("A") and not registry.needs("B")
        host.engine("A").may_load.set()
        await reaches(registry, "A", State.READY)
        assert not registry.needs("A")
        await leased(registry, "B")  # it was loaded once; that it had to go is no fault
        assert registry.engine("A").state == "unloaded" and not registry.needs("A")


async def test_a_failed_start_is_needed_still() -> None:
    host = FakeHost()
    host.at_start, host.fails = {"A"}, {"A": "no config.json"}
    async with host.registry() as registry:
        await reaches(registry, "A", State.FAILED)
        assert registry.needs("A") and "no config.json" in (registry.engine("A").reason or "")


# ---- making room


async def test_the_idle_model_goes_and_its_bytes_count_until_it_is_gone() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await leased(registry, "A")
        first = host.engine("A")
        first.may_close.clear()
        asking = asyncio.create_task(leased(registry, "B"))
        await reaches(registry, "A", State.UNLOADING)
        await settle()
        assert not host.engines["B"], "B is loaded before A's process is gone"
        first.may_close.set()
        await asking
        assert registry.engine("A").state == "unloaded" and registry.tally.unloads == {("A", "budget"): 1}


async def test_a_model_in_use_is_never_evicted() -> None:
    host = FakeHost(patience_s=0.0, max_wait_s=0.3)
    async with host.registry() as registry:
        using = await holder(registry, "A")
        with pytest.raises(ModelsBusyError) as refused:
            await leased(registry, "B")
        assert refused.value.retry_after_s > 0
        assert not using.done() and not host.engine("A").closed
        await end(using)
        await leased(registry, "B")


async def test_the_least_recently_used_goes() -> None:
    host = FakeHost(sizes={"A": 50, "B": 50, "C": 50})
    async with host.registry() as registry:
        await leased(registry, "A")
        await leased(registry, "B")
        await asyncio.sleep(0.01)
        await leased(registry, "A")
        await leased(registry, "C")
        states = {i: registry.engine(i).state for i in "ABC"}
        assert states == {"A": "ready", "B": "unloaded", "C": "ready"}


async def test_an_idle_model_leaves_after_its_time() -> None:
    host = FakeHost()
    host.entries["A"]["ttl_s"] = 0.05
    async with host.registry() as registry:
        await leased(registry, "A")
        await reaches(registry, "A", State.UNLOADED)
        assert registry.tally.unloads == {("A", "ttl"): 1}


# ---- refusals


async def test_what_can_never_fit_is_refused_with_the_plan_and_nobody_leaves() -> None:
    host = FakeHost(sizes={"B": 101})
    async with host.registry() as registry:
        await leased(registry, "A")
        with pytest.raises(InsufficientMemoryError, match="101 bytes of cpu, where at most 100") as refused:
            await leased(registry, "B")
        assert refused.value.details["plan"]["verdict"] == "never"
        assert refused.value.details["plan"]["needed_bytes"] == {"cpu": 101}
        assert registry.engine("A").state == "ready"
        assert not (await registry.plan("B")).fits and (await registry.plan("C")).evict == (VariantKey("A"),)


async def test_a_failed_load_is_told_to_all_who_wait_with_its_cause() -> None:
    host = FakeHost()
    host.held, host.fails = {"A"}, {"A": "model.safetensors is truncated"}
    async with host.registry() as registry:
        asking = [asyncio.create_task(leased(registry, "A")) for _ in range(3)]
        await reaches(registry, "A", State.LOADING)
        host.engine("A").may_load.set()
        errors = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(error) for error in errors] == [LoadFailedError] * 3
        assert all("model.safetensors is truncated" in str(error) for error in errors)
        with pytest.raises(LoadFailedError):  # not tried again at once
            await leased(registry, "A")
        assert len(host.engines["A"]) == 1 and registry.tally.loads == {("A", "failure"): 1}
        await reaches(registry, "A", State.FAILED)


async def test_a_checkpoint_that_cannot_be_looked_at_is_a_failed_load_until_it_is_repaired() -> None:
    host = FakeHost(failures=FailureRule(first_delay_s=0.01))
    host.broken = {"A"}
    async with host.registry() as registry:
        with pytest.raises(LoadFailedError, match=r"weights\.safetensors is truncated"):
            await leased(registry, "A")
        host.broken = set()
        await asyncio.sleep(0.02)
        await leased(registry, "A")


async def test_who_does_not_wait_long_enough_is_told_to_come_back_and_the_load_goes_on() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        with pytest.raises(ModelLoadingError):
            await leased(registry, "A", wait_s=0)
        assert not host.engines["A"]
        with pytest.raises(ModelLoadingError):
            await leased(registry, "A", wait_s=0.05)
        host.engine("A").may_load.set()
        await leased(registry, "A")
        assert len(host.engines["A"]) == 1


async def test_the_queue_is_bounded() -> None:
    host = FakeHost(max_waiters=1)
    host.held = {"A"}
    async with host.registry() as registry:
        first = asyncio.create_task(leased(registry, "A"))
        await reaches(registry, "A", State.LOADING)
        with pytest.raises(ServerFullError):
            await leased(registry, "A")
        await end(first)


async def test_too_many_swaps_are_refused() -> None:
    host = FakeHost(most_swaps=1, max_wait_s=0.2, patience_s=0.0)
    async with host.registry() as registry:
        await leased(registry, "A")
        async with registry.lease("B"):
            with pytest.raises(ChurnLimitedError):
                await leased(registry, "A")


async def test_unknown_models_are_not_found() -> None:
    async with FakeHost().registry() as registry:
        with pytest.raises(ModelNotFoundError, match="Models: A, B, C"):
            registry.lease("D")


@pytest.mark.parametrize("kind", RefusalKind)
def test_every_refusal_has_an_error_that_names_the_model(kind: RefusalKind) -> None:
    error = error_for(Refuse(1, kind, 7.0, "it is broken"), "some-model")
    assert "some-model" in error.message
    assert error.code != MegptError.code


def test_every_abort_has_an_error() -> None:
    errors = {reason: abort_error(reason, "m").code for reason in AbortReason}
    assert errors[AbortReason.WORKER_DIED] == "engine_failed"
    assert errors[AbortReason.ADMIN] == errors[AbortReason.DRAIN_DEADLINE] == "model_unloading"


# ---- what goes wrong


async def test_a_worker_that_died_is_replaced_for_the_next_request() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        host.engine("A").state, host.engine("A").reason = "failed", "it was killed"
        with pytest.raises(EngineFailedError):
            await using
        await leased(registry, "A")
        assert len(host.engines["A"]) == 2 and host.engines["A"][0].closed


async def test_counters_go_on_over_reloads() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await leased(registry, "A")
        host.engine("A").stats = EngineStats(generated_tokens=3, num_running=1)
        await (await registry.unload("A"))
        engine = registry.engine("A")
        assert engine.ended_stats.generated_tokens == 3 and engine.stats == EngineStats()
        assert engine.info is not None, "its facts are known though it is unloaded"
        await leased(registry, "A")
        host.engine("A").stats = EngineStats(generated_tokens=4)
        assert engine.ended_stats.generated_tokens + engine.stats.generated_tokens == 7


async def test_the_owner_survives_an_event_that_cannot_be_true(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeHost().registry() as registry:
        registry._post(LeaseReleased(99, VariantKey("A")))
        registry._post("nonsense")  # type: ignore[arg-type]
        await leased(registry, "A")
        assert "failed on str" in caplog.text


async def test_who_asked_is_answered_when_the_owner_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(state: RegistryState, event: Event, now_s: float) -> tuple[RegistryState, tuple[Effect, ...]]:
        if isinstance(event, Asked | AdminLoad):
            raise AssertionError("a bug")
        return step(state, event, now_s)

    monkeypatch.setattr("memory_efficient_gpt_server.registry.owner.step", broken)
    async with FakeHost().registry() as registry, asyncio.timeout(5):
        with pytest.raises(RuntimeError, match="Asked"):
            await leased(registry, "A")
        with pytest.raises(RuntimeError, match="AdminLoad"):
            await (await registry.load("A"))


async def test_an_engine_that_cannot_be_made_is_a_failed_load(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost()

    def broken(model_id: str, limits: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(host, "_make", broken)
    async with host.registry() as registry:
        with pytest.raises(LoadFailedError, match="no more processes"):
            await leased(registry, "A")
        await reaches(registry, "A", State.FAILED)


async def test_closing_refuses_who_waits_and_who_comes() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        asking = asyncio.create_task(leased(registry, "A"))
        await reaches(registry, "A", State.LOADING)
        await registry.close()
        with pytest.raises(DrainingError):
            await asking
        with pytest.raises(DrainingError):
            await leased(registry, "A")
