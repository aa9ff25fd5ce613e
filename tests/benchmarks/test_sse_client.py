"""Reading a recorded response: tokens, events, and when the first text came."""

from __future__ import annotations

import pytest

from benchmarks.sse_client import read_stream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EMPTY = b'data: {"choices": [{"text": ""}]}\n\n'
TEXT = b'data: {"choices": [{"text": "a b"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_first_token_is_the_first_event_with_text() -> None:
    streamed = read_stream([(0.1, HEAD + EMPTY), (0.2, TEXT), (0.3, TEXT), (0.4, USAGE + DONE)])
    assert (streamed.first_token_s, streamed.seconds) == (0.2, 0.4)
    assert (streamed.tokens, streamed.events) == (7, 4)


def test_an_event_counts_when_its_last_byte_came() -> None:
    assert read_stream([(0.1, HEAD + TEXT[:20]), (0.2, TEXT[20:] + USAGE + DONE)]).first_token_s == 0.2


@pytest.mark.parametrize(
    "response",
    [b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + DONE, HEAD + TEXT + USAGE, HEAD + TEXT + DONE],
    ids=["refused", "cut short", "no usage"],
)
def test_what_is_not_a_whole_stream_is_an_error(response: bytes) -> None:
    with pytest.raises(RuntimeError):
        read_stream([(0.1, response)])
