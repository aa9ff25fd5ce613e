"""Where the time of a decoding step goes on a GPU: by kind of kernel, from a profile of steps that repeat.

Purpose: how many kernels a step has, how long they run, and what each kind adds to the step.
Does not know: how a step is computed; kinds are told by kernels' names.
Invariant: what all kinds add is the profiled steps' time from the first kernel to the last one's end.

    python -m benchmarks.kernel_profile                                         llama8b, one sequence
    python -m benchmarks.kernel_profile --models qwen06b --batches 1 8 --out profile.json
    python -m benchmarks.kernel_profile --without deferral                      one kernel for each call

`busy`: the sum of kernels' own times. `added`: how much later the device is done for the kernel, the gap
before it included; kernels that start while the one before runs are busy for longer than they add. `wall`:
the same steps without a profiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import accelerator_facts, versions
from benchmarks.serving_gpu import MODELS, make_engine
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams

KINDS: Final[tuple[tuple[str, str], ...]] = (
    ("attention", r"paged_attention|join_splits|flash"),
    ("norms", r"rms_norm"),
    ("rotary and cache writes", r"rotary|turned_write|write_kv"),
    ("gated activations", r"gated"),
    (
        "products",
        r"gemm|gemv|nvjet|cutlass|cublas|splitk|matmul|few_rows|one_row|experts|linear|dense|scaled_mm|product",
    ),
    ("choosing tokens", r"choose_kernel"),
    ("sums by torch", r"CUDAFunctor_add|add_kernel"),
    ("copies", r"memcpy|memset|copy"),
)
"""Kinds and what is in the names of their kernels; the first that fits."""
_OTHER: Final = "others"
_WARM_STEPS: Final = 12


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Share:
    """What the kernels of a kind took, in all."""

    kernels: int = 0
    busy_us: float = 0.0
    added_us: float = 0.0


def kind_of(name: str) -> str:
    """The kind of a kernel with that name."""
    return next((kind for kind, part in KINDS if re.search(part, name, re.IGNORECASE)), _OTHER)


def shares(kernels: Iterable[Kernel]) -> dict[str, Share]:
    """By kind, the largest addition first."""
    found: dict[str, Share] = {}
    done: float | None = None
    for kernel in sorted(kernels, key=lambda k: (k.start, k.end)):
        share = found.setdefault(kind_of(kernel.name), Share())
        share.kernels += 1
        share.busy_us += kernel.end - kernel.start
        share.added_us += max(0.0, kernel.end - (kernel.start if done is None else done))
        done = kernel.end if done is None else max(done, kernel.end)
    return dict(sorted(found.items(), key=lambda item: -item[1].added_us))


def kernels_of(trace: Path) -> list[Kernel]:
    """Kernels, copies and fills of a trace that torch's profiler exported."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return [
        Kernel(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def decoding(engine: Engine, batch: int, context: int, steps: int) -> None:
    """Bring `batch` sequences to where all of them decode, for at least so many steps."""
    for number in range(batch):
        prompt = tuple(3 + (7 * number + i) % (engine.info.vocab_size - 3) for i in range(context))
        params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.request_id for event in engine.step() if event.token_ids}
    run(engine, _WARM_STEPS)  # the step's graph is captured when it comes up again


def run(engine: Engine, steps: int) -> float:
    """Milliseconds of a step."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps * 1000


def profile(engine: Engine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """A record: the steps' time without and with the profiler, and by kind for a step."""
    decoding(engine, batch, context, 2 * steps + 4 * _WARM_STEPS)
    wall_ms = run(engine, steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        profiled_ms = run(engine, steps)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        found = shares(kernels_of(trace))
    while engine.has_work:
        engine.step()
    return {
        "wall_ms": wall_ms,
        "profiled_ms": profiled_ms,
        "kernels": sum(share.kernels for share in found.values()) / steps,
        "kinds": {
            kind: {
                "kernels": share.kernels / steps,
                "busy_ms": share.busy_us / steps / 1000,
                "added_ms": share.added_us / steps / 1000,
            }
            for kind, share in found.items()
        },
    }


def table(title: str, record: dict[str, Any]) -> Table:
    """For people."""
    shown = Table(title=f"{title}: {record['wall_ms']:.3f} ms a step, {record['kernels']:.0f} kernels")
    for column in ("kind", "kernels", "busy ms", "added ms"):
        shown.add_column(column, justify="left" if column == "kind" else "right")
    for kind, figures in record["kinds"].items():
        shown.add_row(
            kind, f"{figures['kernels']:.1f}", f"{figures['busy_ms']:.3f}", f"{figures['added_ms']:.3f}"
        )
    return shown


def leave_out(parts: Sequence[str]) -> None:
    """Compute without these, in this process; before an engine is made."""
    if "deferral" in parts:
        from memory_efficient_gpt import assembly

        vars(assembly)["_try_deferral"] = lambda *_: (frozenset(), "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["llama8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--without", nargs="+", choices=("deferral",), default=[])
    parser.add_argument("--out", type=Path, help="the record to write")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args()
    leave_out(arguments.without)
    console, results = Console(), dict[str, Any]()
    for name in arguments.models:
        engine, _ = make_engine(name)
        console.print("; ".join(engine.info.notes))
        for batch in arguments.batches:
            record = profile(engine, batch, arguments.context, arguments.steps)
            results[f"{name}_b{batch}"] = record
            console.print(table(f"{name}, {batch} sequences", record))
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.out is not None:
        record = {"machine": accelerator_facts("cuda"), "versions": versions(), "commit": arguments.commit,
                  "without": arguments.without, "results": results}  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
