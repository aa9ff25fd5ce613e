"""An engine in the test's own process that gives tokens by a script: a faithful fake of `ModelEngine`.

Every request is answered with the tokens of `answer`, one at a time, `step_s` apart; a sequence ends by
end-of-sequence after the last, or by max_tokens. What real engines check, it checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memory_efficient_gpt.engine_info import EngineInfo, EngineStats
from memory_efficient_gpt.errors import ContextLengthError, MegptError
from memory_efficient_gpt.request import Cost, FinishReason, Request, SequenceEvent, TokenLogprob
from memory_efficient_gpt_server.event_stream import EventStream

INFO = EngineInfo(
    model="scripted", architecture="LlamaForCausalLM", tier="B", tier_reason="a fake", dtype="float32",
    device="cpu", max_model_len=512, vocab_size=4096, eos_token_ids=(0,), num_kv_blocks=100, block_size=16,
    kv_cache_dtype="float32", weights_bytes=1000, kv_cache_bytes=2000, attention_backend="none",
)  # fmt: skip


@dataclass
class ScriptedEngine:
    """Implements `ModelEngine`. before_token: runs before each token, with the request and their count.

    block_bytes: what each token costs a metered request, for a second each; None: it measures nothing.
    """

    answer: list[int]
    step_s: float = 0.0
    info: EngineInfo | None = INFO
    state: str = "ready"
    reason: str | None = None
    stalled: bool = False
    stats: EngineStats = field(default_factory=lambda: EngineStats(num_kv_blocks=100, num_free_blocks=75))
    ended_stats: EngineStats = field(default_factory=EngineStats)
    cached_tokens: int = 0
    block_bytes: int | None = 10
    refuse_with: MegptError | None = None
    before_token: Callable[[Request, int], MegptError | None] = lambda request, count: None
    requests: list[Request] = field(default_factory=list)
    aborted: list[tuple[str, int | None]] = field(default_factory=list)
    most_running: int = 0
    closed: bool = False
    _running: dict[str, tuple[EventStream, asyncio.Task[None]]] = field(default_factory=dict)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self) -> None:
        pass

    async def close(self, drain_s: float = 0.0) -> None:
        self.state = "closed"
        for request_id in list(self._running):
            self.abort(request_id)

    def submit(self, request: Request) -> EventStream:
        if self.refuse_with is not None:
            raise self.refuse_with
        assert request.id not in self._running, "ids must be unique"
        assert self.info is not None
        request.params.validate(self.info.vocab_size)
        if len(request.prompt_token_ids) + (request.params.max_tokens or 1) > self.info.max_model_len:
            raise ContextLengthError("too long", param="prompt")
        self.requests.append(request)
        stream = EventStream(request.id, request.params.n, abandon=self.abort)
        self._running[request.id] = (stream, asyncio.create_task(self._run(request, stream)))
        self.most_running = max(
            self.most_running, sum(s.params.n for s in self.requests[-self.num_running :])
        )
        return stream

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))
        if request_id not in self._running:
            return
        stream, task = self._running[request_id]
        stream.close(index)
        if stream.ended:
            task.cancel()
            del self._running[request_id]

    async def _run(self, request: Request, stream: EventStream) -> None:
        for count in range(len(self.answer) + 1):
            await asyncio.sleep(self.step_s)
            if (error := self.before_token(request, count)) is not None:
                stream.fail(error)
                break
            for index in range(request.params.n):
                stream.put(self._event(request, index, count))
            self.stats = replace(
                self.stats, steps=self.stats.steps + 1, generated_tokens=self.stats.generated_tokens + 1
            )
            if stream.ended:
                break
        self._running.pop(request.id, None)

    def _event(self, request: Request, index: int, count: int) -> SequenceEvent:
        params = request.params
        event = SequenceEvent(request_id=request.id, index=index, num_cached_tokens=self.cached_tokens)
        if request.metered:
            event.cost = self._cost(count + 1)
        if count == 0 and index == 0 and params.prompt_logprobs is not None:
            scores = [scored(token, params.prompt_logprobs) for token in request.prompt_token_ids]
            event.prompt_logprobs = [None, *scores[1:]]
        if count == len(self.answer):
            event.finish_reason, event.stop_token_id = FinishReason.STOP, 0
            return event
        event.token_ids = [self.answer[count]]
        if params.logprobs is not None:
            event.logprobs = [scored(self.answer[count], params.logprobs)]
        if count + 1 == params.max_tokens:
            event.finish_reason = FinishReason.LENGTH
        return event

    def _cost(self, num_tokens: int) -> Cost:
        size = None if self.block_bytes is None else self.block_bytes * num_tokens
        return Cost(queue_s=0.25, kv_peak_bytes=size, kv_byte_seconds=None if size is None else size / 2)


def scored(token_id: int, num_top: int) -> TokenLogprob:
    """A log probability that tests can predict: of a token and of those after it."""
    top = tuple(((token_id + k) % 4096, -0.5 * (k + 1)) for k in range(num_top))
    return TokenLogprob(token_id, -0.5, top)
