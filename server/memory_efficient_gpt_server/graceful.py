"""uvicorn, stopped gracefully.

Purpose: what signals do, and the HTTP parser's settings.
Does not know: routes, models.
Invariant: after the first SIGTERM or SIGINT new requests are refused with 503 while the running ones go on,
for `drain_s` seconds at most; only then are connections closed. A second SIGINT ends at once.

uvicorn alone closes its listener first, so that clients meet a refused connection instead of a 503 with
Retry-After, and raises the signal again at the end, so that the exit code is the signal's.
h11 parses HTTP: httptools buffers a header of any size (144 MB were measured), h11 stops at 64 KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES: Final = 64 << 10
CLOSE_CONNECTIONS_S: Final = 5
KEEP_ALIVE_S: Final = 75
"""Longer than the idle time of common proxies and clients, so that it is they who close."""

EXIT_FORCED: Final = 130


class GracefulServer(uvicorn.Server):
    """Serves `app`; `drained(seconds)` waits for its running requests, and ends those that take longer."""

    def __init__(self, app: FastAPI, *, drain_s: float, drained: Callable[[float], Awaitable[bool]]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_CONNECTIONS_S,
            )
        )
        self.exit_code = 0
        self._drain_s = drain_s
        self._drained = drained
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in the event loop while serving."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal, signum)
        try:
            yield
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._drain is None:
            logger.info("%s: draining for up to %g s; Ctrl-C ends at once.", signum.name, self._drain_s)
            self._drain = asyncio.create_task(self._drain_then_exit(), name="drain")
        elif signum is signal.SIGINT:
            logger.warning("SIGINT again: ending at once.")
            self.exit_code = EXIT_FORCED
            # the application is not asked to end but cancelled: uvicorn would log a traceback of that
            self.lifespan.logger = logging.getLogger(f"{__name__}.cut_short")
            self.lifespan.logger.disabled = True
            self.force_exit = self.should_exit = True

    async def _drain_then_exit(self) -> None:
        try:
            if not await self._drained(self._drain_s):
                logger.warning("Requests still running after %g s were ended.", self._drain_s)
        finally:
            self.should_exit = True
