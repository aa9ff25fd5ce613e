"""Frames: what goes in comes out, and nothing that comes in can do harm."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_efficient_gpt import errors, frames
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import ConfigError, EngineFailedError, MegptError, OverloadedError
from memory_efficient_gpt.frames import (
    HEADER,
    Abort,
    Close,
    Drain,
    Events,
    Failed,
    FrameDecoder,
    KvLimit,
    Message,
    Ping,
    Pong,
    Progress,
    Ready,
    SetKvLimit,
    Sleep,
    Slept,
    Stats,
    Submit,
    Wake,
    Woke,
    decode,
    encode,
    encode_events,
)
from memory_efficient_gpt.request import (
    Cost,
    FinishReason,
    Request,
    SamplingParams,
    SequenceEvent,
    TokenLogprob,
)
from memory_efficient_gpt.wire import FrameError, pack_record, unpack_record

PARAMS = SamplingParams(
    temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2,
    frequency_penalty=0.3, seed=-(2**63), logit_bias={7: -100.0}, logprobs=0, prompt_logprobs=20,
    stop=("\n", "é\U0001f600"), stop_token_ids=(0, 1), max_tokens=1, min_tokens=1, ignore_eos=True, n=8,
)  # fmt: skip
REQUEST = Request(
    id="r", prompt_token_ids=(1, 2**31), params=PARAMS, client="c", cache_salt="s", adapter="a",
    use_prefix_cache=False, resumed_token_ids=((), None, (1, 2**31)), metered=True,
)  # fmt: skip
INFO = EngineInfo(
    model="m", architecture="A", tier="B", tier_reason="r", dtype="float32", device="cpu", max_model_len=1,
    vocab_size=2, eos_token_ids=(3, 4), num_kv_blocks=5, block_size=6, kv_cache_dtype="int8", weights_bytes=7,
    kv_cache_bytes=2**40, attention_backend="torch", quantization="int4", prefix_cache=False,
    notes=("one", "two"), kv_block_bytes=10, kv_granule_bytes=11, kv_least_bytes=8, kv_most_bytes=2**41,
)  # fmt: skip
CONFIG = EngineConfig(
    model="m", revision="r", device="cpu", dtype="float32", quantization="int4", kv_cache_dtype="int8",
    max_model_len=2, num_kv_blocks=2, kv_reserve_bytes=9, block_size=1, max_num_seqs=1, max_batched_tokens=1,
    prefix_cache=False, num_threads=1,
    overlap=True, cuda_graphs=False, record_steps=False, deterministic=True, tier="C", debug_checks=True,
)  # fmt: skip
STATS = EngineStats(**{f.name: number for number, f in enumerate(fields(EngineStats), start=1)})
REPORT = SleepReport(
    parked_bytes=2**40, pinned=True, device_bytes=1, kv_bytes=2, dropped_bytes=3, seconds=0.5
)
LOGPROBS = [TokenLogprob(1, -0.5, ((1, -0.5), (2, float("-inf"))))]
FULL_EVENT = SequenceEvent(
    request_id="r", index=3, token_ids=[5, 6], logprobs=LOGPROBS, prompt_logprobs=[None, *LOGPROBS],
    finish_reason=FinishReason.STOP, stop_token_id=0, num_cached_tokens=16,
    cost=Cost(queue_s=0.5, kv_peak_bytes=2**40, kv_byte_seconds=1.5, resumed=True),
)  # fmt: skip
EVENTS = [
    FULL_EVENT,
    SequenceEvent(request_id="r", token_ids=[1]),
    SequenceEvent(request_id="r", logprobs=[]),
    SequenceEvent(request_id="r", stop_token_id=0),
    SequenceEvent(request_id="r", token_ids=[1], cost=Cost(queue_s=0.0)),
]
MESSAGES: list[Message] = [
    Submit(REQUEST), Submit(Request(id="x", prompt_token_ids=())), Abort("r"), Abort("r", 0), Drain(),
    Close(), Ping(2**40), Pong(0), Progress("reading", 0.5), Ready(INFO), Events(EVENTS), Stats(STATS, 0.01),
    Sleep(), Wake(), Slept(REPORT), Woke(),
    SetKvLimit(2**40), KvLimit(0),
]  # fmt: skip


def _frame(body: object) -> bytes:
    payload: bytes = msgpack.packb(body)
    return HEADER.pack(len(payload)) + payload


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert FrameDecoder().feed(encode(message)) == [message]


@pytest.mark.parametrize(
    "record", [PARAMS, REQUEST, INFO, STATS, REPORT, CONFIG], ids=lambda r: type(r).__name__
)
def test_every_field_of_a_record_is_carried(record: Any) -> None:
    packed = pack_record(record)
    unused = {"kv_cache_bytes", "native_kernels"} if record is CONFIG else set()  # exclude others
    assert set(packed) == {f.name for f in fields(record)} - unused
    assert unpack_record(type(record), msgpack.unpackb(msgpack.packb(packed), strict_map_key=False)) == record


def test_fields_at_their_defaults_are_left_out() -> None:
    assert pack_record(SamplingParams()) == {}
    assert pack_record(replace(SamplingParams(), n=2)) == {"n": 2}


@pytest.mark.parametrize(
    "cls", [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MegptError)]
)
def test_every_error_keeps_class_message_and_field(cls: type[MegptError]) -> None:
    if cls is ConfigError:
        sent: MegptError = ConfigError(["one.", "two."])
    elif cls is OverloadedError:
        sent = OverloadedError("full", retry_after_s=2.5)
    else:
        sent = cls("text", param="n")
    (failed,) = FrameDecoder().feed(encode(Failed(sent)))
    assert isinstance(failed, Failed)
    assert type(failed.error) is cls
    assert vars(failed.error) == vars(sent)


def test_an_error_that_users_never_meet_is_not_sent() -> None:
    class OtherError(MegptError):
        code = "engine_failed"

    with pytest.raises(FrameError, match="OtherError"):
        encode(Failed(OtherError("x")))


def test_plain_token_events_stay_small() -> None:
    event = SequenceEvent(request_id="cmpl-0123456789abcdef", token_ids=[40_000])
    one, two = (len(encode(Events([event] * count))) for count in (1, 2))
    assert two - one == len(event.request_id) + 1 + 7  # array, index, [token as 1 + 2 bytes], cached


@given(st.lists(st.integers(1, 200), max_size=20))
def test_frames_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    stream = b"".join(map(encode, MESSAGES))
    decoder, got, start = FrameDecoder(), [], 0
    for size in [*cuts, len(stream)]:
        got += decoder.feed(stream[start : start + size])
        start += size
    assert got == MESSAGES


@given(st.binary(max_size=200))
def test_random_bytes_give_messages_or_frame_errors(data: bytes) -> None:
    for attempt in (lambda: FrameDecoder().feed(data), lambda: decode(data)):
        with contextlib.suppress(FrameError):
            attempt()


_leaf = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=9) | st.binary()
)
_key = st.text(max_size=5) | st.integers(0, 9)
_nonsense = st.recursive(
    _leaf,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(_key, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=300)
@given(st.integers(-1, 12), st.lists(_nonsense, max_size=4))
def test_well_formed_nonsense_gives_messages_or_frame_errors(kind: int, arguments: list[object]) -> None:
    with contextlib.suppress(FrameError):
        decode(msgpack.packb([kind, *arguments]))


@settings(max_examples=300)
@given(st.sampled_from(MESSAGES), st.data())
def test_one_wrong_byte_gives_messages_or_frame_errors(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    position = data.draw(st.integers(HEADER.size, len(frame) - 1))
    frame[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FrameError):
        FrameDecoder().feed(bytes(frame))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([], "known kind"),
        ([99], "known kind"),
        ([True], "known kind"),
        ({}, "known kind"),
        ([1, "r"], "Abort has 1 fields"),
        ([0, {"id": "r"}], "prompt_token_ids"),
        ([0, {"id": "r", "prompt_token_ids": [1], "colour": 1}], "colour"),
        ([0, {"id": "r", "prompt_token_ids": [True]}], "integers"),
        ([0, {"id": "r", "prompt_token_ids": [1], "params": {"n": True}}], "expected an integer"),
        ([0, {"id": "r", "prompt_token_ids": [1], "params": {"temperature": "hot"}}], "expected a number"),
        (
            [0, {"id": "r", "prompt_token_ids": [1], "params": {"logit_bias": {"7": 1}}}],
            "expected an integer",
        ),
        ([7, ["no_such_code", "x", None, None]], "no error code"),
        ([8, [["r", 0, [1.5], 0]]], "integers"),
        ([8, [["r", 0, [1], 0, "bored", None, None, None, None, None]]], "finish reason"),
        ([8, [["r", 0, [1], 0, None, None, [[1]], None, None, None]]], "logprob"),
        ([8, [["r", 0, [1], 0, None, None, None, None, None, {"queue_s": "long"}]]], "Cost|number"),
    ],
)
def test_malformed_messages_say_what_is_wrong(body: object, problem: str) -> None:
    with pytest.raises(FrameError, match=problem):
        FrameDecoder().feed(_frame(body))


def test_settings_that_contradict_each_other_are_malformed() -> None:
    with pytest.raises(FrameError, match="give one"):
        unpack_record(EngineConfig, {"model": "m", "num_kv_blocks": 2, "kv_cache_bytes": 1})
    with pytest.raises(FrameError, match="expected one of"):
        unpack_record(EngineConfig, {"model": "m", "dtype": "float8"})


def test_an_oversized_announcement_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="announces"):
        FrameDecoder().feed(struct.pack(">I", frames.MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize("bad", ["\ud800", 2**70])
def test_values_without_a_wire_form_are_refused_by_the_sender(bad: Any) -> None:
    request = Request(id="r", prompt_token_ids=(1,), params=SamplingParams(seed=bad))
    with pytest.raises(FrameError, match="Submit can't be encoded"):
        encode(Submit(request))


def test_events_too_large_for_one_frame_are_split_and_a_hopeless_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 300)
    small = [SequenceEvent(request_id=f"r{i}", token_ids=[1] * 20) for i in range(20)]
    huge = SequenceEvent(request_id="huge", index=2, token_ids=[1] * 1000)
    decoder, got = FrameDecoder(), []
    for frame in encode_events([*small, huge]):
        (message,) = decoder.feed(frame)
        assert isinstance(message, Events)
        got += message.events
    assert got[:-1] == small
    assert (got[-1].request_id, got[-1].index, got[-1].finish_reason) == ("huge", 2, FinishReason.ERROR)
    assert isinstance(got[-1].error, EngineFailedError)
