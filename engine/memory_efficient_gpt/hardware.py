"""What this machine offers: devices, memory, CPU threads.

Purpose: turn "auto" into a concrete device and say how much memory is free on it.
Does not know: models, budgets.
Invariant: nothing here initialises CUDA unless a CUDA device is asked about.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from memory_efficient_gpt.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError([f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}.']) from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError([f"device {name!r} is not available: {count} CUDA devices are visible."])
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ConfigError([f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}.'])
    return device


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now (on Linux, MemAvailable within the cgroup's limit)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_memory(), _cgroup_headroom())


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ask for the total instead
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_headroom() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = Path("/sys/fs/cgroup/memory.stat").read_text()
    except OSError:
        return 2**63
    if limit == "max":
        return 2**63
    cached = int(dict(line.split() for line in stat.splitlines()).get("inactive_file", 0))
    return max(0, int(limit) - used + cached)  # page cache counts as used, and goes when memory is needed
