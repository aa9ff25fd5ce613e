"""`megpt bench`: how fast a model runs here, in this process, without HTTP."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from memory_efficient_gpt_server.commands.options import (
    Commands,
    add_engine_options,
    engine_options,
    new_command,
    positive_int,
)

if TYPE_CHECKING:
    import random

    from memory_efficient_gpt.core import Engine
    from memory_efficient_gpt.request import Request, SequenceEvent

WARM_UP_TOKENS: Final = 4

_EXAMPLES = """\
  megpt bench --model demo
  megpt bench --model demo --num-requests 64 --concurrency 16 --input-len 512 --output-len 128
  megpt bench --model ./my-model --kv-cache-dtype int8 --json > int8.json
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "bench", summary="measure throughput and latency in this process", examples=_EXAMPLES
    )
    parser.add_argument(
        "--model", default="demo", help="bundled model's name, folder, or hub id (default: demo)"
    )
    parser.add_argument("--num-requests", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--input-len", type=positive_int, default=128, metavar="TOKENS", help="default: 128")
    parser.add_argument("--output-len", type=positive_int, default=64, metavar="TOKENS", help="default: 64")
    parser.add_argument(
        "--concurrency", type=positive_int, default=16, metavar="N", help="requests at once (default: 16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_engine_options(parser)
    parser.set_defaults(run=run)


@dataclass(slots=True)
class Timeline:
    """One request's times, in seconds on one clock."""

    submitted_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0

    @property
    def per_later_token_s(self) -> float:
        """Mean time between tokens; there must be two."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


@dataclass(slots=True)
class Result:
    """What was measured. `*_ms` are percentiles over requests: time to first token, time per later token."""

    model: str
    device: str
    dtype: str
    tier: str
    num_requests: int
    concurrency: int
    input_len: int
    output_len: int
    load_s: float
    seconds: float = 0.0
    output_tokens_per_s: float = 0.0
    total_tokens_per_s: float = 0.0
    steps: int = 0
    host_share: float = 0.0
    ttft_ms: dict[str, float] = field(default_factory=dict)
    tpot_ms: dict[str, float] = field(default_factory=dict)
    kv_cache_bytes: int = 0
    weights_bytes: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Load, warm up, measure, print."""
    from memory_efficient_gpt.config import EngineConfig
    from memory_efficient_gpt.core import Engine
    from memory_efficient_gpt.progress import load_bar

    options = {"max_num_seqs": args.concurrency} | engine_options(args)
    started = time.perf_counter()
    with load_bar(args.model) as report:
        engine = Engine.load(EngineConfig(model=args.model, **options), report)
    load_s = time.perf_counter() - started
    try:
        result = measure(engine, args, load_s)
    finally:
        engine.close()
    print(json.dumps(asdict(result)) if args.json else _table(result))
    return 0


def measure(engine: Engine, args: argparse.Namespace, load_s: float) -> Result:
    """Run the workload: `args.num_requests` random prompts, `args.concurrency` at a time."""
    import random

    info = engine.info
    rng = random.Random(args.seed)
    requests = [
        _request(rng, f"bench-{n}", info.vocab_size, args.input_len, args.output_len)
        for n in range(args.num_requests)
    ]
    warm_up = [
        _request(rng, "warm-up", info.vocab_size, args.input_len, min(WARM_UP_TOKENS, args.output_len))
    ]
    _drive(engine, warm_up, 1, lambda: None)
    before = (engine.stats().steps, engine.stats().step_seconds, engine.stats().host_seconds)
    began = time.perf_counter()
    with _bar(len(requests)) as advance:
        timelines = _drive(engine, requests, args.concurrency, advance)
    seconds = time.perf_counter() - began
    after = engine.stats()
    num_tokens = sum(t.num_tokens for t in timelines)
    return Result(
        model=info.model, device=info.device, dtype=info.dtype, tier=info.tier,
        num_requests=args.num_requests, concurrency=args.concurrency, input_len=args.input_len,
        output_len=args.output_len, load_s=round(load_s, 3), seconds=round(seconds, 3),
        output_tokens_per_s=round(num_tokens / seconds, 1),
        total_tokens_per_s=round((num_tokens + args.num_requests * args.input_len) / seconds, 1),
        steps=after.steps - before[0],
        host_share=round((after.host_seconds - before[2]) / max(after.step_seconds - before[1], 1e-9), 4),
        ttft_ms=_percentiles([t.first_s - t.submitted_s for t in timelines]),
        tpot_ms=_percentiles([t.per_later_token_s for t in timelines if t.num_tokens > 1]),
        kv_cache_bytes=info.kv_cache_bytes, weights_bytes=info.weights_bytes, machine=_machine(),
    )  # fmt: skip


def _request(
    rng: random.Random, request_id: str, vocab_size: int, input_len: int, output_len: int
) -> Request:
    from memory_efficient_gpt.request import Request, SamplingParams

    return Request(
        id=request_id,
        prompt_token_ids=tuple(rng.randrange(vocab_size) for _ in range(input_len)),
        params=SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True),
    )


def _drive(
    engine: Engine, requests: list[Request], concurrency: int, advance: Callable[[], None]
) -> list[Timeline]:
    """Keep `concurrency` requests aboard until all are done; calls `advance` after each."""
    waiting = iter(requests)
    timelines: dict[str, Timeline] = {}
    num_done = 0

    def submit_next() -> None:
        if (request := next(waiting, None)) is not None:
            timelines[request.id] = Timeline(time.perf_counter())
            engine.submit(request)

    for _ in range(concurrency):
        submit_next()
    while num_done < len(requests):
        events = engine.step()
        now_s = time.perf_counter()
        for event in events:
            if _note(timelines[event.request_id], event, now_s):
                num_done += 1
                advance()
                submit_next()
    return list(timelines.values())


def _note(timeline: Timeline, event: SequenceEvent, now_s: float) -> bool:
    """Record an event; True if it was the request's last. Raises the error it ended with."""
    if event.error is not None:
        raise event.error
    if event.token_ids:
        timeline.first_s = timeline.first_s or now_s
        timeline.last_s = now_s
        timeline.num_tokens += len(event.token_ids)
    return event.finish_reason is not None


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        name: round(1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 3)
        for name, share in at.items()
    }


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch
    import transformers

    from memory_efficient_gpt import __version__

    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; yields what advances it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from memory_efficient_gpt.progress import batch_bar

    with batch_bar(total, shown=True) as bar:
        assert bar is not None, "shown on a terminal"
        yield lambda: bar.update(bar.task_ids[0], advance=1)


def _table(result: Result) -> str:
    rows = [
        ("model", f"{result.model} ({result.device}, {result.dtype}, tier {result.tier})"),
        ("workload", f"{result.num_requests} x ({result.input_len} in + {result.output_len} out), "
                     f"{result.concurrency} at once"),
        ("load", f"{result.load_s:.2f} s"),
        ("output", f"{result.output_tokens_per_s:,.1f} tokens/s"),
        ("input + output", f"{result.total_tokens_per_s:,.1f} tokens/s"),
        ("time to first token", _shown(result.ttft_ms)),
        ("time per later token", _shown(result.tpot_ms)),
        ("steps", f"{result.steps} ({result.host_share:.0%} of their time outside the model)"),
        ("weights", f"{result.weights_bytes / 2**20:.1f} MiB"),
        ("KV cache", f"{result.kv_cache_bytes / 2**20:.1f} MiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _shown(percentiles: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.1f} ms" for name, value in percentiles.items()) or "-"
