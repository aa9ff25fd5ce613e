"""Weights that are read from their file through the page cache: the pages can go and come back.

Purpose: give back the memory of clean file pages that tensors are mapped from.
Does not know: models, checkpoints.
Invariant: only mappings without a single changed page are touched, so no content is ever lost: the next
access reads the file again. Nothing is done where /proc does not tell.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger(__name__)

_MADV_WILLNEED: Final = 3
_MADV_DONTNEED: Final = 4


@dataclass(slots=True)
class Mapping:
    """A file's pages in this process. resident_bytes: in RAM; changed_bytes: copied because written to."""

    start: int
    end: int
    resident_bytes: int = 0
    changed_bytes: int = 0


def drop_mapped_pages(tensors: Iterable[torch.Tensor]) -> list[Mapping]:
    """Let go of the clean file pages behind these CPU tensors; returns the mappings that were resident.

    Their pages stay in the system's page cache for as long as nobody needs the memory.
    """
    clean = [m for m in _mappings_of(tensors) if m.changed_bytes == 0 and m.resident_bytes]
    return [mapping for mapping in clean if _advise(mapping, _MADV_DONTNEED)]


def fetch_mapped_pages(mappings: Iterable[Mapping]) -> None:
    """Ask the system to read dropped pages ahead; returns at once."""
    for mapping in mappings:
        _advise(mapping, _MADV_WILLNEED)


def _mappings_of(tensors: Iterable[torch.Tensor]) -> list[Mapping]:
    addresses = sorted({t.data_ptr() for t in tensors if t.device.type == "cpu" and t.numel()})
    if sys.platform != "linux" or not addresses:
        return []
    return [m for m in _file_mappings() if any(m.start <= address < m.end for address in addresses)]


def _file_mappings() -> Iterator[Mapping]:
    """This process' private mappings of files, as /proc tells them."""
    current: Mapping | None = None
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        logger.debug("/proc/self/smaps can't be read; mapped pages stay.")
        return
    for line in lines:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            if current is not None:
                yield current
            start, end = (int(number, 16) for number in words[0].split("-"))
            is_file = words[4] != "0" and words[1].endswith("p")  # an inode, private
            current = Mapping(start, end) if is_file else None
        elif current is not None and words[0] == "Rss:":
            current.resident_bytes = int(words[1]) * 1024
        elif current is not None and words[0] in ("Anonymous:", "Swap:"):
            current.changed_bytes += int(words[1]) * 1024
    if current is not None:
        yield current


def _advise(mapping: Mapping, advice: int) -> bool:
    size = mapping.end - mapping.start
    failed: int = _libc().madvise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(size), advice)
    return not failed


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
