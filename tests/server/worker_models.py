"""Models in real worker processes with a scripted engine, and what tests do to them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.request import Request, SequenceEvent
from memory_efficient_gpt_server.event_stream import EventStream
from memory_efficient_gpt_server.supervision import RestartRule
from memory_efficient_gpt_server.workers import WorkerModel
from tests.engine.scripted_engine import load_scripted


class EagerRestarts(RestartRule):
    """The usual rule without the waiting."""

    def died(self, now_s: float, *, ready_for_s: float) -> float | None:
        return None if super().died(now_s, ready_for_s=ready_for_s) is None else 0.0


@asynccontextmanager
async def serving(
    name: str = "scripted", *, ready: bool = True, **options: Any
) -> AsyncIterator[WorkerModel]:
    model = WorkerModel(EngineConfig(model=name), load=load_scripted, restart_rule=EagerRestarts, **options)
    model.start()
    try:
        if ready:
            await model.wait_ready(30)
        yield model
    finally:
        await model.close()


async def answer(model: WorkerModel, what: Request) -> list[SequenceEvent]:
    return [event async for event in model.submit(what)]


async def rest(stream: EventStream) -> list[SequenceEvent]:
    return [event async for event in stream]


def kill(model: WorkerModel) -> None:
    assert model.pid is not None
    os.kill(model.pid, signal.SIGKILL)


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s
        await asyncio.sleep(0.005)
    return time.monotonic() - started


def tokens(events: list[SequenceEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]
