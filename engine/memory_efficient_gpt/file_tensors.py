"""Tensors that lie in safetensors files until they are asked for, and then are on a device.

Purpose: let transformers put a checkpoint's weights together from tensors that are read straight to a GPU.
Does not know: models; whether a file is sound (`loading` has checked it).
Invariant: a tensor has the shape, type and bytes that its file's header gives; nothing is read before.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Any, Final

import numpy as np
import torch

from memory_efficient_gpt.device_reads import DeviceReader
from memory_efficient_gpt.errors import CheckpointError

DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class FileTensor:
    """One of them. It answers as a slice of the safetensors library does."""

    def __init__(
        self, reader: DeviceReader, file: _File, offset: int, shape: Sequence[int], dtype_name: str
    ) -> None:
        self._reader, self._file, self._offset = reader, file, offset
        self._shape, self._dtype_name = list(shape), dtype_name

    def get_shape(self) -> list[int]:
        """Its extents."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Its type as safetensors names it."""
        return self._dtype_name

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> torch.Tensor:
        """All of it is read, whatever is wanted. Raises CheckpointError if its file has become shorter."""
        target = torch.empty(self._shape, dtype=DTYPES[self._dtype_name], device=self._reader.device)
        self._reader.fill(target, lambda into, begin: self._file.read(into, self._offset + begin))
        return target if index is Ellipsis else target[index]


@contextmanager
def file_tensors(files: Sequence[Path], device: torch.device) -> Iterator[dict[str, FileTensor]]:
    """All tensors of the files by name, to be read meanwhile. Raises OSError if one can't be opened."""
    with ExitStack() as opened:
        reader = opened.enter_context(DeviceReader(device))
        found: dict[str, FileTensor] = {}
        for path in files:
            file = _File(path)
            opened.callback(file.close)
            begin, header = _header(path)
            for name, entry in header.items():
                offset = begin + entry["data_offsets"][0]
                found[name] = FileTensor(reader, file, offset, entry["shape"], entry["dtype"])
        yield found


def obstacle(files: Sequence[Path]) -> str | None:
    """Why such files can't be read so here; None if they can."""
    if not hasattr(os, "preadv"):
        return "this system has no preadv"
    for path in files:
        for name, entry in _header(path)[1].items():
            if entry["dtype"] not in DTYPES:
                return f"tensor {name} is of type {entry['dtype']}"
    return None


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the entry of each."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


class _File:
    """An open file, read at any place by any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, into: np.ndarray, offset: int) -> None:
        """Fill bytes `[n] uint8` with those from `offset` on."""
        view = into.data
        while view:
            got = os.preadv(self._descriptor, [view], offset)
            if not got:
                raise CheckpointError(f"{self._path} has become shorter while it was read. Copy it again.")
            view, offset = view[got:], offset + got

    def close(self) -> None:
        """Nothing may be read afterwards."""
        os.close(self._descriptor)
