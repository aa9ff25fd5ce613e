"""One generation, from admission to the last byte, for every API format.

Purpose: reserve, lease, tokenize, submit, turn events into text, answer plainly or as a stream, clean up.
Does not know: the formats (`Dialect`), processes (`ModelEngine`).
Invariant: however a request ends, its sequences are aborted or finished, its lease and its reservation
are given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import EngineFailedError, MegptError
from memory_efficient_gpt.output import TextAssembler
from memory_efficient_gpt.request import Cost, FinishReason, Request, SequenceEvent
from memory_efficient_gpt_server.deps import Client, Server
from memory_efficient_gpt_server.errors import ClientDisconnectedError, StreamStalledError, answer_for
from memory_efficient_gpt_server.logs import RequestRecord
from memory_efficient_gpt_server.merged_events import MergedEvents
from memory_efficient_gpt_server.metrics import ModelMetrics
from memory_efficient_gpt_server.models import ModelEngine
from memory_efficient_gpt_server.optimizations import check_optimizations, check_prefix_cache, wish_of
from memory_efficient_gpt_server.receipts import Serving, later, receipt
from memory_efficient_gpt_server.routes.dialect import FinishedChoice, Usage
from memory_efficient_gpt_server.routes.job import Job
from memory_efficient_gpt_server.served_variant import takes_requests
from memory_efficient_gpt_server.sse import DONE, SseChannel, event
from memory_efficient_gpt_server.text import (
    ScoredToken,
    SequenceText,
    check_prompt,
    encode,
    estimated_tokens,
    score_prompt,
    size_of,
)

logger = logging.getLogger(__name__)

MOST_UNHURRIED_STREAMS: Final = 4
"""With so many requests at once or fewer, every token is written when it comes."""

_LAST_WRITE_TIMEOUT_S: Final = 5.0


class GenerationResponse(Response):
    """An ASGI response that does the job while it answers."""

    def __init__(self, server: Server, client: Client, job: Job, record: RequestRecord) -> None:
        super().__init__()
        self._server = server
        self._client = client
        self._job = job
        self._record = record
        self._cold_state = ""
        self._asked_s: float | None = None
        self._waited_s: float | None = None
        record.model, record.user, record.stream = job.model.id, job.body.user, bool(job.body.stream)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it. Raises MegptError before the first byte; afterwards errors become events."""
        try:
            await self._answer(scope, receive, send)
        except MegptError:
            scope["megpt.headers"] = self._model_headers()  # for errors.py
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        running = self._server.lifecycle.running(receive, self._server.settings.request_timeout_s)
        if not self._job.body.stream:
            async with running:
                body = await self._plain()
                answer = Response(body, headers=self._model_headers(), media_type="application/json")
                await answer(scope, receive, send)
            return
        settings = self._server.settings
        channel = SseChannel(
            send,
            keepalive_s=settings.keepalive_s,
            stall_s=settings.stream_stall_s,
            on_stall=lambda: running.stop(StreamStalledError("The client does not read its stream.")),
            more_headers=self._model_headers,
        )
        try:
            async with running, channel:
                await self._stream(channel)
        except Exception as error:
            if not channel.started:
                raise
            await self._fail(channel, error)

    def _model_headers(self) -> dict[str, str]:
        """The model's state when the request came, and how long it waited for the model to be ready."""
        if self._asked_s is None:
            return {}  # nobody has looked
        waited_s = time.perf_counter() - self._asked_s if self._waited_s is None else self._waited_s
        return {
            "x-megpt-model-state": self._cold_state or "ready",
            "x-megpt-load-ms": f"{1000 * waited_s:.0f}",
        }

    async def _plain(self) -> bytes:
        async with self._generation() as generation:
            async for _ in generation.progress():
                pass
            choices = [generation.finished_choice(s) for s in generation.sequences]
            return self._job.dialect.whole(choices, generation.usage, generation.receipt)

    async def _stream(self, channel: SseChannel) -> None:
        dialect = self._job.dialect
        async with self._generation() as generation:
            async for touched in generation.progress():
                if chunks := generation.chunks(touched):
                    await channel.write(chunks)
                    await self._let_tokens_gather()
            usage = generation.usage if self._job.body.include_usage else None
            last = dialect.last(usage, generation.receipt)
        await channel.end(last + DONE)

    async def _let_tokens_gather(self) -> None:
        """With many streams most of a token's cost is its write: then let the next few share one."""
        if self._server.lifecycle.num_running > MOST_UNHURRIED_STREAMS:
            await asyncio.sleep(self._server.settings.stream_interval_s)

    async def _fail(self, channel: SseChannel, error: Exception) -> None:
        """Tell the client in the stream, unless it has left or doesn't read."""
        if not isinstance(error, MegptError):
            logger.error("A stream failed.", exc_info=error)
        answer = answer_for(error, self._record.id)
        self._record.error = answer.code
        if not isinstance(error, ClientDisconnectedError | StreamStalledError):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WRITE_TIMEOUT_S):
                    await channel.end(event(answer.body()))

    @contextlib.asynccontextmanager
    async def _generation(self) -> AsyncIterator[Generation]:
        """Admitted, its model loaded, tokenized and submitted; ended and accounted for on leaving."""
        job, server = self._job, self._server
        sequences = job.params.n * len(job.prompts)
        guess = sum(map(estimated_tokens, job.prompts)) * job.params.n + job.charged_tokens
        wish = wish_of(job.body.optimizations)
        asked_s = time.perf_counter()
        with server.admission.reserve(self._client.id, sequences, guess) as reservation:
            variant = await job.model.choose(wish)
            engine = variant.engine
            self._cold_state = "" if takes_requests(engine) else engine.state
            self._asked_s = asked_s
            if job.body.on_cold == "fail":
                variant.require_warm()
            prompts: list[tuple[int, ...]] = []
            if engine.info is not None:  # else only a load can tell
                self._check_optimizations(engine.info)
                if self._cold_state:  # nobody leaves for what is refused afterwards
                    prompts = await self._encode(engine.info)
            async with variant.lease() as info:
                self._waited_s = time.perf_counter() - asked_s
                self._check_optimizations(info)
                prompts = prompts or await self._encode(info)
                reservation.correct(sum(map(len, prompts)) * job.params.n + job.charged_tokens)
                serving = Serving(job.model.id, variant.name, info, self._waited_s)
                metrics = server.metrics.of(job.model.id)
                generation = Generation(job, prompts, engine, serving, metrics, self._record)
                try:
                    generation.submit(self._client)
                    yield generation
                finally:
                    await generation.close()
                    usage = generation.usage
                    reservation.release(usage.prompt_tokens + usage.completion_tokens)

    def _check_optimizations(self, info: EngineInfo) -> None:
        wanted, model_id = self._job.body.optimizations, self._job.model.id
        check_prefix_cache(self._job.body.prefix_cache_field, model_id, info)
        if wanted is None:
            return
        loaded = [(other.id, other.engine.info) for other in self._server.catalog if other.id != model_id]
        others = [(name, facts) for name, facts in loaded if facts is not None]
        check_optimizations(wanted, model_id, info, others)

    async def _encode(self, info: EngineInfo) -> list[tuple[int, ...]]:
        job = self._job
        prompts = []
        for number, prompt in enumerate(job.prompts):
            token_ids = await self._server.text_pool.run(
                size_of(prompt), partial(encode, job.model.tokenizer, prompt)
            )
            field = f"{job.field}[{number}]" if len(job.prompts) > 1 else job.field
            check_prompt(token_ids, info, job.params.max_tokens, field, job.body.output_limit_field)
            prompts.append(token_ids)
        return prompts


