"""Variants of one model under one budget: loaded beside or instead of each other, counted as one model."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.errors import LoadFailedError
from memory_efficient_gpt_server.registry.choice import Choices, Facts, Wish
from memory_efficient_gpt_server.registry.owner import Named, Registry
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import KvLimits, VariantKey
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, settle

INT4, INT8, FP8 = (VariantKey("A", name) for name in ("int4", "int8", "fp8"))


def host(**options: object) -> FakeHost:
    """A takes 60 bytes, its int4 variant 20, its int8 one 50, of 100."""
    made = FakeHost(sizes={str(INT4): 20, str(INT8): 50}, **options)  # type: ignore[arg-type]
    made.choices["A"] = Choices((INT4, INT8))
    return made


def states(registry: Registry, *keys: VariantKey) -> list[str]:
    return [registry.engine(key).state for key in keys]


async def test_a_variant_is_loaded_beside_the_model_while_there_is_room() -> None:
    async with (
        host().registry() as registry,
        registry.lease("A") as own,
        registry.lease(await registry.choose("A", Wish("int4"))) as int4,
    ):
        assert own is not int4 and states(registry, VariantKey("A"), INT4) == ["ready", "ready"]
        assert int4.info is not None and int4.info.quantization == "int4"
        assert registry.state.ledger.used["cpu"] == 80


async def test_and_instead_of_the_idle_one_when_there_is_not() -> None:
    async with host().registry() as registry:
        async with registry.lease("A"):
            pass
        async with registry.lease(INT4), registry.lease(INT8):
            assert states(registry, VariantKey("A"), INT4, INT8) == ["unloaded", "ready", "ready"]
        assert registry.tally.unloads == {("A", "budget"): 1} and registry.tally.loads["A", "success"] == 3


async def test_a_variant_in_use_is_not_evicted_for_another() -> None:
    async with host().registry() as registry:
        using = await holder(registry, INT8)
        waiting = asyncio.create_task(registry.lease("A").__aenter__())
        await settle()
        assert states(registry, INT8) == ["ready"] and not waiting.done()
        await end(using)
        await asyncio.wait_for(waiting, 5)
        assert states(registry, INT8) == ["unloaded"]


async def test_choosing_loads_nothing_and_looks_at_each_variant_once() -> None:
    made = host()
    looked: list[str] = []
    provide = made._provide

    def counted(key: VariantKey, limits: KvLimits) -> object:
        looked.append(str(key))
        return provide(key, limits)

    made._provide = counted  # type: ignore[method-assign,assignment]
    async with made.registry() as registry:
        assert await registry.choose("A", Wish()) == VariantKey("A") and looked == []
        for _ in range(3):
            assert await registry.choose("A", Wish("int4")) == INT4
        assert looked == ["A", "A[quantization=int4]"] and not made.engines


async def test_a_model_to_be_loaded_at_start_is_not_there_for_a_variants_sake() -> None:
    made = host()
    made.at_start, made.held = {"A"}, {"A"}
    async with made.registry() as registry:
        async with registry.lease(INT4):
            await reaches(registry, "A", State.LOADING)
            assert registry.needs("A")
        made.engine("A").may_load.set()
        async with registry.lease("A"):
            assert not registry.needs("A")


async def test_what_can_not_be_had_is_the_requests_mistake_and_a_broken_file_is_not() -> None:
    made = host()
    made.choices["A"] = Choices(any=True)
    made.impossible[str(FP8)] = "fp8 is for CUDA."
    made.broken = {str(INT8)}
    async with made.registry() as registry:
        with pytest.raises(InvalidRequestError, match=r"A\[quantization=fp8\].*fp8 is for CUDA"):
            await registry.choose("A", Wish("fp8"))
        with pytest.raises(LoadFailedError, match="truncated"):
            await registry.choose("A", Wish("int8"))


async def test_models_that_are_known_to_do_it_are_named() -> None:
    made = FakeHost()
    made.facts["B"] = Facts("int4", "float32")
    async with made.registry() as registry:
        with pytest.raises(InvalidRequestError, match="administrator"):
            await registry.choose("A", Wish("int4"))
        await registry.plan("B")  # now it was looked at
        with pytest.raises(InvalidRequestError, match="Model B would do"):
            await registry.choose("A", Wish("int4"))


async def test_a_wish_that_the_checkpoint_defeats_is_refused_before_any_load() -> None:
    made = FakeHost()
    made.choices["A"] = Choices(any=True)
    made._served = lambda key: Facts("bf16", "transformers")  # type: ignore[method-assign]
    async with made.registry() as registry:
        with pytest.raises(InvalidRequestError, match="can't be served as a KV cache in int8"):
            await registry.choose("A", Wish(None, "int8"))


async def test_counters_of_all_variants_are_there_and_survive_an_unload() -> None:
    made = host()
    async with made.registry() as registry:
        counts: list[tuple[Named, int]] = [("A", 1), (INT4, 10)]
        for name, tokens in counts:
            async with registry.lease(name):
                made.engine(str(name)).stats = EngineStats(generated_tokens=tokens)
        await asyncio.wait_for(await registry.unload(INT4), 5)
        counted = [e.stats.generated_tokens + e.ended_stats.generated_tokens for e in registry.engines("A")]
        assert counted == [1, 10]


async def test_an_unload_is_of_one_variant() -> None:
    async with host().registry() as registry:
        async with registry.lease("A"), registry.lease(INT4):
            pass
        await asyncio.wait_for(await registry.unload("A"), 5)
        assert states(registry, VariantKey("A"), INT4) == ["unloaded", "ready"]
        assert registry.variants("A") == (VariantKey("A"), INT4, INT8) and registry.variants("B") == (
            VariantKey("B"),
        )
