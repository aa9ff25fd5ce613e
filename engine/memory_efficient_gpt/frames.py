"""Frames between the server process and a worker: length-prefixed msgpack, never pickle.

Purpose: the messages of that conversation, and their exact form on the wire.
Does not know: sockets, processes, engines.
Invariant: bytes become well-typed messages or FrameError, nothing else.

    frame    = length of the body (4 bytes, big endian) + body
    body     = msgpack [kind, field, ...]
    event    = [request_id, index, token_ids, num_cached_tokens] and, only when there is more to say,
               [..., finish_reason, stop_token_id, logprobs, prompt_logprobs, error, cost]
    logprob  = [token_id, logprob, [[token_id, logprob], ...]]
    error    = [code, message, param, retry_after_s]
    request, info, stats, cost, report = maps (see wire.py)

Token events dominate: an event is a short array, and one frame carries all events of a step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, Final

import msgpack

from memory_efficient_gpt import errors
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import ConfigError, EngineFailedError, MegptError, OverloadedError
from memory_efficient_gpt.request import Cost, FinishReason, Request, SequenceEvent, TokenLogprob
from memory_efficient_gpt.wire import (
    Convert,
    FrameError,
    as_float,
    as_int,
    as_list,
    as_str,
    optional,
    pack_record,
    unpack_record,
)

MAX_FRAME_BYTES: Final = 64 << 20
"""Room for the prompt logprobs of a 128k-token prompt; anything longer is a broken peer."""

HEADER: Final = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Submit:
    """To the worker: start this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """To the worker: forget sequence `index` of a request, or all of it. Unknown ids are fine."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """To the worker: accept nothing new, finish what is aboard, then exit."""


@dataclass(frozen=True, slots=True)
class Close:
    """To the worker: exit now."""


@dataclass(frozen=True, slots=True)
class Ping:
    """To the worker: answer with a Pong of the same number."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Sleep:
    """To the worker: give memory back once nothing is aboard; answered by Slept. No Submit before Wake."""


@dataclass(frozen=True, slots=True)
class Wake:
    """To the worker: take the memory back; answered by Woke."""


@dataclass(frozen=True, slots=True)
class SetKvLimit:
    """To the worker: let the KV cache have so many bytes. It answers with KvLimit, in the same order."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class KvLimit:
    """From the worker: what the KV cache can have in memory now, in bytes."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """From the worker while it loads: what it is doing, and how far it is (0..1)."""

    phase: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker: loaded."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """From the worker: it can't load, or died of `error`. The last frame of a conversation.

    What was aboard has not ended: another worker may resume it.
    """

    error: MegptError


@dataclass(frozen=True, slots=True)
class Events:
    """From the worker: all news of one step."""

    events: list[SequenceEvent]


@dataclass(frozen=True, slots=True)
class Stats:
    """From the worker, unasked: counters, and the 99th percentile of recent step times in seconds."""

    stats: EngineStats
    step_p99_s: float


@dataclass(frozen=True, slots=True)
class Pong:
    """From the worker: it has seen everything sent before the Ping of that number."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Slept:
    """From the worker: it sleeps, and this is what it gave back and keeps."""

    report: SleepReport


@dataclass(frozen=True, slots=True)
class Woke:
    """From the worker: it takes requests again."""


Message = (
    Submit
    | Abort
    | Drain
    | Close
    | Ping
    | Sleep
    | Wake
    | SetKvLimit
    | Progress
    | Ready
    | Failed
    | Events
    | Stats
    | Pong
    | Slept
    | Woke
    | KvLimit
)


def encode(message: Message) -> bytes:
    """One whole frame. Raises FrameError if a value has no wire form or the frame would be too large."""
    body: list[Any] = [_KIND_OF[type(message)]]
    body += [_to_wire(getattr(message, f.name)) for f in fields(message)]
    try:
        payload: bytes = msgpack.packb(body)
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"{type(message).__name__} can't be encoded: {error}.") from error
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(
            f"{type(message).__name__} takes {len(payload)} bytes; the limit of a frame is {MAX_FRAME_BYTES}."
        )
    return HEADER.pack(len(payload)) + payload


def encode_events(events: Sequence[SequenceEvent]) -> Iterator[bytes]:
    """Frames with all `events`: one, unless they don't fit; an event too large alone becomes an error."""
    try:
        yield encode(Events(list(events)))
    except FrameError as error:
        if len(events) > 1:
            middle = len(events) // 2
            yield from encode_events(events[:middle])
            yield from encode_events(events[middle:])
        else:
            yield encode(Events([_undeliverable(event, error) for event in events]))


def decode(payload: bytes | memoryview) -> Message:
    """The message of one frame's body (without its length). Raises FrameError."""
    try:
        body = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameError(f"a frame of {len(payload)} bytes is not msgpack: {error!r}.") from error
    if type(body) is not list or not body or type(body[0]) is not int or not 0 <= body[0] < len(_FORMS):
        raise FrameError("a frame does not begin with a known kind.")
    cls, converts = _FORMS[body[0]]
    if len(body) - 1 != len(converts):
        raise FrameError(f"{cls.__name__} has {len(body) - 1} fields; it must have {len(converts)}.")
    message: Message = cls(*(convert(raw) for convert, raw in zip(converts, body[1:], strict=True)))
    return message


class FrameDecoder:
    """Cuts a byte stream into messages, whatever pieces it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """All messages that `data` completes. Raises FrameError; the stream is useless afterwards."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start, end = 0, len(buffer)
        while end - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}.")
            body = start + HEADER.size
            if end - body < length:
                break
            with memoryview(buffer) as view, view[body : body + length] as payload:
                messages.append(decode(payload))
            start = body + length
        del buffer[:start]
        return messages


