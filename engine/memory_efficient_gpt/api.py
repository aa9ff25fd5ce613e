"""The library's front door: a model in this process, text in, text out.

Purpose: tokenizing, the engine's loop and text assembly behind a few methods.
Does not know: HTTP, worker processes.
Invariant: the same Engine as the server's, used by one thread. Calls may interleave within it: whoever
steps the engine also takes in what the others' requests got, so a paused `stream` loses nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats
from memory_efficient_gpt.errors import InvalidRequestError, MegptError
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.output import TextAssembler, TextDelta
from memory_efficient_gpt.progress import batch_bar, load_bar
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent, TokenLogprob
from memory_efficient_gpt.tokenizer import Tokenizer


class IdArray(Protocol):
    """Token ids in a numpy array or a tensor."""

    def tolist(self) -> Any: ...


Prompt = str | Sequence[int] | IdArray


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

    def __init__(self, model: str | os.PathLike[str], *, progress: bool = True, **options: Any) -> None:
        """Load `model`: a bundled model's name, a Hugging Face folder, or a hub id.

        `options` are EngineConfig's fields. Raises what `Engine.load` raises.
        """
        config = EngineConfig(model=os.fspath(model), **options)
        shown = load_bar(config.model) if progress else nullcontext()
        with shown as bar:
            engine = Engine.load(config, bar)
        self._serve(engine, Tokenizer.load(resolve_model(config.model, config.revision)))

    @classmethod
    def around(cls, engine: Engine, tokenizer: Tokenizer | None) -> Self:
        """The same for an engine that exists already; without a tokenizer for prompts of token ids only."""
        llm = cls.__new__(cls)
        llm._serve(engine, tokenizer)
        return llm

    def _serve(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._ids = itertools.count()
        self._running: dict[str, _Running] = {}

    def __repr__(self) -> str:
        info = self.info
        return f"<LLM {info.model!r}: {info.architecture}, {info.dtype} on {info.device}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises InvalidRequestError if it has none."""
        if self._tokenizer is None:
            raise InvalidRequestError(
                "this model has no tokenizer, so it takes token ids only, not text.", param="prompt"
            )
        return self._tokenizer

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
        several, single = _separate(prompts)
        running = self._start(several, _one_of(params, sampling))
        shown = len(several) > 1 if progress is None else progress
        completions = self._complete(running, shown=shown)
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Iterator[str]:
        """Continue one prompt, yielding text as it comes; closing the iterator frees everything.

        Raises InvalidRequestError, here or with the first text, or the error the request ended with.
        """
        params = _one_of(params, sampling)
        several, single = _separate(prompt)
        if params.n != 1 or not single:
            field, asked = ("n", f"{params.n} texts") if single else ("prompt", "several prompts")
            raise InvalidRequestError(
                f"stream gives one text for one prompt, {asked} were asked for. Use generate.", param=field
            )
        return self._stream(several, params)

    def _stream(self, prompts: list[str | Sequence[int]], params: SamplingParams) -> Iterator[str]:
        (only,) = self._start(prompts, params)
        choice, sent = only.completion.choices[0], 0
        try:
            while not only.done or len(choice.text) > sent:
                if len(choice.text) > sent:  # perhaps while another call stepped the engine
                    start, sent = sent, len(choice.text)
                    yield choice.text[start:]
                else:
                    self._step()
            only.raise_error()
        finally:
            self._leave([only])

    def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None, **sampling: Any
    ) -> Completion:
        """Answer a conversation (role/content messages) through the model's chat template."""
        ids = self.tokenizer.apply_chat_template(list(messages))
        running = self._start([tuple(ids)], _one_of(params, sampling), continues=False)
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
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams, *, continues: bool = True
    ) -> list[_Running]:
        started: list[_Running] = []
        try:
            for prompt in prompts:
                ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
                request = Request(id=f"local-{next(self._ids)}", prompt_token_ids=ids, params=params)
                if params.stop:
                    self.tokenizer  # noqa: B018  # stop strings need one
                self.engine.submit(request)
                started.append(_Running(request, self._tokenizer, continues=continues))
                self._running[request.id] = started[-1]
        except BaseException:  # an interrupt, too, leaves nothing running
            self._leave(started)
            raise
        return started

    def _complete(self, mine: list[_Running], *, shown: bool) -> list[Completion]:
        unfinished = list(mine)
        try:
            with batch_bar(len(mine), shown=shown) as bar:
                while unfinished:
                    self._step()
                    for running in mine:
                        running.raise_error()
                    unfinished = [running for running in unfinished if not running.done]
                    if bar is not None:
                        bar.update(bar.task_ids[0], completed=len(mine) - len(unfinished))
        finally:
            self._leave(mine)
        return [running.completion for running in mine]

    def _step(self) -> None:
        """One step of the engine; every request, whoever waits for it, takes its part."""
        for event in self.engine.step():
            running = self._running.get(event.request_id)
            if running is not None and running.apply(event):
                self.engine.abort(event.request_id, event.index)

    def _leave(self, several: list[_Running]) -> None:
        for running in several:
            self._running.pop(running.request.id, None)
            if not running.done:
                self.engine.abort(running.request.id)


