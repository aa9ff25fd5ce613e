"""This project's engine in process: submit everything, step until all is done.

Purpose: the engine without HTTP, as the library runs it.
Does not know: the other engines.
Invariant: the engine's defaults, apart from what the command line sets.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from benchmarks.peers.protocol import Generated, serve
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams


class OurGenerator:
    """A loaded engine."""

    def __init__(self, config: EngineConfig) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._engine = Engine.load(config, None)
        self._ids = itertools.count()

    def facts(self) -> dict[str, Any]:
        """What was loaded and how it is run."""
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), **asdict(self._engine.info)}

    def generate(self, mode: str, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> Generated:
        """mode: "together"."""
        started = time.perf_counter()
        running: dict[str, list[int]] = {}
        for prompt, wanted in zip(prompts, new_tokens, strict=True):
            params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)
            request = Request(id=str(next(self._ids)), prompt_token_ids=tuple(prompt), params=params)
            self._engine.submit(request)
            running[request.id] = []
        first: dict[str, float] = {}
        while self._engine.has_work:
            for event in self._engine.step():
                if event.error is not None:
                    raise event.error
                running[event.request_id] += event.token_ids
                if event.token_ids:
                    first.setdefault(event.request_id, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        first_token_s = [first[request_id] for request_id in running]
        return Generated(list(running.values()), seconds, first_token_s, asdict(self._engine.stats()))


def main() -> None:
    """Answer commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--num-kv-blocks", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    options = parser.parse_args()
    config = EngineConfig(
        model=options.model,
        device="cpu",
        num_threads=options.threads,
        num_kv_blocks=options.num_kv_blocks,
        max_num_seqs=options.max_num_seqs,
    )
    serve(lambda: OurGenerator(config))


if __name__ == "__main__":
    main()
