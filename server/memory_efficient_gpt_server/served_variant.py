"""One variant of a model, as one request uses it.

Purpose: wait for it, keep it loaded, and say why it takes no requests.
Does not know: which variants there are, tokenizers, HTTP.
Invariant: inside a lease the engine is ready, or entering it has failed with the reason.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from memory_efficient_gpt.errors import ModelLoadError
from memory_efficient_gpt_server.errors import ModelLoadingError, ModelNotLoadedError, shutting_down

if TYPE_CHECKING:
    from memory_efficient_gpt.engine_info import EngineInfo
    from memory_efficient_gpt_server.models import ModelEngine, ModelRegistry
    from memory_efficient_gpt_server.registry.variants import VariantKey


_ON_THE_WAY: Final = frozenset({"loading", "waking", "queued", "ready"})
"""States in which a model takes requests again by itself; a ready one makes no steps at present."""


def takes_requests(engine: ModelEngine) -> bool:
    """Whether a request submitted now would be computed."""
    return engine.state == "ready" and not engine.stalled


@dataclass(frozen=True, slots=True)
class ServedVariant:
    """registry: loads it on demand; None: it is loaded at start and stays. key: None: as configured."""

    model_id: str
    engine: ModelEngine
    registry: ModelRegistry | None = None
    key: VariantKey | None = None

    @property
    def name(self) -> str:
        """For people: the model's id, with what is special about the variant."""
        return self.model_id if self.key is None else str(self.key)

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[EngineInfo]:
        """The loaded variant's facts, and it stays loaded inside.

        Raises as `require_ready`, or the registry's errors.
        """
        if self.registry is None:
            yield self.require_ready()
            return
        async with self.registry.lease(self.model_id if self.key is None else self.key) as engine:
            # It may have been told to leave since the lease was granted: it finishes its work first. Or its
            # worker has died since: the next one takes what is submitted.
            known = engine.info if engine.state in ("draining", "loading") else None
            yield known or self.require_ready()

    def require_warm(self) -> None:
        """Raise ModelLoadingError or ModelLoadError unless it is ready; nothing is loaded."""
        if self.registry is not None and not takes_requests(self.engine) and self.engine.state != "failed":
            coming = self.engine.state in _ON_THE_WAY
            raise (ModelLoadingError if coming else ModelNotLoadedError)(
                f"Model {self.name} is {self.engine.state}, and on_cold is fail. "
                "Leave on_cold out to wait for it."
            )
        self.require_ready()

    def require_ready(self) -> EngineInfo:
        """The loaded variant's facts. Raises OverloadedError or ModelLoadError if it takes no requests."""
        engine = self.engine
        if engine.state == "ready" and engine.info is not None:
            return engine.info
        if engine.state == "loading":
            raise ModelLoadingError(f"Model {self.name} is loading. Try again in a few seconds.")
        if engine.state == "failed":
            raise ModelLoadError(
                f"Model {self.name} could not be loaded; GET /v1/models/{self.model_id} says why."
            )
        raise shutting_down()
