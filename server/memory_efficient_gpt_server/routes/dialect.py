"""What differs between the two ways to generate: the shape of answers.

Purpose: the interface between a running generation and an API format, and what both formats share.
Does not know: how text comes about, connections.
Invariant: a chunk is built from bytes that were serialised once; only its text is encoded anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pydantic_core import to_json

from memory_efficient_gpt_server.sse import event
from memory_efficient_gpt_server.text import ScoredToken

LEAST_LOGPROB: Final = -9999.0
"""OpenAI's number for "very unlikely"; JSON has no -inf."""

_MARK: Final = "\0"


@dataclass(slots=True)
class Usage:
    """Tokens of a whole request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """A whole choice of a plain answer. `logprobs` is the format's own object."""

    index: int
    text: str
    finish_reason: str
    logprobs: Any = None


class Dialect(Protocol):
    """An API format, for one response."""

    def begin(self, index: int) -> bytes:
        """The event that begins a choice; empty if the format has none."""

    def delta(self, index: int, text: str, logprobs: Any) -> bytes:
        """The event for new text."""

    def finish(self, index: int, reason: str) -> bytes:
        """The event that ends a choice."""

    def last(self, usage: Usage | None, receipt: Mapping[str, Any] | None) -> bytes:
        """The event after all choices, with what was asked for; empty if nothing was."""

    def logprobs(self, tokens: Sequence[ScoredToken]) -> Any:
        """The format's logprobs object for the next tokens of a choice."""

    def whole(
        self, choices: Sequence[FinishedChoice], usage: Usage, receipt: Mapping[str, Any] | None
    ) -> bytes:
        """The plain answer."""


class Template:
    """An event of which only one value changes: serialised once, cut where the value goes."""

    __slots__ = ("_head", "_tail")

    def __init__(self, payload: dict[str, Any]) -> None:
        """`payload` holds `Template.hole` in the place of the value."""
        self._head, self._tail = event(to_json(payload)).split(to_json(_MARK))

    hole: Final = _MARK

    def fill(self, value: bytes) -> bytes:
        """The event with this JSON value."""
        return self._head + value + self._tail


def last_event(common: Mapping[str, Any], usage: Usage | None, receipt: Mapping[str, Any] | None) -> bytes:
    """The event without choices that ends a stream; empty if there is nothing to tell."""
    told: dict[str, Any] = {} if usage is None else {"usage": usage.as_json()}
    told |= receipt_field(receipt)
    return event(to_json({**common, "choices": [], **told})) if told else b""


def receipt_field(receipt: Mapping[str, Any] | None) -> dict[str, Any]:
    """The field of an answer for those who asked for it."""
    return {} if receipt is None else {"receipt": dict(receipt)}


def finite(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)
