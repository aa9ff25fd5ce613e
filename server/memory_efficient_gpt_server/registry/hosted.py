"""What the owner is given of each model, and what it needs of an engine that it starts.

Purpose: the seam between the registry and whatever runs models.
Does not know: settings, worker processes.
Invariant: a hosted model's key never changes and has no options; each engine is started once and closed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from memory_efficient_gpt.engine_info import SleepReport
from memory_efficient_gpt_server.models import ModelEngine
from memory_efficient_gpt_server.registry.choice import NO_CHOICES, UNQUANTIZED_FACTS, Choices, Facts
from memory_efficient_gpt_server.registry.variants import Estimate, KvLimits, ModelEntry, VariantKey


class LoadableEngine(ModelEngine, Protocol):
    """An engine that is loaded once and gone when `close` returns. It may sleep in between."""

    @property
    def pid(self) -> int | None:
        """Its process while there is one."""

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Return once it is ready. Raises ModelLoadError if it failed or was closed, TimeoutError."""

    async def sleep(self) -> SleepReport:
        """Give memory back while it has no requests. Raises MegptError; it is to be closed then."""

    async def wake(self) -> None:
        """Take the memory back and requests again. Raises MegptError; it is to be closed then."""

    async def set_kv_limit(self, num_bytes: int) -> int:
        """Let its KV cache have so many bytes; returns what it can hold then. Raises ModelLoadError."""


@dataclass(frozen=True, slots=True)
class Provision:
    """What a variant takes, how to make an engine (not started) that takes it, and how it will be served."""

    estimate: Estimate
    make_engine: Callable[[], LoadableEngine]
    facts: Facts = UNQUANTIZED_FACTS


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model that can be loaded.

    key: the model as it is configured. provide: looks at the checkpoint, for any variant of the model under
    limits of its KV cache, which may take a second; called in a thread, and not again for the same once it
    has succeeded. Raises MegptError. at_start: whether the model is loaded (as configured) when the server
    starts, rather than when it is first asked for. choices: which other variants requests may choose.
    """

    entry: ModelEntry
    key: VariantKey
    provide: Callable[[VariantKey, KvLimits], Provision]
    at_start: bool = False
    choices: Choices = NO_CHOICES

    @property
    def id(self) -> str:
        """Its id in the API."""
        return self.entry.id
