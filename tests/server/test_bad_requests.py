"""Whatever is sent, the answer is a 4xx in OpenAI's shape that names what is wrong."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import LiveServer, Serve

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def assert_error(response: Any, status: int, *, code: str | None = None, param: str | None = "?") -> str:
    """The one shape of all errors, in a response of any HTTP client. Returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    assert isinstance(error["code"], str) and isinstance(error["param"], str | None)
    assert code is None or error["code"] == code, error
    assert param == "?" or error["param"] == param, error
    in_vain = "x-should-retry" in response.headers
    assert ("retry-after" in response.headers) == (status == 429 or (status == 503 and not in_vain))
    message: str = error["message"]
    return message


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Any:
    with live.client() as client:
        yield client


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.0}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": -1}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 10**23}, "n"),
    ({"n": [1]}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [4096]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": 10**400}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"user": "x" * 257}, "user"),
    ({"user": 5}, "user"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"nonsense": 1}, "nonsense"),
    ({"model": ""}, "model"),
    ({"model": "../../etc/passwd"}, "model"),
    ({"model": None}, "model"),
]
BAD_COMPLETION_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [4096]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**400]}, "prompt"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"prompt": "word " * 2000}, "prompt"),
    ({"prompt": [5] * 513}, "prompt"),
    ({"prompt": ["a", "word " * 2000]}, "prompt[1]"),
    ({"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": "x"}, "echo"),
]
BAD_CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "nonsense": 1}]}, "messages[0].nonsense"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"prediction": {}}, "prediction"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS + BAD_COMPLETION_FIELDS)
def test_completions_name_the_bad_field(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"model": "demo", "prompt": "a", **fields}
    response = http.post(COMPLETIONS, json=body)
    message = assert_error(
        response, 404 if isinstance(body["model"], str) and body["model"] != "demo" else 400
    )
    assert response.json()["error"]["param"] == param
    assert param.split("[", maxsplit=1)[0].split(".")[-1] in message or param == "model"


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS + BAD_CHAT_FIELDS)
def test_chat_names_the_bad_field(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"model": "demo", "messages": MESSAGES, **fields}
    response = http.post(CHAT, json=body)
    assert_error(
        response, 404 if isinstance(body["model"], str) and body["model"] != "demo" else 400, param=param
    )


def test_fields_at_their_openai_defaults_are_accepted(http: httpx.Client) -> None:
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "store": False, "metadata": {}, "service_tier": "auto", "logprobs": False, "audio": None, "n": None,
        "temperature": None, "stop": None, "logit_bias": None, "stream": None, "user": None,
    }  # fmt: skip
    response = http.post(CHAT, json={"model": "demo", "messages": MESSAGES, "max_tokens": 1, **neutral})
    assert response.status_code == 200, response.text


def test_limits_and_values_are_named(http: httpx.Client) -> None:
    response = http.post(COMPLETIONS, json={"model": "demo", "prompt": "a", "temperature": 2.5})
    message = assert_error(response, 400, code="invalid_value", param="temperature")
    assert "2.0" in message and "2.5" in message
    response = http.post(COMPLETIONS, json={"model": "demo", "prompt": [5] * 600})
    message = assert_error(response, 400, code="context_length_exceeded", param="prompt")
    assert "600" in message and "512" in message


RAW_BODIES = [
    b"", b" ", b"null", b"[]", b"7", b'"text"', b"{", b"}", b"{}", b"\x00", b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"model":"demo","prompt":"a","temperature":NaN}',
    b'{"model":"demo","prompt":"a","temperature":Infinity}',
    b'{"model":"demo","prompt":"a","temperature":-Infinity}',
    b'{"model":"demo","prompt":"a","temperature":1e999}',
    b'{"model":"demo","prompt":"a","n":1e3}',
    b'{"model":"demo","prompt":"a","n":' + b"9" * 5000 + b"}",
    b'{"model":"demo","prompt":"a","seed":-99999999999999999999999}',
    b'{"model":"demo","prompt":"a","logit_bias":{"1":NaN}}',
    b'{"model":"demo","prompt":"a","logit_bias":{"1":1e999}}',
    rb'{"model":"demo","prompt":"\ud800"}',
    rb'{"model":"demo","prompt":["\udfff"]}',
    rb'{"model":"\ud800","prompt":"a"}',
    rb'{"model":"demo","prompt":"a","stop":"\ud800"}',
    rb'{"model":"demo","prompt":"a","user":"\ud800"}',
    rb'{"\ud800":1}',
    b'{"model":"demo","prompt":"\xff"}',
    b'{"model":"demo","prompt":"\xed\xa0\x80"}',
    b'{"model":"demo","prompt":[NaN]}',
    b'{"model":"demo","prompt":[1e999]}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"model":"demo","prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model":"demo","prompt":"a"} trailing',
    b'{"model":"demo","prompt":"a",}',
    b"{'model':'demo'}",
    b"model=demo&prompt=a",
    b'{"model":"demo","prompt":"a\nb"}',
    b"{" + b",".join(b'"field%d":1' % i for i in range(20_000)) + b"}",
]  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/tokenize", "/v1/detokenize"])
@pytest.mark.parametrize("body", RAW_BODIES, ids=lambda body: repr(body[:50]))
def test_raw_bytes_are_refused(http: httpx.Client, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert len(assert_error(response, 400)) < 1000


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json", "content-encoding": "identity, br"}, 415),
        ({"content-type": "Application/JSON; charset=UTF-8"}, 200),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
    ],
)
def test_only_plain_json_is_read(http: httpx.Client, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"model": "demo", "prompt": "a", "max_tokens": 1})
    response = http.post(COMPLETIONS, content=body, headers=headers)
    if status != 200:
        assert_error(response, status, code="unsupported_media_type")
    assert response.status_code == status


