"""Models' engines as the rest of the server sees them, whether they are loaded or not.

Purpose: one lasting `ModelEngine` for each variant over the engines that come and go behind it.
Does not know: when or why a model is loaded.
Invariant: counters never fall: what closed engines have counted is kept.
"""

from __future__ import annotations

from collections.abc import Callable

from memory_efficient_gpt.engine_info import EngineInfo, EngineStats
from memory_efficient_gpt.request import Request
from memory_efficient_gpt_server.counters import add_counters
from memory_efficient_gpt_server.errors import ModelLoadingError
from memory_efficient_gpt_server.models import ModelEngine, SequenceEvents
from memory_efficient_gpt_server.registry.states import Life, State
from memory_efficient_gpt_server.registry.variants import VariantKey


class ManagedEngine:
    """Implements `ModelEngine`. `life` tells where the model is, `present` its engine while it has one."""

    def __init__(
        self, model_id: str, life: Callable[[], Life], present: Callable[[], ModelEngine | None]
    ) -> None:
        self._id = model_id
        self._life = life
        self._present = present
        self._last_info: EngineInfo | None = None
        self._counted = EngineStats()

    @property
    def state(self) -> str:
        """The registry's word, or the engine's own while it recovers from a crash."""
        life, engine = self._life(), self._present()
        if life.state is State.READY and engine is not None:
            return str(engine.state)
        return str(life.state)

    @property
    def reason(self) -> str | None:
        """Why, or what it is doing."""
        engine = self._present()
        return self._life().reason or (engine.reason if engine is not None else None)

    @property
    def info(self) -> EngineInfo | None:
        """The facts of the present engine, else of the last one."""
        engine = self._present()
        return (engine.info if engine is not None else None) or self._last_info

    @property
    def stats(self) -> EngineStats:
        """The present engine's; all zero while there is none."""
        engine = self._present()
        return EngineStats() if engine is None else engine.stats

    @property
    def ended_stats(self) -> EngineStats:
        """What ended workers have counted."""
        engine = self._present()
        return self._counted if engine is None else add_counters(self._counted, engine.ended_stats)

    @property
    def stalled(self) -> bool:
        """Whether it has work but makes no step."""
        engine = self._present()
        return engine is not None and engine.stalled

    def start(self) -> None:
        """Nothing: the registry starts engines."""

    def submit(self, request: Request) -> SequenceEvents:
        """Hand a request to the present engine. Raises MegptError."""
        engine = self._present()
        if engine is None:
            raise ModelLoadingError(f"Model {self._id} is not loaded. Try again in a few seconds.")
        return engine.submit(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, without further events."""
        engine = self._present()
        if engine is not None:
            engine.abort(request_id, index)

    async def close(self, drain_s: float = 0.0) -> None:
        """Nothing: the registry closes engines."""

    def outlived(self, engine: ModelEngine) -> None:
        """Keep what a closed engine has told."""
        self._last_info = engine.info or self._last_info
        self._counted = add_counters(add_counters(self._counted, engine.ended_stats), engine.stats)


class ManagedEngines:
    """Those of all variants that were ever asked for. life, present: as ManagedEngine's, by key."""

    def __init__(
        self, life: Callable[[VariantKey], Life], present: Callable[[VariantKey], ModelEngine | None]
    ) -> None:
        self._life = life
        self._present = present
        self._by_key: dict[VariantKey, ManagedEngine] = {}

    def of(self, key: VariantKey) -> ManagedEngine:
        """The variant's, loaded or not."""
        if key not in self._by_key:
            self._by_key[key] = ManagedEngine(str(key), lambda: self._life(key), lambda: self._present(key))
        return self._by_key[key]

    def of_model(self, model_id: str) -> tuple[ManagedEngine, ...]:
        """Of all its variants that were asked for."""
        return tuple([engine for key, engine in self._by_key.items() if key.model_id == model_id])

    def outlived(self, key: VariantKey, engine: ModelEngine) -> None:
        """Keep what a closed engine of a variant has told."""
        self.of(key).outlived(engine)

    def forget(self, model_id: str) -> None:
        """The model is gone."""
        for key in [key for key in self._by_key if key.model_id == model_id]:
            del self._by_key[key]
