"""`python -m benchmarks.crashes --kills 100`: kill workers at random moments of their streams.

Purpose: whether streams survive their worker's death unchanged, and how long their readers wait.
Does not know: HTTP; how requests are resumed.
Invariant: a round counts as survived only if every text of all its streams, and why each ended, is that of
the same requests undisturbed; each round has new prompts, and one kill while streams are aboard.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cpu import progress_bar, write_record
from benchmarks.machine import ROOT, commit, machine_facts, usable_cpus, versions
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt_server.supervision import RestartRule
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.workers import WorkerModel

STREAMS = 8
MAX_TOKENS = 96
READY_TIMEOUT_S = 120.0
ROUND_TIMEOUT_S = 120.0
LONGEST_JITTER_S = 0.01
LATEST = 0.95
"""Share of all tokens after which no kill comes, so that streams are aboard."""
_KINDS: tuple[dict[str, Any], ...] = (
    dict(temperature=0.0),
    dict(temperature=0.9),
    dict(temperature=0.0, repetition_penalty=1.2, logprobs=2),
    dict(temperature=1.0, top_p=0.9, top_k=50, n=2),
    dict(temperature=0.8, presence_penalty=0.5, frequency_penalty=0.5),
    dict(temperature=1.0, min_p=0.05, min_tokens=20, ignore_eos=False),
)


class AtOnce(RestartRule):
    """Restarts without delay and for ever: it is the benchmark that kills."""

    def died(self, now_s: float, *, ready_for_s: float) -> float | None:
        """No wait."""
        return 0.0


@dataclass(slots=True)
class Text:
    """One sequence as its reader got it."""

    token_ids: list[int] = field(default_factory=list)
    logprob_ids: list[int] = field(default_factory=list)
    ended: tuple[str, int | None] | None = None
    error: str | None = None


@dataclass(slots=True)
class Round:
    """One kill. tokens_at_kill: given to all streams by then. silence_s: the longest that no stream of the
    round was given a token. resumed: streams that the successor went on with."""

    number: int
    tokens_at_kill: int
    streams_at_kill: int
    silence_s: float
    resumed: int
    problems: list[str]


class Readers:
    """Reads all streams of a round side by side."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, int], Text] = {}
        self.num_tokens = 0
        self.arrived = asyncio.Event()
        self.silence_s = 0.0
        self._last_token_s = time.monotonic()

    async def read(self, model: WorkerModel, request: Request) -> None:
        """Submit one request and read it to its end."""
        async for event in model.submit(request):
            text = self.texts.setdefault((request.id, event.index), Text())
            text.token_ids += event.token_ids
            text.logprob_ids += [entry.token_id for entry in event.logprobs or ()]
            if event.finish_reason is not None:
                text.ended = event.finish_reason.value, event.stop_token_id
            if isinstance(event.error, MegptError):
                text.error = str(event.error)
            self.num_tokens += len(event.token_ids)
            now_s = time.monotonic()
            self.silence_s = max(self.silence_s, now_s - self._last_token_s)
            self._last_token_s = now_s
            self.arrived.set()

    async def given(self, num_tokens: int) -> None:
        """Return once all streams together have been given so many tokens."""
        while self.num_tokens < num_tokens:
            self.arrived.clear()
            await self.arrived.wait()


def requests(number: int, chance: random.Random, vocab_size: int) -> list[Request]:
    """The streams of a round: new prompts, half of them greedy, the others with seeds."""
    return [
        Request(
            id=f"{number}-{stream}",
            prompt_token_ids=tuple(chance.randrange(vocab_size) for _ in range(chance.randint(4, 120))),
            params=SamplingParams(
                **{"max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": chance.getrandbits(62)}
                | _KINDS[stream % len(_KINDS)]
            ),
        )
        for stream in range(STREAMS)
    ]


