"""How many CPUs this process may use.

Purpose: one number for whoever divides CPU threads.
Does not know: models.
Invariant: at least 1.
"""

from __future__ import annotations

import os


def num_usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
