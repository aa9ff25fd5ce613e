"""Worker processes: starting them from the fork server, talking to one, ending it.

Purpose: turn a forked process and its socket into messages in, messages out, and one end.
Does not know: requests, restarts, models.
Invariant: `ended` is set exactly once, after the last message has been delivered and the process is gone,
so its memory is free by then.

multiprocessing carries the entry point and the settings to the new process over its own pipe; everything
else is frames. The fork server is a fresh interpreter: it and its children have none of our descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sysconfig
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Final

import memory_efficient_gpt
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.frames import Close, FrameDecoder, Message, encode
from memory_efficient_gpt.wire import FrameError, pack_record
from memory_efficient_gpt.worker import PRELOAD_ENVIRONMENT, LoadEngine, load_engine, run_worker

logger = logging.getLogger(__name__)

PRELOAD_MODULES: Final = ("memory_efficient_gpt.fork_server_exit", "memory_efficient_gpt.worker_preload")
EXIT_GRACE_S: Final = 2.0
CLOSE_GRACE_S: Final = 5.0


def start_fork_server() -> None:
    """Start the fork server unless it runs. Returns at once; its imports (seconds) go on meanwhile.

    Call it as early as possible. Mutates os.environ: sets `PRELOAD_ENVIRONMENT` where it is unset.
    """
    for name, value in PRELOAD_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD_MODULES))
    resource_tracker.ensure_running()  # it would unblock the interrupts below
    with _engine_on_python_path(), _interrupts_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def _engine_on_python_path() -> Iterator[None]:
    """Let the fork server find the engine when it is not installed but on our sys.path.

    The fork server gets the environment, not sys.path, and ignores a preload module it can't find.
    """
    root = str(Path(memory_efficient_gpt.__file__).resolve().parents[1])
    before = os.environ.get("PYTHONPATH")
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        os.environ["PYTHONPATH"] = root if before is None else os.pathsep.join((root, before))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """For a child: Ctrl-C reaches all of the terminal's processes, and the fork server's imports would end
    with a traceback. It is told to end by our end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerProcess(asyncio.Protocol):
    """One running worker. Owned by the event loop that started it."""

    def __init__(self, process: ForkServerProcess, receive: Callable[[Message], None]) -> None:
        self._process = process
        self._receive = receive
        self._decoder = FrameDecoder()
        self._transport: asyncio.WriteTransport | None = None
        self._loop = asyncio.get_running_loop()
        self._exit_code: int | None = None
        self.pid = process.pid or 0
        self.ended: asyncio.Future[int] = self._loop.create_future()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        receive: Callable[[Message], None],
        *,
        log_level: str = "INFO",
        log_json: bool = False,
        load: LoadEngine = load_engine,
    ) -> WorkerProcess:
        """Fork a worker that loads `config`; `receive` is called in this loop with each of its messages.

        Waits for the fork server's imports if they still go on. Raises OSError if it can't be started.
        """
        start_fork_server()
        ours, theirs = socket.socketpair()
        try:
            process = multiprocessing.get_context("forkserver").Process(
                target=run_worker,
                args=(theirs, pack_record(config), log_level, log_json, load),
                name=f"worker {config.model}",
                daemon=True,
            )
            await _start_in_thread(process, theirs)
        except BaseException:
            ours.close()
            raise
        worker = cls(process, receive)
        worker._loop.add_reader(process.sentinel, worker._exited)
        await worker._loop.create_unix_connection(lambda: worker, sock=ours)
        return worker

    def send(self, message: Message) -> None:
        """Send, or do nothing if the connection is gone (`ended` follows). Raises FrameError."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """As `send`, for an encoded frame."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def cpu_seconds(self) -> float:
        """Processor time that the worker has used; 0 where /proc does not tell."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]  # fields 14 and 15; the name may hold spaces
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL. `ended` follows."""
        if self._exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def end(self, *, patiently: bool) -> None:
        """Ask it to end; kill it if it has not after CLOSE_GRACE_S, or at once if not `patiently`."""
        if not self.ended.done():
            self.send(Close())
            await asyncio.wait([self.ended], timeout=CLOSE_GRACE_S if patiently else 0)
            self.kill()
            await self.ended

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours to use."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Deliver all messages that `data` completes. A worker that makes no sense is killed."""
        try:
            for message in self._decoder.feed(data):
                self._receive(message)
        except FrameError:
            logger.exception("Worker %d sent a frame that can't be understood; killing it.", self.pid)
            self.kill()
            self._abort_transport()

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker closed its end, or died: then the exit code comes soon, or it is killed."""
        self._transport = None
        self._finish()
        if not self.ended.done():
            self._loop.call_later(EXIT_GRACE_S, self.kill)

    def _exited(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.join()
        self._exit_code = self._process.exitcode
        self._process.close()
        if self._exit_code is None:  # the fork server died before it could tell
            self._exit_code = -signal.SIGKILL
        self._finish()

    def _finish(self) -> None:
        if self._transport is None and self._exit_code is not None and not self.ended.done():
            self.ended.set_result(self._exit_code)

    def _abort_transport(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def _start_in_thread(process: ForkServerProcess, theirs: socket.socket) -> None:
    """Start `process`, then close our copy of its socket.

    `process.start()` waits for the fork server's imports; a daemon thread never holds up our exit. The
    thread owns `theirs`: closed earlier, by a cancelled caller, its number could mean another socket.
    """
    loop = asyncio.get_running_loop()
    started: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not started.done():
            started.set_result(None) if error is None else started.set_exception(error)

    def start() -> None:
        error: BaseException | None = None
        try:
            process.start()
        except BaseException as caught:  # noqa: BLE001 - handed to whoever awaits
            error = caught
        finally:
            theirs.close()
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=start, name="start worker", daemon=True).start()
    await started


def how_it_ended(exit_code: int) -> str:
    """Exit code or signal, as the end of a sentence about the worker."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"