def _to_wire(value: Any) -> Any:
    if isinstance(value, list):
        return [_pack_event(event) for event in value]
    if isinstance(value, Request | EngineInfo | EngineStats | SleepReport):
        return pack_record(value)
    return _pack_error(value) if isinstance(value, MegptError) else value


_NOTHING_MORE: Final = (None,) * 6


def _pack_event(event: SequenceEvent) -> list[Any]:
    packed = [event.request_id, event.index, event.token_ids, event.num_cached_tokens]
    rest = (
        event.finish_reason, event.stop_token_id, event.logprobs, event.prompt_logprobs,
        event.error, event.cost,
    )  # fmt: skip
    if rest != _NOTHING_MORE:
        packed += rest[:2]
        packed += (_pack_logprobs(event.logprobs), _pack_logprobs(event.prompt_logprobs))
        packed.append(None if event.error is None else _pack_error(event.error))
        packed.append(None if event.cost is None else pack_record(event.cost))
    return packed


def _unpack_event(raw: object) -> SequenceEvent:
    if type(raw) is not list or len(raw) not in (4, 10):
        raise FrameError("an event must be an array of 4 or 10.")
    token_ids = raw[2]
    if type(token_ids) is not list or any(type(token_id) is not int for token_id in token_ids):
        raise FrameError("an event's tokens must be an array of integers.")
    event = SequenceEvent(
        request_id=as_str(raw[0]), index=as_int(raw[1]), token_ids=token_ids, num_cached_tokens=as_int(raw[3])
    )
    if len(raw) == 10:
        event.finish_reason = _unpack_finish_reason(raw[4])
        event.stop_token_id = None if raw[5] is None else as_int(raw[5])
        event.logprobs = None if raw[6] is None else [_unpack_logprob(entry) for entry in as_list(raw[6])]
        event.prompt_logprobs = (
            None if raw[7] is None else list(map(optional(_unpack_logprob), as_list(raw[7])))
        )
        event.error = None if raw[8] is None else _unpack_error(raw[8])
        event.cost = None if raw[9] is None else unpack_record(Cost, raw[9])
    return event


def _undeliverable(event: SequenceEvent, error: FrameError) -> SequenceEvent:
    return SequenceEvent(
        request_id=event.request_id,
        index=event.index,
        finish_reason=FinishReason.ERROR,
        error=EngineFailedError(f"The answer could not be delivered: {error} Ask for fewer logprobs."),
    )


def _pack_logprobs(entries: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
    if entries is None:
        return None
    return [None if entry is None else (entry.token_id, entry.logprob, entry.top) for entry in entries]


def _unpack_logprob(raw: object) -> TokenLogprob:
    if type(raw) is not list or len(raw) != 3:
        raise FrameError("a logprob must be an array of 3.")
    return TokenLogprob(as_int(raw[0]), as_float(raw[1]), tuple(map(_unpack_top, as_list(raw[2]))))


def _unpack_top(raw: object) -> tuple[int, float]:
    if type(raw) is not list or len(raw) != 2:
        raise FrameError("a top logprob must be a pair.")
    return as_int(raw[0]), as_float(raw[1])


def _unpack_finish_reason(raw: object) -> FinishReason | None:
    try:
        return None if raw is None else FinishReason(as_str(raw))
    except ValueError as error:
        raise FrameError(f"{raw!s:.40} is no finish reason.") from error


def _pack_error(error: MegptError) -> list[Any]:
    if _error_classes().get(error.code) is not type(error):
        raise FrameError(f"{type(error).__name__} is not one of the errors that users meet.")
    retry_after_s = error.retry_after_s if isinstance(error, OverloadedError) else None
    return [error.code, str(error), error.param, retry_after_s]


def _unpack_error(raw: object) -> MegptError:
    if type(raw) is not list or len(raw) != 4:
        raise FrameError("an error must be an array of 4.")
    code, text, param = as_str(raw[0]), as_str(raw[1]), optional(as_str)(raw[2])
    cls = _error_classes().get(code)
    if cls is None:
        raise FrameError(f"{code:.40} is no error code.")
    if issubclass(cls, ConfigError):
        return cls(text.split("\n"))
    if issubclass(cls, OverloadedError):
        return cls(text, retry_after_s=as_float(raw[3]))
    return cls(text, param=param)


@cache
def _error_classes() -> dict[str, type[MegptError]]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MegptError)]
    return {c.code: c for c in classes}


def _unpack_events(raw: object) -> list[SequenceEvent]:
    return [_unpack_event(event) for event in as_list(raw)]


_FORMS: Final[tuple[tuple[type, tuple[Convert, ...]], ...]] = (
    (Submit, (partial(unpack_record, Request),)),
    (Abort, (as_str, optional(as_int))),
    (Drain, ()),
    (Close, ()),
    (Ping, (as_int,)),
    (Progress, (as_str, as_float)),
    (Ready, (partial(unpack_record, EngineInfo),)),
    (Failed, (_unpack_error,)),
    (Events, (_unpack_events,)),
    (Stats, (partial(unpack_record, EngineStats), as_float)),
    (Pong, (as_int,)),
    (Sleep, ()),
    (Wake, ()),
    (Slept, (partial(unpack_record, SleepReport),)),
    (Woke, ()),
    (SetKvLimit, (as_int,)),
    (KvLimit, (as_int,)),
)
"""Kind number = position. For each kind its class and how each of its fields is checked."""

_KIND_OF: Final = {cls: kind for kind, (cls, _) in enumerate(_FORMS)}
