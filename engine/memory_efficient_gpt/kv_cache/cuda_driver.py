"""CUDA's virtual memory calls of one device, checked.

Purpose: address ranges, pieces of device memory, and mappings of one to the other, through cuda-bindings.
Does not know: tensors, blocks, what is mapped where.
Invariant: a call that fails raises PoolMemoryError with the driver's own name for the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NewType

import torch

from memory_efficient_gpt.kv_cache.pool_memory import PoolMemoryError

Handle = NewType("Handle", object)
"""A piece of device memory of one granule; the driver's own type."""


class CudaDriver:
    """The calls on one device. bindings: the module `cuda.bindings.driver`, or what behaves like it.

    index: the device's. stream: the handle of the stream that clears memory. wait: returns when the device
    has done all that it was told. capturing: whether calls are being captured, and waiting would spoil it.
    granule_bytes: size of a mapping. Made where the device's context is
    current; it is made current again for other threads.
    """

    def __init__(
        self,
        bindings: Any,
        index: int,
        *,
        stream: Callable[[], int],
        wait: Callable[[], None],
        capturing: Callable[[], bool],
    ) -> None:
        """Raises PoolMemoryError if the device or the driver can't do it."""
        self._cuda = bindings
        self._stream = stream
        self.wait = wait
        self.capturing = capturing
        device = self._call("cuDeviceGet", index)
        attribute = bindings.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call("cuDeviceGetAttribute", attribute, device):
            raise PoolMemoryError("the GPU has no virtual memory management")
        self._context = self._call("cuCtxGetCurrent")
        self._kind = bindings.CUmemAllocationProp()
        self._kind.type = bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = bindings.CUmemAccessDesc()
        self._access.flags = bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for location in (self._kind.location, self._access.location):
            location.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            location.id = index
        least = bindings.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granule_bytes = int(self._call("cuMemGetAllocationGranularity", self._kind, least))

    def enter(self) -> None:
        """Make the context current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def reserve(self, num_bytes: int) -> int:
        """The address of a range without memory, of whole granules."""
        return int(self._call("cuMemAddressReserve", num_bytes, self.granule_bytes, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """Give back a range in which nothing is mapped."""
        self._call("cuMemAddressFree", address, num_bytes)

    def create(self) -> Handle:
        """Take one granule of device memory."""
        return Handle(self._call("cuMemCreate", self.granule_bytes, self._kind, 0))

    def release(self, handle: Handle) -> None:
        """Give it back; it is not mapped any more."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, handle: Handle) -> None:
        """Put a granule at an address; nobody may touch it before `allow`."""
        self._call("cuMemMap", address, self.granule_bytes, 0, handle, 0)

    def unmap(self, address: int) -> None:
        """Take the granule from an address; nothing may be under way that touches it."""
        self._call("cuMemUnmap", address, self.granule_bytes)

    def allow(self, address: int, num_bytes: int) -> None:
        """Let the device read and write a range that is mapped throughout."""
        self._call("cuMemSetAccess", address, num_bytes, [self._access], 1)

    def clear(self, address: int, num_bytes: int) -> None:
        """Enqueue zeros for a range; what is enqueued later finds them."""
        stream = self._cuda.CUstream(self._stream())
        self._call("cuMemsetD8Async", address, 0, num_bytes, stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The call's value, if it has one."""
        try:
            status, *values = getattr(self._cuda, name)(*arguments)
        except RuntimeError as error:  # a driver that is older than the bindings lacks the function
            raise PoolMemoryError(f"{name} can't be called: {error}") from error
        if int(status) != 0:
            raise PoolMemoryError(f"{name} failed: {getattr(status, 'name', status)}")
        return values[0] if values else None


def load_driver(device: torch.device) -> CudaDriver:
    """The driver of a CUDA device. Raises PoolMemoryError with what is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise PoolMemoryError(f"the package cuda-bindings can't be imported ({error})") from error
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        torch.cuda.synchronize()  # its context is there and current afterwards
        try:
            return CudaDriver(
                driver,
                index,
                stream=lambda: int(torch.cuda.current_stream(index).cuda_stream),
                wait=lambda: torch.cuda.synchronize(index),
                capturing=torch.cuda.is_current_stream_capturing,
            )
        except (AttributeError, TypeError) as error:
            raise PoolMemoryError(f"cuda-bindings has other calls than are known ({error})") from error
