"""How memory of a CUDA device is asked for while weights are read, quantized and merged.

Purpose: that what is given up on the way (float weights, copies, temporary results) leaves no holes.
Does not know: models, files.
Invariant: outside `apart` torch's allocator has the settings that it had.

torch gives a block of device memory back as a whole only. Two habits keep blocks from being given back: it
cuts large free blocks for small tensors, and transformers reserves one block for all weights of a checkpoint.
A workspace that lands where a float weight has been then keeps the size of all of them.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

logger = logging.getLogger(__name__)

_UNSPLIT_MIB: Final = 32
"""A free block of that size or more is for tensors of nearly its size."""
_NO_LIMIT_MIB: Final = 1 << 40
_VARIABLES: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_lock = threading.Lock()
_depth = 0


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Weights that are made meanwhile have memory of their own, if `device` is a GPU; may be nested."""
    if device.type != "cuda":
        yield
        return
    _ask_before_warmup()
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _split_below(_UNSPLIT_MIB)


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _split_below(_NO_LIMIT_MIB)


def _split_below(mebibytes: int) -> None:
    """Let torch cut blocks that are smaller than that only; a user's own settings of the allocator stay."""
    if any("max_split_size_mb" in os.environ.get(name, "") for name in _VARIABLES):
        return
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is None:
        _warn_once("This torch's allocator can't be told how to cut blocks: loading may leave holes.")
        return
    change(f"max_split_size_mb:{mebibytes}")


@functools.cache
def _ask_before_warmup() -> None:
    """Put our question before transformers' reservation; there is none in versions without it."""
    from transformers import modeling_utils

    reserve = getattr(modeling_utils, "caching_allocator_warmup", None)
    if reserve is None:
        _warn_once("This transformers reserves memory in a way that is not known here.")
        return

    @functools.wraps(reserve)
    def ask(*args: Any, **kwargs: Any) -> None:
        if _depth == 0:
            reserve(*args, **kwargs)

    modeling_utils.caching_allocator_warmup = ask


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
