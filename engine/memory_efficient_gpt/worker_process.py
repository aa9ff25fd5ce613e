"""What makes a forked process a worker of its own: its signals, lifetime, descriptors and log lines.

Purpose: cut a worker off from the server that started it, except for one socket.
Does not know: engines, frames.
Invariant: afterwards the process holds no descriptor of the server but `sock` and the standard three, gets
no terminal signals, and dies when the server dies.

    server --(alive pipe)--> fork server --(PDEATHSIG)--> worker
       +------------------------ sock ------------------------+

When the server is gone the alive pipe closes and the fork server exits, which kills the worker at once even
in the middle of a load. multiprocessing gives every child a copy of the pipe's write end, which would keep
the fork server alive: it is closed here with all else that was inherited. The end of `sock` says the same
more slowly, and is all there is outside Linux.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from typing import Final

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def detach_from_server(sock: socket.socket, *, name: str) -> None:
    """Make this process a worker. `name` (its last path part) shows in `ps` and `top`.

    Mutates: signal handlers, session, open descriptors.
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


def _close_descriptors_except(kept: int) -> None:
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(3, kept)
    os.closerange(kept + 1, highest if highest != resource.RLIM_INFINITY else 1 << 20)


def configure_logging(level: str, *, as_json: bool) -> None:
    """Write log lines to standard error, which a worker shares with its server. Mutates the root logger."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=level,
        format=f"%(asctime)sZ %(levelname)-7s worker {os.getpid()} %(name)s: %(message)s",
        force=True,
    )
    if as_json:
        logging.getLogger().handlers[0].setFormatter(_JsonFormatter())


class _JsonFormatter(logging.Formatter):
    """One JSON object per record, with the fields of the server's own lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "worker": os.getpid(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
