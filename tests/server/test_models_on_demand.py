"""Real worker processes under a budget for one: the bundled demo model under several ids."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.registry.sizing import sized
from memory_efficient_gpt_server.settings import Settings, load_settings
from memory_efficient_gpt_server.worker_process import start_fork_server
from tests.server.conftest import LiveServer, Serve
from tests.server.test_bad_requests import assert_error

ADMIN = "admin-" + "c" * 32
BLOCKS = 200


def catalog(settings: Settings) -> ModelCatalog:
    return build_catalog(settings, worker_log_level="WARNING", worker_log_json=False)


def on_demand(model_id: str, model: str, **fields: Any) -> dict[str, Any]:
    return {"id": model_id, "model": model, "load": "on_demand", "num_threads": 1, **fields}


@pytest.fixture(scope="module")
def one_model_bytes() -> int:
    _, estimate = sized(EngineConfig(model="demo", num_kv_blocks=BLOCKS), 1 << 40)
    return sum(amount.bytes for amount in estimate.awake())


@pytest.fixture(scope="module")
def damaged_demo(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with the end of its weights missing."""
    folder = tmp_path_factory.mktemp("models") / "damaged"
    folder.mkdir()
    for file in demo_folder.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    return folder


@pytest.fixture(scope="module")
def live(serve: Serve, one_model_bytes: int, damaged_demo: Path) -> Iterator[LiveServer]:
    """A budget with room for one of the demo's twins."""
    start_fork_server()
    budget = one_model_bytes * 3 // 2
    models = [
        on_demand("first", "demo", num_kv_blocks=BLOCKS),
        on_demand("second", "demo", num_kv_blocks=BLOCKS),
        on_demand("large", "demo", kv_cache_bytes=2 * budget),
        on_demand("damaged", str(damaged_demo), num_kv_blocks=BLOCKS),
    ]
    with serve(catalog=catalog, models=models, memory_budget_bytes=budget, admin_key=ADMIN) as running:
        yield running


@pytest.fixture
def client(live: LiveServer) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=live.url, timeout=60, headers=headers) as made:
        yield made


def ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "Once", "max_tokens": 4, **fields})


def states(client: httpx.Client) -> dict[str, str]:
    return {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]}


def test_models_come_when_asked_for_and_the_idle_one_leaves(client: httpx.Client, live: LiveServer) -> None:
    assert set(states(client).values()) == {"unloaded"} and client.get("/readyz").status_code == 200
    texts = {ask(client, "first", temperature=0).json()["choices"][0]["text"]}
    registry = live.server.catalog.registry
    assert registry is not None
    pid = registry.pid("first")
    assert pid is not None and states(client)["first"] == "ready"
    told = client.get("/admin/models/first").json()
    assert told["measured_bytes"] == told["estimated_bytes"], "the estimate is wrong"
    texts.add(ask(client, "second", temperature=0).json()["choices"][0]["text"])
    assert states(client) | {"first": "unloaded", "second": "ready"} == states(client)
    assert len(texts) == 1 and not Path(f"/proc/{pid}").exists(), "its process must be gone"
    assert registry.tally.unloads["first", "budget"] == 1


def test_a_stream_is_never_cut_by_another_models_load(client: httpx.Client, live: LiveServer) -> None:
    registry = live.server.catalog.registry
    assert registry is not None
    assert client.post("/admin/models/first/load", json={"wait": True}).json()["state"] == "ready"
    body = {"model": "first", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        ThreadPoolExecutor() as pool,
        client.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("data:"))
        other = pool.submit(ask, client, "second")
        while client.get("/admin/models/second").json()["waiting"] == 0:
            time.sleep(0.01)
        assert client.get("/admin/models/first").json()["leases"] == 1, (
            "the stream was too short for the test"
        )
        rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert other.result(60).status_code == 200
    assert states(client)["first"] == "unloaded"


def test_what_can_never_fit_is_refused_before_anything_leaves(client: httpx.Client) -> None:
    assert ask(client, "second").status_code == 200
    answer = ask(client, "large")
    assert answer.status_code == 507 and answer.headers["x-should-retry"] == "false"
    plan = answer.json()["error"]["plan"]
    assert plan["verdict"] == "never" and plan["needed_bytes"]["cpu"] > plan["reservable_bytes"]["cpu"]
    assert states(client)["second"] == "ready"


def test_a_damaged_checkpoint_is_named(client: httpx.Client) -> None:
    answer = ask(client, "damaged")
    assert_error(answer, 500, code="load_failed")
    assert "model.safetensors" in answer.text


def test_a_killed_worker_comes_back(client: httpx.Client, live: LiveServer) -> None:
    registry = live.server.catalog.registry
    assert registry is not None and ask(client, "second").status_code == 200
    pid = registry.pid("second")
    assert pid is not None
    os.kill(pid, 9)
    answers = [ask(client, "second") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200], "each waits for the next worker"
    assert registry.pid("second") not in (pid, None)
    assert registry.tally.loads["second", "failure"] == 0


def test_a_model_that_comes_later_is_served_as_the_others(client: httpx.Client, demo_folder: Path) -> None:
    body = {"id": "later", "model": "demo", "num_kv_blocks": BLOCKS, "priority": 1}
    made = client.post("/admin/models", json=body)
    assert (made.status_code, made.json()["state"]) == (201, "unloaded")
    assert_error(client.post("/admin/models", json={**body, "id": "x", "model": str(demo_folder)}), 400)
    texts = {ask(client, name, temperature=0).json()["choices"][0]["text"] for name in ("first", "later")}
    assert len(texts) == 1 and states(client)["first"] == "unloaded"
    assert client.post("/admin/models/later/unload", json={"wait": True}).status_code == 200
    assert client.delete("/admin/models/later").json() == {"id": "later", "removed": True}
    assert_error(ask(client, "later"), 404, code="model_not_found")


def test_a_later_model_on_a_device_without_a_budget_is_refused(client: httpx.Client) -> None:
    answer = client.post("/admin/models", json={"id": "later", "model": "demo", "device": "cuda:7"})
    assert "cuda:7" in assert_error(answer, 400) and "later" not in states(client)


def test_what_is_to_be_loaded_at_start_must_fit_together(one_model_bytes: int) -> None:
    models = [{"id": name, "model": "demo", "num_kv_blocks": BLOCKS} for name in ("a", "b")]
    settings = load_settings({"models": models, "memory_budget_bytes": one_model_bytes * 3 // 2}, {}).settings
    with pytest.raises(ConfigError, match=r"load: start \(a, b\)"):
        catalog(settings)


def test_an_automatic_kv_cache_leaves_room_for_other_models() -> None:
    budget = 40_000_000
    config, estimate = sized(EngineConfig(model="demo"), budget)
    assert config.kv_cache_bytes is not None and 0 < estimate.kv_bytes <= budget // 4
    config, estimate = sized(EngineConfig(model="demo", max_num_seqs=2), 1 << 40)
    assert config.kv_cache_bytes == estimate.kv_bytes < 1 << 30, "no more than its sequences can fill"
