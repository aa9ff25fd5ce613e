"""One sequence being generated, and the step plans that move it forward. No torch.

Purpose: the bookkeeping that scheduler and runner share.
Does not know: how plans are made or computed.
Invariant: num_committed <= num_scheduled <= total_len, and `blocks` covers num_scheduled positions.

    tokens      [ prompt ........ | outputs read so far ]            len(tokens)
                  (of a resumed sequence the outputs begin with those of the engine before)
    total_len   [ ...................................... | in flight ]
    positions   [0 .. num_committed)   KV final, may be shared and cached
                [num_committed .. num_scheduled)   KV written by steps under way
                [num_scheduled .. total_len)       still to be planned
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from memory_efficient_gpt.kv_meter import KvMeter
from memory_efficient_gpt.request import Request, TokenLogprob


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n continuations.

    `slot` is its row in the runner's tables while RUNNING. `epoch` grows whenever its KV is dropped,
    so that a step planned before is recognised as stale. `dirty_from` is the first entry of `blocks`
    that the runner has not seen. `block_keys` are the prefix-cache keys of its leading full blocks.
    `distinct_prompt` is filled in when a penalty first needs it. `stop_ids` are the tokens that end it.
    `meter` is its request's, if any.
    """

    request: Request
    index: int
    seed: int
    max_len: int
    tokens: list[int]
    order: int
    status: Status = Status.WAITING
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_scheduled: int = 0
    num_committed: int = 0
    in_flight: int = 0
    epoch: int = 0
    dirty_from: int = 0
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    siblings: tuple[Sequence, ...] = ()
    distinct_prompt: tuple[int, ...] | None = None
    stop_ids: frozenset[int] = frozenset()
    meter: KvMeter | None = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def total_len(self) -> int:
        """Tokens known plus tokens sampled but not read yet."""
        return len(self.tokens) + self.in_flight

    @property
    def num_outputs(self) -> int:
        """Output tokens, those in flight included."""
        return len(self.tokens) + self.in_flight - self.prompt_len

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """Alternatives for each prompt token, None for no logprobs: the first sequence gives them, with its
        first token, so one that is resumed has given them already."""
        wanted = self.request.params.prompt_logprobs
        return None if wanted is None or self.index != 0 or self.request.tokens_before(0) else wanted

    @property
    def num_unscheduled(self) -> int:
        """Positions that still have to be computed before the next token can be sampled."""
        return len(self.tokens) + self.in_flight - self.num_scheduled

    @property
    def decoding(self) -> bool:
        """Whether one more position is all that is missing."""
        return self.num_scheduled > 0 and self.num_unscheduled == 1

    @property
    def exhausted(self) -> bool:
        """Whether its last token is in flight: nothing more is planned for it."""
        return self.total_len >= self.max_len

    def drop_kv(self) -> None:
        """Forget all computed positions (its blocks have been released)."""
        self.blocks = []
        self.block_keys = []
        self.num_scheduled = self.num_committed = self.dirty_from = 0
        self.epoch += 1


@dataclass(slots=True, eq=False)
class Chunk:
    """Positions start .. start + num_tokens - 1 of one sequence, computed in one step. Never changed."""

    seq: Sequence  # not frozen: hundreds are made for a step, and frozen ones take three times as long
    start: int
    num_tokens: int
    epoch: int
    prompt_logprobs: int | None = None


@dataclass(slots=True, eq=False)
class Sample:
    """One token to draw from the last position of chunk number `chunk`; `output_index` counts from 0.
    Never changed."""

    seq: Sequence
    chunk: int
    output_index: int


class Step:
    """What one forward pass computes. `copies` (source, target) blocks come before everything else.

    num_decodes: how many of the chunks are one token of a sequence that is past its prompt.

    A step may repeat an earlier one, `first`, `ahead` positions later: one token of each of the same decoding
    sequences, in the same order. Its chunks and samples are made when somebody asks for them; who keeps
    what follows from `first` needs neither.
    """

    __slots__ = ("_chunks", "_samples", "ahead", "copies", "first", "num_decodes", "num_tokens")

    def __init__(self, first: Step | None = None, ahead: int = 0) -> None:
        self.first = first
        self.ahead = ahead
        self._chunks: list[Chunk] | None = [] if first is None else None
        self._samples: list[Sample] | None = [] if first is None else None
        self.copies: list[tuple[int, int]] = []
        self.num_tokens: int = 0 if first is None else first.num_tokens
        self.num_decodes: int = self.num_tokens

    @property
    def chunks(self) -> list[Chunk]:
        """The parts of sequences that it computes."""
        if self._chunks is None:
            assert self.first is not None
            ahead = self.ahead
            self._chunks = [Chunk(c.seq, c.start + ahead, 1, c.epoch) for c in self.first.chunks]
        return self._chunks

    @property
    def samples(self) -> list[Sample]:
        """The tokens that are drawn behind them."""
        if self._samples is None:
            assert self.first is not None
            ahead = self.ahead
            self._samples = [Sample(s.seq, s.chunk, s.output_index + ahead) for s in self.first.samples]
        return self._samples


@dataclass(slots=True)
class StepOutcome:
    """What a step gave, on the host. Lists follow `Step.samples`; `ok` is False for unusable logits.

    `prompt_logprobs[c]` are chunk c's: one entry for each prompt token at positions
    start + 1 .. start + num_tokens that exists.
    """

    token_ids: list[int]
    ok: list[bool]
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
