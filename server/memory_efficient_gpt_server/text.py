"""Between text and tokens: encoding off the event loop, and the text of each sequence as it grows.

Purpose: prompts to checked token ids, events to text, stop strings.
Does not know: HTTP, the API's formats, engines.
Invariant: no long text is ever tokenized on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import ContextLengthError, InvalidRequestError
from memory_efficient_gpt.output import TextAssembler
from memory_efficient_gpt.request import FinishReason, SequenceEvent, TokenLogprob
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.schemas import ChatMessage

_Result = TypeVar("_Result")

INLINE_CHARACTERS: Final = 2_000
"""Shorter texts are tokenized at once (about a millisecond): a thread would cost more than it saves."""

CHARACTERS_PER_TOKEN: Final = 3
"""Rather too few, so that an estimate is rather too large."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that the model's chat template turns into text."""

    messages: Sequence[ChatMessage]


Prompt = str | tuple[int, ...] | Conversation


class TextPool:
    """Threads for long texts."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="megpt-text")

    async def run(self, num_characters: int, work: Callable[[], _Result]) -> _Result:
        """`work()`, on a thread if it is about many characters (or tokens)."""
        if num_characters <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Drop what waits; a running piece of work ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def size_of(prompt: Prompt) -> int:
    """Characters of text, or tokens."""
    if isinstance(prompt, Conversation):
        return sum(len(message.content) for message in prompt.messages)
    return len(prompt)


def estimated_tokens(prompt: Prompt) -> int:
    """About how many tokens it has, without tokenizing."""
    return len(prompt) if isinstance(prompt, tuple) else size_of(prompt) // CHARACTERS_PER_TOKEN + 1


def encode(tokenizer: Tokenizer, prompt: Prompt, *, special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt. Raises InvalidRequestError if the chat template refuses the messages.

    special_tokens: whether text gets the frame that the tokenizer puts around one.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt, add_special_tokens=special_tokens))
    if isinstance(prompt, Conversation):
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        return tuple(tokenizer.apply_chat_template(messages))
    return prompt


def check_prompt(token_ids: Sequence[int], info: EngineInfo, max_tokens: int | None, field: str) -> None:
    """Raises InvalidRequestError, or ContextLengthError if prompt and answer don't fit."""
    if not token_ids:
        raise InvalidRequestError(f"{field} has no tokens; give at least one.", param=field)
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"{field} has the token id {token_id:.0f}; ids go from 0 to {info.vocab_size - 1}.",
                param=field,
            )
    wanted = 1 if max_tokens is None else max_tokens
    if len(token_ids) + wanted > info.max_model_len:
        raise ContextLengthError(
            f"{field} has {len(token_ids)} tokens and max_tokens is {wanted}, together "
            f"{len(token_ids) + wanted}; the limit of this model is {info.max_model_len}. "
            "Shorten the prompt or lower max_tokens.",
            param=field if len(token_ids) >= info.max_model_len else "max_tokens",
        )


class ScoredToken(NamedTuple):
    """A token, its log probability (a prompt's first token has none) and where its text begins."""

    token_id: int
    entry: TokenLogprob | None
    offset: int


def score_prompt(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]
) -> list[ScoredToken]:
    """The tokens of an echoed prompt."""
    offsets = TextAssembler(tokenizer).push(token_ids).offsets
    return list(map(ScoredToken, token_ids, entries, offsets))


class SequenceText:
    """One of the texts that a request produces. `take` events; `pending_*` is what was not yet sent."""

    __slots__ = (
        "_assembler",
        "_offset",
        "finish_reason",
        "index",
        "last_token_s",
        "num_tokens",
        "opened",
        "pending_scores",
        "pending_text",
        "prompt_index",
        "prompt_scored",
    )

    def __init__(self, index: int, prompt_index: int, assembler: TextAssembler, echo: str = "") -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.pending_text = echo
        self.pending_scores: list[ScoredToken] = []
        self.opened = False
        self.prompt_scored = False
        self.last_token_s: float | None = None
        self._assembler = assembler
        self._offset = len(echo)

    def take(self, event: SequenceEvent) -> bool:
        """Add an event's tokens. True if a stop string ended the text, which the engine can't know."""
        delta = self._assembler.push(event.token_ids)
        self.num_tokens += delta.num_tokens
        self.pending_text += delta.text
        if event.logprobs is not None:
            self.pending_scores += [
                ScoredToken(entry.token_id, entry, self._offset + offset)
                for entry, offset in zip(
                    event.logprobs, delta.offsets, strict=False
                )  # not those behind a stop
            ]
        if delta.stop_string is not None:
            self.finish_reason = FinishReason.STOP
            return event.finish_reason is None
        if event.finish_reason is not None:
            self.pending_text += self._assembler.finish().text
            self.finish_reason = event.finish_reason
        return False
