"""What the registry's metrics say of waits and of wrong estimates."""

from __future__ import annotations

import pytest

from memory_efficient_gpt_server.errors import ModelLoadingError
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey
from memory_efficient_gpt_server.registry_metrics import registry_metrics
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, leased


def value(registry: Registry, name: str, model: str) -> float | None:
    """A sample of a model; None if there is none."""
    samples = [sample for family in registry_metrics(registry) for sample in family.samples]
    found = [s.value for s in samples if s.name == f"megpt_{name}" and s.labels.get("model_name") == model]
    return found[0] if found else None


async def test_only_requests_that_found_their_model_not_ready_have_waited() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await leased(registry, "A")
        await leased(registry, "A")
        assert value(registry, "load_queue_wait_seconds_count", "A") == 1


async def test_a_request_that_was_refused_has_waited_too() -> None:
    host = FakeHost()
    host.held = {"A"}
    async with host.registry() as registry:
        await registry.load("A")
        await reaches(registry, "A", State.LOADING)
        with pytest.raises(ModelLoadingError):
            await leased(registry, "A", wait_s=0.05)
        assert value(registry, "load_queue_wait_seconds_count", "A") == 1
        assert (value(registry, "load_queue_wait_seconds_sum", "A") or 0) >= 0.05


async def test_the_error_of_an_estimate_is_that_of_the_variant_that_is_furthest_off() -> None:
    host = FakeHost(sizes={"A": 20, "A[quantization=int4]": 20}, budget=200)
    host.held = {"A", "A[quantization=int4]"}
    variant = VariantKey("A", "int4")
    async with host.registry() as registry:
        assert value(registry, "model_estimate_error_ratio", "A") is None
        for key, took in ((VariantKey("A"), 21), (variant, 15)):
            operation = await registry.load(key)
            host.engine(str(key))._weights_bytes = took
            host.engine(str(key)).may_load.set()
            await operation
        assert value(registry, "model_estimate_error_ratio", "A") == pytest.approx(-0.25)
        using = await holder(registry, "A")
        assert value(registry, "model_leases", "A") == 1
        await end(using)
