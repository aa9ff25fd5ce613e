"""Workers that hang or die under real servers: what health checks say, what streams get, what is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.settings import Settings
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.workers import WorkerModel
from tests.server import command_line
from tests.server.command_line import assert_gone
from tests.server.conftest import LiveServer, Serve
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

BODY: dict[str, Any] = {
    "model": "demo", "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0.9, "seed": 3,
    "ignore_eos": True, "stream": True,
}  # fmt: skip
HASTY: dict[str, Any] = {"stall_s": 1.0, "stall_kill_factor": 1.5, "resume_wait_s": 60.0}


def catalog(settings: Settings) -> ModelCatalog:
    return build_catalog(settings, worker_log_level="WARNING", worker_log_json=False)


def read(url: str, on_text: Callable[[str], None] = lambda text: None) -> str:
    """The whole text of BODY's stream; `on_text` is told of what has come so far."""
    text, done = "", False
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=60) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"]
                on_text(text)
    assert done, "the stream was cut"
    return text


def worker_of(live: LiveServer) -> WorkerModel:
    served = live.server.catalog.get("demo")
    engine = served.engine
    if live.server.catalog.registry is not None:
        engine = live.server.catalog.registry._processes.engine(
            live.server.catalog.registry.models["demo"].key
        )  # type: ignore[assignment]
    assert isinstance(engine, WorkerModel)
    return engine


@pytest.mark.parametrize("budget", [None, 1_000_000_000], ids=["no budget", "budget"])
def test_a_hung_worker_is_told_by_readyz_killed_and_replaced_and_its_stream_is_whole(
    serve: Serve, budget: int | None
) -> None:
    start_fork_server()
    models = [{"id": "demo", "model": "demo", "num_threads": 1, "num_kv_blocks": 200}]
    with serve(catalog=catalog, models=models, memory_budget_bytes=budget, **HASTY) as live:
        ready_again(live.url)
        undisturbed = read(live.url)
        worker = worker_of(live)
        first_pid = worker.pid
        assert first_pid is not None
        seen: list[tuple[int, str]] = []

        def hang(text: str) -> None:
            if seen or len(text) < 100:
                return
            os.kill(first_pid, signal.SIGSTOP)
            deadline = time.monotonic() + 20
            while worker.pid in (first_pid, None) or not worker.ready:
                answer = httpx.get(f"{live.url}/readyz")
                seen.append((answer.status_code, answer.text))
                assert time.monotonic() < deadline, seen
                time.sleep(0.05)

        assert read(live.url, hang) == undisturbed
        assert worker.pid != first_pid and worker.num_restarts == worker.num_resumed == 1
        assert not Path(f"/proc/{first_pid}").exists()
        told = [text for status, text in seen if status == 503]
        assert any("model demo has work but makes no step" in text for text in told), seen
        assert any("model demo is loading" in text for text in told), "while it is replaced"
        ready_again(live.url)


def ready_again(url: str) -> None:
    deadline = time.monotonic() + 30
    while (answer := httpx.get(f"{url}/readyz")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)


def test_a_loaded_model_whose_worker_is_being_replaced_makes_the_server_unready(stage: Start) -> None:
    with stage(FakeHost()) as s:
        s.ask("A")
        assert s.client.get("/readyz").status_code == 200
        engine = s.host.engine("A")
        engine.state, engine.reason = "loading", "its worker was ended by SIGKILL; restarting in 1 s"
        told = s.client.get("/readyz")
        assert (told.status_code, told.json()["reasons"]) == (503, ["model A is loading"])
        engine.state = "ready"
        assert s.client.get("/readyz").status_code == 200


def test_a_killed_server_leaves_no_worker_be_it_busy_or_asleep_and_serves_again(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = tmp_path / "config.yaml"
    models = [
        {"id": name, "model": "demo", "num_threads": 1, "num_kv_blocks": 200, "load": "start"}
        for name in ("demo", "sleeper")
    ]
    config.write_text(json.dumps({"models": models, "memory_budget_bytes": 1_000_000_000}))
    arguments = ("--config", str(config), "--port", port)
    as_admin = {"authorization": f"Bearer {ADMIN}"}

    def texts(url: str) -> str:
        answer = httpx.post(
            f"{url}/v1/completions", json={**BODY, "stream": False}, timeout=60, headers=as_admin
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    with command_line.serving(*arguments, MEGPT_ADMIN_KEY=ADMIN) as server:
        url = server.wait_for(r"serving on (http://\S+)")[1]
        ready_again(url)
        expected = texts(url)
        slept = httpx.post(
            f"{url}/admin/models/sleeper/sleep", json={"wait": True}, headers=as_admin, timeout=20
        )
        assert slept.json()["state"] == "asleep"
        processes = server.workers()
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, headers=as_admin, timeout=30) as stream:
            next(line for line in stream.iter_lines() if line.startswith("data:"))
            server.process.kill()
            server.process.wait()
            assert_gone(processes, within_s=5)
    with command_line.serving(*arguments, MEGPT_ADMIN_KEY=ADMIN) as server:
        assert server.wait_for(r"serving on (http://\S+)")[1] == url
        ready_again(url)
        assert texts(url) == expected
        again = server.workers()
        assert not set(again) & set(processes)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert_gone(again, within_s=5)
