"""A request's stream: merged for slow readers, always ended."""

from __future__ import annotations

import asyncio

from memory_efficient_gpt.errors import EngineFailedError
from memory_efficient_gpt.request import FinishReason, SequenceEvent, TokenLogprob
from memory_efficient_gpt_server.event_stream import EventStream


def _event(token: int, index: int = 0, finish: FinishReason | None = None) -> SequenceEvent:
    return SequenceEvent(request_id="r", index=index, token_ids=[token], finish_reason=finish)


def _stream(num_sequences: int = 1) -> tuple[EventStream, list[str]]:
    abandoned: list[str] = []
    return EventStream("r", num_sequences, abandoned.append), abandoned


async def _rest(stream: EventStream) -> list[SequenceEvent]:
    return [event async for event in stream]


def test_a_reader_that_keeps_up_gets_every_event() -> None:
    async def run() -> list[list[int]]:
        stream, _ = _stream()
        got = []
        for token in range(3):
            stream.put(_event(token, finish=FinishReason.LENGTH if token == 2 else None))
            got.append((await anext(stream)).token_ids)
        assert await _rest(stream) == []
        return got

    assert asyncio.run(run()) == [[0], [1], [2]]


def test_unread_events_become_one_with_nothing_lost() -> None:
    async def run() -> list[SequenceEvent]:
        stream, _ = _stream()
        for token in range(1000):
            stream.put(
                SequenceEvent(
                    request_id="r",
                    token_ids=[token],
                    logprobs=[TokenLogprob(token, -1.0)],
                    prompt_logprobs=[None] if token == 0 else None,
                    num_cached_tokens=16,
                )
            )
        stream.put(SequenceEvent(request_id="r", finish_reason=FinishReason.STOP, stop_token_id=2))
        return await _rest(stream)

    (event,) = asyncio.run(run())
    assert event.token_ids == list(range(1000))
    assert event.logprobs == [TokenLogprob(token, -1.0) for token in range(1000)]
    assert event.prompt_logprobs == [None]
    assert (event.finish_reason, event.stop_token_id, event.num_cached_tokens) == (FinishReason.STOP, 2, 16)


def test_a_stream_ends_after_the_last_sequence() -> None:
    async def run() -> list[int]:
        stream, _ = _stream(2)
        stream.put(_event(1, index=1, finish=FinishReason.STOP))
        stream.put(_event(2, index=1))  # after its end: not news
        stream.put(_event(3, index=0, finish=FinishReason.STOP))
        return sorted(event.token_ids[0] for event in await _rest(stream))

    assert asyncio.run(run()) == [1, 3]


def test_failing_ends_what_is_open_and_only_that() -> None:
    async def run() -> dict[int, FinishReason | None]:
        stream, _ = _stream(2)
        stream.put(_event(1, index=0, finish=FinishReason.STOP))
        stream.fail(EngineFailedError("gone"))
        return {event.index: event.finish_reason for event in await _rest(stream)}

    assert asyncio.run(run()) == {0: FinishReason.STOP, 1: FinishReason.ERROR}


def test_closing_one_sequence_drops_its_news() -> None:
    async def run() -> list[int]:
        stream, _ = _stream(2)
        stream.put(_event(1, index=0))
        stream.close(0)
        stream.put(_event(2, index=0))
        stream.put(_event(3, index=1, finish=FinishReason.STOP))
        return [event.token_ids[0] for event in await _rest(stream)]

    assert asyncio.run(run()) == [3]


def test_closing_wakes_a_waiting_reader() -> None:
    async def run() -> list[SequenceEvent]:
        stream, _ = _stream()
        reader = asyncio.create_task(_rest(stream))
        await asyncio.sleep(0)
        stream.close()
        return await asyncio.wait_for(reader, 1)

    assert asyncio.run(run()) == []


def test_leaving_early_abandons_the_request_and_leaving_late_does_not() -> None:
    async def run() -> tuple[list[str], list[str]]:
        early, abandoned = _stream()
        await early.aclose()
        late, kept = _stream()
        late.put(_event(1, finish=FinishReason.STOP))
        await late.aclose()
        return abandoned, kept

    assert asyncio.run(run()) == (["r"], [])
