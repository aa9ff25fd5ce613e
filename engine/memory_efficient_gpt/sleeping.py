"""A model that sleeps: it keeps its process and gives back the memory that it computes with.

Purpose: free what an idle model has on its device, and take it back in a fraction of a load's time.
Does not know: requests, schedulers, who decides.
Invariant: after `wake` every weight has the bytes it had, in the same tensors; the KV cache is empty. What
`sleep` says was freed was freed.

    on a GPU     weights, packed ones and buffers too, are copied to (pinned) host memory and their device
                 memory is freed; so are the KV cache and what torch's allocator keeps
    on a CPU     weights are in host memory already: the KV cache's pages go, and those of weights that are
                 mapped from their file, which is all of them unless they are quantized or converted at load
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

from memory_efficient_gpt.engine_info import SleepReport
from memory_efficient_gpt.kv_cache.limit import KVLimit
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.mapped_files import Mapping, drop_mapped_pages, fetch_mapped_pages
from memory_efficient_gpt.parking import ParkedStorages, device_storages, held_tensors


class SleepableModel:
    """A loaded model and its KV pool (None: the model has a cache of its own, empty between requests).

    limit: of a pool that has more address space than it may use. report: what the present sleep gave back;
    None while it is awake.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: KVPool | None,
        device: torch.device,
        limit: KVLimit | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._limit = limit
        self._device = device
        self._parked: ParkedStorages | None = None
        self._dropped: list[Mapping] = []
        self.report: SleepReport | None = None

    @property
    def asleep(self) -> bool:
        """Whether its memory was given back."""
        return self.report is not None

    def sleep(self) -> SleepReport:
        """Give memory back; nobody may compute until `wake`.

        Raises MemoryError or RuntimeError if the host has no room for the weights; nothing has changed then.
        """
        assert not self.asleep, "it sleeps already"
        began_s = time.perf_counter()
        if self._device.type == "cpu":
            self._dropped = drop_mapped_pages(self._weights())
        else:
            self._parked = ParkedStorages(self._storages())
        kv_bytes = self.release_pool()
        self.report = SleepReport(
            parked_bytes=self._parked.num_bytes if self._parked is not None else 0,
            pinned=self._parked is not None and self._parked.pinned,
            device_bytes=_give_back_unused(self._device),
            kv_bytes=kv_bytes,
            dropped_bytes=sum(mapping.resident_bytes for mapping in self._dropped),
            seconds=time.perf_counter() - began_s,
        )
        return self.report

    def wake(self) -> None:
        """Take it all back. Raises RuntimeError if the device has no room: the process is of no use then."""
        assert self.asleep, "it does not sleep"
        if self._parked is not None:
            self._parked.restore()
            self._parked = None
        fetch_mapped_pages(self._dropped)
        self._dropped = []
        if self._limit is not None:
            self._limit.restore()
        elif self._pool is not None:
            self._pool.restore()
        self.report = None

    def release_pool(self) -> int:
        """Give back all that the KV pool could have in memory; its bytes."""
        if self._pool is None:
            return 0
        released = self._pool.release()
        return released if self._limit is None else min(released, self._limit.held_bytes)

    def _weights(self) -> Iterator[torch.Tensor]:
        caches = {id(tensor) for tensor in self._pool.tensors()} if self._pool is not None else set()
        return (tensor for tensor in held_tensors(self._model) if id(tensor) not in caches)

    def _storages(self) -> list[torch.UntypedStorage]:
        without = self._pool.tensors() if self._pool is not None else []
        return device_storages(self._model, self._device, without=without)


def _give_back_unused(device: torch.device) -> int:
    """Let allocators return what is free. What torch still has on a device that is not the host, in bytes."""
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # tens of MB; made again when they are needed
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others return free pages unasked
        if trim is not None:
            trim(0)
    return 0
