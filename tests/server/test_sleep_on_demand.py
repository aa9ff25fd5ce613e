"""Real worker processes on a CPU that sleep under a budget: the bundled demo model under several ids."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.registry.sizing import sized
from memory_efficient_gpt_server.registry.variants import Estimate
from memory_efficient_gpt_server.settings import Settings
from memory_efficient_gpt_server.worker_process import start_fork_server
from tests.server.conftest import LiveServer, Serve

ADMIN = "admin-" + "c" * 32
BLOCKS = 30_000
"""So that the cache is larger than all the rest of a model."""


def catalog(settings: Settings) -> ModelCatalog:
    return build_catalog(settings, worker_log_level="WARNING", worker_log_json=False)


@pytest.fixture(scope="module")
def size() -> Estimate:
    _, estimate = sized(EngineConfig(model="demo", num_kv_blocks=BLOCKS), 1 << 40)
    assert estimate.can_sleep
    return estimate


@pytest.fixture(scope="module")
def live(serve: Serve, size: Estimate) -> Iterator[LiveServer]:
    """Room for one model with its cache and the rest of two others."""
    start_fork_server()
    rest = size.weights_bytes + size.workspace_bytes
    budget = size.kv_bytes + 2 * rest + rest // 2
    models: list[dict[str, Any]] = [
        {"id": name, "model": "demo", "load": "on_demand", "num_threads": 1, "num_kv_blocks": BLOCKS}
        for name in ("first", "second", "third")
    ]
    with serve(catalog=catalog, models=models, memory_budget_bytes=budget, admin_key=ADMIN) as running:
        yield running


@pytest.fixture
def client(live: LiveServer) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=live.url, timeout=60, headers=headers) as made:
        yield made


def ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "Once", "max_tokens": 8, **fields})


def text(client: httpx.Client, model: str) -> str:
    return str(ask(client, model, temperature=0, ignore_eos=True).json()["choices"][0]["text"])


def told(client: httpx.Client, model: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/admin/models/{model}").json()
    return found


def post(client: httpx.Client, model: str, what: str) -> dict[str, Any]:
    answer = client.post(f"/admin/models/{model}/{what}", json={"wait": True})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def first_token_s(client: httpx.Client, model: str) -> float:
    body = {"model": model, "prompt": "Once", "max_tokens": 4, "stream": True, "ignore_eos": True}
    began = time.monotonic()
    with client.stream("POST", "/v1/completions", json=body) as stream:
        next(line for line in stream.iter_lines() if line.startswith("data:"))
        return time.monotonic() - began


def test_a_model_sleeps_for_another_if_its_cache_is_enough_and_leaves_if_not(
    client: httpx.Client, live: LiveServer
) -> None:
    registry = live.server.catalog.registry
    assert registry is not None
    expected = text(client, "first")
    pid = registry.pid("first")
    assert text(client, "second") == expected
    assert (told(client, "first")["state"], registry.pid("first")) == ("asleep", pid)
    assert text(client, "first") == expected, "it is itself after its sleep"
    assert told(client, "second")["state"] == "asleep" and registry.pid("first") == pid
    assert 0 < told(client, "first")["last_wake_s"] < 0.3
    assert text(client, "third") == expected, "somebody had to leave: caches are not enough"
    states = sorted(told(client, name)["state"] for name in ("first", "second", "third"))
    assert states == ["asleep", "ready", "unloaded"]
    registry.state.check_integrity()


def test_from_asleep_to_the_first_token_takes_at_most_a_third_of_a_second(client: httpx.Client) -> None:
    ask(client, "first")
    seconds = []
    for _ in range(5):
        assert post(client, "first", "sleep")["state"] == "asleep"
        seconds.append(first_token_s(client, "first"))
    assert sorted(seconds)[2] < 0.3, seconds


def test_administrators_sleep_and_wake_a_real_model(
    client: httpx.Client, live: LiveServer, size: Estimate
) -> None:
    registry = live.server.catalog.registry
    assert registry is not None
    ask(client, "first")
    before = registry.state.ledger.used["cpu"]
    assert post(client, "first", "sleep")["state"] == "asleep"
    assert before - registry.state.ledger.used["cpu"] == size.kv_bytes
    woken = post(client, "first", "wake")
    assert woken["state"] == "ready" and woken["last_wake_s"] < 0.3
    assert registry.state.ledger.used["cpu"] == before


def test_the_receipt_of_a_request_that_woke_its_model_has_its_own_figures(client: httpx.Client) -> None:
    receipts = []
    for sleeps in (False, True):
        ask(client, "first")
        if sleeps:
            post(client, "first", "sleep")
        answer = ask(client, "first", optimizations={"receipt": True}, prefix_cache=False)
        assert answer.headers["x-megpt-model-state"] == ("asleep" if sleeps else "ready")
        receipts.append(answer.json()["receipt"])
        assert round(receipts[-1]["load_ms"]) == int(answer.headers["x-megpt-load-ms"])
    awake, woken = receipts
    assert woken["kv_peak_bytes"] == awake["kv_peak_bytes"] > 0, "nothing of before its sleep is counted"
    assert woken["load_ms"] > 0 and woken["kv_byte_seconds"] > 0 and woken["resumed"] is False


def test_a_worker_killed_in_its_sleep_is_loaded_anew(client: httpx.Client, live: LiveServer) -> None:
    registry = live.server.catalog.registry
    assert registry is not None
    expected = text(client, "second")
    post(client, "second", "sleep")
    pid = registry.pid("second")
    assert pid is not None
    os.kill(pid, 9)
    deadline = time.monotonic() + 30
    while told(client, "second")["state"] != "unloaded":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
    assert text(client, "second") == expected and registry.pid("second") != pid
    registry.state.check_integrity()
