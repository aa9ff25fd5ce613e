"""The models this server offers, by id.

Purpose: what routes need of a model, and the table in which ids are looked up.
Does not know: worker processes (it sees them through `ModelEngine`), HTTP, settings.
Invariant: an id is a key of a table and nothing else; it never becomes a path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from memory_efficient_gpt.engine_info import EngineInfo, EngineStats
from memory_efficient_gpt.errors import ModelLoadError, ModelNotFoundError
from memory_efficient_gpt.request import Request, SequenceEvent
from memory_efficient_gpt_server.errors import DrainingError, ModelLoadingError

if TYPE_CHECKING:
    from memory_efficient_gpt.tokenizer import Tokenizer
    from memory_efficient_gpt_server.registry.owner import Registry


class SequenceEvents(Protocol):
    """Events of all sequences of one request. Ends after the last event of each sequence."""

    def __aiter__(self) -> AsyncIterator[SequenceEvent]: ...

    async def __anext__(self) -> SequenceEvent: ...

    async def aclose(self) -> None:
        """Leave; the request is aborted unless it has ended."""


class ModelEngine(Protocol):
    """An engine somewhere else, as this process sees it. Used from one event loop, never blocks it.

    `state` is "loading", "ready", "draining", "failed" or "closed", `reason` says why; `info` is None until
    it was ready once; `stats` is the present engine's, all zero while there is none, and `ended_stats` adds
    up the counters of those before it; `stalled` is true while it has work but makes no step.
    """

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str | None: ...

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def ended_stats(self) -> EngineStats: ...

    @property
    def stalled(self) -> bool: ...

    def start(self) -> None:
        """Begin to load in the background. Never raises: a failure becomes `state` and `reason`."""

    def submit(self, request: Request) -> SequenceEvents:
        """Start a request. Raises MegptError, or gives events that carry one."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, without further events. Unknown ids are fine."""

    async def close(self, drain_s: float = 0.0) -> None:
        """Give what is aboard `drain_s` seconds, then end it."""


class ModelRegistry(Protocol):
    """Who loads models on demand and keeps them loaded for those who hold a lease."""

    def start(self) -> None:
        """Begin to work."""

    async def close(self, drain_s: float = 0.0) -> None:
        """End every engine."""

    def lease(self, name: str, wait_s: float | None = None) -> AbstractAsyncContextManager[ModelEngine]:
        """Inside, the model is loaded. Entering it waits for that; raises MegptError."""

    def needs(self, model_id: str) -> bool:
        """Whether the server is not ready for want of this model."""


@dataclass(slots=True)
class ServedModel:
    """A model as the API offers it.

    tokenizer_source: the tokenizer, or what loads it once it is needed. generation_defaults: sampling fields
    from the checkpoint's generation_config.json, used when a request leaves the field out. created: Unix time
    in seconds. registry: loads it on demand; None: it is loaded at start and stays. config_vocab_size: of the
    checkpoint, for as long as no engine has told its own; only needed with a registry.
    """

    id: str
    engine: ModelEngine
    tokenizer_source: Tokenizer | Callable[[], Tokenizer]
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    registry: ModelRegistry | None = None
    config_vocab_size: int = 0
    _preparing: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded now (which takes up to a second) unless it was; see `prepare`."""
        if callable(self.tokenizer_source):
            self.tokenizer_source = self.tokenizer_source()
        return self.tokenizer_source

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would be computed."""
        return self.engine.state == "ready" and not self.engine.stalled

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.config_vocab_size if self.engine.info is None else self.engine.info.vocab_size

    async def prepare(self) -> None:
        """Have the tokenizer at hand. Raises OverloadedError or ModelLoadError if it takes no requests.

        All who ask meanwhile share one load. A model under a registry takes requests at any time.
        """
        if self.registry is None:
            self.require_ready()
        async with self._preparing:
            if callable(self.tokenizer_source):
                self.tokenizer_source = await asyncio.to_thread(self.tokenizer_source)

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[EngineInfo]:
        """The loaded model's facts, and it stays loaded inside. Raises as `require_ready`, or the registry's
        errors."""
        if self.registry is None:
            yield self.require_ready()
            return
        async with self.registry.lease(self.id):
            yield self.require_ready()

    def require_warm(self) -> None:
        """Raise ModelLoadingError or ModelLoadError unless it is ready; nothing is loaded."""
        if self.registry is not None and not self.ready and self.engine.state != "failed":
            raise ModelLoadingError(
                f"Model {self.id} is {self.engine.state}, and on_cold is fail. "
                "Leave on_cold out to wait for it."
            )
        self.require_ready()

    def require_ready(self) -> EngineInfo:
        """The loaded model's facts. Raises OverloadedError or ModelLoadError if it takes no requests."""
        engine = self.engine
        if engine.state == "ready" and engine.info is not None:
            return engine.info
        if engine.state == "loading":
            raise ModelLoadingError(f"Model {self.id} is loading. Try again in a few seconds.")
        if engine.state == "failed":
            raise ModelLoadError(f"Model {self.id} could not be loaded; GET /v1/models/{self.id} says why.")
        raise DrainingError("The server is shutting down. Try again later.")

    def why_not_ready(self) -> str | None:
        """One sentence for a health check, or None if it is ready. Tells no paths."""
        if self.engine.state == "ready":
            return f"model {self.id} has work but makes no step" if self.engine.stalled else None
        if self.registry is not None and not self.registry.needs(self.id):
            return None
        return f"model {self.id} is {self.engine.state}"


class ModelCatalog:
    """All models of this server: id -> ServedModel. registry: loads them on demand, if there is a budget."""

    def __init__(self, models: Iterable[ServedModel], registry: Registry | None = None) -> None:
        self.registry = registry
        self._models: dict[str, ServedModel] = {}
        for model in models:
            if model.id in self._models:
                raise ValueError(f"two models have the id {model.id!r}")
            self._models[model.id] = model

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, model_id: str) -> ServedModel:
        """The model of that id. Raises ModelNotFoundError."""
        try:
            return self._models[model_id]
        except KeyError:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelNotFoundError(
                f"There is no model {model_id[:80]!r} here. Models: {known}.", param="model"
            ) from None

    def start(self) -> None:
        """Begin to load every model, or those that the registry loads at start."""
        if self.registry is not None:
            self.registry.start()
            return
        for model in self:
            model.engine.start()

    async def close(self, drain_s: float = 0.0) -> None:
        """End every engine; all get the same `drain_s` seconds."""
        if self.registry is not None:
            await self.registry.close(drain_s)
            return
        async with asyncio.TaskGroup() as group:
            for model in self:
                group.create_task(model.engine.close(drain_s))