class _Running:
    """A request under way and the text it has so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, *, continues: bool) -> None:
        """continues: the text goes on from the prompt's, so a leading space of its first token counts.

        Without a tokenizer there is no text, only token ids.
        """
        params = request.params
        self.request = request
        self.completion = Completion(request.prompt_token_ids, [Choice() for _ in range(params.n)])
        self._error: MegptError | None = None
        self._assemblers: list[TextAssembler] = []
        if tokenizer is not None:
            self._assemblers = [
                TextAssembler(tokenizer, params.stop, min_tokens=params.min_tokens, continues=continues)
                for _ in range(params.n)
            ]

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return all(choice.finish_reason is not None for choice in self.completion.choices)

    def raise_error(self) -> None:
        """Raise what the engine ended the request with, if it did."""
        if self._error is not None:
            raise self._error

    def apply(self, event: SequenceEvent) -> bool:
        """Take an event in; True when a stop string ended the sequence, which the engine can't know."""
        choice = self.completion.choices[event.index]
        assembler = self._assemblers[event.index] if self._assemblers else None
        self._error = self._error or event.error
        if event.index == 0 and event.prompt_logprobs is not None:
            self.completion.prompt_logprobs = event.prompt_logprobs
        self.completion.num_cached_tokens = max(self.completion.num_cached_tokens, event.num_cached_tokens)
        choice.token_ids += event.token_ids
        choice.logprobs += event.logprobs or []
        delta = assembler.push(event.token_ids) if assembler is not None else TextDelta()
        choice.text += delta.text
        if delta.stop_string is not None:
            choice.finish_reason, choice.stop = FinishReason.STOP, delta.stop_string
            return event.finish_reason is None
        if event.finish_reason is not None:
            choice.text += assembler.finish().text if assembler is not None else ""
            choice.finish_reason, choice.stop = event.finish_reason, event.stop_token_id
        return False


def _one_of(params: SamplingParams | None, keywords: Mapping[str, Any]) -> SamplingParams:
    """The parameters, however they were given. Raises TypeError if they were given twice."""
    if params is not None and keywords:
        names = ", ".join(keywords)
        raise TypeError(f"give params or keywords, not both: params and {names}. Use dataclasses.replace.")
    return params if params is not None else SamplingParams(**keywords)


def _separate(prompts: Prompt | Sequence[Prompt]) -> tuple[list[str | Sequence[int]], bool]:
    """Prompts as a list of texts and of token id lists, and whether it was only one. Arrays become lists."""
    plain = _plain(prompts)
    if _is_prompt(plain):
        return [plain], True
    several = [_plain(item) for item in plain] if isinstance(plain, list | tuple) else [plain]
    for item in several:
        if not _is_prompt(item):
            raise InvalidRequestError(
                f"a prompt must be text or token ids, got {type(item).__name__}.", param="prompt"
            )
    return several, False


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list | tuple | range) and any(isinstance(item, int) for item in value)
