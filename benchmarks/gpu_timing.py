"""Times of CUDA work, as it runs inside a captured graph.

Purpose: microseconds a call, without the host's launch time, with the caches as cold as they are in a model.
Does not know: kernels, models.
Invariant: calls of one measurement follow each other as in a step; each should read other weights, so that
nothing is found in the L2 cache that a real step would not find there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

L2_BYTES = 64 << 20


def require_triton() -> None:
    """Ends the program, saying what is missing, where Triton's kernels can't run; to be called once arguments
    are parsed. Modules of kernels are imported by the functions that use them, after this."""
    lacking = [
        text
        for text, there in (
            ("the package triton (torch's wheels for CUDA bring it)", find_spec("triton") is not None),
            ("a CUDA GPU that torch can use", torch.cuda.is_available()),
        )
        if not there
    ]
    if lacking:
        raise SystemExit(f"This measures Triton kernels on a GPU; missing: {', '.join(lacking)}.")


def copies_needed(num_bytes: int) -> int:
    """How many copies of a weight to rotate through, so that none stays in the L2 cache."""
    return max(2, min(64, -(-4 * L2_BYTES // max(1, num_bytes))))


def graph_us(calls: Sequence[Callable[[], object]], *, replays: int = 10) -> float:
    """Median over `replays` of the time of one call, in microseconds. Raises what a call raises."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiled, workspaces allocated
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return float(statistics.median(times))


def copy_bandwidth() -> float:
    """Bytes a second of a large elementwise operation, read and written ones counted."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    microseconds = graph_us([lambda: torch.neg(source, out=target)], replays=5)
    return 2 * source.nbytes / (microseconds * 1e-6)