def test_a_missing_content_type_is_refused(http: httpx.Client) -> None:
    assert_error(http.post(COMPLETIONS, content=b"{}"), 415)


def test_large_bodies_are_refused_before_parsing(live: LiveServer) -> None:
    too_large = b'{"model":"demo","prompt":"' + b"a" * 2_100_000 + b'"}'

    def in_chunks() -> Any:
        for start in range(0, len(too_large), 100_000):
            yield too_large[start : start + 100_000]

    for content in (too_large, in_chunks()):
        with live.client() as client:
            response = client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
            assert "2000000" in assert_error(response, 413, code="body_too_large")
    with live.client() as client:
        assert client.get("/livez").status_code == 200


def test_an_announced_giant_is_refused_without_its_bytes(live: LiveServer) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((live.host, live.port), timeout=5) as connection:
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode() + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_unknown_paths_and_wrong_methods_have_the_shape(http: httpx.Client) -> None:
    assert_error(http.get("/nothing"), 404, code="not_found", param=None)
    assert_error(http.get("/v1/completions/"), 404, code="not_found")
    response = http.get(COMPLETIONS)
    assert_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert_error(http.request("DELETE", "/v1/models/demo"), 405)
    assert_error(http.get("/v1/models/..%2f..%2fetc"), 404)


def test_a_bad_body_of_a_stream_is_a_plain_error(http: httpx.Client) -> None:
    body = {"model": "demo", "prompt": "a", "stream": True, "temperature": 9}
    assert_error(http.post(COMPLETIONS, json=body), 400, param="temperature")


def test_tokenizing_checks_its_body(http: httpx.Client) -> None:
    both = {"model": "demo", "prompt": "a", "messages": MESSAGES}
    assert_error(http.post("/v1/tokenize", json=both), 400, param="prompt")
    assert_error(http.post("/v1/tokenize", json={"model": "demo"}), 400, param="prompt")
    assert_error(http.post("/v1/detokenize", json={"model": "demo", "tokens": [4096]}), 400, param="tokens")
    assert_error(
        http.post("/v1/detokenize", json={"model": "no", "tokens": [1]}), 404, code="model_not_found"
    )


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
        "logit_bias",
        "user",
        "cache_salt",
        "prefix_cache",
        "echo",
        "logprobs",
        "top_logprobs",
        "best_of",
        "suffix",
        "tools",
        "store",
    ]
)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_body_makes_the_server_fail(http: httpx.Client, path: str) -> None:
    sensible = {"model": "demo", "max_tokens": 2}
    sensible |= {"prompt": "a"} if path == COMPLETIONS else {"messages": MESSAGES}

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.dictionaries(_FIELDS, _JSON, max_size=3))
    def check(fields: dict[str, Any]) -> None:
        body = json.dumps({**sensible, **fields})
        response = http.post(path, content=body, headers={"content-type": "application/json"})
        if response.status_code != 200:
            assert_error(response, 404 if response.status_code == 404 else 400)

    check()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(garbage=st.binary(max_size=200))
def test_garbage_on_the_socket_leaves_the_server_alive(live: LiveServer, garbage: bytes) -> None:
    with socket.create_connection((live.host, live.port), timeout=5) as connection:
        connection.sendall(garbage + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert not answer.startswith(b"HTTP/1.1 5")
    with live.client() as client:
        assert client.get("/livez").status_code == 200


def test_a_slow_body_times_out(serve: Serve) -> None:
    with serve(body_timeout_s=0.2) as live, socket.create_connection((live.host, live.port), 5) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
