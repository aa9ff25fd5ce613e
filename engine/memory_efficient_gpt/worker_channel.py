"""A worker's end of the socket: whole messages in, frames out, and no call that waits unless told to.

Purpose: non-blocking reading and buffered, non-blocking writing of frames.
Does not know: what messages mean.
Invariant: bytes leave in the order of `send`; only `wait` and `flush` ever wait.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from typing import Final

from memory_efficient_gpt.frames import FrameDecoder, Message

READ_BYTES: Final = 1 << 18


class ConnectionClosedError(Exception):
    """The server has closed its end, or is gone."""


class FrameChannel:
    """Owns `sock` and makes it non-blocking. `pending_bytes` is what the peer has not taken yet."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder()
        self._outbox: deque[memoryview] = deque()
        self.pending_bytes = 0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def receive(self) -> list[Message]:
        """All messages that have arrived; also writes what can be written.

        Raises ConnectionClosedError, FrameError.
        """
        self._write()
        messages: list[Message] = []
        while True:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise ConnectionClosedError from error
            if not data:
                raise ConnectionClosedError
            messages += self._decoder.feed(data)

    def send(self, frame: bytes) -> None:
        """Append `frame` and write what the socket takes now. Raises ConnectionClosedError."""
        self._outbox.append(memoryview(frame))
        self.pending_bytes += len(frame)
        self._write()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when there is something to read, or room for pending bytes, or the time is over."""
        self._poll.modify(self._sock, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        self._poll.poll(None if timeout_s is None else timeout_s * 1000)

    def flush(self, timeout_s: float) -> None:
        """Wait until all is written or the peer is gone, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        self._poll.modify(self._sock, select.POLLOUT)
        try:
            while self._outbox and (left_s := deadline - time.monotonic()) > 0:
                self._poll.poll(left_s * 1000)
                self._write()
        except ConnectionClosedError:
            return

    def _write(self) -> None:
        while self._outbox:
            frame = self._outbox[0]
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                return
            except OSError as error:
                raise ConnectionClosedError from error
            self.pending_bytes -= sent
            if sent < len(frame):
                self._outbox[0] = frame[sent:]
                return
            self._outbox.popleft()
