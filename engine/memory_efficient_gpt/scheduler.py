"""What the next step computes: one token budget shared by decodes and prompt chunks. No torch.

Purpose: admit, chunk, preempt and finish sequences; own the block allocator.
Does not know: token values before `commit`, tensors, text, time.
Invariant: every planned position has a block that only its sequence may write; at least one token of
every admitted sequence is computed (the prefix cache never covers a whole prompt).

There are no prefill and decode phases: each running sequence has positions that are not computed
yet, one when it decodes and many when its prompt is new, and `plan` hands out the budget: decodes
first, then prompts under way, then new ones. When blocks run out the newest sequence gives up all of
its own and is computed again later; with the prefix cache, most of that is found again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from memory_efficient_gpt.block_tables import BlockTables
from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.repetition import Repetition
from memory_efficient_gpt.request import FinishReason, SequenceEvent, TokenLogprob
from memory_efficient_gpt.sequence import Chunk, Sample, Sequence, Status, Step, StepOutcome
from memory_efficient_gpt.waiting import WaitingQueue

_MOST_RIVALS: Final = 64
"""Prompts that are looked at before a long one takes its part of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step. `window` and `variant`: see BlockTables.

    `forks`: whether the n sequences of a request may share their prompt's KV. `chunks`: whether a prompt
    may be computed in parts.
    """

    max_num_seqs: int
    max_batched_tokens: int
    window: int | None = None
    forks: bool = True
    chunks: bool = True
    variant: str = ""


class Scheduler:
    """Plans steps over sequences; `plan` and `commit` alternate, with at most one step in between."""

    def __init__(self, config: SchedulerConfig, allocator: BlockAllocator) -> None:
        self._config = config
        self._allocator = allocator
        self._tables = BlockTables(allocator, variant=config.variant, window=config.window)
        self._repetition = Repetition(self._tables, allocator.block_size)
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._live: dict[str, list[Sequence]] = {}
        self._refused: tuple[Sequence, int] | None = None
        self._outputs: Counter[str] = Counter()
        self.stats = EngineStats(num_kv_blocks=allocator.num_blocks - 1)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._live)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def add(self, sequences: list[Sequence]) -> None:
        """Queue a request's sequences; those after the first are forked from it where possible.

        Resumed sequences have tokens of their own and share the prompt only through the prefix cache.
        """
        first = sequences[0]
        forks = self._config.forks and not any(seq.num_outputs for seq in sequences)
        self._live[first.request.id] = list(sequences)
        self._waiting.arrived(first.request.client, len(sequences))
        if len(sequences) > 1 and forks and len(sequences) <= self._config.max_num_seqs:
            first.siblings = tuple(sequences[1:])
        for seq in sequences[: 1 if first.siblings else None]:
            self._waiting.add(seq)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request's sequences (or one of them) and free their blocks now."""
        for seq in list(self._live.get(request_id, ())):
            if index is None or seq.index == index:
                self._abort(seq)

    def abort_all(self) -> None:
        """End every sequence."""
        for request_id in list(self._live):
            self.abort(request_id)

    def clear_prefix_cache(self) -> None:
        """Forget all cached content: the memory behind the blocks is about to go."""
        self._allocator.clear_cache()

    def plan(self) -> Step | None:
        """The next step, or None when nothing can be computed now. Takes blocks, may preempt."""
        if not self._may_admit() and (repeated := self._repetition.next()) is not None:
            return repeated
        step = Step()
        preempted = False
        candidates = self._candidates()
        for position, seq in enumerate(candidates):
            if seq.status is not Status.RUNNING:
                continue
            num_tokens = self._num_tokens(step, seq, candidates[position + 1 :])
            if num_tokens <= 0:
                continue
            missing = self._tables.missing(seq, num_tokens)
            if missing > self._tables.num_free:
                victims = [c for c in candidates[position + 1 :] if c.status is Status.RUNNING]
                preempted |= self._make_room(seq, num_tokens, victims)
            if seq.status is Status.RUNNING:
                self._schedule(step, seq, num_tokens, extend=missing > 0)
        if not preempted:
            self._admit(step)
        self._repetition.begin(step, len(self._running))
        return step if step.chunks else None

    def commit(self, step: Step, outcome: StepOutcome) -> list[SequenceEvent]:
        """Take in what a step gave: append tokens, cache full blocks, finish what is done."""
        planned = step.first or step
        tables, size = self._tables, self._allocator.block_size
        for number, chunk in enumerate(planned.chunks):
            if chunk.prompt_logprobs is not None:
                self._take_prompt_logprobs(chunk, outcome.prompt_logprobs.get(number))
            seq = chunk.seq
            if seq.epoch != chunk.epoch or seq.status is not Status.RUNNING:
                continue  # preempted, finished or aborted since it was planned
            end = chunk.start + step.ahead + chunk.num_tokens
            if end > seq.num_committed:
                seq.num_committed = end
            if tables.windowed or (tables.caching and len(seq.block_keys) < end // size):
                tables.committed(seq)
        events = []
        for number, sample in enumerate(planned.samples):
            seq = sample.seq
            if seq.status is Status.FINISHED:
                continue
            seq.in_flight -= 1
            event = self._commit_token(seq, number, outcome)
            if seq.meter is not None:
                event.cost = seq.meter.cost()
            events.append(event)
        self._charge_outputs()
        return events

    def snapshot(self) -> EngineStats:
        """Fill in and return the present state."""
        self.stats.num_running = len(self._running)
        self.stats.num_waiting = len(self._waiting)
        short = self._refused is not None and self._refused[0].status is Status.WAITING
        self.stats.num_waiting_for_blocks = len(self._waiting) if short else 0
        self.stats.num_kv_blocks = self._allocator.limit
        self.stats.num_free_blocks = self._allocator.num_free
        self.stats.num_cached_blocks = self._allocator.num_cached
        return self.stats

    def check_integrity(self) -> None:
        """Assert every invariant (tests, debug mode)."""
        self._allocator.check_integrity([s.blocks for s in self._running])
        slots = [s.slot for s in self._running]
        assert None not in slots and len(set(slots)) == len(slots)
        assert len(slots) + len(self._free_slots) == self._config.max_num_seqs
        for seq in self._waiting:
            assert seq.status is Status.WAITING and not seq.blocks and seq.num_scheduled == 0
        for seq in self._running:
            assert seq.status is Status.RUNNING
            assert seq.num_committed <= seq.num_scheduled <= seq.total_len
            assert len(seq.blocks) * self._allocator.block_size >= seq.num_scheduled

    # Planning

    def _may_admit(self) -> bool:
        """Whether a waiting sequence may start; False is certain."""
        seq = self._waiting.peek() if self._free_slots else None
        return seq is not None and not self._refused_as_before(seq)

    def _refused_as_before(self, seq: Sequence) -> bool:
        """Whether `seq` found no room when as much was free: its prompt is not hashed in every step."""
        if not self._running or self._refused is None:
            return False
        refused, num_free = self._refused
        return refused is seq and self._tables.num_free <= num_free

    def _candidates(self) -> list[Sequence]:
        """Running sequences with something to compute: decodes first, each by age."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self._running:
            total = len(seq.tokens) + seq.in_flight
            missing = total - seq.num_scheduled
            if missing > 0 and total < seq.max_len:
                (decodes if missing == 1 and seq.num_scheduled > 0 else prompts).append(seq)
        return decodes + prompts

    def _num_tokens(self, step: Step, seq: Sequence, others: list[Sequence]) -> int:
        """How many of the sequence's next positions the step takes. others: running, and not in it yet.

        A long prompt must not hold up short ones: it leaves them room, and takes no more than a quarter of a
        step beside sequences that wait for their next token.
        """
        limit = self._config.max_batched_tokens
        room, wanted = limit - step.num_tokens, seq.num_unscheduled
        least = max(limit // 4, self._allocator.block_size)
        if not self._config.chunks or wanted <= least or room <= least:
            return min(wanted, room)
        if step.num_decodes:
            return least
        return min(wanted, max(least, room - self._short_rivals(wanted // 2, others)))

    def _short_rivals(self, most: int, others: list[Sequence]) -> int:
        """Tokens of prompts that need no more than `most`. An even share would serve nobody sooner."""
        waiting = islice(self._waiting, min(len(self._free_slots), _MOST_RIVALS))
        needs = (seq.num_unscheduled for seq in chain(others[:_MOST_RIVALS], waiting))
        return sum(need for need in needs if need <= most)

    def _make_room(self, seq: Sequence, num_tokens: int, victims: list[Sequence]) -> bool:
        """Free blocks until `seq` can be extended, newest victim first, itself last; True if any fell."""
        preempted = False
        while self._tables.missing(seq, num_tokens) > self._tables.num_free:
            preempted = True
            self._preempt(victims.pop() if victims else seq)
            if seq.status is not Status.RUNNING:
                break
        return preempted

    def _schedule(self, step: Step, seq: Sequence, num_tokens: int, *, extend: bool = True) -> None:
        """extend: whether it may need blocks."""
        copy = self._tables.extend(seq, num_tokens) if extend else None
        if copy is not None:
            step.copies.append(copy)
        wanted = seq.wanted_prompt_logprobs
        if wanted is not None and seq.prompt_logprobs is not None:
            wanted = None if len(seq.prompt_logprobs) >= seq.prompt_len else wanted
        step.chunks.append(Chunk(seq, seq.num_scheduled, num_tokens, seq.epoch, wanted))
        step.num_tokens += num_tokens
        step.num_decodes += seq.decoding
        seq.num_scheduled += num_tokens
        if seq.num_unscheduled == 0:
            self._plan_sample(step, seq)

    def _plan_sample(self, step: Step, seq: Sequence) -> None:
        chunk = len(step.chunks) - 1
        forked, seq.siblings = seq.siblings, ()
        for sibling in forked:
            self._fork(seq, sibling)
        for member in (seq, *forked):
            step.samples.append(Sample(member, chunk, member.num_outputs))
            member.in_flight += 1

    def _fork(self, leader: Sequence, sibling: Sequence) -> None:
        self._tables.share(leader, sibling)
        sibling.num_scheduled = leader.num_scheduled
        sibling.num_committed = leader.num_committed
        sibling.num_cached_tokens = leader.num_cached_tokens
        self._start(sibling)

    def _start(self, seq: Sequence) -> None:
        self._repetition.end()
        seq.status = Status.RUNNING
        seq.slot = self._free_slots.pop()
        self._running.append(seq)
        if seq.meter is not None:
            seq.meter.started()

    def _admit(self, step: Step) -> None:
        while (seq := self._waiting.peek()) is not None:
            room = self._config.max_batched_tokens - step.num_tokens
            reserved = sum(len(leader.siblings) for leader in self._running)  # they fork later
            if room <= 0 or seq.in_flight or len(self._free_slots) - reserved <= len(seq.siblings):
                return
            if not self._find_room(seq):
                return
            self._waiting.remove(seq)
            self._start(seq)
            self._tables.reserve_prompt(seq)
            self._schedule(step, seq, self._num_tokens(step, seq, []))

    def _find_room(self, seq: Sequence) -> bool:
        """Whether all of the prompt fits now; if so, it has taken its cached blocks."""
        if self._refused_as_before(seq):
            return False
        found = self._tables.find_cached(seq)
        if self._running and self._tables.missing_for_admission(seq, found) > 0:
            self._refused = seq, self._tables.num_free
            return False  # with nothing running all blocks are free, and any accepted prompt fits in those
        self._refused = None
        num_tokens = self._tables.take_cached(seq, found)
        seq.num_scheduled = seq.num_committed = num_tokens
        if seq.num_cached_tokens is None:
            self._count_prompt(seq, num_tokens)
        return True

    def _count_prompt(self, seq: Sequence, num_cached: int) -> None:
        seq.num_cached_tokens = num_cached
        num_tokens = len(seq.tokens)  # the prompt's, and those that a resumed sequence has generated
        self._waiting.charge(seq.request.client, prompt_tokens=num_tokens - num_cached)
        if self._allocator.prefix_cache and seq.request.use_prefix_cache:
            self.stats.prefix_queries_tokens += num_tokens
            self.stats.prefix_hits_tokens += num_cached

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; what it has generated stays and becomes part of its prompt."""
        self.stats.num_preemptions += 1
        if seq.num_scheduled < seq.prompt_len:  # else what is missing is in flight, and still counts
            seq.prompt_logprobs = None
        self._leave(seq)
        seq.status = Status.WAITING
        self._waiting.add_preempted(seq)

    def _leave(self, seq: Sequence) -> None:
        self._repetition.end()
        self._tables.release(seq)
        self._running.remove(seq)
        assert seq.slot is not None
        self._free_slots.append(seq.slot)
        seq.slot = None

    # Committing

    def _take_prompt_logprobs(self, chunk: Chunk, logprobs: list[TokenLogprob] | None) -> None:
        seq = chunk.seq
        if logprobs and (seq.epoch == chunk.epoch or chunk.start + chunk.num_tokens >= seq.prompt_len):
            seq.prompt_logprobs = [*(seq.prompt_logprobs or [None]), *logprobs]
        elif seq.prompt_len == 1:
            seq.prompt_logprobs = [None]

    def _commit_token(self, seq: Sequence, number: int, outcome: StepOutcome) -> SequenceEvent:
        request, tokens, token = seq.request, seq.tokens, outcome.token_ids[number]
        event = SequenceEvent(request_id=request.id, index=seq.index, token_ids=[])
        if len(tokens) == len(request.prompt_token_ids):
            event.num_cached_tokens = seq.num_cached_tokens or 0
            if seq.index == 0:
                event.prompt_logprobs = seq.prompt_logprobs
                self.stats.prompt_tokens += seq.prompt_len
        if not outcome.ok[number]:
            self._tables.distrust(seq)
            return self._end(seq, event, FinishReason.ERROR)
        if token in seq.stop_ids:
            event.stop_token_id = token
            return self._end(seq, event, FinishReason.STOP)
        tokens.append(token)
        self._outputs[request.client] += 1
        event.token_ids.append(token)
        logprob = outcome.logprobs[number]
        if logprob is not None:
            event.logprobs = [logprob]
        if len(tokens) >= seq.max_len:
            return self._end(seq, event, FinishReason.LENGTH)
        return event

    def _charge_outputs(self) -> None:
        """Account the output tokens of each client, those of one step together."""
        for client, count in self._outputs.items():
            self.stats.generated_tokens += count
            self._waiting.charge(client, output_tokens=count)
        self._outputs.clear()

    def _end(self, seq: Sequence, event: SequenceEvent, reason: FinishReason) -> SequenceEvent:
        event.finish_reason = reason
        self._charge_outputs()  # before its client may be forgotten
        self._finish(seq)
        return event

    def _abort(self, seq: Sequence) -> None:
        if seq.siblings:  # it leads sequences that are not forked yet: the next one takes its place
            heir, *rest = seq.siblings
            seq.siblings = ()
            heir.siblings = tuple(rest)
            self._finish(seq)
            self._waiting.add(heir)
            return
        for leader in self._live[seq.request.id]:
            if seq in leader.siblings:  # never started
                leader.siblings = tuple(s for s in leader.siblings if s is not seq)
                self._retire(seq)
                return
        self._finish(seq)

    def _finish(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self._leave(seq)
        else:
            self._waiting.remove(seq)
        self._retire(seq)

    def _retire(self, seq: Sequence) -> None:
        seq.status = Status.FINISHED
        self._waiting.finished(seq.request.client)
        members = self._live[seq.request.id]
        members.remove(seq)
        if not members:
            del self._live[seq.request.id]
