"""The bodies that clients send: which fields exist, of which types, and which are refused and why.

Purpose: one strict schema per body.
Does not know: models, limits of sampling parameters (`SamplingParams.validate` has those), how errors read.
Invariant: every field is used, or refused with a reason; numbers are finite; nothing is coerced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from memory_efficient_gpt.request import MAX_LOGIT_BIAS, SamplingParams
from memory_efficient_gpt_server.wording import short

MAX_PROMPTS: Final = 16
MAX_MESSAGES: Final = 2048
MAX_USER_CHARACTERS: Final = 256
MAX_BIAS: Final = 100
_TOKEN_ID: Final = re.compile(r"0|[1-9][0-9]{0,9}")

PromptInput = str | tuple[int, ...]


def _problem(message: str, param: str | None = None) -> PydanticCustomError:
    """An error in our words. Of a field: what comes after its name; of fields together: with `param`."""
    return PydanticCustomError("sentence", "{text}", {"text": message, "param": param})


class Refused:
    """Annotation of a known field that is not supported; null and the `allowed` values mean the default."""

    def __init__(self, reason: str, *allowed: object) -> None:
        self._reason = reason
        self._allowed = allowed

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept what changes nothing."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Say so in the API's description."""
        return {"description": f"Not supported: {self._reason}"}

    def _check(self, value: Any) -> None:
        if value is not None and not any(type(value) is type(a) and value == a for a in self._allowed):
            raise _problem(f"is not supported: {self._reason}")


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _problem(f"must be a string or a list of strings, got {short(value)}.")


def _prompts(value: Any) -> tuple[PromptInput, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _problem(
            f"must be a string, a list of strings, or one or several lists of token ids, got {short(value)}."
        )
    if _all_ints(value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise _problem(f"has {len(value)} prompts; the limit is {MAX_PROMPTS}. Send several requests.")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) and item and _all_ints(item) for item in value):
        return tuple(map(tuple, value))
    raise _problem("must hold only strings, only token ids (integers), or only non-empty lists of token ids.")


def _all_ints(values: list[Any]) -> bool:
    return set(map(type, values)) == {int}


