"""Row-wise maxima, sorts and cuts of float32 matrices, by whatever is fast on the device.

Purpose: argmax, the k largest values, all values in descending order, and zeroing what is below a bound.
Does not know: what the values mean.
Invariant: results are values of the input; no arithmetic, hence no rounding.

On CPU numpy does it: its sorts are vectorised and need no indices. Sorting [16, 4096] takes it 0.1 ms
where torch.sort takes 3 ms; its argmax is 15 times as fast and its comparisons 5 times. On other devices
torch does it.
"""

from __future__ import annotations

import numpy as np
import torch


def argmax(values: torch.Tensor) -> torch.Tensor:
    """Index of each row's maximum: `[R, V]` -> `[R] int64`. The first NaN counts as the maximum."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.float().numpy().argmax(axis=-1))
    return values.argmax(dim=-1)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` (at most V) largest of each row, descending: `[R, V] float32` -> `[R, count]`."""
    size = values.shape[-1]
    if count == size:
        return sort_descending(values)
    if values.device.type == "cpu":
        top = np.partition(values.numpy(), size - count, axis=-1)[:, size - count :]
        top.sort(axis=-1)
        return torch.from_numpy(top).flip(-1)
    return values.topk(count, dim=-1).values


def sort_descending(values: torch.Tensor) -> torch.Tensor:
    """Each row's values in descending order: `[R, V] float32` -> `[R, V]`."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def keep_at_least(values: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """values `[R, V] float32` (finite) where they reach the row's bound `[R, 1] float32`, 0 elsewhere."""
    if values.device.type == "cpu":
        array = values.numpy()
        return torch.from_numpy(array * (array >= bound.numpy()))
    return values * (values >= bound)
