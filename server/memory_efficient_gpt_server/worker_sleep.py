"""A worker that is told to sleep or to wake, and its answer.

Purpose: one question at a time to one worker, answered, or ended with the worker.
Does not know: models' states, who wants it.
Invariant: whoever asks gets the answer or EngineFailedError; a worker that does not answer is killed.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from memory_efficient_gpt.engine_info import EngineInfo, SleepReport
from memory_efficient_gpt.errors import EngineFailedError
from memory_efficient_gpt.frames import Sleep, Wake
from memory_efficient_gpt_server.worker_process import WorkerProcess, how_it_ended

LEAST_S: Final = 10.0
SLOWEST_BYTES_PER_S: Final = 5e8
"""Copies to and from memory that is not page-locked are several times faster."""


class SleepSwitch:
    """Asks; `answered` is to be called with what the worker says. least_s: what any worker has to answer."""

    def __init__(self, least_s: float = LEAST_S) -> None:
        self._least_s = least_s
        self._answer: asyncio.Future[SleepReport] | None = None

    async def ask(self, process: WorkerProcess, wish: Sleep | Wake, info: EngineInfo | None) -> SleepReport:
        """What the worker answers to Sleep; an empty report for Wake. Raises EngineFailedError.

        info: of the model, whose weights it may have to copy first.
        """
        weights_bytes = 0 if info is None else info.weights_bytes
        longest_s = self._least_s + weights_bytes / SLOWEST_BYTES_PER_S
        answer: asyncio.Future[SleepReport] = asyncio.get_running_loop().create_future()
        self._answer = answer
        process.send(wish)
        news: set[asyncio.Future[Any]] = {answer, process.ended}
        await asyncio.wait(news, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        what = "falling asleep" if isinstance(wish, Sleep) else "waking"
        if process.ended.done():
            raise EngineFailedError(f"its worker {how_it_ended(process.ended.result())} while {what}")
        process.kill()
        raise EngineFailedError(f"its worker was killed, as {what} took longer than {longest_s:.1f} s")

    def answered(self, report: SleepReport) -> None:
        """The worker has done it. An answer that nobody waits for any more is dropped."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(report)
