"""Who may start: never more than the limits, each place given back once, Retry-After that means something."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest

from memory_efficient_gpt.errors import InvalidRequestError, OverloadedError
from memory_efficient_gpt_server.admission import Admission, AdmissionLimits, Reservation, TokenRate
from memory_efficient_gpt_server.errors import ServerFullError, retry_after_s
from tests.server.conftest import LiveServer, Serve
from tests.server.scripted_model import ScriptedEngine
from tests.server.test_bad_requests import assert_error

KEYS = ["key-number-one-" + "1" * 16, "key-number-two-" + "2" * 16]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_random_operations_keep_the_books() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        limits = AdmissionLimits(20, 1000, 8)
        admission, held = Admission(limits, Clock()), list[Reservation]()
        for _ in range(300):
            action = rng.random()
            try:
                if action < 0.5:
                    held.append(admission.reserve(rng.choice("abc"), rng.randint(1, 6), rng.randint(1, 300)))
                elif held and action < 0.7:
                    rng.choice(held).correct(rng.randint(1, 300))
                elif held:
                    gone = held.pop(rng.randrange(len(held)))
                    gone.release(rng.randint(0, 100))
                    gone.release()
            except OverloadedError:
                pass
            assert admission.sequences == sum(r.sequences for r in held) <= limits.max_sequences
            assert admission.tokens == sum(r.tokens for r in held)
            assert admission.tokens <= limits.max_reserved_tokens
            for client in "abc":
                assert sum(r.sequences for r in held if r.client == client) <= 8


def test_a_request_larger_than_the_token_limit_runs_alone() -> None:
    admission = Admission(AdmissionLimits(10, 100))
    with admission.reserve("", 1, 5000), pytest.raises(ServerFullError):
        admission.reserve("", 1, 1)
    with admission.reserve("", 1, 1), pytest.raises(ServerFullError):
        admission.reserve("", 1, 5000)


def test_what_can_never_fit_is_the_requests_fault() -> None:
    admission = Admission(AdmissionLimits(10, 100, 4))
    with pytest.raises(InvalidRequestError, match="limit is 4"):
        admission.reserve("", 5, 1)


def test_a_correction_that_does_not_fit_changes_nothing() -> None:
    admission = Admission(AdmissionLimits(10, 100))
    with admission.reserve("", 1, 60), admission.reserve("", 1, 30) as mine:
        with pytest.raises(ServerFullError):
            mine.correct(50)
        assert admission.tokens == 90


def test_retry_after_follows_backlog_and_rate() -> None:
    clock = Clock()
    admission = Admission(AdmissionLimits(100, 10_000), clock)
    assert admission.retry_after_s() == 1.0
    for _ in range(200):
        clock.now_s += 0.5
        admission.reserve("", 1, 50).release(50)
    admission.reserve("", 1, 4000)
    assert admission.retry_after_s() == pytest.approx(4000 / 2 / 100, rel=0.05)
    admission.reserve("", 1, 5000).correct(6000)
    clock.now_s += 200
    assert retry_after_s(ServerFullError("", retry_after_s=admission.retry_after_s())) == 60


def test_the_rate_forgets() -> None:
    clock = Clock()
    rate = TokenRate(clock)
    assert rate.per_second() is None
    for tokens in (1000, 10):
        for _ in range(200):
            clock.now_s += 1
            rate.add(tokens)
    assert rate.per_second() == pytest.approx(10, rel=0.1)


def test_retry_after_is_clamped() -> None:
    waits = [0.0, 0.2, 1.5, 59.1, 1e9, float("inf"), float("nan")]
    assert [retry_after_s(OverloadedError("", retry_after_s=w)) for w in waits] == [1, 1, 2, 60, 60, 60, 60]


async def _burst(live: LiveServer, count: int, key: str = "none", **fields: object) -> list[int]:
    """The statuses of `count` requests sent at once."""
    async with openai.AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=30
    ) as client:

        async def one() -> int:
            try:
                await client.completions.create(model="demo", prompt="a", max_tokens=2, **fields)  # type: ignore[call-overload]  # fields vary
            except openai.APIStatusError as error:
                assert_error(error.response, error.status_code)
                return error.status_code
            return 200

        return await asyncio.gather(*(one() for _ in range(count)))


def test_a_burst_admits_no_more_than_the_limit(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=0.3), max_sequences=8) as live:
        statuses = asyncio.run(_burst(live, 60))
        assert set(statuses) == {200, 503}
        assert live.engine.most_running <= 8
        assert statuses.count(200) == len(live.engine.requests) >= 8
        assert live.server.admission.sequences == live.server.admission.tokens == 0


def test_n_counts_as_n(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=0.3), max_sequences=8) as live:
        assert sorted(asyncio.run(_burst(live, 3, n=4))) == [200, 200, 503]


def test_a_greedy_key_gets_429_while_others_are_served(serve: Serve, answer_ids: list[int]) -> None:
    engine = ScriptedEngine(answer_ids, step_s=0.3)
    with serve(engine, api_keys=KEYS, max_sequences_per_key=3) as live:

        async def both() -> tuple[list[int], list[int]]:
            return await asyncio.gather(_burst(live, 6, KEYS[0]), _burst(live, 2, KEYS[1]))

        greedy, modest = asyncio.run(both())
        assert sorted(greedy) == [200] * 3 + [429] * 3 and modest == [200, 200]


def test_a_refused_client_succeeds_when_it_retries(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=0.1), max_sequences=1) as live:

        async def run() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=5) as client:
                calls = [client.completions.create(model="demo", prompt="a", max_tokens=1) for _ in range(2)]
                return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

        assert len(asyncio.run(run())) == 2


def test_failures_give_the_place_back(serve: Serve) -> None:
    with serve(max_sequences=2) as live, live.client() as client:
        for fields in ({"prompt": "word " * 3000}, {"prompt": [4096]}, {"prompt": ["a", "word " * 3000]}):
            for _ in range(3):
                response = client.post("/v1/completions", json={"model": "demo", **fields})
                assert_error(response, 400)
        live.engine.refuse_with = OverloadedError("The engine is full.", retry_after_s=7)
        response = client.post("/v1/completions", json={"model": "demo", "prompt": "a"})
        assert_error(response, 503, code="overloaded")
        assert response.headers["retry-after"] == "7"
        assert live.server.admission.sequences == live.server.admission.tokens == 0
