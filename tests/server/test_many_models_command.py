"""`megpt serve` with the example of many models: it serves, and leaves nothing whatever its models do."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.server.command_line import RunningServer, assert_gone, megpt, serving
from tests.server.staged_models import ADMIN, AS_ADMIN

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "many_models.yaml"
DRAIN_S = 1
BLOCK = 24_576


def _client(server: RunningServer) -> httpx.Client:
    url = server.wait_for(r"serving on (http://\S+)")[1]
    return httpx.Client(base_url=url, headers=AS_ADMIN, timeout=60)


def _ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "Once", "max_tokens": 8, **fields}
    return client.post("/v1/completions", json=body)


def _state(client: httpx.Client, model: str) -> str:
    return str(client.get(f"/admin/models/{model}").json()["state"])


def test_the_example_of_many_models_serves_and_ends_while_they_sleep_and_load() -> None:
    environment = {"MEGPT_ADMIN_KEY": ADMIN, "MEGPT_DRAIN_SECONDS": str(DRAIN_S)}
    with serving("--config", str(CONFIG), **environment) as server, _client(server) as client:
        assert _ask(client, "house").is_success
        wish = {"quantization": "int4", "receipt": True}
        answer = _ask(client, "author", optimizations=wish)
        assert answer.json()["receipt"]["variant"] == "writer[quantization=int4]", answer.text
        listed = megpt("ps", "--url", str(client.base_url), MEGPT_ADMIN_KEY=ADMIN)
        assert "writer[quantization=int4]" in listed.stdout, listed.stderr
        body = {"optimizations": {"quantization": "int4"}, "wait": True}
        assert client.post("/admin/models/author/sleep", json=body).json()["state"] == "asleep"
        assert client.post("/admin/models/draft/load", json={}).status_code == 202
        assert _state(client, "draft") == "loading"
        processes = server.workers()
        assert len(processes) >= 2
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - began < DRAIN_S + 4
        assert "Traceback" not in "".join(server.err)
        assert_gone(processes)


def test_it_ends_while_kv_memory_moves(tmp_path: Path) -> None:
    model = {"model": "demo", "load": "on_demand", "num_threads": 1, "max_model_len": 256}
    limits = {"kv_soft_limit_bytes": 20 * BLOCK, "kv_hard_limit_bytes": 200 * BLOCK}
    settings = {"memory_budget_bytes": 300_000_000, "models": [{"id": i, **model, **limits} for i in "ab"]}
    config = tmp_path / "two.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    environment = {"MEGPT_ADMIN_KEY": ADMIN, "MEGPT_DRAIN_SECONDS": str(DRAIN_S)}
    with serving("--config", str(config), **environment) as server, _client(server) as client:
        assert _ask(client, "a").is_success
        with ThreadPoolExecutor(24) as pool:
            burst = [
                pool.submit(_ask, client, "b", prompt=f"Once {n}", max_tokens=200, ignore_eos=True)
                for n in range(24)
            ]
            deadline = time.monotonic() + 30
            while client.get("/admin/models/b").json()["kv_bytes"] <= 20 * BLOCK:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            processes = server.workers()
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert server.wait() == 0
            assert time.monotonic() - began < DRAIN_S + 4
            assert all(answer.result().status_code in (200, 503) for answer in burst)
        assert "Traceback" not in "".join(server.err)
        assert_gone(processes)
