"""The text of one sequence as it grows, token by token.

Purpose: incremental detokenizing, stop strings, text offsets.
Does not know: engines, requests, HTTP, where tokens come from.
Invariant: no delta ends inside a character, and deltas joined (with `finish`) are the text of all tokens up
to the stop string. Work per token is bounded: nothing is decoded again from the start.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from memory_efficient_gpt.tokenizer import Tokenizer

_CONTEXT_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text. stop_string: the one that ended the text, if one did.

    num_tokens: how many of the pushed tokens were read, the one that completed a stop string included;
    offsets: for each of those, where in the whole text (characters from 0, stop string included) its
    own text begins. A token inside a character has the offset of that character.
    """

    text: str = ""
    stop_string: str | None = None
    num_tokens: int = 0
    offsets: tuple[int, ...] = ()


class Detokenizer(Protocol):
    """Tokens of one text to characters."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the text ends inside a character."""


def detokenizer(
    tokenizer: Tokenizer, *, continues: bool = False, skip_special_tokens: bool = True
) -> Detokenizer:
    """The detokenizer that fits the tokenizer.

    continues: the text continues another one, so a space before its first word is kept.
    """
    if tokenizer.bytes.independent:
        return ByteDetokenizer(tokenizer, continues=continues, skip_special_tokens=skip_special_tokens)
    return ContextDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes each by itself: joins bytes, decodes them as UTF-8.

    Invalid UTF-8 becomes U+FFFD as the Unicode standard advises: one for each maximal part of a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, continues: bool = False, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._begun = continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        if self._begun:
            return self._decoder.decode(self._tokenizer.bytes.of(token_id))
        self._begun = bool(self._tokenizer.bytes.of(token_id))
        return self._decoder.decode(self._tokenizer.bytes.first(token_id))

    def finish(self) -> str:
        """U+FFFD if the text ends inside a character."""
        return self._decoder.decode(b"", final=True)


class ContextDetokenizer:
    """For tokenizers that join whole words by rules (WordPiece, end-of-word suffixes).

    A token's text is what it adds to the text of the few tokens before it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._context: list[int] = []

    def push(self, token_id: int) -> str:
        """What this token adds."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        before = self._decode(self._context)
        self._context.append(token_id)
        after = self._decode(self._context)
        del self._context[:-_CONTEXT_TOKENS]
        return after[len(before) :]

    def finish(self) -> str:
        """Nothing: tokens are whole characters here."""
        return ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)


class TextAssembler:
    """Text of one sequence, up to the first stop string.

    The stop string that is complete first ends the text (of several complete at the same character the
    longest), whatever tokens it is spread over. Text that may begin one is held back, and no more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        continues: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """include_stop: leave the stop string in the text. continues: see `detokenizer`.

        min_tokens: a stop string counts only in the text of the tokens after so many.
        """
        self._detokenizer = detokenizer(
            tokenizer, continues=continues, skip_special_tokens=skip_special_tokens
        )
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens_left = min_tokens
        self._held = ""
        self._length = 0
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Read tokens in order; those behind a stop string are not read."""
        parts: list[str] = []
        offsets: list[int] = []
        stop_string = None
        for token_id in token_ids:
            if self.stopped:
                break
            offsets.append(self._length)
            self._min_tokens_left -= 1
            text, stop_string = self._take(self._detokenizer.push(token_id))
            parts.append(text)
        return TextDelta("".join(parts), stop_string, len(offsets), tuple(offsets))

    def finish(self) -> TextDelta:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return TextDelta()
        text, stop_string = self._take(self._detokenizer.finish())
        if stop_string is None:
            text += self._held
        self._held = ""
        self.stopped = True
        return TextDelta(text, stop_string)

    def _take(self, new: str) -> tuple[str, str | None]:
        """Add characters; returns those that are certain now, and the stop string if one is complete."""
        self._length += len(new)
        if not self._stop or not new or self._min_tokens_left >= 0:
            return new, None
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if ends:
            end, start, stop = min(ends)
            self.stopped = True
            self._held = ""
            return text[: end if self._include_stop else start], stop
        certain = self._certain(text)
        self._held = text[certain:]
        return text[:certain], None

    def _certain(self, text: str) -> int:
        """How many leading characters cannot belong to a stop string that is still to be completed."""
        certain = len(text)
        for stop in self._stop:
            start = max(0, len(text) - len(stop) + 1)
            while (start := text.find(stop[0], start)) >= 0:
                if stop.startswith(text[start:]):
                    certain = min(certain, start)
                    break
                start += 1
        return certain
