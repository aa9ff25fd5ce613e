"""The bytes that each token stands for.

Purpose: read a tokenizer's decoder and turn single tokens into bytes, so that text can grow token by token.
Does not know: sequences of tokens, control tokens' meaning, stop strings.
Invariant: where `independent`, the bytes of a text's tokens joined (the first taken by `first`) are the text
that the tokenizer itself decodes, before invalid UTF-8 is replaced.

Two families of decoders work token by token. Byte-level ones spell each byte as a character. SentencePiece's
spell a space as U+2581 and bytes without a token as <0x00> to <0xFF>, and drop the space before the first
word. (One exception to the invariant: Metaspace decoders also drop spaces inside a text's first token.
Those belong to the text, and are kept here.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_STRIPS_ALL: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How tokens spell text. leading_spaces: how many are dropped from a text's first token."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    leading_spaces: int = 0

    def read(self, token: str) -> bytes:
        if self.byte_level:
            alphabet = _byte_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()


class TokenBytes:
    """Bytes of single tokens; control tokens give their names' bytes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._spelling = _spelling_of(backend)
        self._known: dict[int, bytes] = {}

    @property
    def independent(self) -> bool:
        """Whether a token's bytes do not depend on its neighbours; if not, they are of the token alone."""
        return self._spelling is not None

    def of(self, token_id: int) -> bytes:
        """The token's bytes within a text; none for an id without a token."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def first(self, token_id: int) -> bytes:
        """The token's bytes at the start of a text."""
        raw = self.of(token_id)
        spaces = self._spelling.leading_spaces if self._spelling is not None else 0
        while spaces and raw.startswith(b" "):
            raw, spaces = raw[1:], spaces - 1
        return raw

    def _read(self, token_id: int) -> bytes:
        if self._spelling is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spelling.read(token)


def _spelling_of(backend: Backend) -> _Spelling | None:
    """None where decoders join tokens in other ways (WordPiece, end-of-word suffixes, none at all)."""
    if backend.decoder is None:
        return None
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    steps = [step for step in steps if step["type"] != "Fuse"]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _Spelling(byte_level=True)
    if kinds == ["Metaspace"]:
        dropped = 0 if steps[0]["prepend_scheme"] == "never" else _STRIPS_ALL
        return _Spelling(replacements=((steps[0]["replacement"], " "),), leading_spaces=dropped)
    return _sentencepiece(steps, kinds)


def _sentencepiece(steps: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> _Spelling | None:
    leading = 0
    if kinds and kinds[-1] == "Strip":
        strip, steps, kinds = steps[-1], steps[:-1], kinds[:-1]
        if strip["content"] != " " or strip["stop"]:
            return None
        leading = strip["start"]
    byte_fallback = bool(kinds) and kinds[-1] == "ByteFallback"
    replaces = steps[:-1] if byte_fallback else steps
    if not all(step["type"] == "Replace" and "String" in step["pattern"] for step in replaces):
        return None
    return _Spelling(
        byte_fallback=byte_fallback,
        replacements=tuple((step["pattern"]["String"], step["content"]) for step in replaces),
        leading_spaces=leading,
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that spell bytes: printable Latin-1 spells itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
