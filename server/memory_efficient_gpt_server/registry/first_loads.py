"""What is loaded when the server starts, and whether it was.

Purpose: the order of the first loads, and which of them the server is not ready without.
Does not know: how models are loaded, HTTP.
Invariant: a model counts as loaded once it was, though it may have left since.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.registry.hosted import HostedModel
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import VariantKey

logger = logging.getLogger(__name__)


class FirstLoads:
    """Of those of `models` that are to be loaded at start."""

    def __init__(self, models: Iterable[HostedModel]) -> None:
        self._models = {model.key: model for model in models if model.at_start}
        self._loaded: set[VariantKey] = set()

    def loaded(self, key: VariantKey) -> None:
        """A variant has become ready."""
        self._loaded.add(key)

    def forget(self, model_id: str) -> None:
        """The model is gone; one that gets its id later is no first load."""
        self._models = {key: model for key, model in self._models.items() if key.model_id != model_id}

    def due(self, key: VariantKey, state: State) -> bool:
        """Whether the variant, now in `state`, should have been loaded, and never was or has failed."""
        return key in self._models and (key not in self._loaded or state is State.FAILED)

    async def begin(self, load: Callable[[str], Awaitable[object]]) -> None:
        """Have them loaded by id: the pinned first, then by priority."""
        for model in sorted(self._models.values(), key=lambda m: (not m.entry.pinned, -m.entry.priority)):
            try:
                await load(model.id)
            except MegptError as error:
                logger.error("%s is not loaded at start: %s", model.id, error.message)
