"""The engine: requests in, token events out, one step at a time.

Purpose: validate and queue requests, and drive plan -> launch -> commit.
Does not know: text, HTTP, processes; how a model was built.
Invariant: owned by one thread; whatever a request asks for is done or refused, never ignored.

With `overlap`, step N + 1 is launched before step N's tokens are read: the device never waits for
the host, tokens arrive one call later, and a sequence that ended costs one token computed for nothing.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from memory_efficient_gpt.assembly import Parts, assemble, build
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import (
    ContextLengthError,
    EngineFailedError,
    InvalidRequestError,
    OverloadedError,
    SamplingFailedError,
)
from memory_efficient_gpt.kv_meter import KvMeter
from memory_efficient_gpt.request import FinishReason, Request, SequenceEvent
from memory_efficient_gpt.scheduler import Scheduler
from memory_efficient_gpt.sequence import Sequence, Step
from memory_efficient_gpt.step_sampling import PendingStep
from memory_efficient_gpt.tiers import decide_tier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, float], None]
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that a request's n seeds differ


class Engine:
    """One loaded model with its scheduler, cache and runner."""

    def __init__(self, parts: Parts, *, debug_checks: bool = False) -> None:
        self.info: EngineInfo = parts.info
        self._runner = parts.runner
        self._sleepable = parts.sleepable
        self._depth = 1 if parts.overlap else 0
        self._debug_checks = debug_checks
        self._scheduler = Scheduler(parts.scheduler_config, parts.allocator)
        self._kv_limit = parts.kv_limit
        self._pending: deque[tuple[Step, PendingStep]] = deque()
        self._eos = frozenset(self.info.eos_token_ids)
        self._arrivals = 0
        self._random = random.SystemRandom()
        self._closed = False

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> Engine:
        """Load a model. `progress(phase, fraction)` is called as it goes.

        Raises ModelNotFoundError, CheckpointError, UnsupportedModelError or ConfigError.
        """
        return cls(assemble(config, progress or _silent), debug_checks=config.debug_checks)

    @classmethod
    def from_model(cls, model: PreTrainedModel, config: EngineConfig) -> Engine:
        """An engine around a transformers model that is loaded already; the model is changed in place.

        config.model is the name it goes by. Raises UnsupportedModelError or ConfigError.
        """
        decision = decide_tier(model.config, forced=config.tier, max_model_len=config.max_model_len)
        parts = build(model, decision, config, device=model.device, name=config.model)
        return cls(parts, debug_checks=config.debug_checks)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work or bool(self._pending)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises InvalidRequestError naming the field, ContextLengthError when it cannot fit.
        """
        if self._closed:
            raise EngineFailedError(f"the engine of {self.info.model!r} is closed.")
        if self._sleepable.asleep:
            raise OverloadedError(f"the engine of {self.info.model!r} sleeps; call wake() first.")
        self._check(request)
        params = request.params
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        max_len = self.info.max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, len(request.prompt_token_ids) + params.max_tokens)
        meter = None
        if request.metered:
            meter = KvMeter(self.info.kv_block_bytes, resumed=bool(request.resumed_token_ids))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        sequences = []
        for index in request.open_indices:
            self._arrivals += 1
            mixed = (seed + index * _SEED_STRIDE) % 2**64
            tokens = [*request.prompt_token_ids, *request.tokens_before(index)]
            sequences.append(
                Sequence(
                    request, index, mixed, max_len, tokens, self._arrivals, stop_ids=stop_ids, meter=meter
                )
            )
        self._scheduler.add(sequences)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request (or its sequence `index`) and free its blocks now. Unknown ids are fine."""
        self._scheduler.abort(request_id, index)
        self._rest_if_idle()

    def step(self) -> list[SequenceEvent]:
        """One turn of the loop; [] when idle, or when tokens are still on their way."""
        started = time.perf_counter()
        step = self._scheduler.plan()
        device_s = 0.0
        if step is not None:
            began = time.perf_counter()
            self._pending.append((step, self._runner.launch(step)))
            device_s = time.perf_counter() - began
        events: list[SequenceEvent] = []
        if self._pending and (len(self._pending) > self._depth or step is None):
            done, pending = self._pending.popleft()
            began = time.perf_counter()
            outcome = pending.wait()
            device_s += time.perf_counter() - began
            events = self._scheduler.commit(done, outcome)
            self._explain_failures(events)
        if self._debug_checks:
            self._scheduler.check_integrity()
        self._rest_if_idle()
        if step is not None or events:
            self._account(time.perf_counter() - started, device_s, computed=step is not None)
        return events

    @property
    def asleep(self) -> bool:
        """Whether it has given its memory back and takes no requests."""
        return self._sleepable.asleep

    def sleep(self) -> SleepReport:
        """Give back what an idle model needs not (see sleeping.py); the prefix cache is lost. Twice is fine.

        Raises OverloadedError while there is work; MemoryError or RuntimeError, with nothing changed but the
        prefix cache, if the host has no room for the weights.
        """
        if self.has_work:
            raise OverloadedError(
                f"the engine of {self.info.model!r} has work and can't sleep. Finish or abort it first."
            )
        if self._sleepable.report is not None:
            return self._sleepable.report
        self._runner.rest()
        self._runner.forget_addresses()
        self._scheduler.clear_prefix_cache()
        return self._sleepable.sleep()

    def wake(self) -> None:
        """Take the memory back and requests again. Fine if it does not sleep.

        Raises RuntimeError if the device has no room; the engine is of no use then.
        """
        if self._sleepable.asleep:
            self._sleepable.wake()

    def stats(self) -> EngineStats:
        """Counters and present state (the object is reused: copy it to keep it)."""
        return self._scheduler.snapshot()

    def set_kv_limit(self, num_bytes: int) -> int:
        """Let the KV pool have `num_bytes`, or the nearest that it can; returns what it can have in memory.

        Growing is at once, up to `info.kv_most_bytes`. Shrinking takes no block in use and keeps
        `info.kv_least_bytes`; free memory and then the prefix cache is given back before this returns. A pool
        of fixed size (see EngineInfo) stays as it is, and so does one that finds no memory to grow by. A step
        under way is no hindrance: on a CPU its writes are over when it was launched, and on a GPU memory is
        taken away only once the device has done it.
        """
        if self._kv_limit is None:
            return self.info.kv_cache_bytes
        return self._kv_limit.set(num_bytes)

    def close(self) -> None:
        """Drop all work. The engine accepts nothing afterwards."""
        self._closed = True
        self._scheduler.abort_all()
        self._pending.clear()
        self._runner.rest()

    def retire(self) -> None:
        """Close, give the KV cache's memory back and forget where weights are: for another engine around the
        same module."""
        self.close()
        self._runner.forget_addresses()
        self._sleepable.release_pool()

    def _check(self, request: Request) -> None:
        vocab_size = self.info.vocab_size
        request.params.validate(vocab_size)
        if not request.id or request.id in self._scheduler:
            raise InvalidRequestError(f"request id {request.id!r} is empty or already in use.", param="id")
        if request.adapter is not None:
            raise InvalidRequestError(
                f"adapter {request.adapter!r} is not loaded: this model has no adapters.", param="adapter"
            )
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token.", param="prompt")
        _check_ids("prompt token ids", prompt, vocab_size, param="prompt")
        self._check_length(len(prompt), request.params.max_tokens)
        if request.resumed_token_ids:
            self._check_resumed(request)

    def _check_resumed(self, request: Request) -> None:
        params, resumed, param = request.params, request.resumed_token_ids, "resumed_token_ids"
        if len(resumed) != params.n or not request.open_indices:
            raise InvalidRequestError(
                f"resumed_token_ids must have an entry for each of the {params.n} sequences, one of them at "
                f"least not None; got {len(resumed)} entries, {len(request.open_indices)} sequences open.",
                param=param,
            )
        for earlier in map(request.tokens_before, request.open_indices):
            if not earlier:
                continue
            _check_ids("resumed token ids", earlier, self.info.vocab_size, param=param)
            if params.max_tokens is not None and len(earlier) >= params.max_tokens:
                raise InvalidRequestError(
                    f"a sequence to resume has {len(earlier)} tokens; max_tokens is {params.max_tokens}, "
                    "so it has ended.",
                    param=param,
                )
            self._check_length(len(request.prompt_token_ids) + len(earlier), None)

    def _check_length(self, prompt_len: int, max_tokens: int | None) -> None:
        limit = self.info.max_model_len
        needed = prompt_len + (max_tokens if max_tokens is not None else 1)
        if needed > limit:
            asked = "" if max_tokens is None else f" plus max_tokens {max_tokens:,}"
            raise ContextLengthError(
                f"the prompt has {prompt_len:,} tokens{asked}; this model's context is {limit:,}. "
                "Shorten the prompt or lower max_tokens.",
                param="prompt" if prompt_len >= limit else "max_tokens",
            )

    def _explain_failures(self, events: list[SequenceEvent]) -> None:
        for event in events:
            if event.finish_reason is FinishReason.ERROR:
                event.error = SamplingFailedError(
                    "the model gave NaN or infinite logits for this request; it was ended. "
                    "Other requests are not affected. A float32 or bfloat16 dtype may avoid it."
                )

    def _rest_if_idle(self) -> None:
        if not self.has_work:
            self._runner.rest()

    def _account(self, step_s: float, device_s: float, *, computed: bool) -> None:
        stats = self._scheduler.stats
        stats.steps += computed  # the last turn of overlapped work only reads tokens
        stats.step_seconds += step_s
        stats.host_seconds += step_s - device_s
        stats.last_step_s = step_s


def _check_ids(what: str, token_ids: tuple[int, ...], vocab_size: int, *, param: str) -> None:
    if set(map(type, token_ids)) != {int}:
        raise InvalidRequestError(f"{what} must be integers.", param=param)
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{what} must be from 0 to {vocab_size - 1}, got {token_id}.", param=param
            )


def _silent(phase: str, fraction: float) -> None:
    """Report progress to nobody."""
