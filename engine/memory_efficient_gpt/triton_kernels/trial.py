"""The smallest kernel, to see whether Triton can compile and launch one here.

Purpose: find out before a model depends on it: Triton needs a C compiler and a folder that it may write to.
Does not know: what the other kernels do.
Invariant: wrong results are an error, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(x, y, N, BLOCK: tl.constexpr):
    """y `[N]` = 2 * x `[N]`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < N), mask=at < N)


def run_trial(device: torch.device) -> None:
    """Raises whatever Triton raises, or RuntimeError."""
    x = torch.arange(100, dtype=torch.float32, device=device)
    y = torch.full_like(x, -1.0)
    with torch.cuda.device(device):
        double_kernel[(2,)](x, y, 100, BLOCK=64)
    if not torch.equal(y, 2 * x):
        raise RuntimeError("a kernel gave wrong results")
