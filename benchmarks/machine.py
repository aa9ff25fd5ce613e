"""Where and with what figures were measured.

Purpose: the record that makes a figure comparable.
Does not know: figures.
Invariant: nothing that names a person, a host or a folder.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "memory-efficient-gpt", "torch", "triton", "transformers", "bitsandbytes", "llama-cpp-python", "numpy",
    "uvicorn",
)  # fmt: skip


def machine_facts(threads: int) -> dict[str, object]:
    """The processor, its memory and how fast it is read."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cpus": usable_cpus(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "read_bytes_per_s": read_bandwidth(threads),
        "load_average": os.getloadavg(),
    }


def accelerator_facts(device: str) -> dict[str, object]:
    """The GPU that torch calls `device`; nothing for a CPU."""
    if device == "cpu":
        return {}
    import torch  # not for the callers that measure a server in a process of its own

    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}


def versions() -> dict[str, str]:
    """Python's and the packages'; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is checked out, with a plus if files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int) -> float:
    """Bytes per second; in a process of its own, because torch would stay loaded here."""
    command = [sys.executable, "-m", "benchmarks.bandwidth", "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
