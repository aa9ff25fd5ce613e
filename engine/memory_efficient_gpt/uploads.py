"""Small arrays from the host to the device without stopping either.

Purpose: the one way in which a step's numbers reach the device.
Does not know: what they mean.
Invariant: never waits for the device. A copy from pageable memory would; pinned memory is given back
by torch's caching allocator only when the copy is done.
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
