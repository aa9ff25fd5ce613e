"""The models this server offers, by id.

Purpose: what routes need of a model, and the table in which ids are looked up.
Does not know: worker processes (it sees them through `ModelEngine`), HTTP, settings.
Invariant: an id is a key of a table and nothing else; it never becomes a path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from memory_efficient_gpt.engine_info import EngineInfo, EngineStats
from memory_efficient_gpt.errors import ModelLoadError, ModelNotFoundError
from memory_efficient_gpt.request import Request, SequenceEvent
from memory_efficient_gpt_server.errors import LoadFailedError
from memory_efficient_gpt_server.served_variant import ServedVariant, takes_requests

if TYPE_CHECKING:
    from memory_efficient_gpt.tokenizer import Tokenizer
    from memory_efficient_gpt_server.model_settings import ModelSettings
    from memory_efficient_gpt_server.registry.choice import Wish
    from memory_efficient_gpt_server.registry.hosted import HostedModel
    from memory_efficient_gpt_server.registry.owner import Registry
    from memory_efficient_gpt_server.registry.variants import VariantKey


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

    async def choose(self, name: str, wish: Wish) -> VariantKey:
        """The variant of a model that does what is wished for. Raises MegptError."""

    def engine(self, name: str | VariantKey) -> ModelEngine:
        """A model's engine as configured, or a variant's; loaded or not."""

    def engines(self, model_id: str) -> Sequence[ModelEngine]:
        """Those of all variants of a model that were ever used; the first is that of the configured one."""

    def lease(
        self, name: str | VariantKey, wait_s: float | None = None
    ) -> AbstractAsyncContextManager[ModelEngine]:
        """Inside, the variant is loaded. Entering it waits for that; raises MegptError."""

    def needs(self, model_id: str) -> bool:
        """Whether the server is not ready for want of this model."""


class ModelMaker(Protocol):
    """Makes models while the server runs."""

    def make(
        self, model: ModelSettings, budgets: Mapping[str, int]
    ) -> tuple[HostedModel, Callable[[Registry], ServedModel]]:
        """What the registry needs of a model, and what makes its offer once the registry knows it.

        Takes its time (it may download a hub model): call it in a thread. budgets: bytes by device.
        Raises ModelNotFoundError, CheckpointError; ConfigError for a device that is not there or has none.
        """


@dataclass(slots=True)
class ServedModel:
    """A model as the API offers it. `engine` serves it as it is configured.

    tokenizer_source: the tokenizer, or what loads it once it is needed. generation_defaults: sampling fields
    from the checkpoint's generation_config.json, used when a request leaves the field out. created: Unix time
    in seconds. registry: loads it on demand; None: it is loaded at start and stays. config_vocab_size: of the
    checkpoint, for as long as no engine has told its own; only needed with a registry. aliases: other names
    that requests may use.
    """

    id: str
    engine: ModelEngine
    tokenizer_source: Tokenizer | Callable[[], Tokenizer]
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    registry: ModelRegistry | None = None
    config_vocab_size: int = 0
    aliases: tuple[str, ...] = ()
    _preparing: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded now (which takes up to a second) unless it was; see `prepare`."""
        if callable(self.tokenizer_source):
            self.tokenizer_source = self.tokenizer_source()
        return self.tokenizer_source

    @property
    def engines(self) -> Sequence[ModelEngine]:
        """Of all its variants, that of the configured one first."""
        return (self.engine,) if self.registry is None else self.registry.engines(self.id)

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would be computed, at least by one of its variants."""
        return any(takes_requests(engine) for engine in self.engines)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.config_vocab_size if self.engine.info is None else self.engine.info.vocab_size

    async def prepare(self) -> None:
        """Have the tokenizer at hand. Raises OverloadedError or ModelLoadError if it takes no requests, or if
        there is none.

        All who ask meanwhile share one load. A model under a registry takes requests at any time.
        """
        if self.registry is None:
            self.as_configured.require_ready()
        async with self._preparing:
            if callable(self.tokenizer_source):
                self.tokenizer_source = await self._load_tokenizer(self.tokenizer_source)

    async def _load_tokenizer(self, load: Callable[[], Tokenizer]) -> Tokenizer:
        """Of a model under a registry it is a part of what a request has loaded, and fails as that does."""
        try:
            return await asyncio.to_thread(load)
        except ModelLoadError as error:
            if self.registry is None:
                raise
            raise LoadFailedError(f"Model {self.id} can't be loaded: {error.message}") from error

    @property
    def as_configured(self) -> ServedVariant:
        """What a request gets that asks for nothing special."""
        return ServedVariant(self.id, self.engine, self.registry)

    async def choose(self, wish: Wish) -> ServedVariant:
        """The variant that does what is wished for; without a registry there is one. Raises MegptError."""
        if self.registry is None or not wish:
            return self.as_configured
        key = await self.registry.choose(self.id, wish)
        return ServedVariant(self.id, self.registry.engine(key), self.registry, key)

    def why_not_ready(self) -> str | None:
        """One sentence for a health check, or None if it is ready. Tells no paths."""
        if any(engine.state == "ready" and engine.stalled for engine in self.engines):
            return f"model {self.id} has work but makes no step"
        if self.engine.state == "ready":
            return None
        if self.registry is not None and not self.registry.needs(self.id):
            return None
        return f"model {self.id} is {self.engine.state}"


class ModelCatalog:
    """All models of this server: id -> ServedModel. registry: loads them on demand, if there is a budget.
    maker: makes more of them while the server runs."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        registry: Registry | None = None,
        maker: ModelMaker | None = None,
    ) -> None:
        self.registry = registry
        self.maker = maker
        self._models: dict[str, ServedModel] = {}
        self._by_alias: dict[str, ServedModel] = {}
        for model in models:
            if model.id in self._models:
                raise ValueError(f"two models have the id {model.id!r}")
            self.add(model)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> ServedModel:
        """The model of that id or alias. Raises ModelNotFoundError."""
        model = self._models.get(name) or self._by_alias.get(name)
        if model is None:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelNotFoundError(f"There is no model {name[:80]!r} here. Models: {known}.", param="model")
        return model

    def add(self, model: ServedModel) -> None:
        """Offer one more model, whose id and aliases must be free."""
        assert model.id not in self._models, f"{model.id} is there already"
        self._models[model.id] = model
        self._by_alias |= dict.fromkeys(model.aliases, model)

    def remove(self, model_id: str) -> None:
        """Offer a model no more; unknown ones are fine."""
        model = self._models.pop(model_id, None)
        for alias in model.aliases if model is not None else ():
            del self._by_alias[alias]

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
