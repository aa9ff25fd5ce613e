"""What each variant takes, found out once.

Purpose: call `HostedModel.provide` off the event loop, one call however many ask, for the limits that a
model's KV cache has at that time.
Does not know: checkpoints, memory.
Invariant: a failure is told to those who asked and not remembered: a repaired folder is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from memory_efficient_gpt.errors import MegptError, ModelNotFoundError
from memory_efficient_gpt_server.errors import LoadFailedError
from memory_efficient_gpt_server.registry.hosted import HostedModel, Provision
from memory_efficient_gpt_server.registry.variants import (
    HOST,
    NO_LIMITS,
    Estimate,
    KvLimits,
    VariantKey,
)

UNKNOWN: Final = Estimate(device=HOST, weights_bytes=0)
"""What stands for the estimate of a checkpoint that can't be looked at."""


class Provisions:
    """Those that are known, by key. hosted: by model id. Used from one event loop."""

    def __init__(self, hosted: Mapping[str, HostedModel]) -> None:
        self._hosted = dict(hosted)
        self._limits = {model.id: model.entry.kv_limits for model in hosted.values()}
        self._known: dict[VariantKey, Provision] = {}
        self._asked: dict[VariantKey, asyncio.Task[Provision]] = {}

    def host(self, model: HostedModel) -> None:
        """One more model."""
        self._hosted[model.id] = model
        self._limits[model.id] = model.entry.kv_limits

    def forget(self, model_id: str) -> None:
        """A model is gone. What is being found out about it is for those only who have asked."""
        del self._hosted[model_id], self._limits[model_id]
        for key in [key for key in (*self._known, *self._asked) if key.model_id == model_id]:
            self._known.pop(key, None)
            self._asked.pop(key, None)

    def known(self, key: VariantKey) -> Provision | None:
        """What was found out so far."""
        return self._known.get(key)

    async def estimate(self, key: VariantKey) -> tuple[Estimate, str | None]:
        """What the variant takes; of an unusable checkpoint nothing, and why. Raises ModelNotFoundError."""
        try:
            return (await self.of(key)).estimate, None
        except LoadFailedError as error:
            cause = error.__cause__
            return UNKNOWN, cause.message if isinstance(cause, MegptError) else error.message

    async def of(self, key: VariantKey) -> Provision:
        """The provision. Raises LoadFailedError if the checkpoint is unusable, ModelNotFoundError."""
        if key in self._known:
            return self._known[key]
        if key.model_id not in self._hosted:  # removed since it was looked up
            raise ModelNotFoundError(f"There is no model {key.model_id!r} here.", param="model")
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.create_task(self._look_at(key))
            task.add_done_callback(lambda done: self._found(key, done))
        try:
            return await asyncio.shield(task)
        except MegptError as error:
            raise LoadFailedError(f"Model {key} can't be loaded: {error.message}") from error

    async def under(self, model_id: str, limits: KvLimits) -> dict[VariantKey, Provision]:
        """What those of a model's variants that are known would take with other limits, and the model as it
        is configured. Raises MegptError."""
        model, found = self._hosted[model_id], dict[VariantKey, Provision]()
        while left := [
            key for key in (model.key, *self._known) if key.model_id == model_id and key not in found
        ]:
            found[left[0]] = await asyncio.to_thread(model.provide, left[0], limits)
        return found

    def renew(self, model_id: str, limits: KvLimits, found: Mapping[VariantKey, Provision]) -> None:
        """From now on the model has these limits; `found` is what `under` gave."""
        self._limits[model_id] = limits
        self._known.update(found)

    async def _look_at(self, key: VariantKey) -> Provision:
        while True:
            limits = self._limits.get(key.model_id, NO_LIMITS)
            found = await asyncio.to_thread(self._hosted[key.model_id].provide, key, limits)
            if self._limits.get(key.model_id, limits) == limits:
                return found

    def _found(self, key: VariantKey, task: asyncio.Task[Provision]) -> None:
        if self._asked.get(key) is not task:
            return  # the model is gone, and perhaps another one has its id
        del self._asked[key]
        if not task.cancelled() and task.exception() is None:
            self._known[key] = task.result()
