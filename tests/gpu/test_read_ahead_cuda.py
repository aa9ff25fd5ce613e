"""What a fork server works out for Triton: all that a worker would, and nothing that forbids to fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = """
import os
import torch
import memory_efficient_gpt.worker_preload
from memory_efficient_gpt.triton_kernels.read_ahead import kernels

assert not torch.cuda.is_initialized()
threads = [open(f"/proc/self/task/{name}/comm").read().strip() for name in os.listdir("/proc/self/task")]
# jemalloc, which a package may bring, stops its own thread around a fork
own = [name for name in threads if name != "jemalloc_bg_thd"]
assert len(own) == 1, f"a process with threads must not fork: {own}"
found = list(kernels())
assert len(found) > 50 and all(kernel.hash is not None for kernel in found)
if os.fork() == 0:
    torch.ones(1, device="cuda").add_(1).item()  # would raise if the parent had used CUDA
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_a_process_that_has_read_ahead_may_fork_and_has_every_kernels_key() -> None:
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
