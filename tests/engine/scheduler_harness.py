"""A scheduler driven against a model that is a pure function of the tokens it can see in its blocks.

The fake runner keeps a token in every KV position that a plan writes and reads a context back through the
block table, as a real model would: a wrong block, a missing copy, a stale or a shared write gives other
tokens than the sequence computed alone.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_meter import KvMeter
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent, TokenLogprob
from memory_efficient_gpt.scheduler import Scheduler, SchedulerConfig
from memory_efficient_gpt.sequence import Sequence, Step, StepOutcome

STOP_TOKEN = 0
VOCAB = 40


def next_token(context: list[int], seed: int) -> int:
    """The fake model: a hash of everything visible."""
    return zlib.crc32(repr((context, seed)).encode()) % VOCAB


def alone(prompt: list[int], seed: int, max_len: int, window: int | None = None) -> list[int]:
    """What a sequence gives when nothing else exists."""
    tokens = list(prompt)
    while len(tokens) < max_len:
        token = next_token(tokens[-window:] if window else tokens, seed)
        if token == STOP_TOKEN:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class FakeRunner:
    """Computes steps on token memory instead of KV tensors."""

    def __init__(self, num_blocks: int, block_size: int, window: int | None) -> None:
        self.memory = [[-1] * block_size for _ in range(num_blocks)]
        self.size = block_size
        self.window = window
        self.last_token: dict[int, int] = {}

    def run(self, step: Step) -> StepOutcome:
        for source, target in step.copies:
            self.memory[target] = list(self.memory[source])
        contexts: list[list[int]] = []
        written: set[tuple[int, int]] = set()
        for chunk in step.chunks:
            seq = chunk.seq
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                token = seq.tokens[position] if position < len(seq.tokens) else self.last_token[id(seq)]
                place = (seq.blocks[position // self.size], position % self.size)
                assert place[0] != 0 and place not in written, "two sequences write one place"
                written.add(place)
                self.memory[place[0]][place[1]] = token
        for chunk in step.chunks:
            end = chunk.start + chunk.num_tokens
            begin = max(0, end - self.window) if self.window else 0
            contexts.append(
                [self.memory[chunk.seq.blocks[p // self.size]][p % self.size] for p in range(begin, end)]
            )
        tokens = [next_token(contexts[s.chunk], s.seq.seed) for s in step.samples]
        for s, token in zip(step.samples, tokens, strict=True):
            self.last_token[id(s.seq)] = token
        outcome = StepOutcome(tokens, [True] * len(tokens), [None] * len(tokens))
        for number, chunk in enumerate(step.chunks):
            if chunk.prompt_logprobs is not None:
                last = min(chunk.start + chunk.num_tokens, chunk.seq.prompt_len - 1)
                outcome.prompt_logprobs[number] = [
                    TokenLogprob(chunk.seq.tokens[p], -float(p)) for p in range(chunk.start + 1, last + 1)
                ]
        return outcome


class Harness:
    """A scheduler with the fake runner, `depth` steps launched ahead (0 or 1)."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        depth: int = 0,
        window: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, prefix_cache=prefix_cache)
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_batched_tokens=budget, window=window)
        self.scheduler = Scheduler(config, self.allocator)
        self.runner = FakeRunner(num_blocks, block_size, window)
        self.depth = depth
        self.pending: list[tuple[Step, StepOutcome]] = []
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], FinishReason] = {}
        self.first_events: list[SequenceEvent] = []
        self.scored: dict[str, list[TokenLogprob | None]] = {}
        self.steps: list[Step] = []
        self.order = 0

    def submit(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        n: int = 1,
        client: str = "",
        salt: str = "",
        scored: bool = False,
        meter: KvMeter | None = None,
    ) -> None:
        params = SamplingParams(n=n, max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
        request = Request(
            id=name, prompt_token_ids=tuple(prompt), params=params, client=client, cache_salt=salt
        )
        sequences = []
        for index in range(n):
            self.order += 1
            sequences.append(
                Sequence(
                    request,
                    index,
                    index,
                    len(prompt) + max_tokens,
                    list(prompt),
                    self.order,
                    stop_ids=frozenset((STOP_TOKEN,)),
                    meter=meter,
                )
            )
            self.outputs[name, index] = []
        self.scheduler.add(sequences)

    def turn(self) -> None:
        step = self.scheduler.plan()
        if step is not None:
            assert 0 < step.num_tokens == sum(c.num_tokens for c in step.chunks)
            self.steps.append(step)
            self.pending.append((step, self.runner.run(step)))
        self.scheduler.check_integrity()
        if self.pending and (len(self.pending) > self.depth or step is None):
            for event in self.scheduler.commit(*self.pending.pop(0)):
                self.take(event)
        self.scheduler.check_integrity()

    def take(self, event: SequenceEvent) -> None:
        key = (event.request_id, event.index)
        if not self.outputs[key]:
            self.first_events.append(event)
        self.outputs[key] += event.token_ids
        if event.prompt_logprobs is not None:
            assert event.request_id not in self.scored, "prompt_logprobs came twice"
            self.scored[event.request_id] = event.prompt_logprobs
        if event.finish_reason is not None:
            assert key not in self.reasons
            self.reasons[key] = event.finish_reason

    def run(self, max_turns: int = 5000) -> None:
        for _ in range(max_turns):
            if not self.scheduler.has_work and not self.pending:
                return
            self.turn()
        raise AssertionError("no end: the scheduler is stuck")


def prompts(rng: random.Random, count: int, longest: int = 30) -> Iterator[list[int]]:
    shared = [rng.randint(1, VOCAB) for _ in range(longest)]
    for _ in range(count):
        cut = rng.randint(0, longest - 1)
        yield shared[:cut] + [rng.randint(1, VOCAB) for _ in range(rng.randint(1, longest - cut))]
