"""Clients that ask many models and check what they are told.

Purpose: requests chosen by chance, sent as the OpenAI SDK sends them, each answer kept with its times.
Does not know: the server's process, memory.
Invariant: every request ends in exactly one Answer; a stream that ended without [DONE] or an error event is
cut; what a request was refused before it was answered is kept in `retries`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

MAX_RETRIES: Final = 2
FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 8.0
LONGEST_RETRY_AFTER_S: Final = 120.0
"""As in the OpenAI SDK."""
TIMEOUT_S: Final = 600.0
_RETRIED: Final = frozenset({408, 409, 429})

PROMPTS: Final = (
    ("Once upon a time", 24),
    ("The old house stood at the end of the lane", 16),
    ("She opened the door and", 12),
    ("It was a dark night, and the wind", 20),
    ("In the morning he", 8),
    ("There was no one in the room but", 18),
    ("My dear friend, I have", 10),
    ("The captain looked at the sea and said", 22),
)
"""Texts, and how many tokens are asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: a model, the index of its prompt, and whether it is streamed."""

    model: str
    prompt: int
    stream: bool

    def body(self) -> dict[str, Any]:
        """As it is sent."""
        text, tokens = PROMPTS[self.prompt]
        body = {"model": self.model, "prompt": text, "max_tokens": tokens, "temperature": 0}
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if self.stream else {})


@dataclass(slots=True)
class Answer:
    """What came back. first_token_s: since the first attempt was sent, only of streams. error: None if whole;
    "cut" if a stream just ended. retries: "503 code" of each attempt that was made again."""

    asked: Asked
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0
    retries: tuple[str, ...] = ()
    error: str | None = None


References = dict[tuple[str, int], tuple[str, str | None]]


async def references(client: httpx.AsyncClient, models: Sequence[str]) -> References:
    """Every model's answer to every prompt, one at a time. Raises RuntimeError if one is refused."""
    told: References = {}
    for model, prompt in itertools.product(models, range(len(PROMPTS))):
        answer = await ask(client, Asked(model, prompt, stream=False), random.Random(0))
        if answer.error is not None:
            raise RuntimeError(f"{model}, asked alone: {answer.error}")
        told[model, prompt] = answer.text, answer.finish_reason
    return told


def by_chance(models: Sequence[str], seed: str, deadline_s: float) -> Iterator[Asked]:
    """Requests of one client until the deadline (of time.monotonic)."""
    chance = random.Random(seed)
    while time.monotonic() < deadline_s:
        yield Asked(chance.choice(models), chance.randrange(len(PROMPTS)), chance.random() < 0.5)


async def play(
    client: httpx.AsyncClient, sources: Sequence[Iterator[Asked]], told: Callable[[Answer], None]
) -> None:
    """One client for each source, one request after the other; sources may be the same iterator."""

    async def one(number: int, source: Iterator[Asked]) -> None:
        jitter = random.Random(number)
        for asked in source:
            told(await ask(client, asked, jitter))

    async with asyncio.TaskGroup() as group:
        for number, source in enumerate(sources):
            group.create_task(one(number, source))


async def ask(client: httpx.AsyncClient, asked: Asked, jitter: random.Random) -> Answer:
    """Ask until there is an answer or no retry is left."""
    answer = Answer(asked)
    started = time.monotonic()
    for left in reversed(range(MAX_RETRIES + 1)):
        delay_s = await _attempt(client, answer, started)
        if answer.error is None or delay_s is None or left == 0:
            break
        answer.retries += (answer.error,)
        if delay_s == 0:
            backoff_s = min(FIRST_DELAY_S * 2.0 ** (MAX_RETRIES - left), LONGEST_DELAY_S)
            delay_s = backoff_s * (1 - 0.25 * jitter.random())
        await asyncio.sleep(delay_s)
    answer.seconds = time.monotonic() - started
    return answer


async def _attempt(client: httpx.AsyncClient, answer: Answer, started: float) -> float | None:
    """Returns the delay that the server wants before a retry; 0: it names none; None: no retry."""
    answer.error, began = None, False
    try:
        async with client.stream("POST", "/v1/completions", json=answer.asked.body()) as response:
            if response.status_code != 200:
                return await _refused(response, answer)
            began = True
            if answer.asked.stream:
                await _read_stream(response, answer, started)
            else:
                _read_whole(json.loads(await response.aread()), answer)
        return None
    except httpx.TransportError as error:
        cut = began and answer.asked.stream and not isinstance(error, httpx.TimeoutException)
        answer.error = "cut" if cut else type(error).__name__
        return None if began else 0.0


async def _refused(response: httpx.Response, answer: Answer) -> float | None:
    try:
        code = json.loads(await response.aread())["error"]["code"]
    except (ValueError, LookupError, TypeError):
        code = "no code"
    answer.error = f"{response.status_code} {code}"
    wanted, retry = response.headers.get("retry-after"), response.headers.get("x-should-retry")
    delay_s = float(wanted) if wanted is not None and wanted.isdigit() else 0.0
    if retry == "false" or delay_s > LONGEST_RETRY_AFTER_S:
        return None
    return (
        delay_s if retry == "true" or response.status_code in _RETRIED or response.is_server_error else None
    )


def _read_whole(body: dict[str, Any], answer: Answer) -> None:
    choice = body["choices"][0]
    answer.text, answer.finish_reason = choice["text"], choice["finish_reason"]
    answer.tokens = body["usage"]["completion_tokens"]


async def _read_stream(response: httpx.Response, answer: Answer, started: float) -> None:
    done = False
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data:"):
            event = json.loads(line[5:])
            if "error" in event:
                answer.error = f"stream {event['error'].get('code')}"
            else:
                _take(event, answer, started)
    if not done and answer.error is None:
        answer.error = "cut"


def _take(event: dict[str, Any], answer: Answer, started: float) -> None:
    for choice in event["choices"]:
        if choice["text"] and answer.first_token_s is None:
            answer.first_token_s = time.monotonic() - started
        answer.text += choice["text"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]


def wrong(answers: Sequence[Answer], expected: References) -> list[str]:
    """Answers that are whole and not what the model said when it was asked alone."""
    return [
        f"{a.asked}: {a.text!r} ({a.finish_reason}), expected {text!r} ({reason})"
        for a in answers
        if a.error is None
        for text, reason in [expected[a.asked.model, a.asked.prompt]]
        if (a.text, a.finish_reason) != (text, reason)
    ]
