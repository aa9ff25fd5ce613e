"""KV memory that wanders between real workers: bursts, a load, a death, all within the budget."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.registry.events import BudgetPatched
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.sizing import sized
from memory_efficient_gpt_server.registry.variants import VariantKey
from memory_efficient_gpt_server.settings import Settings, load_settings
from memory_efficient_gpt_server.worker_process import start_fork_server
from tests.server.conftest import LiveServer, Serve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory moves as on Linux")

ADMIN = "admin-" + "c" * 32
BLOCK = 24_576
SOFT, HARD = 20 * BLOCK, 100 * BLOCK
FIELDS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 32}
BURST, TOKENS, PROMPTS = 24, 90, 4


def _catalog(settings: Settings) -> ModelCatalog:
    return build_catalog(settings, worker_log_level="WARNING", worker_log_json=False)


@pytest.fixture(scope="module")
def live(serve: Serve) -> Iterator[LiveServer]:
    """Three demo models that begin with 20 KV blocks and may have 100. Room for three with 27 blocks each."""
    start_fork_server()
    _, estimate = sized(EngineConfig(model="demo", **FIELDS), 1 << 40)
    fixed_bytes = estimate.weights_bytes + estimate.workspace_bytes
    models = [
        {
            "id": name, "model": "demo", "load": "on_demand", "num_threads": 1, **FIELDS,
            "kv_soft_limit_bytes": SOFT, "kv_hard_limit_bytes": HARD,
        }
        for name in ("a", "b", "c")
    ]  # fmt: skip
    budget = 3 * fixed_bytes + 80 * BLOCK
    with serve(catalog=_catalog, models=models, memory_budget_bytes=budget, admin_key=ADMIN) as running:
        yield running


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    limits = httpx.Limits(max_connections=100)
    with httpx.Client(base_url=live.url, timeout=60, headers=headers, limits=limits) as made:
        yield made


def _ask(client: httpx.Client, model: str, number: int) -> str:
    body = {
        "model": model,
        "prompt": f"Once {number}",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def _kv(client: httpx.Client, model: str) -> int:
    told = client.get(f"/admin/models/{model}").json()
    assert (told["kv_soft_limit_bytes"], told["kv_hard_limit_bytes"]) == (SOFT, HARD)
    assert told["kv_bytes"] <= told["kv_most_bytes"]
    return int(told["kv_bytes"])


def _settled_kv(client: httpx.Client) -> int:
    """Of a and b together, once the last wish of a burst that has just ended was considered."""
    seen = list(range(5))
    while len(set(seen)) > 1:
        time.sleep(0.15)
        seen = [*seen[1:], _kv(client, "a") + _kv(client, "b")]
    return seen[0]


def _within_budget(client: httpx.Client) -> None:
    device = client.get("/admin/memory").json()["devices"]["cpu"]
    assert device["used_bytes"] <= device["budget_bytes"]


def _burst(client: httpx.Client, model: str, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
    """Many requests at once; the budget is looked at as long as any runs."""
    with ThreadPoolExecutor(BURST) as pool:
        answers: list[Future[str]] = [pool.submit(_ask, client, model, n % PROMPTS) for n in range(BURST)]
        while not all(answer.done() for answer in answers):
            _within_budget(client)
            meanwhile()
            time.sleep(0.02)
    return [answer.result() for answer in answers]


def _registry(live: LiveServer) -> Registry:
    registry = live.server.catalog.registry
    assert isinstance(registry, Registry)
    return registry


@contextlib.contextmanager
def _free_bytes(live: LiveServer, free: int) -> Iterator[None]:
    """A budget of what is booked now and `free` bytes."""
    registry = _registry(live)
    ledger = registry.state.ledger
    live.call(lambda: registry._post(BudgetPatched("cpu", Budget(ledger.used["cpu"] + free))))
    yield
    live.call(lambda: registry._post(BudgetPatched("cpu", ledger.budgets["cpu"])))


def test_bursts_take_what_idle_models_do_not_use_and_nobody_is_loaded_again(
    client: httpx.Client, live: LiveServer
) -> None:
    registry = _registry(live)
    alone = [_ask(client, "a", number) for number in range(PROMPTS)] * (BURST // PROMPTS)
    assert _ask(client, "b", 0) == alone[0]
    pids = {name: registry.pid(name) for name in "ab"}
    assert (_kv(client, "a"), _kv(client, "b")) == (SOFT, SOFT)
    assert _burst(client, "a") == alone
    assert 3 * SOFT < _kv(client, "a") <= HARD
    most_of_b = 0

    def look() -> None:
        nonlocal most_of_b
        most_of_b = max(most_of_b, _kv(client, "b"))

    _settled_kv(client)
    with _free_bytes(live, 0):  # from now on, b's bytes can only be a's
        assert _burst(client, "b", look) == alone
    assert most_of_b > 2 * SOFT
    assert {name: registry.pid(name) for name in "ab"} == pids
    assert registry.tally.loads["a", "success"] == registry.tally.loads["b", "success"] == 1


def test_a_load_takes_spare_kv_bytes_and_evicts_nobody(client: httpx.Client, live: LiveServer) -> None:
    registry = _registry(live)
    before = _settled_kv(client)
    pids = {name: registry.pid(name) for name in "ab"}
    plan = client.post("/admin/plan", json={"model": "c"}).json()
    missing = 15 * BLOCK
    assert before > 2 * SOFT + missing
    with _free_bytes(live, plan["needed_bytes"]["cpu"] - missing):
        plan = client.post("/admin/plan", json={"model": "c"}).json()
        assert plan["verdict"] == "after_shrinking" and plan["evict"] == []
        assert sum(plan["shrink_kv_bytes"].values()) == missing
        assert client.post("/admin/models/c/load", json={"wait": True}).json()["state"] == "ready"
        _within_budget(client)
        assert _kv(client, "a") + _kv(client, "b") <= before - missing
    assert {name: registry.pid(name) for name in "ab"} == pids
    assert not registry.tally.unloads


def test_a_worker_that_is_killed_comes_back_with_its_present_limit(
    client: httpx.Client, live: LiveServer
) -> None:
    registry = _registry(live)
    assert _ask(client, "b", 0)
    blocks = _kv(client, "b") // BLOCK - 1
    engine = registry.engine("b")
    pid = registry.pid("b")
    assert pid is not None and 0 < engine.stats.num_kv_blocks <= blocks
    os.kill(pid, 9)
    deadline = time.monotonic() + 30
    while registry.pid("b") in (None, pid) or engine.stats.num_kv_blocks != blocks:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    _within_budget(client)


def test_a_model_that_slept_wakes_in_its_process_with_what_it_keeps(
    client: httpx.Client, live: LiveServer
) -> None:
    registry, alone = _registry(live), _ask(client, "a", 0)
    assert _burst(client, "a")[0] == alone
    _settled_kv(client)
    pid, engine, grown = registry.pid("a"), registry.engine("a"), _kv(client, "a")
    assert grown > SOFT
    used = client.get("/admin/memory").json()["devices"]["cpu"]["used_bytes"]
    asleep = client.post("/admin/models/a/sleep", json={"wait": True}).json()
    assert (asleep["state"], asleep["kv_bytes"]) == ("asleep", 0)
    assert client.get("/admin/memory").json()["devices"]["cpu"]["used_bytes"] == used - grown
    assert _ask(client, "a", 0) == alone
    assert (_kv(client, "a"), registry.pid("a")) == (SOFT, pid)
    assert _burst(client, "a")[0] == alone, "it still grows"
    assert _kv(client, "a") > SOFT and engine.stats.num_kv_blocks > SOFT // BLOCK
    _within_budget(client)


def test_a_model_that_is_registered_while_the_server_runs_has_its_limits(
    client: httpx.Client, live: LiveServer
) -> None:
    fields = {"model": "demo", "kv_soft_limit_bytes": SOFT, "kv_hard_limit_bytes": HARD, **FIELDS}
    assert client.post("/admin/models", json={"id": "d", **fields}).status_code == 201
    assert client.post("/admin/plan", json={"model": "d"}).json()["bytes"]["kv"] == SOFT
    told = client.get("/admin/models/d").json()
    assert (told["kv_soft_limit_bytes"], told["kv_hard_limit_bytes"]) == (SOFT, HARD)
    assert client.delete("/admin/models/d").is_success


def test_limits_that_change_while_a_model_runs_hold_for_it_and_for_its_next_load(
    client: httpx.Client,
) -> None:
    fields = {"model": "demo", "kv_soft_limit_bytes": SOFT, "kv_hard_limit_bytes": HARD, **FIELDS}
    assert client.post("/admin/models", json={"id": "e", **fields}).status_code == 201
    _ask(client, "e", 0)
    told = client.get("/admin/models/e").json()
    least = told["kv_least_bytes"]
    assert told["kv_bytes"] == SOFT > least
    too_small = client.patch(
        "/admin/models/e", json={"kv_soft_limit_bytes": None, "kv_hard_limit_bytes": least - 1}
    )
    assert too_small.status_code == 409 and too_small.json()["error"]["kv_least_bytes"] == least
    smaller = {"kv_soft_limit_bytes": None, "kv_hard_limit_bytes": least}
    assert client.patch("/admin/models/e", json=smaller).is_success
    _until_kv(client, "e", least)
    assert _ask(client, "e", 1) == _ask(client, "a", 1), "one request of its length still fits"
    larger = {"kv_soft_limit_bytes": 30 * BLOCK, "kv_hard_limit_bytes": 2 * HARD}
    assert client.patch("/admin/models/e", json=larger).is_success
    assert client.get("/admin/models/e").json()["kv_bytes"] == least, "it grows when it wants to"
    assert client.post("/admin/models/e/unload", json={"wait": True}).is_success
    _ask(client, "e", 2)
    told = client.get("/admin/models/e").json()
    assert told["kv_bytes"] == 30 * BLOCK and HARD < told["kv_most_bytes"] <= 2 * HARD
    assert client.post("/admin/models/e/unload", json={"wait": True}).is_success
    assert client.delete("/admin/models/e").is_success


def test_a_given_size_is_no_more_than_a_limit_that_comes_later(client: httpx.Client) -> None:
    fields = {"model": "demo", "kv_cache_bytes": 40 * BLOCK, **FIELDS}
    assert client.post("/admin/models", json={"id": "f", **fields}).status_code == 201
    refused = client.patch("/admin/models/f", json={"kv_hard_limit_bytes": 39 * BLOCK})
    assert refused.status_code == 400 and f"begins with {40 * BLOCK:,} bytes" in refused.text
    assert client.delete("/admin/models/f").is_success


def _until_kv(client: httpx.Client, model: str, size: int) -> None:
    for _ in range(100):
        if client.get(f"/admin/models/{model}").json()["kv_bytes"] == size:
            return
        time.sleep(0.05)
    raise AssertionError(f"{model} has no {size} KV bytes")


def test_the_limits_of_a_model_are_its_variants_too() -> None:
    model = {"model": "demo", "load": "on_demand", "variants": "any", "kv_hard_limit_bytes": HARD, **FIELDS}
    settings = load_settings({"models": [model], "memory_budget_bytes": 1 << 30}, {}).settings
    registry = _catalog(settings).registry
    assert isinstance(registry, Registry)
    for key in (VariantKey("demo"), VariantKey("demo", "int4"), VariantKey("demo", None, "int8")):
        hosted = registry.models["demo"]
        estimate = hosted.provide(key, hosted.entry.kv_limits).estimate
        assert estimate.kv_most_bytes is not None and HARD - BLOCK < estimate.kv_most_bytes <= HARD


@pytest.mark.parametrize(("limits", "level"), [({}, "INFO"), ({"kv_hard_limit_bytes": HARD}, "WARNING")])
def test_a_model_whose_cache_can_not_move_is_named_in_the_log(
    limits: dict[str, int], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = [{"model": "demo", "tier": "C", "load": "on_demand", **limits}]
    settings = load_settings({"models": models, "memory_budget_bytes": 1 << 30}, {}).settings
    registry = _catalog(settings).registry
    assert isinstance(registry, Registry)
    with caplog.at_level("INFO"):
        for _ in range(2):
            hosted = registry.models["demo"]
            hosted.provide(hosted.key, hosted.entry.kv_limits)
    found = [r.levelname for r in caplog.records if "keeps the size of its KV cache" in r.getMessage()]
    assert found == [level]
