"""The library's front door: a model in this process, text in, text out.

Purpose: tokenizing, the engine's loop and text assembly behind a few methods.
Does not know: HTTP, worker processes.
Invariant: the same Engine as the server's; one thread at a time (calls don't interleave).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.output import TextAssembler
from memory_efficient_gpt.progress import batch_bar, load_bar
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent, TokenLogprob
from memory_efficient_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Choice:
    """One of a completion's n texts."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Completion:
    """What became of one prompt. `text` is the first choice's."""

    prompt_token_ids: tuple[int, ...]
    choices: list[Choice]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    def __str__(self) -> str:
        return self.text


class LLM:
    """A loaded model.

    >>> llm = LLM("demo")
    >>> llm.generate("The old house stood", max_tokens=40).text
    """

    def __init__(self, model: str, *, progress: bool = True, **options: Any) -> None:
        """Load `model`: a bundled model's name, a Hugging Face folder, or a hub id.

        `options` are EngineConfig's fields. Raises what `Engine.load` raises.
        """
        config = EngineConfig(model=model, **options)
        shown = load_bar(model) if progress else nullcontext()
        with shown as bar:
            self.engine = Engine.load(config, bar)
        self.tokenizer = Tokenizer.load(resolve_model(model, config.revision))
        self._ids = itertools.count()

    @property
    def info(self) -> EngineInfo:
        """The facts of the loaded model."""
        return self.engine.info

    @property
    def stats(self) -> EngineStats:
        """Counters since the model was loaded."""
        return self.engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue one prompt (returns a Completion) or several, batched (returns a list of them).

        A prompt is text or token ids. Give `params`, or SamplingParams' fields as keywords.
        progress: a bar over the prompts; None shows it for more than one, on a terminal.
        Raises InvalidRequestError before anything is computed, or the error a request ended with.
        """
        params = params or SamplingParams(**sampling)
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        running = self._start(several, params)
        shown = len(several) > 1 if progress is None else progress
        completions = self._complete(running, shown=shown)
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Iterator[str]:
        """Continue one prompt, yielding text as it comes; closing the iterator frees everything."""
        params = params or SamplingParams(**sampling)
        if params.n != 1:
            raise ValueError(f"stream gives one text; n is {params.n}. Use generate for several.")
        running = self._start([prompt], params)
        (only,) = running.values()
        choice, sent = only.completion.choices[0], 0
        try:
            while choice.finish_reason is None:
                for event in self.engine.step():
                    self._take(running, event)
                if len(choice.text) > sent:
                    yield choice.text[sent:]
                    sent = len(choice.text)
        finally:
            self.engine.abort(only.request.id)

    def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None, **sampling: Any
    ) -> Completion:
        """Answer a conversation (role/content messages) through the model's chat template."""
        ids = self.tokenizer.apply_chat_template(list(messages))
        running = self._start([ids], params or SamplingParams(**sampling), continues=False)
        return self._complete(running, shown=False)[0]

    def close(self) -> None:
        """Drop the model."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, continues: bool = True
    ) -> dict[str, _Running]:
        running: dict[str, _Running] = {}
        try:
            for prompt in prompts:
                ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
                request = Request(id=f"local-{next(self._ids)}", prompt_token_ids=ids, params=params)
                self.engine.submit(request)
                running[request.id] = _Running(request, self.tokenizer, continues=continues)
        except Exception:
            for request_id in running:
                self.engine.abort(request_id)
            raise
        return running

    def _complete(self, running: dict[str, _Running], *, shown: bool) -> list[Completion]:
        with batch_bar(len(running), shown=shown) as bar:
            self._drain(running, bar)
        return [r.completion for r in running.values()]

    def _drain(self, running: dict[str, _Running], bar: Progress | None) -> None:
        unfinished = len(running)
        try:
            while unfinished:
                for event in self.engine.step():
                    unfinished -= self._take(running, event)
                    if bar is not None:
                        bar.update(bar.task_ids[0], completed=len(running) - unfinished)
        finally:
            if unfinished:
                for request_id in running:
                    self.engine.abort(request_id)

    def _take(self, running: dict[str, _Running], event: SequenceEvent) -> bool:
        """Apply an event; True when its request is complete."""
        mine = running.get(event.request_id)
        if mine is None:
            return False
        if event.error is not None:
            raise event.error
        if mine.apply(event):
            self.engine.abort(event.request_id, event.index)
        return all(choice.finish_reason is not None for choice in mine.completion.choices)


class _Running:
    """A request under way and the text it has so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer, *, continues: bool) -> None:
        """continues: the text goes on from the prompt's, so a leading space of its first token counts."""
        n = request.params.n
        self.request = request
        self.completion = Completion(request.prompt_token_ids, [Choice() for _ in range(n)])
        self._assemblers = [
            TextAssembler(tokenizer, request.params.stop, continues=continues) for _ in range(n)
        ]

    def apply(self, event: SequenceEvent) -> bool:
        """Take an event in; True when a stop string ended the sequence, which the engine can't know."""
        choice, assembler = self.completion.choices[event.index], self._assemblers[event.index]
        if event.index == 0 and event.prompt_logprobs is not None:
            self.completion.prompt_logprobs = event.prompt_logprobs
        self.completion.num_cached_tokens = max(self.completion.num_cached_tokens, event.num_cached_tokens)
        choice.token_ids += event.token_ids
        choice.logprobs += event.logprobs or []
        delta = assembler.push(event.token_ids)
        choice.text += delta.text
        if delta.stop_string is not None:
            choice.finish_reason, choice.stop = FinishReason.STOP, delta.stop_string
            return event.finish_reason is None
        if event.finish_reason is not None:
            choice.text += assembler.finish().text
            choice.finish_reason, choice.stop = event.finish_reason, event.stop_token_id
        return False
