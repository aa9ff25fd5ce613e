"""`megpt serve` as a process: what it serves, how it stops, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest

from memory_efficient_gpt.loading import bundled_models
from tests.server.command_line import assert_gone, megpt, serving


@pytest.fixture
def damaged_demo(tmp_path: Path) -> Path:
    """The demo model with the end of its weights missing."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in bundled_models()["demo"].iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    return folder


def test_the_server_serves_what_it_can_drains_on_sigterm_and_leaves_nothing(damaged_demo: Path) -> None:
    with serving("--model", "demo", "--model", str(damaged_demo)) as server:
        url = server.url()
        states = {model["id"]: model["state"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
        assert states == {"demo": "ready", "damaged": "failed"}
        readiness = httpx.get(f"{url}/readyz")
        assert (readiness.status_code, readiness.json()["reasons"]) == (503, ["model damaged is failed"])
        assert re.search(r"damaged: failed \(.*model\.safetensors", "".join(server.out))
        processes = server.workers()
        chat = megpt("chat", "demo", "--url", url, "-n", "5", stdin="Hello\n")
        assert chat.returncode == 0, chat.stderr
        assert chat.stdout.strip()

        body = {"model": "demo", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            refused = httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=30)
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
        assert server.wait() == 0
        assert_gone(processes)


def test_a_second_interrupt_ends_the_server_at_once() -> None:
    with serving("--model", "demo") as server:
        url = server.url()
        processes = server.workers()
        body = {
            "model": "demo",
            "prompt": "Once",
            "max_tokens": 400,
            "n": 8,
            "ignore_eos": True,
            "stream": True,
        }
        request = httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30)
        with contextlib.suppress(httpx.HTTPError), request as stream:
            next(stream.iter_lines())
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
            server.process.send_signal(signal.SIGINT)
            assert server.wait(5) == 130
        assert "Traceback" not in "".join(server.err)
        assert_gone(processes)


def test_an_interrupt_while_the_server_starts_ends_it_at_once_and_quietly() -> None:
    with serving("--model", "demo") as server:
        deadline = time.monotonic() + 30
        while "CPU threads" not in "".join(server.err):  # from here on it loads the tokenizer
            assert time.monotonic() < deadline
            time.sleep(0.01)
        interrupted = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: to the fork server too
        assert server.process.wait(5) == 130
        assert time.monotonic() - interrupted < 2
        server.wait()
        assert "Traceback" not in "".join(server.err)
