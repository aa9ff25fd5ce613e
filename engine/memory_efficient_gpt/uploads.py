"""Small arrays from the host to the device without stopping either.

Purpose: the one way in which a step's numbers reach the device.
Does not know: what they mean.
Invariant: never waits for the device. A copy from pageable memory would; pinned memory is given back
by torch's caching allocator only when the copy is done. (`Staging` has its own, and the one wait there
is none for steps that are waited for in turn.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of `array`'s shape and dtype on `device`; on the CPU it shares the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Staging:
    """Pinned memory for numbers that go to one place on the device, step after step: one call a step.

    Two buffers take turns, so that one can be filled while the other's copy may still be under way.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """size: the most elements, int32."""
        self._on_cuda = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=self._on_cuda) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def take(self, size: int) -> npt.NDArray[np.int32]:
        """Zeros `[size] int32` to be filled and then sent.

        Its copy of two steps ago is over, if steps are waited for with one in between; else this waits.
        """
        self._turn ^= 1
        copied = self._copied[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()
        array: npt.NDArray[np.int32] = self._buffers[self._turn].numpy()[:size]
        array.fill(0)
        return array

    def send(self, target: torch.Tensor) -> None:
        """Enqueue the copy of what was taken last to `target [size] int32`."""
        target.copy_(self._buffers[self._turn][: len(target)], non_blocking=True)
        if self._on_cuda:
            event = self._copied[self._turn] or torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