class Generation:
    """The sequences of one job and the text they have so far."""

    def __init__(
        self,
        job: Job,
        prompts: Sequence[tuple[int, ...]],
        engine: ModelEngine,
        serving: Serving,
        metrics: ModelMetrics,
        record: RequestRecord,
    ) -> None:
        self._job = job
        self._prompts = prompts
        self._engine = engine
        self._serving = serving
        self._metrics = metrics
        self._record = record
        self._events = MergedEvents()
        self._prompt_scores: dict[int, list[ScoredToken]] = {}
        self._cached = [0] * len(prompts)
        self._costs: dict[int, Cost] = {}
        echoes = [self._prompt_text(number) if job.echo else "" for number in range(len(prompts))]
        self.sequences = [
            SequenceText(number * job.params.n + i, number, self._assembler(), echoes[number])
            for number in range(len(prompts))
            for i in range(job.params.n)
        ]
        self._numbers = {self._request_id(i): i for i in range(len(prompts))}

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        completion = 0 if self._job.score_only else sum(s.num_tokens for s in self.sequences)
        return Usage(sum(map(len, self._prompts)), completion, sum(self._cached))

    @property
    def receipt(self) -> dict[str, Any] | None:
        """What served it and what it has cost so far, for those who asked."""
        if not self._job.body.wants_receipt:
            return None
        return receipt(self._serving, self._costs.values(), len(self._prompts), sum(self._cached))

    def submit(self, client: Client) -> None:
        """Hand every prompt to the engine. Raises MegptError."""
        body = self._job.body
        for request_id, number in self._numbers.items():
            request = Request(
                id=request_id,
                prompt_token_ids=self._prompts[number],
                params=self._job.params,
                client=client.id,
                cache_salt=f"{client.id}:{body.cache_salt or ''}",
                use_prefix_cache=body.uses_prefix_cache,
                metered=body.wants_receipt,
            )
            self._events.add(self._engine.submit(request))

    async def progress(self) -> AsyncIterator[Sequence[SequenceText]]:
        """After each piece of news the sequences it is about; ends when all have finished."""
        unfinished = len(self.sequences)
        while events := await self._events.next():
            now_s = time.perf_counter()
            touched: dict[SequenceText, None] = {}  # a set that keeps the order
            for news in events:
                sequence = self._take(news, now_s)
                if sequence is not None:
                    touched[sequence] = None
                    unfinished -= sequence.finish_reason is not None
            if touched:
                yield tuple(touched)
            if not unfinished:
                return
        raise EngineFailedError("The engine gave no end to this request. Retry.")

    def chunks(self, touched: Sequence[SequenceText]) -> bytes:
        """The events for what is new in these sequences."""
        dialect, parts = self._job.dialect, []
        for sequence in touched:
            if not self._ready_to_show(sequence):
                continue
            if not sequence.opened:
                sequence.opened = True
                parts.append(dialect.begin(sequence.index))
            if sequence.pending_text or sequence.pending_scores:
                text, logprobs = self._shown(sequence)
                parts.append(dialect.delta(sequence.index, text, logprobs))
            if sequence.finish_reason is not None:
                parts.append(dialect.finish(sequence.index, sequence.finish_reason.value))
        return b"".join(parts)

    def finished_choice(self, sequence: SequenceText) -> FinishedChoice:
        """The whole of a sequence that was never shown in chunks."""
        text, logprobs = self._shown(sequence)
        reason = sequence.finish_reason or FinishReason.ABORT
        return FinishedChoice(sequence.index, text, reason.value, logprobs)

    async def close(self) -> None:
        """End what still runs and account for everything. Safe after any failure."""
        await self._events.close()
        for sequence in self.sequences:
            self._metrics.finished[(sequence.finish_reason or FinishReason.ABORT).value] += 1
        usage, record = self.usage, self._record
        record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        record.cached_tokens = usage.cached_tokens
        self._metrics.prompt_tokens.observe(usage.prompt_tokens)
        self._metrics.generation_tokens.observe(usage.completion_tokens)
        self._metrics.e2e.observe(time.perf_counter() - record.started_s)

    def _take(self, news: SequenceEvent, now_s: float) -> SequenceText | None:
        if news.error is not None:
            raise news.error
        prompt = self._numbers[news.request_id]
        sequence = self.sequences[prompt * self._job.params.n + news.index]
        if news.cost is not None:
            self._costs[prompt] = later(self._costs.get(prompt), news.cost)
        if sequence.finish_reason is not None:
            return None  # it ended here, by a stop string, while this was on the way
        if news.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise EngineFailedError("The engine ended this request early. Retry.")
        if news.token_ids:
            self._time_tokens(sequence, len(news.token_ids), now_s)
        if news.num_cached_tokens:
            self._cached[prompt] = max(self._cached[prompt], news.num_cached_tokens)
        if news.prompt_logprobs is not None:
            self._prompt_scores[prompt] = score_prompt(
                self._job.model.tokenizer, self._prompts[prompt], news.prompt_logprobs
            )
        if self._job.score_only:
            news.token_ids, news.logprobs = [], None
        if sequence.take(news):
            self._engine.abort(news.request_id, news.index)
        return sequence

    def _time_tokens(self, sequence: SequenceText, count: int, now_s: float) -> None:
        if self._record.ttft_s is None:
            self._record.ttft_s = now_s - self._record.started_s
            self._metrics.ttft.observe(self._record.ttft_s)
        if sequence.last_token_s is not None:
            self._metrics.itl.observe((now_s - sequence.last_token_s) / count, count)
        sequence.last_token_s = now_s

    def _ready_to_show(self, sequence: SequenceText) -> bool:
        """Scores of an echoed prompt come before everything else of its choices."""
        wants_scores = self._job.params.prompt_logprobs is not None
        return not wants_scores or sequence.prompt_index in self._prompt_scores

    def _shown(self, sequence: SequenceText) -> tuple[str, object]:
        """Text and logprobs that were not shown yet; they count as shown."""
        text, sequence.pending_text = sequence.pending_text, ""
        if self._job.params.logprobs is None and self._job.params.prompt_logprobs is None:
            return text, None
        scores, sequence.pending_scores = sequence.pending_scores, []
        if not sequence.prompt_scored:
            sequence.prompt_scored = True
            scores = self._prompt_scores.get(sequence.prompt_index, []) + scores
        return text, self._job.dialect.logprobs(scores)

    def _assembler(self) -> TextAssembler:
        return TextAssembler(
            self._job.model.tokenizer, self._job.params.stop, continues=self._job.continues_text
        )

    def _request_id(self, number: int) -> str:
        return f"{self._job.id}-{number}" if len(self._prompts) > 1 else self._job.id

    def _prompt_text(self, number: int) -> str:
        prompt = self._job.prompts[number]
        return prompt if isinstance(prompt, str) else self._job.model.tokenizer.decode(self._prompts[number])