def _content(value: Any) -> str:
    """Text, or text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _problem(f"must be a string or a non-empty list of text parts, got {short(value)}.")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise _problem(f"has a part of type {short(kind)}; only text parts are supported.")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise _problem("has a text part that is not of the form {'type': 'text', 'text': '...'}.")
    return "\n".join(part["text"] for part in value)


def _logit_bias(value: Any) -> Mapping[int, float]:
    if not isinstance(value, dict):
        raise _problem(f"must be an object of token id: bias, got {short(value)}.")
    if len(value) > MAX_LOGIT_BIAS:
        raise _problem(f"has {len(value)} entries; the limit is {MAX_LOGIT_BIAS}.")
    for token_id, bias in value.items():
        if not _TOKEN_ID.fullmatch(token_id):
            raise _problem(f"has the key {short(token_id)}; keys must be token ids, without leading zeros.")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:  # NaN is not in any range
            raise _problem(f"has the bias {short(bias)}; it must be a number from -{MAX_BIAS} to {MAX_BIAS}.")
    return {int(token_id): bias for token_id, bias in value.items()}


_STRINGS: Final = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
_STRINGS_SCHEMA: Final[dict[str, Any]] = {"anyOf": _STRINGS}
_IDS_SCHEMA: Final[dict[str, Any]] = {"type": "array", "items": {"type": "integer"}}
_PROMPT_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [*_STRINGS, _IDS_SCHEMA, {"type": "array", "items": _IDS_SCHEMA}]
}
_BIAS_SCHEMA: Final[dict[str, Any]] = {"type": "object", "additionalProperties": {"type": "number"}}


def _or_none(parse: Callable[[Any], Any]) -> PlainValidator:
    """`parse`, or null for absent."""
    return PlainValidator(lambda value: None if value is None else parse(value))


class StrictModel(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[None, Refused("chunks are not padded.", False)] = None


class LoadOptions(StrictModel):
    """What decides how a model is loaded. `auto` and what is left out leave it to the model."""

    quantization: str | None = None
    kv_cache_dtype: str | None = None


class Optimizations(LoadOptions):
    """How a request shall be computed. receipt: whether the answer tells what was done and what it cost."""

    attention: Literal["auto", "flash", "sdpa", "lsh"] | None = None
    prefix_cache: bool | None = None
    receipt: bool | None = None


class GenerationBody(StrictModel):
    """What both ways to generate have in common. Ranges are checked by `SamplingParams.validate`."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...] | None, _or_none(_texts), WithJsonSchema(_STRINGS_SCHEMA)] = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[Mapping[int, float] | None, _or_none(_logit_bias), WithJsonSchema(_BIAS_SCHEMA)] = (
        None
    )
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    cache_salt: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    prefix_cache: bool | None = None
    optimizations: Optimizations | None = None
    on_cold: Literal["wait", "fail"] | None = None

    @model_validator(mode="after")
    def _check_prefix_cache(self) -> Self:
        wanted = self.optimizations.prefix_cache if self.optimizations is not None else None
        if wanted is not None and self.prefix_cache is not None and wanted is not self.prefix_cache:
            raise _problem("prefix_cache and optimizations.prefix_cache differ; give one.", "prefix_cache")
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _problem(
                "stream_options is only for streams; set stream to true or leave it out.", "stream_options"
            )
        return self

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether blocks computed before may be reused; so unless either field says no."""
        wanted = self.optimizations.prefix_cache if self.optimizations is not None else None
        return self.prefix_cache is not False and wanted is not False

    @property
    def prefix_cache_field(self) -> str | None:
        """The field that asks for the prefix cache, if one does."""
        if self.optimizations is not None and self.optimizations.prefix_cache:
            return "optimizations.prefix_cache"
        return "prefix_cache" if self.prefix_cache else None

    @property
    def wants_receipt(self) -> bool:
        """Whether the answer tells what served it and what it cost."""
        return self.optimizations is not None and bool(self.optimizations.receipt)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def output_limit(self) -> int | None:
        """The most tokens of an answer, if the client says so."""
        return self.max_tokens

    @property
    def output_limit_field(self) -> str | None:
        """The field that says so; None if none does."""
        return None if self.max_tokens is None else "max_tokens"

    @property
    def names_of_parameters(self) -> Mapping[str, str]:
        """Sampling parameters whose field here has another name."""
        return {}

    def sampling(
        self,
        defaults: Mapping[str, float],
        *,
        max_tokens: int | None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The parameters, not yet validated; `defaults` (of the model) stand in for absent fields."""

        def chosen(name: str, otherwise: float) -> Any:
            value = getattr(self, name)
            return defaults.get(name, otherwise) if value is None else value

        top_k = chosen("top_k", 0)
        return SamplingParams(
            temperature=chosen("temperature", 1.0),
            top_k=None if top_k in (0, -1) else top_k,
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            repetition_penalty=chosen("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=self.stop or (),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            n=1 if self.n is None else self.n,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[tuple[PromptInput, ...], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Annotated[None, Refused("models here continue text, they don't fill gaps.")] = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _problem(
                f"best_of must equal n (got {short(self.best_of)} and {short(self.n or 1)}): "
                "every candidate is returned.",
                "best_of",
            )
        return self


class ChatMessage(StrictModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content), WithJsonSchema({"type": "string"})]
    name: Annotated[None, Refused("chat templates here have no place for names.")] = None
    tool_calls: Annotated[None, Refused("tools are not supported.", [])] = None
    tool_call_id: Annotated[None, Refused("tools are not supported.")] = None
    function_call: Annotated[None, Refused("functions are not supported.")] = None
    refusal: Annotated[None, Refused("models here don't produce refusals apart from text.")] = None
    audio: Annotated[None, Refused("models here read and write text.")] = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[None, Refused("models here don't call tools.", [])] = None
    tool_choice: Annotated[None, Refused("models here don't call tools.", "none")] = None
    parallel_tool_calls: Annotated[None, Refused("models here don't call tools.")] = None
    functions: Annotated[None, Refused("models here don't call functions.", [])] = None
    function_call: Annotated[None, Refused("models here don't call functions.", "none")] = None
    response_format: Annotated[None, Refused("only {'type': 'text'} is.", {"type": "text"})] = None
    modalities: Annotated[None, Refused("only ['text'] is.", ["text"])] = None
    audio: Annotated[None, Refused("models here read and write text.")] = None
    prediction: Annotated[None, Refused("predicted outputs are not implemented.")] = None
    reasoning_effort: Annotated[None, Refused("models here have no such setting.")] = None
    verbosity: Annotated[None, Refused("models here have no such setting.")] = None
    web_search_options: Annotated[None, Refused("there is no web search here.")] = None
    store: Annotated[None, Refused("nothing is stored here.", False)] = None
    metadata: Annotated[None, Refused("nothing is stored here.", {})] = None
    service_tier: Annotated[None, Refused("there is one tier.", "auto", "default")] = None
    moderation: Annotated[None, Refused("there is no moderation here.")] = None
    safety_identifier: Annotated[None, Refused("use `user`.")] = None
    prompt_cache_key: Annotated[None, Refused("use `cache_salt` to keep caches apart.")] = None
    prompt_cache_options: Annotated[None, Refused("use `prefix_cache`.")] = None
    prompt_cache_retention: Annotated[None, Refused("the cache keeps what fits.")] = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _problem("top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _problem("max_tokens and max_completion_tokens mean the same; give one.", "max_tokens")
        return self

    @property
    def output_limit(self) -> int | None:
        """Both fields mean it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_limit_field(self) -> str | None:
        """Whichever was given."""
        return super().output_limit_field if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def names_of_parameters(self) -> Mapping[str, str]:
        """`logprobs` is a switch here; its number is in `top_logprobs`."""
        return {"max_tokens": self.output_limit_field or "max_tokens", "logprobs": "top_logprobs"}


class TokenizeBody(StrictModel):
    """POST /v1/tokenize: text or a conversation."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _problem("give either prompt or messages.", "prompt")
        if self.messages is not None and self.add_special_tokens is not None:
            raise _problem(
                "add_special_tokens is for prompt; the chat template decides for messages.",
                "add_special_tokens",
            )
        return self


class DetokenizeBody(StrictModel):
    """POST /v1/detokenize."""

    model: str
    tokens: list[int]
