"""What makes a forked process a worker of its own: its signals, lifetime, descriptors and log lines.

Purpose: cut a worker off from the server that started it, except for one socket.
Does not know: engines, frames.
Invariant: afterwards the process holds no descriptor of the server but `sock` and the standard three, gets
no terminal signals, and dies when the server dies.

    server --(alive pipe)--> fork server --(PDEATHSIG)--> worker
       +------------------------ sock ------------------------+

Two ways, because each has a gap. A thread waits for the end of `sock`: at once, but not while native code
holds the interpreter's lock, as in a load. When the server is gone the alive pipe closes and the fork server
exits, which kills the worker whatever it does: but a process with torch loaded takes its time to exit, and
only Linux has the signal. multiprocessing gives every child a copy of the pipe's write end, which would keep
the fork server alive: it is closed here with all else that was inherited.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from typing import Final

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%S"


def detach_from_server(sock: socket.socket, *, name: str) -> None:
    """Make this process a worker. `name` (its last path part) shows in `ps` and `top`.

    Mutates: signal handlers, session, open descriptors; starts a thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    _close_descriptors_except(sock.fileno())
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NAME, f"megpt:{os.path.basename(name)}".encode()[:15], 0, 0, 0)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            logger.warning(
                "prctl refused PDEATHSIG (errno %d); only the socket ends orphans.", ctypes.get_errno()
            )
    else:
        logger.info("No parent-death signal on %s; only the socket ends orphans.", sys.platform)
    threading.Thread(
        target=_exit_when_closed, args=(sock.fileno(),), name="orphan watch", daemon=True
    ).start()


def _exit_when_closed(fd: int) -> None:
    """End the process when the other end of `fd` is closed. There is nothing to save."""
    hangup = select.poll()
    hangup.register(fd, 0)  # no event asked for: only a hangup or an error is told
    hangup.poll()
    os._exit(0)


def _close_descriptors_except(kept: int) -> None:
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(3, kept)
    os.closerange(kept + 1, highest if highest != resource.RLIM_INFINITY else 1 << 20)


def configure_logging(level: str, *, as_json: bool) -> None:
    """Write log lines to standard error, which a worker shares with its server. Mutates the root logger."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=level,
        format=f"%(asctime)s.%(msecs)03dZ %(levelname)-7s worker {os.getpid()} %(name)s: %(message)s",
        datefmt=_TIME_FORMAT,
        force=True,
    )
    if as_json:
        logging.getLogger().handlers[0].setFormatter(_JsonFormatter())


class _JsonFormatter(logging.Formatter):
    """One JSON object per record, with the fields of the server's own lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, _TIME_FORMAT)}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "worker": os.getpid(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
