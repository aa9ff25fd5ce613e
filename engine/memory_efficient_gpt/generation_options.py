"""The options of `QuantizedModel.generate`, named as transformers names them.

Purpose: turn them into the engine's sampling parameters, and the engine's complaints back into these names.
Does not know: engines, tokenizers, tensors.
Invariant: an option is obeyed or refused by name.

What is not given comes from the checkpoint's generation_config.json, as in transformers; what neither names
is off. With `do_sample` false there, or absent, the most likely token is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypedDict

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.request import SamplingParams

if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_MAX_NEW_TOKENS: Final = 256
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p")
_RECOMMENDED: Final = (*_SAMPLING, "repetition_penalty")
_ENGINE_NAMES: Final = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}


class GenerationOptions(TypedDict, total=False):
    """max_new_tokens: None takes the checkpoint's, else 256, and never more than the context has room for.

    do_sample: None samples if temperature, top_k, top_p or min_p is given, else as the checkpoint says.
    seed: the same seed gives the same text, whatever else is in the list; None draws one.
    The others are SamplingParams' fields; `stop_strings` and the token limits have transformers' names.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    stop_strings: str | Sequence[str] | None
    seed: int | None


def sampling_params(
    options: Mapping[str, Any], recommended: GenerationConfig | None, *, room: int
) -> SamplingParams:
    """The parameters for `options`. room: tokens that the context has left, the limit where none is given.

    Raises InvalidRequestError for an unknown option, or for sampling options beside `do_sample=False`.
    """
    _refuse_unknown(options)
    given = {name: value for name, value in options.items() if value is not None}
    advice = {
        name: getattr(recommended, name, None) for name in (*_RECOMMENDED, "do_sample", "max_new_tokens")
    }
    if not _samples(given, advised=bool(advice["do_sample"])):
        given["temperature"] = 0.0
        advice |= dict.fromkeys(_SAMPLING)
    if "max_new_tokens" not in given:
        given["max_new_tokens"] = max(1, min(advice["max_new_tokens"] or DEFAULT_MAX_NEW_TOKENS, room))
    given.pop("do_sample", None)
    chosen: dict[str, Any] = {name: advice[name] for name in _RECOMMENDED if advice[name] is not None} | given
    if chosen.get("top_k") == 0:  # transformers' word for all
        del chosen["top_k"]
    return SamplingParams(**{_ENGINE_NAMES.get(name, name): value for name, value in chosen.items()})


@contextmanager
def own_names() -> Iterator[None]:
    """Let errors that the engine raises within name these options, not the engine's."""
    try:
        yield
    except InvalidRequestError as error:
        message, param = error.message, error.param or ""
        for ours, engines in _ENGINE_NAMES.items():
            begins = "^" if engines == "stop" else r"\b"  # "stop" is a word of messages, too
            message = re.sub(rf"{begins}{engines}\b", ours, message)
            param = ours if param == engines else param
        raise type(error)(message, param="inputs" if param == "prompt" else param or None) from None


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    unknown = [name for name in options if name not in GenerationOptions.__annotations__]
    if unknown:
        raise InvalidRequestError(
            f"generate has no option {unknown[0]!r}. It has {', '.join(GenerationOptions.__annotations__)}; "
            "all of transformers' options are at model.model.generate.",
            param=unknown[0],
        )


def _samples(given: Mapping[str, Any], *, advised: bool) -> bool:
    asked = [name for name in _SAMPLING if name in given]
    wanted = given.get("do_sample")
    if wanted is not None and not isinstance(wanted, bool):
        raise InvalidRequestError(f"do_sample must be true or false, got {wanted!r}.", param="do_sample")
    if wanted is False and asked and given.get("temperature") != 0:
        raise InvalidRequestError(
            f"do_sample is False, and {asked[0]} {given[asked[0]]!r} was given. Leave one of them out.",
            param="do_sample",
        )
    if given.get("temperature") == 0:
        if wanted:
            raise InvalidRequestError(
                "do_sample is True, and temperature 0 was given, which takes the most likely token. "
                "Leave one of them out.",
                param="do_sample",
            )
        return False
    return wanted if wanted is not None else bool(asked) or advised
