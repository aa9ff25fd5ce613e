"""Whether the Triton kernels can run here, and if not, why.

Purpose: one question, asked before anything else of this package is imported.
Does not know: kernels.
Mutates os.environ: where $MEGPT_CACHE_DIR is set and $TRITON_CACHE_DIR is not, Triton's binaries go to the
former's folder `triton`, beside the native kernels.
Invariant: never raises, never starts CUDA for a device that is not CUDA; the answer is found once, by trial.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from pathlib import Path
from typing import Final, cast

import torch

logger = logging.getLogger(__name__)

LEAST_CAPABILITY: Final = (8, 0)
"""Ampere: the first with bfloat16 in its tensor cores."""
OVERLAP_CAPABILITY: Final = (9, 0)
"""Hopper: the first whose kernels can begin while the one before runs."""


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin on the device while the one before runs (overlap.py)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY


def overlap_options(device: torch.device) -> dict[str, bool]:
    """A kernel's `early` and the launch option that goes with it."""
    early = can_overlap(device)
    return {"early": early, "launch_pdl": early}


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels can't run on `device`, or None if they can."""
    if device.type != "cuda":
        return f"on {device.type}"
    index = cast("int | None", device.index)  # torch's stub forgets that a device may have none
    return _cuda_obstacle(torch.cuda.current_device() if index is None else index)


def binaries_folder() -> Path:
    """Where Triton keeps what it compiled: $TRITON_CACHE_DIR, $MEGPT_CACHE_DIR/triton, or its own default."""
    if chosen := os.environ.get("TRITON_CACHE_DIR"):
        return Path(chosen)
    root = os.environ.get("MEGPT_CACHE_DIR")
    return Path(root) / "triton" if root else Path.home() / ".triton" / "cache"


@functools.cache
def _cuda_obstacle(index: int) -> str | None:
    if torch.version.__dict__.get("hip") is not None:
        return "the Triton kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("MEGPT_CACHE_DIR"):
        os.environ.setdefault("TRITON_CACHE_DIR", str(binaries_folder()))
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        own, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        return f"the GPU has compute capability {own}, the Triton kernels need {least}"
    return _failed_trial(torch.device("cuda", index))


def _failed_trial(device: torch.device) -> str | None:
    """Why Triton can't compile a kernel here, such as no C compiler: whatever it says."""
    from memory_efficient_gpt.triton_kernels.trial import run_trial

    try:
        run_trial(device)
    except Exception as error:  # noqa: BLE001  # any of its many stages may fail, in its own way
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        reason = f"Triton can't run a kernel here ({said})"
        logger.warning(reason)
        return reason
    return None
