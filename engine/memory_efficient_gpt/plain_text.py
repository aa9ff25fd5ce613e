"""Tokenizing what users write, so that no text can become a control token.

Purpose: ids of untrusted text, and of text that holds control tokens under names nobody can guess.
Does not know: messages, chat templates.
Invariant: an id of a control token comes out only where an alias went in; for text that holds no control
token's name the ids are those of the tokenizer itself.

It is a second front on the tokenizer's own model (shared, not copied) whose added tokens are the same,
except that control tokens go by random aliases. Nothing is switched while tokenizing: threads may share it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memory_efficient_gpt.errors import InvalidRequestError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend


class PlainTextEncoder:
    """Encodes text in which control tokens' names are only text."""

    def __init__(self, backend: Backend, control: Mapping[str, int]) -> None:
        """`control`: names and ids of those added tokens that are control tokens. The backend stays as is.

        Raises UnsupportedModelError if the model's ids leave no room for aliases.
        """
        from tokenizers import AddedToken, Tokenizer

        front = Tokenizer(backend.model)
        if backend.normalizer is not None:
            front.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            front.pre_tokenizer = backend.pre_tokenizer
        nonce = secrets.token_hex(8)
        self.aliases = {name: f"\U000f0000{nonce}.{number}\U000f0001" for number, name in enumerate(control)}
        self._control = dict(control)
        self._in_model = frozenset(i for name, i in control.items() if backend.model.token_to_id(name) == i)
        self._ids: dict[int, int] = {}
        for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
            name = self.aliases.get(token.content, token.content)
            copy = AddedToken(
                name,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            front.add_special_tokens([copy]) if token.special else front.add_tokens([copy])
            self._map_id(backend, front.token_to_id(name), name, token_id)
        self._front = front

    def _map_id(self, backend: Backend, front_id: int | None, name: str, token_id: int) -> None:
        if front_id is None or backend.model.id_to_token(front_id) not in (None, name):
            raise UnsupportedModelError(
                f"the tokenizer's vocabulary has gaps, so the token {name!r} cannot be told from text; "
                "number its tokens from 0 without gaps."
            )
        self._ids[front_id] = token_id

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which `aliases` stand for control tokens. Raises InvalidRequestError."""
        # encode_batch lets other threads run meanwhile and encode does not; _fast leaves offsets out.
        (encoding,) = self._front.encode_batch_fast([text], add_special_tokens=False)
        cuts: list[int] = []
        if not self._in_model.isdisjoint(encoding.ids):
            (located,) = self._front.encode_batch([text], add_special_tokens=False)
            cuts = self._forgeries(located, text)
        if not cuts:
            return [self._ids.get(token_id, token_id) for token_id in encoding.ids]
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self.encode(text[start:end])
        return ids

    def _forgeries(self, encoding: Encoding, text: str) -> list[int]:
        """Where to cut the text so that the model itself no longer finds a control token's name in it.

        Some models have the names in their vocabulary and may take them whole. The id alone does not tell: a
        model may also use a control token, <unk>, for characters that it does not know.
        """
        cuts = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            name = text[start:end].strip()
            if token_id not in self._in_model or self._control.get(name) != token_id:
                continue
            if len(name) == 1:
                raise InvalidRequestError(
                    f"the text contains {name!r}, which this model reads only as a control token. Remove it."
                )
            cuts.append(text.index(name, start) + 1)
        return cuts


def check_encodable(text: str, param: str | None = None) -> None:
    """Raises InvalidRequestError if `text` holds half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start:,}, "
            "which UTF-8 cannot express. Send whole characters: both halves of the pair, or U+FFFD.",
            param=param,
        ) from None
