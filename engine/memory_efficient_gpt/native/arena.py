"""Memory for a recording's tensors, of which each part is used again once its tensor is gone.

Purpose: make tensors in memory that stays, as small as the tensors that live at one time need.
Does not know: what is recorded.
Invariant: two tensors that live at one time share no byte. A tensor is gone when nothing holds its storage;
what is done with tensors in the order in which they were made may therefore be done again in that order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

_CHUNK_BYTES: Final = 1 << 18
_ALIGNMENT: Final = 64


@dataclass(slots=True)
class _Chunk:
    """memory: zeros at first. free: (begin, end) of parts that nobody has, ascending, none beside another."""

    memory: npt.NDArray[np.uint8]
    free: list[tuple[int, int]] = field(default_factory=list)

    def take(self, size: int) -> int | None:
        """Where `size` bytes begin that are nobody's, the first such; None if there are none."""
        for place, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[place : place + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def give(self, begin: int, size: int) -> None:
        """Back what `take` gave."""
        parts = sorted([*self.free, (begin, begin + size)])
        joined = [parts[0]]
        for first, last in parts[1:]:
            if joined[-1][1] == first:
                joined[-1] = joined[-1][0], last
            else:
                joined.append((first, last))
        self.free = joined


class Arena:
    """Makes tensors on the CPU; its memory stays as long as it or one of them does."""

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._alive: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """All memory."""
        return sum(len(chunk.memory) for chunk in self._chunks)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is the arena's."""
        return tensor.untyped_storage()._cdata in self._alive

    def like(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A new one of the same shape, strides and dtype, contents undefined; None for one with gaps."""
        if not is_dense(tensor):
            return None
        size = tensor.numel() * tensor.element_size()
        chunk, begin, whole = self._part(-(-size // _ALIGNMENT) * _ALIGNMENT)
        part = chunk.memory[begin : begin + size]
        made = torch.from_numpy(part).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        cdata = made.untyped_storage()._cdata
        self._alive.add(cdata)
        weakref.finalize(part, self._end, chunk, begin, whole, cdata).atexit = False  # the storage holds it
        return made

    def _part(self, size: int) -> tuple[_Chunk, int, int]:
        """Where `size` bytes are nobody's: (chunk, where they begin, size)."""
        for chunk in self._chunks:
            begin = chunk.take(size)
            if begin is not None:
                return chunk, begin, size
        length = max(size, _CHUNK_BYTES)
        raw = np.zeros(length + _ALIGNMENT, dtype=np.uint8)
        skip = -raw.ctypes.data % _ALIGNMENT
        chunk = _Chunk(raw[skip : skip + length], [(size, length)] if length > size else [])
        self._chunks.append(chunk)
        return chunk, 0, size

    def _end(self, chunk: _Chunk, begin: int, size: int, cdata: int) -> None:
        self._alive.discard(cdata)
        chunk.give(begin, size)


def is_dense(x: torch.Tensor) -> bool:
    """Whether its numbers fill a piece of memory without gaps, in some order of its dimensions."""
    size = 1
    for stride, length in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= length
    return x.numel() > 0
