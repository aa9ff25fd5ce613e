"""A model's tokenizer: text to ids, ids to text, conversations to prompts.

Purpose: load it from a model folder and offer what engine users and servers need of it.
Does not know: sampling, streams of tokens (output.py), HTTP.
Invariant: text never becomes a control token; only the chat template and the tokenizer's own frame
(such as a leading begin-of-sequence token) put them in. Safe to use from several threads.

Control tokens are the added tokens marked special and the end-of-sequence tokens. Other added tokens, like
<think> or runs of spaces, are a model's ordinary vocabulary and are found in text.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from memory_efficient_gpt.chat_prompt import ChatPromptEncoder, Messages, Tools
from memory_efficient_gpt.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from memory_efficient_gpt.plain_text import PlainTextEncoder, check_encodable
from memory_efficient_gpt.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOADING = threading.Lock()
"""transformers imports its parts when they are first needed, and fails if two threads need one at once."""


class Tokenizer:
    """Wraps a transformers tokenizer that has a `tokenizers` backend.

    eos_token_ids: tokens that end a text, sorted. control_token_ids: see the module. vocab_size: one more
    than the largest id of any token; a model's embedding may be larger.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()) -> None:
        """`eos_token_ids` are added to the tokenizer's own. Raises UnsupportedModelError."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} has no fast tokenizer; a tokenizer.json is needed."
            )
        backend.no_truncation()
        backend.no_padding()
        own = tokenizer.eos_token_id
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *([own] if isinstance(own, int) else [])}))
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        control = {i: t.content for i, t in added.items() if t.special or i in self.eos_token_ids}
        self.control_token_ids = frozenset(control)
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self._tokenizer = tokenizer
        self._backend = backend
        self._plain = PlainTextEncoder(backend, {name: i for i, name in control.items()})
        self._chat = ChatPromptEncoder(tokenizer, backend, self._plain)
        self.bytes = TokenBytes(backend)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load from a model folder, without network and without running code from it.

        Raises CheckpointError when files are missing or damaged, UnsupportedModelError when there is no
        fast form of the tokenizer.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"There is no folder {folder}. Put the model back, or stop serving it.")
        with _LOADING:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # the tokenizers library raises bare Exception
                first_line = next(iter(str(error).strip().splitlines()), "no reason given").rstrip(" .:")
                raise CheckpointError(
                    f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {first_line}). "
                    "It needs tokenizer.json and tokenizer_config.json."
                ) from error
        return cls(tokenizer, read_eos_token_ids(folder))

    @property
    def wrapped(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of text that is only text, in the frame that the tokenizer puts around one.

        Raises InvalidRequestError for a lone surrogate.
        """
        check_encodable(text)
        ids = self._plain.encode(text)
        if not add_special_tokens:
            return ids
        before, after = self._frame
        return [*before, *ids, *after]

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = True, tools: Tools | None = None
    ) -> list[int]:
        """Ids of a conversation. Control tokens named in messages stay text.

        Raises InvalidRequestError when the model has no template or the template refuses the messages.
        """
        return self._chat.encode(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole list of ids; ids without a token are left out."""
        try:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        except OverflowError:
            raise InvalidRequestError(f"token ids must be from 0 to {self.vocab_size - 1}.") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name's."""
        return self.bytes.of(token_id)

    def token_text(self, token_id: int) -> str:
        """A token as text; U+FFFD for what is only part of a character."""
        return self.bytes.of(token_id).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of decoded text."""
        return token_id in self._special_ids

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a text."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        inner = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        if not inner:
            return list(encoding.ids), []
        return list(encoding.ids[: inner[0]]), list(encoding.ids[inner[-1] + 1 :])


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids that a model's generation_config.json names, or else its config.json."""
    for name in ("generation_config.json", "config.json"):
        settings = _read_json(folder / name)
        for part in (settings, settings.get("text_config") or {}):
            ids = part.get("eos_token_id")
            if isinstance(ids, int):
                return (ids,)
            if ids:
                return tuple(int(i) for i in ids)
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    return data if isinstance(data, dict) else {}
