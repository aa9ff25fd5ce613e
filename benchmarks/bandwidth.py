"""How fast this machine reads memory: the ceiling of one stream's tokens per second.

Purpose: print bytes per second, measured with torch on the given number of threads.
Does not know: models.
Invariant: the array is far larger than any cache.
"""

from __future__ import annotations

import argparse
import time

import torch

ARRAY_BYTES = 1 << 30
RUNS = 7


def measure(threads: int) -> float:
    """Bytes per second of the best of several sums over a float32 array."""
    torch.set_num_threads(threads)
    array = torch.ones(ARRAY_BYTES // 4)
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - started)
    return ARRAY_BYTES / min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    print(measure(parser.parse_args().threads))
