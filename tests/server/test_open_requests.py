"""What is kept of a request so that another worker can go on with it."""

from __future__ import annotations

import asyncio
from typing import Any

from memory_efficient_gpt.errors import EngineFailedError, OverloadedError
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent
from memory_efficient_gpt_server.event_stream import EventStream
from memory_efficient_gpt_server.open_requests import OpenRequest, OpenRequests


def opened(request_id: str = "r", **params: Any) -> OpenRequest:
    request = Request(id=request_id, prompt_token_ids=(1,), params=SamplingParams(**params))
    return OpenRequest(request, EventStream(request_id, request.params.n, abandon=lambda _: None))


def news(*tokens: int, index: int = 0, finish: FinishReason | None = None) -> SequenceEvent:
    return SequenceEvent(request_id="r", index=index, token_ids=list(tokens), finish_reason=finish)


def test_a_request_without_a_token_is_submitted_as_it_was() -> None:
    request = opened(seed=1, n=2)
    assert request.resumed() is request.request
    assert request.request.params.seed == 1


def test_a_request_keeps_the_seed_it_was_given_here() -> None:
    first, second = opened(), opened()
    assert first.request.params.seed is not None
    assert first.request.params.seed != second.request.params.seed
    first.put(news(5))
    assert first.resumed().params == first.request.params


def test_every_token_given_is_known_read_or_not() -> None:
    async def run() -> None:
        request = opened(n=4)
        request.put(news(5, 6))
        assert (await anext(request.stream)).token_ids == [5, 6]
        request.put(news(7))
        request.put(news(8))
        request.put(news(1, index=1, finish=FinishReason.STOP))
        request.put(news(9, index=1))  # after its end
        request.stream.close(3)
        assert request.resumed().resumed_token_ids == ((5, 6, 7, 8), None, (), None)
        assert request.resumed().open_indices == (0, 2)

    asyncio.run(run())


def test_an_end_without_a_token_is_kept_too() -> None:
    request = opened(n=2)
    request.put(news(index=1, finish=FinishReason.STOP))
    assert request.resumed().resumed_token_ids == ((), None)


def test_what_the_worker_tells_of_unknown_sequences_is_dropped() -> None:
    requests = OpenRequests(resume_wait_s=60.0)
    requests.add(opened())
    requests.deliver(news(5, index=7))
    requests.deliver(SequenceEvent(request_id="unknown", token_ids=[1]))
    assert [r.resumed_token_ids for r in requests.resumed()] == [()]


def test_the_second_crash_ends_those_that_saw_the_first() -> None:
    async def run() -> None:
        requests = OpenRequests(resume_wait_s=60.0)
        old, new = opened("old"), opened("new")
        requests.add(old)
        requests.crashed("m", "died")
        assert len(requests.resumed()) == 1
        requests.add(new)
        requests.crashed("m", "died")
        assert [r.id for r in requests.resumed()] == ["new"]
        assert isinstance((await anext(old.stream)).error, EngineFailedError)
        assert not new.stream.ended

    asyncio.run(run())


def test_the_wait_ends_once() -> None:
    """Resumed in time, or failed: the deadline of that wait does nothing later."""

    async def run() -> None:
        requests = OpenRequests(resume_wait_s=0.02)
        first, second = opened("first"), opened("second")
        requests.add(first)
        requests.crashed("m", "died")
        requests.resumed()
        await asyncio.sleep(0.05)
        assert not first.stream.ended
        requests.fail_all(OverloadedError("full"))
        requests.add(second)
        requests.crashed("m", "died")
        await asyncio.sleep(0.05)
        assert isinstance((await anext(second.stream)).error, EngineFailedError)
        assert isinstance((await anext(first.stream)).error, OverloadedError)
        assert len(requests) == 0

    asyncio.run(run())
