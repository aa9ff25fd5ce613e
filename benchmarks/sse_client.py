"""A client that costs next to nothing: completions streamed over raw sockets.

Purpose: measure a server on a machine that it shares with its client.
Does not know: the server's implementation.
Invariant: while streams run, bytes are only kept with their time of arrival; they are read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Streamed:
    """One stream. Times in seconds since all streams were sent; tokens as the server's usage counts them."""

    first_token_s: float
    seconds: float
    tokens: int
    events: int


async def stream_together(
    host: str, port: int, model: str, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Streamed]:
    """Send every prompt at once on connections that are open already. Raises RuntimeError on a refusal."""
    connections = [await asyncio.open_connection(host, port) for _ in prompts]
    requests = [_request(host, model, prompt, new_tokens) for prompt in prompts]
    started = time.perf_counter()
    try:
        return await asyncio.gather(
            *(_stream(*pair, request, started) for pair, request in zip(connections, requests, strict=True))
        )
    finally:
        for _, writer in connections:
            writer.close()


def _request(host: str, model: str, prompt: Sequence[int], new_tokens: int) -> bytes:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


async def _stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, started: float
) -> Streamed:
    writer.write(request)
    arrivals: list[tuple[float, bytes]] = []
    while chunk := await reader.read(1 << 16):
        arrivals.append((time.perf_counter() - started, chunk))
    return read_stream(arrivals)


def read_stream(arrivals: Sequence[tuple[float, bytes]]) -> Streamed:
    """Make sense of a response. Raises RuntimeError if it is not a whole stream of completions."""
    response = b"".join(chunk for _, chunk in arrivals)
    if not response.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in response:
        raise RuntimeError(f"the server answered {response[:400]!r}")
    position, first_at, events, tokens = 0, None, 0, 0
    while (begin := response.find(b"data: {", position)) >= 0:
        position = response.index(b"\n", begin)
        event = json.loads(response[begin + 6 : position])
        events += 1
        if first_at is None and any(choice["text"] for choice in event["choices"]):
            first_at = _arrival(arrivals, position)
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    if first_at is None or not tokens:
        raise RuntimeError(f"a stream of {events} events had no text or no usage")
    return Streamed(first_at, arrivals[-1][0], tokens, events)


def _arrival(arrivals: Sequence[tuple[float, bytes]], position: int) -> float:
    """When the byte at `position` of the response came."""
    for at, chunk in arrivals:
        position -= len(chunk)
        if position < 0:
            return at
    raise ValueError("the position is past the response")
