"""Engines for tests of the registry's owner: loaded when the test says so, and answering by a script.

Purpose: `LoadableEngine` without processes.
Does not know: the registry.
Invariant: as real engines, one is ready only after `finish_load`, and gone when `close` has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from memory_efficient_gpt.engine_info import SleepReport
from memory_efficient_gpt.errors import CheckpointError, ConfigError, EngineFailedError, ModelLoadError
from memory_efficient_gpt_server.registry.choice import Choices, Facts, facts_of
from memory_efficient_gpt_server.registry.hosted import HostedModel, Provision
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, KvLimits, ModelEntry, VariantKey
from tests.server.scripted_model import INFO, ScriptedEngine

FACTS = Facts("bf16", INFO.kv_cache_dtype)
"""How fake models are served unless their variant says otherwise."""


class FakeEngine(ScriptedEngine):
    """A scripted engine with a load and an end. weights_bytes: what it says it takes once it is ready.

    kv: bytes of a KV cache that can be moved, and most of them; those in `kv_in_use` it keeps. kv_limits: all
    that it was told; told: these and its sleeps in their order. It sleeps, wakes and answers to limits once
    `may_move` is set.
    """

    def __init__(
        self,
        weights_bytes: int,
        *,
        held: bool = False,
        fails: str | None = None,
        facts: Facts = FACTS,
        kv: tuple[int, int] | None = None,
        kv_least: int = 0,
    ) -> None:
        super().__init__([5, 6, 7], state="loading", info=None, reason="not started")
        self.pid: int | None = None
        self.started = False
        self.may_load = asyncio.Event()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.may_move = asyncio.Event()
        self.may_move.set()
        self.fails = fails
        self._weights_bytes = weights_bytes
        self._facts = facts
        self._kv = kv
        self._kv_least = kv_least
        self.kv_in_use = 0
        self.kv_limits: list[int] = []
        self.told: list[int | str] = []
        if not held:
            self.may_load.set()

    def start(self) -> None:
        assert not self.started, "started twice"
        self.started, self.pid = True, 4321

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        assert self.started
        await self.may_load.wait()
        if self.fails is not None:
            self.state, self.reason = "failed", self.fails
            raise ModelLoadError(f"it is failed: {self.fails}")
        self.info = replace(
            INFO,
            weights_bytes=self._weights_bytes,
            kv_cache_bytes=0,
            quantization=None if self._facts.quantization == "bf16" else self._facts.quantization,
            kv_cache_dtype=self._facts.kv_cache_dtype,
        )
        if self._kv is not None:
            first, most = self._kv
            self.info = replace(
                self.info,
                kv_cache_bytes=first,
                num_kv_blocks=first - 1,
                kv_block_bytes=1,
                kv_least_bytes=min(first, self._kv_least),
                kv_most_bytes=most,
            )
        self.state, self.reason = "ready", None

    async def sleep(self) -> SleepReport:
        assert self.state == "ready" and self.num_running == 0, "put to sleep at work"
        self.state = "asleep"
        self.told.append("sleep")
        await self._move()
        return SleepReport(parked_bytes=self._weights_bytes, device_bytes=3, kv_bytes=1)

    async def wake(self) -> None:
        assert self.state == "asleep"
        self.told.append("wake")
        await self._move()
        self.state = "ready"

    async def _move(self) -> None:
        await self.may_move.wait()
        if self.fails is not None:
            self.state, self.reason = "failed", self.fails
            raise EngineFailedError(self.fails)

    async def set_kv_limit(self, num_bytes: int) -> int:
        self.kv_limits.append(num_bytes)
        self.told.append(num_bytes)
        await self.may_move.wait()
        if self.closed:
            raise ModelLoadError("it is closed.")
        return max(self.kv_in_use, num_bytes)

    async def close(self, drain_s: float = 0.0) -> None:
        await self.may_close.wait()
        await super().close(drain_s)
        self.closed = True


class FakeHost:
    """Models A, B and C of 60 bytes on a device of 100, unless told otherwise.

    All of these go by a model's id, or by a variant's name. held: loads wait for `finish`. broken:
    checkpoints that can't be looked at. impossible: variants that can't be had, and why. choices: what
    requests may choose, and facts: how it is served, both by model id. A variant has the size of its model
    unless `sizes` says otherwise. kv: as FakeEngine's, by model id, kv_least: what one request needs of it,
    and sleepy: which of those models can give it back asleep. host_budget: the device is a GPU then, whose
    models can sleep in so much host memory.
    """

    def __init__(
        self,
        *,
        sizes: dict[str, int] | None = None,
        budget: int = 100,
        host_budget: int | None = None,
        **policy: Any,
    ) -> None:
        self.engines: defaultdict[str, list[FakeEngine]] = defaultdict(list)
        self.held: set[str] = set()
        self.fails: dict[str, str] = {}
        self.broken: set[str] = set()
        self.kv: dict[str, tuple[int, int]] = {}
        self.kv_least: dict[str, int] = {}
        self.sleepy: set[str] = set()
        self.sizes = {"A": 60, "B": 60, "C": 60} | (sizes or {})
        self.impossible: dict[str, str] = {}
        self.facts: dict[str, Facts] = {}
        self.choices: dict[str, Choices] = {}
        self.entries: dict[str, dict[str, Any]] = defaultdict(dict)
        self.at_start: set[str] = set()
        self._budgets = {HOST: Budget(budget)}
        self._device = HOST
        if host_budget is not None:
            self._device = "cuda:0"
            self._budgets = {"cuda:0": Budget(budget), HOST: Budget(host_budget)}
        self._policy = Policy(**policy)

    @contextlib.asynccontextmanager
    async def registry(self) -> AsyncIterator[Registry]:
        """A running registry, whose state is proved after the test."""
        made = self.make()
        made.start()
        try:
            yield made
            made.state.check_integrity()
        finally:
            await made.close()
        assert all(engine.closed for engines in self.engines.values() for engine in engines)

    def make(self) -> Registry:
        """A registry that is not started."""
        models = [name for name in self.sizes if "[" not in name]
        return Registry(map(self.hosted, models), self._budgets, self._policy)

    def engine(self, model_id: str) -> FakeEngine:
        """The latest of a model, or of a variant by its name."""
        return self.engines[model_id][-1]

    def hosted(self, model_id: str) -> HostedModel:
        """What the registry is told of one of `sizes`."""
        entry = ModelEntry(**({"id": model_id, "source": "x"} | self.entries[model_id]))
        choices = self.choices.get(model_id, Choices())
        return HostedModel(entry, VariantKey(model_id), self._provide, model_id in self.at_start, choices)

    def _provide(self, key: VariantKey, limits: KvLimits) -> Provision:
        name = str(key)
        if name in self.broken:
            raise CheckpointError("weights.safetensors is truncated. Download it again.")
        if name in self.impossible:
            raise ConfigError([self.impossible[name]])
        first, most = self._kv(key, limits) or (0, None)
        least = None if most is None else min(first, self.kv_least.get(key.model_id, 0))
        estimate = Estimate(
            device=self._device,
            weights_bytes=self._size(key),
            kv_bytes=first,
            kv_least_bytes=least,
            kv_most_bytes=most,
            can_sleep=self._device != HOST or key.model_id in self.sleepy,
        )
        return Provision(estimate, lambda: self._make(key, limits), self._served(key))

    def _kv(self, key: VariantKey, limits: KvLimits) -> tuple[int, int] | None:
        """Where it begins and how far it may grow, as real models do within limits."""
        if key.model_id not in self.kv:
            return None
        first, most = self.kv[key.model_id]
        most = most if limits.hard_bytes is None else min(most, limits.hard_bytes)
        return min(max(first, limits.soft_bytes or 0), most), most

    def _served(self, key: VariantKey) -> Facts:
        return facts_of(key, self.facts.get(key.model_id, FACTS))

    def _size(self, key: VariantKey) -> int:
        return self.sizes.get(str(key), self.sizes[key.model_id])

    def _make(self, key: VariantKey, limits: KvLimits) -> FakeEngine:
        name = str(key)
        engine = FakeEngine(
            self._size(key),
            held=name in self.held,
            fails=self.fails.get(name),
            facts=self._served(key),
            kv=self._kv(key, limits),
            kv_least=self.kv_least.get(key.model_id, 0),
        )
        self.engines[name].append(engine)
        return engine


async def reaches(registry: Registry, model_id: str, state: State, timeout_s: float = 5.0) -> None:
    """Wait until a model is in a state."""
    async with asyncio.timeout(timeout_s):
        while registry.engine(model_id).state != state:  # noqa: ASYNC110 - states have no event
            await asyncio.sleep(0.001)
