"""Bytes of host memory and of files, brought to a GPU by several threads.

Purpose: fill device memory at the speed of the page cache, or of the disk, through a few page-locked buffers.
Does not know: models, what a tensor is for.
Invariant: what a tensor is filled with is enqueued before the call returns, on the stream that is current in
the calling thread, so that whoever computes there afterwards finds it; no buffer is written before its last
copy is done.

One thread copies 3 to 6 GB/s out of the page cache, and copies from memory that is not page-locked go through
the driver's own buffers one after the other; PCI Express takes 25 to 50.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Self

import numpy as np
import torch

from memory_efficient_gpt.parking import page_lock, unlock_pages

NUM_THREADS: Final = 4
_BUFFER_BYTES: Final = 8 << 20
_BUFFERS: Final = 2 * NUM_THREADS
"""While one is being copied to the device a thread fills another."""
AHEAD_BYTES: Final = 512 << 20
"""Of tensors that `bring` reads before they are asked for."""
Read = Callable[[np.ndarray, int], None]
"""Fills bytes `[n] uint8` with those from an offset on."""


class _Buffer:
    """A part of page-locked memory, and when its last copy will be done."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        self.memory = memory
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def wait(self) -> None:
        """Until the last copy from it is done."""
        if self._done is not None:
            self._done.synchronize()

    def mark(self, device: torch.device) -> None:
        """The last copy from it is the one that was enqueued just now."""
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(device))


class DeviceReader:
    """Fills tensors on `device`, from any thread. To be closed: `with DeviceReader(device) as reader`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.from_numpy(np.empty(_BUFFERS * _BUFFER_BYTES, dtype=np.uint8))
        self._locked = device.type == "cuda" and page_lock(self._memory, {device})
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for part in self._memory.split(_BUFFER_BYTES):
            self._free.put(_Buffer(part, device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for all copies, give the buffers back. Nothing may be filled afterwards."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            if self._locked:
                self._locked = False
                unlock_pages(self._memory)
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._free = SimpleQueue()

    def fill(self, target: torch.Tensor, read: Read) -> None:
        """Fill a contiguous tensor on the device with what `read` gives. Raises what `read` raises."""
        raw = target.reshape(-1).view(torch.uint8)
        for begin in range(0, raw.numel(), _BUFFER_BYTES):
            part = raw[begin : begin + _BUFFER_BYTES]
            buffer = self._free.get()
            try:
                buffer.wait()
                filled = buffer.memory[: part.numel()]
                read(filled.numpy(), begin)
                part.copy_(filled, non_blocking=self._locked)
                buffer.mark(self.device)
            finally:
                self._free.put(buffer)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of host memory, on the device; the same one if it is there already."""
        if tensor.device == self.device:
            return tensor
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor.to(self.device)
        target = torch.empty_like(tensor, device=self.device)
        source = tensor.reshape(-1).view(torch.uint8).numpy()

        def read(into: np.ndarray, begin: int) -> None:
            np.copyto(into, source[begin : begin + into.size])

        self.fill(target, read)
        return target


def bring(tensors: Sequence[Callable[[], torch.Tensor]], device: torch.device) -> Iterator[torch.Tensor]:
    """What each gives, on `device`, in order. The next ones are being copied while one is worked on.

    Tensors are on the host and stay there; of those to come about half a gigabyte is on the device.
    """
    with DeviceReader(device) as reader, ThreadPoolExecutor(NUM_THREADS, "device-reads") as threads:
        sizes: deque[int] = deque()
        coming: deque[Future[torch.Tensor]] = deque()
        todo = deque(tensors)
        while todo or coming:
            while todo and (sum(sizes) < AHEAD_BYTES or not coming):
                tensor = todo.popleft()().detach()
                sizes.append(tensor.nbytes)
                coming.append(threads.submit(reader.copy_of, tensor))
            sizes.popleft()
            yield coming.popleft().result()  # nothing here holds it while it is worked on
