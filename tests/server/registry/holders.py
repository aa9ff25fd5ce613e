"""Tasks that hold leases, for the tests of the owner."""

from __future__ import annotations

import asyncio
import contextlib

from memory_efficient_gpt_server.registry.owner import Named, Registry


async def leased(registry: Registry, model_id: Named, wait_s: float | None = None) -> None:
    async with registry.lease(model_id, wait_s):
        pass


async def hold(registry: Registry, model_id: Named, entered: asyncio.Event) -> None:
    """Hold a lease until cancelled."""
    async with registry.lease(model_id):
        entered.set()
        await asyncio.Event().wait()


async def holder(registry: Registry, model_id: Named) -> asyncio.Task[None]:
    """A task that holds a lease."""
    entered = asyncio.Event()
    task = asyncio.create_task(hold(registry, model_id, entered))
    await entered.wait()
    return task


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def settle() -> None:
    """Let the owner work off its inbox."""
    for _ in range(10):
        await asyncio.sleep(0)
