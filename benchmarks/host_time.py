"""What a step costs the host: the CUDA path's runner on a tiny model, with graphs that compute nothing.

Purpose: host milliseconds of a step, by part, without a GPU; which steps a workload makes.
Does not know: what a device computes or how long it takes.
Invariant: everything that the host does for a captured step is done, but for calls of CUDA itself.

    python -m benchmarks.host_time                          256 sequences that decode
    python -m benchmarks.host_time --workload mixed256      256 requests of mixed lengths, and their steps
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.frames import encode_events
from memory_efficient_gpt.padded_steps import PaddedSteps, StepKind
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import Choice, RowsToSample, shape_of

_MODEL: Final[dict[str, Any]] = dict(
    vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=16384,
)  # fmt: skip
_LEAST_ROWS: Final = 200
"""Steps of fewer rows don't count as those of 256 sequences."""


class EmptyGraphs:
    """Stands in for StepGraphs: inputs are packed and copied, nothing is computed; tokens are zeros."""

    chooses = True

    def __init__(self, steps: PaddedSteps) -> None:
        self._steps = steps
        self.kinds: Counter[StepKind | None] = Counter()

    def run(self, layout: StepLayout, samples: RowsToSample, choice: Choice | None) -> torch.Tensor:
        """The result of a step that gave tokens 0."""
        shape = shape_of(layout)
        self.kinds[None if shape is None else StepKind(shape, choice)] += 1
        if shape is None:  # such a step is computed call by call; here it is nothing at all
            rows = len(samples.logit_rows)
            return torch.tensor([*[0] * 8 * rows, *[1] * rows], dtype=torch.uint8)
        kind = StepKind(shape, choice)
        self._steps.load(layout, samples, shape)
        result = self._steps.result(kind, len(samples.logit_rows))
        result[8 * shape.rows :] = 1
        return result


def make_engine(max_num_seqs: int, max_batched_tokens: int) -> tuple[Engine, EmptyGraphs]:
    """An engine whose steps cost nothing but host time."""
    model: Any = LlamaForCausalLM(LlamaConfig(**_MODEL))
    config = EngineConfig(
        model="empty", device="cpu", max_model_len=8448, max_num_seqs=max_num_seqs, block_size=64,
        num_kv_blocks=max_num_seqs * 33, max_batched_tokens=max_batched_tokens, prefix_cache=False,
        overlap=True, native_kernels=False,
    )  # fmt: skip
    engine = Engine.from_model(model, config)
    runner: Any = engine._runner
    steps = PaddedSteps(
        runner._model, runner._backend, last_tokens=runner._last_tokens, block_size=64, max_blocks=132
    )
    stand_in: Any = EmptyGraphs(steps)
    runner._replays = stand_in
    return engine, stand_in


class Stopwatch:
    """Milliseconds of each part of each step; parts nest, so a part includes those that it calls."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Measure a method from now on."""
        method: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            result = method(*args, **kwargs)
            spent = (time.perf_counter_ns() - began) / 1e6
            self.current[part] = self.current.get(part, 0.0) + spent
            return result

        setattr(owner, name, measured)

    def end_step(self, **totals: float) -> None:
        """The parts since the last call are those of one step."""
        self.steps.append(self.current | totals)
        self.current = {}


def run(engine: Engine, lengths: list[tuple[int, int]], temperature: float, watch: Stopwatch) -> float:
    """Seconds for requests that all arrive at once; `watch` gets every step."""
    rng = random.Random(7)
    for number, (prompt, output) in enumerate(lengths):
        ids = tuple(rng.choices(range(3, 1000), k=prompt))
        params = SamplingParams(temperature=temperature, max_tokens=output, ignore_eos=True)
        engine.submit(Request(id=str(number), prompt_token_ids=ids, params=params))
    began = time.perf_counter()
    while engine.has_work:
        start = time.perf_counter_ns()
        events = engine.step()
        middle = time.perf_counter_ns()
        if events:
            list(encode_events(events))
        end = time.perf_counter_ns()
        watch.end_step(engine=(middle - start) / 1e6, encode=(end - middle) / 1e6, rows=len(events))
    return time.perf_counter() - began


def lengths_of(workload: str, sequences: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of the requests."""
    if workload == "decode":
        return [(64, 200)] * sequences
    rng = random.Random(1)
    prompts = [rng.randint(100, 1024) for _ in range(256)]
    return list(zip(prompts, [rng.randint(100, 1024) for _ in range(256)], strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=("decode", "mixed256"), default="decode")
    parser.add_argument("--sequences", type=int, default=256, help="of the workload decode")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine, graphs = make_engine(max(256, arguments.sequences), arguments.max_batched_tokens)
    lengths, watch = lengths_of(arguments.workload, arguments.sequences), Stopwatch()
    run(engine, lengths[:4], arguments.temperature, Stopwatch())
    for owner, name, part in _parts(engine, graphs):
        watch.watch(owner, name, part)
    graphs.kinds.clear()
    run(engine, lengths, arguments.temperature, watch)
    _report(watch, graphs, _LEAST_ROWS if arguments.workload == "mixed256" else arguments.sequences)


def _parts(engine: Engine, graphs: EmptyGraphs) -> list[tuple[Any, str, str]]:
    runner: Any = engine._runner
    return [
        (engine._scheduler, "plan", "plan"),
        (engine._scheduler, "commit", "commit"),
        (runner, "launch", "launch"),
        (runner._tables, "lay_out", "lay out (in launch)"),
        (graphs._steps, "load", "pack, copy (in launch)"),
    ]


def _report(watch: Stopwatch, graphs: EmptyGraphs, least_rows: int) -> None:
    console = Console()
    counted = [step for step in watch.steps if step["rows"] >= least_rows]
    for part in sorted({part for step in counted for part in step} - {"rows"}):
        values = sorted(step.get(part, 0.0) for step in counted)
        quartile = values[len(values) // 4]
        console.print(f"{part:24} median {statistics.median(values):.3f} ms, quartile {quartile:.3f} ms")
    eager = graphs.kinds.pop(None, 0)
    again = sum(count >= 2 for count in graphs.kinds.values())
    console.print(
        f"{len(watch.steps)} steps, {len(counted)} of {least_rows} rows or more; {eager} call by call; "
        f"{len(graphs.kinds)} kinds, {again} of them captured"
    )


if __name__ == "__main__":
    main()
