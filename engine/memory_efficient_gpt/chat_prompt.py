"""From messages to a prompt's token ids, through the model's chat template.

Purpose: run the template; its control tokens become special ids, those named in messages stay text.
Does not know: what roles or tools mean, HTTP schemas.
Invariant: for messages that name no control token the ids are those of transformers' apply_chat_template.

The template sees the messages as they are, because templates look into them (they trim, split, compare). If
a message has a character with which a control token's name begins, the template runs a second time with
those characters replaced by a marker, so that only the template itself can write such a name. When both
texts name the same control tokens in the same order, nothing was forged and the first is used. Otherwise the
second is: its control tokens go under aliases, the markers turn back into characters, and the names that
messages hold are tokenized as text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.plain_text import PlainTextEncoder, check_encodable

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatPromptEncoder:
    """Encodes conversations for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, backend: Backend, plain: PlainTextEncoder) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._plain = plain
        names = sorted(plain.aliases, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        nonce = "".join(chr(0xF0100 + secrets.randbelow(0xFE00)) for _ in range(2))
        openings = sorted({name[0] for name in names})
        self._markers = {c: f"{nonce}{chr(0xF0010 + number)}" for number, c in enumerate(openings)}
        self._marking = str.maketrans(self._markers)

    def encode(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: Tools | None = None
    ) -> list[int]:
        """Raises InvalidRequestError when there is no template or it refuses the messages."""
        strings = list(_strings([messages, tools]))
        for text in strings:
            check_encodable(text, param="messages")
        rendered = self._render(messages, tools, add_generation_prompt)
        if any(character in text for text in strings for character in self._markers):
            marked = self._render(self._mark(messages), self._mark(tools), add_generation_prompt)
            if self._names.findall(marked) != self._names.findall(rendered):
                return self._plain.encode(self._unmark(marked))
        ids: list[int] = self._backend.encode(rendered, add_special_tokens=False).ids
        return ids

    def _render(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> str:
        import jinja2

        if self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template. Use /v1/completions with a prompt, or a chat model.",
                param="messages",
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return str(rendered)

    def _mark(self, value: Any) -> Any:
        """A copy of plain data in which no string, key or value, begins a control token's name anywhere."""
        if isinstance(value, str):
            return value.translate(self._marking)
        if isinstance(value, Mapping):
            return {self._mark(key): self._mark(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._mark(item) for item in value]
        return value

    def _unmark(self, text: str) -> str:
        text = self._names.sub(lambda name: self._plain.aliases[name[0]], text)
        for character, marker in self._markers.items():
            text = text.replace(marker, character)
        return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
