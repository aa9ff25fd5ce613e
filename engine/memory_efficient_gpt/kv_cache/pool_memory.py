"""What a KV pool asks of the memory behind its tensors.

Purpose: the protocol that host memory and GPU memory that moves implement; memory of fixed size.
Does not know: layers, blocks' owners.
Invariant: a tensor keeps its address and shape while memory comes and goes; what comes is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Runs = Sequence[tuple[int, int]]
"""Blocks as (first, count), ascending and not adjacent."""


class PoolMemoryError(RuntimeError):
    """There is no memory, or it can't be moved. The message says which, and how much was asked."""


class PoolMemory(Protocol):
    """Memory of one pool: tensors `[N, ...]` with the same number N of blocks.

    granule_bytes: what is held is counted in multiples of this, in each tensor.
    """

    @property
    def granule_bytes(self) -> int: ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One more tensor. All of it may be used after `keep_all_but(())`. Raises PoolMemoryError."""

    def keep_all_but(self, gone: Runs) -> int:
        """Have memory for all blocks but `gone`, in all tensors; returns the bytes that were given back.

        Blocks that are kept keep their content; nobody may use those that are gone. Raises PoolMemoryError,
        with everything as it was, if there is too little.
        """

    def held_bytes(self, gone: Runs) -> int:
        """What can be in memory while `gone` is."""


class FixedMemory:
    """Memory of torch's allocator: it goes as a whole only, while the model sleeps."""

    granule_bytes = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[torch.Tensor] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Raises torch.OutOfMemoryError."""
        self._tensors.append(torch.zeros(shape, dtype=dtype, device=self._device))
        return self._tensors[-1]

    def keep_all_but(self, gone: Runs) -> int:
        """All goes, or nothing. Raises torch.OutOfMemoryError."""
        if self._all(gone):
            return sum(self._resize(tensor, 0) for tensor in self._tensors)
        for tensor in self._tensors:
            if self._resize(tensor, _size(tensor)):
                with torch.inference_mode():  # whatever mode the pool was made in
                    tensor.zero_()
        return 0

    def held_bytes(self, gone: Runs) -> int:
        """All or nothing."""
        return 0 if self._all(gone) else sum(map(_size, self._tensors))

    def _all(self, gone: Runs) -> bool:
        return bool(gone) and gone[0][1] == self._tensors[0].shape[0]

    @staticmethod
    def _resize(tensor: torch.Tensor, size: int) -> int:
        """Returns by how many bytes it changed."""
        storage = tensor.untyped_storage()
        change = abs(size - storage.nbytes())
        if change:
            storage.resize_(size)
        return change


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