async def play_round(model: WorkerModel, number: int, chance: random.Random) -> Round:
    """The requests undisturbed, then once more with a kill. The model is ready before and after."""
    assert model.info is not None
    asked = requests(number, chance, model.info.vocab_size)
    undisturbed = Readers()
    await asyncio.gather(*(undisturbed.read(model, request) for request in asked))
    readers = Readers()
    tasks = [asyncio.create_task(readers.read(model, request)) for request in asked]
    await asyncio.sleep(0)  # they are submitted
    await readers.given(chance.randrange(int(LATEST * undisturbed.num_tokens)))
    await asyncio.sleep(chance.uniform(0, LONGEST_JITTER_S))
    resumed_before, killed = model.num_resumed, model.pid
    streams, tokens = model.num_open_requests, readers.num_tokens
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await asyncio.wait_for(asyncio.gather(*tasks), ROUND_TIMEOUT_S)
    # All may have ended with what was on its way at the kill.
    while model.pid in (killed, None):  # noqa: ASYNC110 - the model has no event for it
        await asyncio.sleep(0.005)
    await model.wait_ready(READY_TIMEOUT_S)
    resumed = model.num_resumed - resumed_before
    problems = differences(readers.texts, undisturbed.texts)
    return Round(number, tokens, streams, readers.silence_s, resumed, problems)


def differences(got: dict[tuple[str, int], Text], expected: dict[tuple[str, int], Text]) -> list[str]:
    """What is wrong with each text that is not as expected."""
    problems = []
    for (request_id, index), text in expected.items():
        mine = got.get((request_id, index), Text())
        if mine != text:
            same = next(
                (i for i, (a, b) in enumerate(zip(mine.token_ids, text.token_ids, strict=False)) if a != b),
                min(len(mine.token_ids), len(text.token_ids)),
            )
            problems.append(
                f"{request_id}, text {index}: {mine.error or 'differs'}; {same} of {len(text.token_ids)} "
                f"tokens are equal, ended {mine.ended}, expected {text.ended}"
            )
    return problems


async def play(options: argparse.Namespace, console: Console) -> list[Round]:
    """All rounds on one model."""
    config = EngineConfig(model=options.model, num_threads=options.threads)
    model = WorkerModel(config, restart_rule=AtOnce, log_level="ERROR")
    model.start()
    chance = random.Random(options.seed)
    rounds: list[Round] = []
    try:
        await model.wait_ready(READY_TIMEOUT_S)
        with progress_bar(console) as bar:
            task = bar.add_task("kills", total=options.kills)
            for number in range(options.kills):
                rounds.append(await play_round(model, number, chance))
                survived = sum(not r.problems for r in rounds)
                bar.update(task, advance=1, description=f"kills survived: {survived} of {len(rounds)}")
    finally:
        await model.close()
    return rounds


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures."""
    silences_s = sorted(r.silence_s for r in rounds if r.resumed)
    return {
        "kills": len(rounds),
        "kills_survived": sum(not r.problems for r in rounds),
        "kills_with_streams_aboard": sum(r.streams_at_kill > 0 for r in rounds),
        "streams": STREAMS * len(rounds),
        "streams_resumed": sum(r.resumed for r in rounds),
        "silence_s_median": statistics.median(silences_s) if silences_s else None,
        "silence_s_longest": silences_s[-1] if silences_s else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, compare, write the record; 0 if every kill was survived."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crashes", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="default: 100")
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="default: all CPUs")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and moments (default: 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "crash_resume.json")
    options = parser.parse_args(argv)
    start_fork_server()
    logging.getLogger("memory_efficient_gpt_server").setLevel(logging.CRITICAL)  # deaths are expected here
    started = time.monotonic()
    rounds = asyncio.run(play(options, Console(stderr=True)))
    figures = summary(rounds)
    record = {
        "machine": machine_facts(options.threads),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": options.model,
        "seed": options.seed,
        "restart_delay_s": 0.0,
        "took_s": time.monotonic() - started,
        **figures,
        "rounds": [asdict(r) for r in rounds],
    }
    write_record(record, options.output)
    print(json.dumps(figures, indent=1))
    for problem in [problem for r in rounds for problem in r.problems]:
        print(problem)
    return 0 if figures["kills_survived"] == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
