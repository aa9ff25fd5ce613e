"""The engine on the bundled model: many streams, a prompt seen before, a pool that is far too small.

Purpose: what batching, the prefix cache and preemption give, each against the engine without it.
Does not know: HTTP.
Invariant: both sides of a comparison compute the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.measuring import (
    Conditions,
    Figure,
    Outcome,
    Target,
    interleaved,
    random_prompts,
    ratio_of_best,
    spread,
)
from benchmarks.peers.protocol import Generated, Peer

MODEL = "demo"
VOCAB = 4096
LONG_PROMPT = 1500
PRESSURE_REQUESTS = 200


def streams(conditions: Conditions) -> Outcome:
    """Tokens per second of one stream and of sixteen, 32 tokens in, 128 out."""
    with engine(conditions) as peer:

        def arm(count: int) -> Callable[[int], Generated]:
            return lambda repetition: peer.generate(
                "together", random_prompts(repetition, count, 32, VOCAB), 128
            )

        measured = interleaved(
            {"1 stream": arm(1), "16 streams": arm(16)}, conditions.repetitions, conditions.advance
        )
        facts = {"ours": peer.facts}
    one, sixteen = ([run.tokens_per_s for run in measured[name]] for name in ("1 stream", "16 streams"))
    figures = [
        Figure("1 stream", max(one), "tokens/s", note=spread(one)),
        Figure("16 streams", max(sixteen), "tokens/s", note=spread(sixteen)),
        Figure("16 streams / 1 stream", ratio_of_best(sixteen, one, best=max), "x", Target(4.0)),
    ]
    return Outcome(figures, facts, {name: [asdict(run) for run in runs] for name, runs in measured.items()})


def prompt_seen_before(conditions: Conditions) -> Outcome:
    """Time to the first token of a 1,500-token prompt: the second time by the first time."""
    first: list[float] = []
    second: list[float] = []
    with engine(conditions) as peer:
        for repetition in range(-1, conditions.repetitions):
            conditions.advance("first, then second")
            prompts = random_prompts(repetition, 1, LONG_PROMPT, VOCAB)
            pair = [peer.generate("together", prompts, 1).first_token_s[0] for _ in range(2)]
            if repetition >= 0:
                first.append(pair[0])
                second.append(pair[1])
        facts = {"ours": peer.facts}
    note = f"{spread(first)} s, then {spread(second)} s"
    figure = Figure(
        "first token, second / first time",
        ratio_of_best(second, first, best=min),
        "x",
        Target(0.15, "at most"),
        note,
    )
    runs = [{"first_s": a, "second_s": b} for a, b in zip(first, second, strict=True)]
    return Outcome([figure], facts, {"ours": runs})


@dataclass(frozen=True, slots=True)
class PressureLoad:
    """Requests of mixed lengths."""

    prompts: list[list[int]]
    new_tokens: list[int]

    def blocks(self, block_size: int) -> int:
        """KV blocks that all of them need together."""
        lengths = zip(map(len, self.prompts), self.new_tokens, strict=True)
        return sum(-(-(prompt + new) // block_size) for prompt, new in lengths)


def small_pool(conditions: Conditions) -> Outcome:
    """200 requests on a tenth of the blocks that they need together, against an ample pool."""
    source = random.Random(0)
    prompts = [
        [source.randrange(10, VOCAB) for _ in range(source.randint(16, 256))]
        for _ in range(PRESSURE_REQUESTS)
    ]
    load = PressureLoad(prompts, [source.randint(16, 128) for _ in prompts])
    with engine(conditions, "--num-kv-blocks", "64") as probe:
        needed = load.blocks(probe.facts["block_size"])
    pools = {"ample": needed + PRESSURE_REQUESTS, "a tenth": needed // 10}
    answers: dict[str, Generated] = {}
    facts = {}
    for name, blocks in pools.items():
        conditions.advance(f"pool: {name}")
        with engine(conditions, "--num-kv-blocks", str(blocks)) as peer:
            answers[name] = peer.generate("together", load.prompts, load.new_tokens)
            facts[name] = peer.facts
    tight, ample = answers["a tenth"], answers["ample"]
    equal = sum(a == b for a, b in zip(tight.token_ids, ample.token_ids, strict=True))
    preempted = tight.counters["num_preemptions"]
    figures = [
        # Peer.generate raises unless every request gave all of its tokens.
        Figure("requests finished", len(tight.token_ids), "of 200", Target(PRESSURE_REQUESTS)),
        Figure("outputs equal to the ample pool's", equal, "of 200", Target(PRESSURE_REQUESTS)),
        Figure("time, small / ample pool", tight.seconds / ample.seconds, note=f"{preempted} preemptions"),
    ]
    return Outcome(figures, facts, {name: [asdict(answer)] for name, answer in answers.items()})


def engine(conditions: Conditions, *arguments: str) -> Peer:
    """Our engine on the bundled model, not yet started."""
    options = ["--model", MODEL, "--threads", str(conditions.threads), *arguments]
    return Peer("ours", "benchmarks.peers.ours", options)
