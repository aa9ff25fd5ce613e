"""Tensors whose bytes wait in host memory while their device is lent to others.

Purpose: find every tensor that a model holds, move their bytes to the host and back.
Does not know: engines, KV caches, which model it is.
Invariant: a parked tensor stays the object it is, with its shape, views and sharing; only the memory of its
storage is gone until `restore`. Until then nothing may compute with it.

The addresses of restored tensors may be others: what keeps raw addresses (a captured CUDA graph) must be made
anew after `restore`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

logger = logging.getLogger(__name__)

_HOLDERS = ("bitsandbytes.", "memory_efficient_gpt.fusion.")
"""Packages whose plain objects keep tensors: quantization states beside a parameter, merged weights."""


def held_tensors(root: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that `root` holds: parameters, buffers, and those in attributes of its modules.

    Attributes are followed through containers and dataclasses (packed weights), and through the objects that
    bitsandbytes hangs on its modules and parameters, and fusion on merged layers.
    """
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing
        todo += _parts_of(thing)


def _parts_of(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, torch.Tensor | nn.Module) or type(thing).__module__.startswith(_HOLDERS):
        return list(getattr(thing, "__dict__", {}).values())
    if is_dataclass(thing) and not isinstance(thing, type):
        return [getattr(thing, f.name, None) for f in fields(thing)]
    return []


def device_storages(
    root: nn.Module, device: torch.device, *, without: Collection[torch.Tensor] = ()
) -> list[torch.UntypedStorage]:
    """The storages on `device` of all that `root` holds, each once, but for those of `without`."""
    left_out = {tensor.untyped_storage()._cdata for tensor in without}
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in held_tensors(root):
        if tensor.device != device:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in left_out:
            found.setdefault(storage._cdata, storage)
    return list(found.values())


class ParkedStorages:
    """The bytes of storages that have no memory now. `num_bytes`: what their copy takes on the host.

    pinned: whether the copy is page-locked, so that the device reads it at full speed; where that is refused
    it is copied from ordinary memory, and the log says so.
    """

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Park them. Raises MemoryError or RuntimeError, with nothing changed, if the host has no room."""
        self._storages = list(storages)
        self._sizes = [storage.nbytes() for storage in storages]
        self.num_bytes = sum(self._sizes)
        # numpy asks for huge pages, which makes both writing and pinning it several times faster
        self._host = torch.from_numpy(np.empty(self.num_bytes, dtype=np.uint8))
        self._devices = {s.device for s in storages if s.device.type == "cuda"}
        self.pinned = bool(self._devices) and page_lock(self._host, self._devices)
        # should nobody restore them: memory that is freed while it is locked makes later copies fail
        self._unpin = weakref.finalize(self, unlock_pages, self._host) if self.pinned else None
        if self._unpin is not None:
            self._unpin.atexit = False  # CUDA may be gone by then
        for storage, part in self._parts():
            part.copy_(_bytes_of(storage), non_blocking=self.pinned)
        self._wait()
        for storage in self._storages:
            storage.resize_(0)

    def restore(self) -> None:
        """Give every storage its bytes back, and the host its memory. Raises RuntimeError out of memory."""
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        for storage, part in self._parts():
            _bytes_of(storage).copy_(part, non_blocking=self.pinned)
        self._wait()
        if self._unpin is not None:
            self._unpin()
        self._host = torch.empty(0, dtype=torch.uint8)
        self._storages, self._sizes, self.num_bytes, self.pinned = [], [], 0, False

    def _parts(self) -> Iterator[tuple[torch.UntypedStorage, torch.Tensor]]:
        return zip(self._storages, self._host.split(self._sizes), strict=True)

    def _wait(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage as a tensor `[bytes] uint8`."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def page_lock(host: torch.Tensor, devices: Collection[torch.device]) -> bool:
    """Page-lock `host`, if the driver lets us; torch's own would be rounded up and stay after it is freed.

    Whoever asks for it unlocks the pages before `host` is freed.
    """
    result = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)
    if int(result) == 0:
        return True
    logger.warning("%d bytes of host memory can't be page-locked (CUDA error %s).", host.numel(), result)
    for device in devices:  # the next kernel launch would be blamed for the error: let it be this one
        try:
            torch.zeros(1, device=device)
        except RuntimeError:
            logger.debug("The error was told and is gone.", exc_info=True)
    return False


def unlock_pages(host: torch.Tensor) -> None:
    """Undo `page_lock`."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))
