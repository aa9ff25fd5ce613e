"""What is asked of an engine and what it answers: plain data, no torch.

Purpose: the request, its sampling parameters, and the events an engine emits.
Does not know: HTTP, tokenizers, tensors, the scheduler's bookkeeping.
Invariant: `SamplingParams` is immutable and, once `validate`d, safe for every later stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from memory_efficient_gpt.errors import InvalidRequestError, MegptError

GREEDY_TEMPERATURE: Final = 1e-2
"""Below this a temperature means greedy: dividing by less only makes infinities."""

MAX_SEQUENCES_PER_REQUEST: Final = 8
MAX_TOP_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 300
MAX_STOP_STRINGS: Final = 4
MAX_STOP_STRING_CHARACTERS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 64


class FinishReason(StrEnum):
    """Why a sequence ended, in the OpenAI API's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Defaults sample from the model's own distribution.

    `seed`: the same seed gives the same text whatever else is in the batch; None draws one.
    `logprobs`: None for none, k for the chosen token's and the k most likely ones'.
    `prompt_logprobs`: as `logprobs`, for the prompt's tokens (for `echo`).
    `max_tokens`: None generates until the model ends or the context is full.
    `min_tokens`: neither the model nor a stop token or string ends the text before so many tokens.
    `stop`: one string or several.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        """Make sequences tuples and None empty; a single stop string stands for itself, not its characters.

        Raises InvalidRequestError for what cannot be made one.
        """
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else _as_tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        bias: object = self.logit_bias
        if not isinstance(bias, Mapping | None):
            raise InvalidRequestError(
                f"logit_bias must map token ids to numbers, got {_short(bias)}.", param="logit_bias"
            )
        object.__setattr__(self, "logit_bias", {} if bias is None else bias)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self, vocab_size: int) -> None:
        """Check every field against its limits. Raises InvalidRequestError naming field, limit and value."""
        for name, low, high in _FLOAT_LIMITS:
            _require_number(name, getattr(self, name), low, high)
        for name, least, most in _INT_LIMITS:
            value = getattr(self, name)
            if value is not None:
                _require_int(name, value, least, most)
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens else 2**31)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(
                f"ignore_eos must be true or false, got {_short(self.ignore_eos)}.", param="ignore_eos"
            )
        if self.repetition_penalty <= 0:
            raise InvalidRequestError(
                f"repetition_penalty must be above 0, got {self.repetition_penalty}.",
                param="repetition_penalty",
            )
        self._validate_stop(vocab_size)
        self._validate_logit_bias(vocab_size)

    def _validate_stop(self, vocab_size: int) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings; the limit is {MAX_STOP_STRINGS}.", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str):
                raise InvalidRequestError(f"stop must be text, got {_short(text)}.", param="stop")
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARACTERS:
                raise InvalidRequestError(
                    f"each stop string must have 1 to {MAX_STOP_STRING_CHARACTERS} characters, "
                    f"got one of {len(text)}.",
                    param="stop",
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; the limit is {MAX_STOP_TOKEN_IDS}.",
                param="stop_token_ids",
            )
        for token_id in self.stop_token_ids:
            _require_token_id("stop_token_ids", "stop_token_ids", token_id, vocab_size)

    def _validate_logit_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}.",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _require_token_id("logit_bias", "the keys of logit_bias", token_id, vocab_size)
            _require_number("logit_bias", bias, -100.0, 100.0)


_FLOAT_LIMITS: Final = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 10.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_INT_LIMITS: Final = (
    ("top_k", 1, 2**31 - 1),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, MAX_TOP_LOGPROBS),
    ("prompt_logprobs", 0, MAX_TOP_LOGPROBS),
    ("max_tokens", 1, 2**31 - 1),
    ("n", 1, MAX_SEQUENCES_PER_REQUEST),
)


def _require_number(name: str, value: object, low: float, high: float) -> None:
    # a comparison with NaN is False, and integers too large for a float still compare
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be a number from {low} to {high}, got {_short(value)}.", param=name
        )


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be an integer from {low} to {high}, got {_short(value)}.", param=name
        )


def _require_token_id(name: str, what: str, value: object, vocab_size: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise InvalidRequestError(
            f"{what} must be token ids, integers from 0 to {vocab_size - 1}; got {_short(value)}.", param=name
        )


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} must be a list, got {_short(value)}.", param=name)
    return tuple(value)


def _short(value: object, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    `client` is the fairness key (who is served), `cache_salt` keeps prefix caches apart.
    `resumed_token_ids` continues what another engine began: empty for a new request, else for each of the
    n sequences the tokens it has generated already, None for one that has ended. Those tokens count as
    output in every respect (max_tokens, penalties, seeds, ...) but are not given again.
    `metered`: whether its events tell what it has cost.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    client: str = ""
    cache_salt: str = ""
    adapter: str | None = None
    use_prefix_cache: bool = True
    resumed_token_ids: tuple[tuple[int, ...] | None, ...] = ()
    metered: bool = False

    @property
    def open_indices(self) -> tuple[int, ...]:
        """The sequences to generate: all n, without those that had ended when it was resumed."""
        ended = {index for index, token_ids in enumerate(self.resumed_token_ids) if token_ids is None}
        return tuple(index for index in range(self.params.n) if index not in ended)

    def tokens_before(self, index: int) -> tuple[int, ...]:
        """What sequence `index` had generated when it was resumed."""
        return (self.resumed_token_ids[index] or ()) if self.resumed_token_ids else ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability and the most likely alternatives `(token_id, logprob)`, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a request has cost its engine so far, all its sequences together.

    queue_s: from its submission until it was first computed. kv_peak_bytes: the most KV memory it held at a
    time; kv_byte_seconds: its KV memory over time; both None where the engine does not hold that memory.
    resumed: another engine began the request; what it cost there is only in here as far as `after` added it.
    """

    queue_s: float
    kv_peak_bytes: int | None = None
    kv_byte_seconds: float | None = None
    resumed: bool = False

    def after(self, earlier: Cost | None) -> Cost:
        """This and what the engine before had told; None: it had told nothing."""
        if earlier is None:
            return replace(self, resumed=True)
        peak, byte_s = self.kv_peak_bytes, self.kv_byte_seconds
        return Cost(
            queue_s=earlier.queue_s + self.queue_s,
            kv_peak_bytes=None if peak is None else max(peak, earlier.kv_peak_bytes or 0),
            kv_byte_seconds=None if byte_s is None else byte_s + (earlier.kv_byte_seconds or 0.0),
            resumed=True,
        )


@dataclass(slots=True, kw_only=True)
class SequenceEvent:
    """News of one sequence of a request; `index` counts the request's n sequences from 0.

    `token_ids` are new tokens (possibly none on the last event). The token that ended a sequence
    (end-of-sequence or a stop token id) is not among them; it is in `stop_token_id`.
    `logprobs` has one entry for each of `token_ids` when asked for; `prompt_logprobs` comes once,
    with index 0, and has None for the first prompt token. `num_cached_tokens` is how many prompt
    tokens came from the prefix cache. `cost`: of the whole request up to this event, if it is metered.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: MegptError | None = None
    cost: Cost | None = None
