"""A lease as its holder sees it: `async with` it, and the model stays loaded inside.

Purpose: ask, hold, give back, whatever happens to the task in between.
Does not know: states, memory, workers.
Invariant: whoever entered leaves exactly once; work whose lease was aborted ends with the abort's error.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.models import ModelEngine
from memory_efficient_gpt_server.registry.variants import VariantKey


class Lender(Protocol):
    """Who gives leases and takes them back."""

    async def grant(self, lease: Lease) -> ModelEngine:
        """Wait for the lease. Raises MegptError; cancelled, it asks for nothing any more."""

    def take_back(self, lease: Lease) -> None:
        """The work under the lease has ended."""


class Lease:
    """One lease on one model, for one task. Entering it waits until the model is ready."""

    def __init__(self, lender: Lender, key: VariantKey, wait_s: float | None) -> None:
        self.key = key
        self.wait_s = wait_s
        self.id: int | None = None
        self._lender = lender
        self._error: MegptError | None = None
        self._task: asyncio.Task[object] | None = None

    async def __aenter__(self) -> ModelEngine:
        self._task = asyncio.current_task()
        try:
            return await self._lender.grant(self)
        except asyncio.CancelledError:
            self._raise_if_aborted()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lender.take_back(self)
        if kind is asyncio.CancelledError:
            self._raise_if_aborted()
        elif self._error is not None and self._task is not None:  # the work made something else of the abort
            self._task.uncancel()

    def abort(self, error: MegptError) -> None:
        """End the work under the lease with `error`; the first call counts. Not for the holder's own task."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()

    def _raise_if_aborted(self) -> None:
        if self._error is not None and self._task is not None and self._task.uncancel() == 0:
            raise self._error from None
