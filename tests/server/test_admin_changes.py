"""PATCH of models and budgets, registering, removing and rescanning, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt_server.model_settings import ModelSettings
from tests.server.conftest import Serve
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, AS_ADMIN, Start
from tests.server.test_bad_requests import assert_error

ROUTES = (
    ("GET", "/admin/queue"),
    ("GET", "/admin/operations"),
    ("GET", "/admin/operations/op-1"),
    ("GET", "/admin/events"),
    ("PATCH", "/admin/models/A"),
    ("PATCH", "/admin/memory"),
    ("POST", "/admin/models"),
    ("DELETE", "/admin/models/A"),
    ("POST", "/admin/rescan"),
)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_only_administrators_of_a_server_with_a_budget_may(serve: Serve, method: str, path: str) -> None:
    bodies = {"/admin/memory": {"device": "cpu", "budget_bytes": 1}, "/admin/models": {"model": "demo"}}
    body = bodies.get(path, {"pinned": True} if method == "PATCH" else None)
    user = "user-" + "u" * 32
    with serve(admin_key=ADMIN, api_keys=[user]) as live, live.client() as client:
        as_user = client.request(method, path, json=body, headers={"authorization": f"Bearer {user}"})
        assert_error(as_user, 403, code="admin_required")
        assert_error(client.request(method, path, json=body), 401)
        assert_error(client.request(method, path, json=body, headers=AS_ADMIN), 409, code="no_memory_budget")


def test_every_admin_route_is_described(stage: Start) -> None:
    with stage() as s:
        paths = s.client.get("/openapi.json").json()["paths"]
    for method, path in ROUTES:
        found = path.replace("/A", "/{model_id}").replace("/op-1", "/{operation_id}")
        described = paths[found][method.lower()]
        assert len(described["description"]) > 50, f"{method} {path}"
        assert method in ("GET", "DELETE") or path == "/admin/rescan" or "requestBody" in described


# ---- models' settings


def test_settings_change_and_are_shown(stage: Start) -> None:
    with stage() as s:
        s.ask("A")
        told = s.client.patch("/admin/models/A", json={"pinned": True, "priority": -2})
        assert told.status_code == 200 and (told.json()["pinned"], told.json()["priority"]) == (True, -2)
        assert_error(s.client.post("/admin/models/A/unload"), 409, code="model_pinned")
        s.client.patch("/admin/models/A", json={"pinned": False, "ttl_s": 30, "min_residency_s": 1.5})
        seen = s.client.get("/admin/models/A").json()
        names = ("pinned", "ttl_s", "min_residency_s", "priority")
        assert [seen[name] for name in names] == [False, 30.0, 1.5, -2]
        assert s.client.patch("/admin/models/A", json={"ttl_s": None}).json()["ttl_s"] is None
        assert s.ask("B").status_code == 200
        assert_error(s.client.patch("/admin/models/D", json={"pinned": True}), 404, code="model_not_found")


def test_limits_of_kv_memory_change_while_the_model_runs(stage: Start) -> None:
    host = FakeHost(sizes={"A": 10})
    host.kv["A"], host.kv_least["A"] = (30, 80), 5
    with stage(host) as s:
        s.ask("A")
        limits = {"kv_soft_limit_bytes": 8, "kv_hard_limit_bytes": 12}
        told = s.client.patch("/admin/models/A", json=limits)
        assert told.status_code == 200 and limits.items() <= told.json().items()
        s.until(lambda: s.client.get("/admin/models/A").json()["kv_bytes"] == 12)
        both = s.client.patch("/admin/models/A", json={"kv_soft_limit_bytes": 13})
        assert "more than kv_hard_limit_bytes, 12" in assert_error(both, 400, param="kv_soft_limit_bytes")
        small = s.client.patch(
            "/admin/models/A", json={"kv_soft_limit_bytes": None, "kv_hard_limit_bytes": 4}
        )
        error = small.json()["error"]
        assert (small.status_code, error["code"]) == (409, "kv_limit_too_small")
        assert (error["param"], error["kv_least_bytes"]) == ("kv_hard_limit_bytes", 5)
        fixed = s.client.patch("/admin/models/B", json={"kv_hard_limit_bytes": 50})
        assert "keeps its size" in assert_error(fixed, 400, param="kv_hard_limit_bytes")
        free = s.client.patch("/admin/models/A", json=dict.fromkeys(limits)).json()
        assert [free[name] for name in limits] == [None, None] and free["kv_bytes"] == 12


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({}, "Give at least one of pinned, ttl_s, min_residency_s, priority, kv_soft_limit_bytes", None),
        (
            {"kv_hard_limit_bytes": 0},
            "kv_hard_limit_bytes must be greater than or equal to 1",
            "kv_hard_limit_bytes",
        ),
        (
            {"kv_soft_limit_bytes": "64MiB"},
            "kv_soft_limit_bytes must be a valid integer",
            "kv_soft_limit_bytes",
        ),
        ({"kv_hard_limit_bytes": 1 << 70}, "kv_hard_limit_bytes must be", "kv_hard_limit_bytes"),
        ({"pined": True}, "pined is not a field that is known here", "pined"),
        ({"id": "B"}, "id is not a field", "id"),
        ({"pinned": None}, "pinned must be a valid boolean", "pinned"),
        ({"pinned": "true"}, "pinned must be a valid boolean", "pinned"),
        ({"ttl_s": 0}, "ttl_s must be greater than 0", "ttl_s"),
        ({"ttl_s": "60"}, "ttl_s must be a valid number", "ttl_s"),
        ({"min_residency_s": -1}, "min_residency_s must be greater than or equal to 0", "min_residency_s"),
        ({"min_residency_s": None}, "min_residency_s must be a valid number", "min_residency_s"),
        ({"priority": 1.5}, "priority must be a valid integer", "priority"),
        ({"priority": 1 << 40}, "priority must be less than", "priority"),
        ([], "must be a JSON object", None),
    ],
)
def test_wrong_settings_are_refused_by_name(stage: Start, body: Any, said: str, param: str | None) -> None:
    with stage() as s:
        answer = s.client.patch("/admin/models/A", json=body)
        assert said in assert_error(answer, 400, code="invalid_value", param=param)
        assert not s.registry.entry("A").pinned


# ---- budgets


def test_a_smaller_budget_evicts(stage: Start) -> None:
    with stage(FakeHost(sizes={"A": 40, "B": 50})) as s:
        s.ask("A")
        s.ask("B")
        told = s.client.patch("/admin/memory", json={"device": "cpu", "budget_bytes": 60})
        assert told.status_code == 200 and told.json()["devices"]["cpu"]["budget_bytes"] == 60
        s.until(lambda: (s.state("A"), s.state("B")) == ("unloaded", "ready"))
        assert s.client.get("/admin/memory").json()["devices"]["cpu"]["budget_bytes"] == 60


def test_a_budget_below_what_is_pinned_is_409_with_figures(stage: Start) -> None:
    host = FakeHost()
    host.entries["A"]["pinned"] = True
    with stage(host) as s:
        s.ask("A")
        answer = s.client.patch("/admin/memory", json={"device": "cpu", "budget_bytes": 59})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (
            409,
            "budget_too_small",
            "budget_bytes",
        )
        assert (error["least_budget_bytes"], error["staying_bytes"]) == (60, {"A": 60})
        assert "59" in error["message"] and "Unpin a model" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"device": "tpu", "budget_bytes": 5}, "device"),
        ({"device": "cpu"}, "budget_bytes"),
        ({"budget_bytes": 5}, "device"),
        ({"device": "cpu", "budget_bytes": 0}, "budget_bytes"),
        ({"device": "cpu", "budget_bytes": 5.5}, "budget_bytes"),
        ({"device": "cpu", "budget_bytes": 1 << 70}, "budget_bytes"),
        ({"device": "cpu", "budget_bytes": 5, "headroom_bytes": 1}, "headroom_bytes"),
    ],
)
def test_wrong_budgets_are_refused_by_name(stage: Start, body: dict[str, Any], param: str) -> None:
    with stage() as s:
        assert_error(s.client.patch("/admin/memory", json=body), 400, code="invalid_value", param=param)
        assert s.registry.state.ledger.budgets["cpu"].total_bytes == 100


# ---- models that come and go


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "models" / "one")
    return tmp_path / "models"


def test_a_registered_model_is_served_until_it_is_removed(stage: Start, models_dir: Path) -> None:
    with stage(models_dir=models_dir) as s:
        made = s.client.post("/admin/models", json={"id": "D", "model": "one", "priority": 4, "ttl_s": 50})
        assert made.status_code == 201 and made.headers["location"] == "/admin/models/D"
        assert (made.json()["id"], made.json()["state"], made.json()["priority"]) == ("D", "unloaded", 4)
        assert s.registry.entry("D").source == str(models_dir / "one") and not s.host.engines
        assert "D" in {model["id"] for model in s.client.get("/v1/models").json()["data"]}
        assert s.client.get("/readyz").status_code == 200
        assert s.ask("D").status_code == 200 and s.state("D") == "ready"
        text = s.client.get("/metrics").text
        assert 'megpt_model_state{model_name="D",state="ready"} 1.0' in text
        assert 'megpt_e2e_request_latency_seconds_count{model_name="D"} 1.0' in text

        again = s.client.post("/admin/models", json={"id": "D", "model": "demo"})
        assert_error(again, 409, code="model_exists", param="id")
        assert_error(s.client.delete("/admin/models/D"), 409, code="model_busy")
        s.client.post("/admin/models/D/unload", json={"wait": True})
        gone = s.client.delete("/admin/models/D")
        assert (gone.status_code, gone.json()) == (200, {"id": "D", "removed": True})
        assert_error(s.ask("D"), 404, code="model_not_found")
        assert_error(s.client.delete("/admin/models/D"), 404, code="model_not_found")
        assert "D" not in {model["id"] for model in s.client.get("/admin/models").json()["models"]}
        assert 'model_name="D"' not in s.client.get("/metrics").text


def test_bundled_models_and_absent_ids(stage: Start) -> None:
    with stage() as s:
        made = s.client.post("/admin/models", json={"model": "demo-draft", "load": "on_demand"})
        assert (made.status_code, made.json()["id"]) == (201, "demo-draft")
        assert s.registry.entry("demo-draft").source == "demo-draft"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "model", "model is required"),
        ({"model": "demo", "pined": True}, "pined", "pined is not a field"),
        ({"model": "demo", "id": "../x"}, "id", "must be a letter or digit"),
        ({"model": "demo", "id": "a/b"}, "id", "must be a letter or digit"),
        ({"model": "demo", "quantization": "int3000"}, None, "int3000"),
        ({"model": "demo", "max_num_seqs": "4"}, "max_num_seqs", "must be a valid integer"),
        ({"model": "demo", "load": "start"}, "load", "POST /admin/models/demo/load"),
        ({"model": "demo", "device": "cuda:5"}, None, "device cuda:5 has no memory budget"),
        ({"model": "demo", "id": "broken"}, "model", "config.json names no vocab_size"),
        ({"model": "/etc"}, "model", "no models_dir"),
        ({"id": "x", "model": "../.."}, "model", "can't be registered"),
    ],
)
def test_wrong_models_are_refused_by_name(
    stage: Start, body: dict[str, Any], param: str | None, said: str
) -> None:
    host = FakeHost()
    host.broken = {"broken"}
    with stage(host) as s:
        answer = s.client.post("/admin/models", json=body)
        assert said in assert_error(answer, 400, code="invalid_value", param=param)
        assert list(s.registry.models) == ["A", "B", "C"]
        assert len(s.client.get("/v1/models").json()["data"]) == 3


def test_a_registration_whose_client_left_changes_nothing(stage: Start) -> None:
    goes_on = threading.Event()
    with stage() as s:
        maker = s.live.server.catalog.maker
        s.live.server.catalog.maker = SlowMaker(maker, goes_on)
        with pytest.raises(httpx.ReadTimeout):
            s.client.post("/admin/models", json={"id": "D", "model": "demo"}, timeout=0.2)
        s.until(lambda: s.live.server.lifecycle.num_running == 0)
        goes_on.set()
        assert list(s.registry.models) == ["A", "B", "C"]
        assert s.client.post("/admin/models", json={"id": "D", "model": "demo"}).status_code == 201


@dataclass
class SlowMaker:
    """Waits before it makes anything, as if it downloaded."""

    maker: Any
    goes_on: threading.Event

    def make(self, model: ModelSettings, budgets: Mapping[str, int]) -> Any:
        assert self.goes_on.wait(10)
        return self.maker.make(model, budgets)


def test_a_rescan_finds_what_is_new_and_tells_what_is_gone(stage: Start, models_dir: Path) -> None:
    with stage(models_dir=models_dir) as s:
        first = s.client.post("/admin/rescan").json()
        assert ([m["id"] for m in first["added"]], first["missing"], first["problems"]) == (["one"], [], [])
        checkpoint(models_dir / "two")
        checkpoint(models_dir / "no id")
        (models_dir / "link").symlink_to(models_dir / "two")
        (models_dir / "one").rename(models_dir.parent / "elsewhere")
        second = s.client.post("/admin/rescan").json()
        assert [m["id"] for m in second["added"]] == ["two"] and second["missing"] == ["one"]
        assert len(second["problems"]) == 2 and "'no id'" in " ".join(second["problems"])
        assert s.ask("two").status_code == 200
        assert s.client.post("/admin/rescan").json()["added"] == []


def test_a_rescan_goes_on_after_a_folder_that_cannot_be_used(stage: Start, models_dir: Path) -> None:
    host = FakeHost()
    host.broken = {"one"}
    checkpoint(models_dir / "two")
    with stage(host, models_dir=models_dir) as s:
        found = s.client.post("/admin/rescan").json()
        assert [m["id"] for m in found["added"]] == ["two"]
        assert found["problems"] == ["one: config.json names no vocab_size."]


def test_without_a_models_dir_there_is_nothing_to_scan(stage: Start) -> None:
    with stage() as s:
        assert "models_dir" in assert_error(s.client.post("/admin/rescan"), 400)
