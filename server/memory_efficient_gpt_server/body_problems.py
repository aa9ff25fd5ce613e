"""What is wrong with a body, said to its sender: in whole sentences, with the sender's own field names.

Purpose: errors of the schema, of JSON and of sampling parameters -> message and field.
Does not know: which checks there are (schemas and `SamplingParams.validate` have those), HTTP.
Invariant: a message names only fields that the client can send, and is short whatever was sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt_server.schemas import GenerationBody
from memory_efficient_gpt_server.wording import clipped, short

_PROBLEMS_SHOWN: Final = 3
_PATH_CHARACTERS: Final = 80
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_MAYBE_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")

Path = tuple[int | str, ...]


def refused_body(error: ValidationError, body: bytes) -> InvalidRequestError:
    """The answer to a body that its schema refused."""
    message, param = _surrogate_problem(error, body) or _problem_of(error)
    return InvalidRequestError(message, param=param)


def validate_sampling(params: SamplingParams, body: GenerationBody, vocab_size: int) -> None:
    """As `params.validate`, but errors name the fields of `body` that the parameters came from."""
    try:
        params.validate(vocab_size)
    except InvalidRequestError as error:
        raise _in_clients_words(error, params, body) from None


def _in_clients_words(
    error: InvalidRequestError, params: SamplingParams, body: GenerationBody
) -> InvalidRequestError:
    param = error.param or ""
    name = body.names_of_parameters.get(param, param)
    message = name + error.message.removeprefix(param) if error.message.startswith(param) else error.message
    if name == "top_k":  # the schema takes these for "all", so the engine's limits are not the whole story
        message = message.replace("must be an integer", "must be 0 or -1 (all tokens) or an integer")
    if name == "min_tokens" and params.max_tokens and body.output_limit_field is None:
        message += f" max_tokens is {params.max_tokens} by default; give it to have more."
    return InvalidRequestError(message, param=name or None)


def _problem_of(error: ValidationError) -> tuple[str, str | None]:
    """All that is wrong, about, and the first field concerned."""
    items = error.errors(include_url=False)
    sentences = [_sentence(item) for item in items[:_PROBLEMS_SHOWN]]
    if len(items) > _PROBLEMS_SHOWN:
        sentences.append(f"There are {len(items) - _PROBLEMS_SHOWN} more problems.")
    param = items[0].get("ctx", {}).get("param") if items[0]["type"] == "sentence" else None
    return " ".join(sentences), param or _path(items[0]["loc"]) or None


def _sentence(item: Mapping[str, Any]) -> str:
    path, kind, message = _path(item["loc"]), item["type"], item["msg"]
    if kind == "value_error":  # of the settings' own checks, which know no paths
        return f"{path} {message.removeprefix('Value error, ').removesuffix('.')}.".lstrip()
    if kind == "json_invalid":
        return f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}."
    if not path:
        return (
            message if kind == "sentence" else f"The body must be a JSON object, got {short(item['input'])}."
        )
    if kind == "sentence":
        return f"{path} {message}"
    if kind == "missing":
        return f"{path} is required."
    if kind == "extra_forbidden":
        return f"{path} is not a field that is known here. Check its spelling or leave it out."
    text = message.replace("Input should be", "must be").replace("Input should", "should")
    text = re.sub(r"^(String|List|Dictionary|Tuple) should", "should", text)
    return f"{path} {text}, got {short(item['input'])}."


def _path(loc: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return clipped(text.removeprefix("."), _PATH_CHARACTERS)


# ---- lone surrogates: JSON may spell them, text may not hold them


class _Found(NamedTuple):
    """A text with a surrogate: a value, or the name of a field of the object at `loc`."""

    loc: Path
    text: str
    is_name: bool = False


def _surrogate_problem(error: ValidationError, body: bytes) -> tuple[str, str | None] | None:
    """The schema's parser calls them invalid JSON and names no field; another parser finds it."""
    if error.errors(include_url=False)[0]["type"] != "json_invalid" or not _MAYBE_SURROGATE.search(body):
        return None
    try:
        found = _first_surrogate(json.loads(body))
    except (ValueError, RecursionError):
        return None
    if found is None:
        return None
    match = _SURROGATE.search(found.text)
    assert match is not None, "it was found by this pattern"
    path = _path(found.loc)
    where = (f"the name of a field in {path}" if path else "the name of a field") if found.is_name else path
    shown = f"\\u{ord(match[0]):04x}"
    message = f"{where or 'the body'} has a lone surrogate ({shown}) at character {match.start() + 1}; "
    return message + "send whole Unicode characters.", path or None


def _first_surrogate(document: Any) -> _Found | None:
    """Depth first without recursion: a body may be nested deeper than Python's stack allows."""
    trail: list[int | str] = []
    levels = [iter([("", document)] if not isinstance(document, dict | list) else _items(document))]
    while levels:
        for key, value in levels[-1]:
            if isinstance(key, str) and _SURROGATE.search(key):
                return _Found(tuple(trail), key, is_name=True)
            if isinstance(value, str) and _SURROGATE.search(value):
                return _Found((*trail, key), value)
            if isinstance(value, dict | list):
                trail.append(key)
                levels.append(iter(_items(value)))
                break
        else:
            levels.pop()
            if trail:
                trail.pop()
    return None


def _items(container: dict[str, Any] | list[Any]) -> Iterable[tuple[int | str, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)
