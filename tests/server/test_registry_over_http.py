"""What clients and administrators are told of models that are not loaded, fail, or lost their worker."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt.tokenizer import Tokenizer
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start
from tests.server.test_bad_requests import assert_error

# ---- workers that are replaced


def test_a_request_waits_while_a_dead_worker_is_replaced(stage: Start) -> None:
    with stage() as s, ThreadPoolExecutor() as pool:
        s.ask("A")
        s.host.engine("A").state = "loading"
        asking = pool.submit(s.ask, "A")
        time.sleep(0.4)
        assert not asking.done()
        told = assert_error(s.ask("A", on_cold="fail"), 503, code="model_loading")
        assert "Leave on_cold out to wait for it" in told
        s.host.engine("A").state = "ready"
        answer = asking.result(5)
        assert (answer.status_code, answer.headers["x-megpt-model-state"]) == (200, "loading")
        assert int(answer.headers["x-megpt-load-ms"]) >= 300


# ---- errors say as much as answers do


def test_refusals_say_in_which_state_the_model_was_and_how_long_it_was_waited_for(stage: Start) -> None:
    host = FakeHost(sizes={"A": 200}, max_wait_s=0.3)
    host.held, host.broken = {"B"}, {"C"}
    with stage(host) as s:
        seen = {}
        for model, fields in (("A", {}), ("B", {}), ("C", {}), ("B", {"on_cold": "fail"})):
            answer = s.ask(model, **fields)
            seen[answer.status_code] = answer.headers["x-megpt-model-state"]
            assert int(answer.headers["x-megpt-load-ms"]) >= 0
        assert seen == {507: "unloaded", 503: "loading", 500: "unloaded"}
        assert (
            "x-megpt-model-state" not in s.ask("A", top_p=5).headers
        )  # refused before a model was looked at


def test_nobody_leaves_for_a_request_that_cannot_be_valid(stage: Start) -> None:
    with stage() as s:
        s.ask("A")
        s.ask("B")
        assert (s.state("A"), s.state("B")) == ("unloaded", "ready")
        told = assert_error(s.ask("A", max_tokens=99_999), 400, code="context_length_exceeded")
        assert "the limit of this model" in told
        assert (s.state("A"), s.state("B")) == ("unloaded", "ready")


def test_a_failed_load_is_told_with_the_seconds_of_its_pause_and_no_doubled_stop(stage: Start) -> None:
    host = FakeHost()
    host.broken = {"A"}
    with stage(host) as s:
        answer = s.ask("A")
        told = assert_error(answer, 500, code="load_failed")
        assert "Download it again. Repair it" in told and "for the next 1 s." in told and ".." not in told
        assert answer.headers["x-should-retry"] == "false"


def test_a_model_without_a_usable_tokenizer_is_a_failed_load(stage: Start) -> None:
    def gone() -> Tokenizer:
        raise CheckpointError("There is no folder /models/x. Put the model back, or stop serving it.")

    with stage() as s:
        s.live.server.catalog.get("A").tokenizer_source = gone
        assert "There is no folder" in assert_error(s.ask("A"), 500, code="load_failed")


def test_a_folder_that_is_gone_has_no_tokenizer_and_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder .*away"):
        Tokenizer.load(tmp_path / "away")


# ---- administrators


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/models?state=ready"),
        ("GET", "/admin/events?foo=1"),
        ("GET", "/admin/queue?x"),
        ("POST", "/admin/models/A/load?wat=true"),
        ("POST", "/admin/rescan?wait=true"),
    ],
)
def test_unknown_query_parameters_are_refused_by_name(stage: Start, method: str, path: str) -> None:
    with stage() as s:
        name = path.partition("?")[2].partition("=")[0]
        told = assert_error(s.client.request(method, path), 400, code="invalid_value", param=name)
        assert repr(name) in told and s.state("A") == "unloaded"


def test_waiting_may_be_asked_for_in_the_query(stage: Start) -> None:
    host = FakeHost()
    with stage(host) as s:
        done = s.client.post("/admin/models/A/load?wait=true", json={})
        assert (done.status_code, done.json()["state"]) == (200, "ready")
        assert s.client.post("/admin/models/A/unload?wait=true").json()["state"] == "unloaded"
        assert_error(s.client.post("/admin/models/A/load?wait=maybe"), 400, param="wait")


def test_an_empty_body_is_as_good_as_none_whatever_type_it_claims(stage: Start) -> None:
    with stage() as s:
        answer = s.client.post("/admin/models/A/load?wait=true", headers={"content-type": "application/json"})
        assert answer.status_code == 200


def test_a_registered_model_may_have_aliases(stage: Start) -> None:
    with stage() as s:
        made = s.client.post("/admin/models", json={"id": "al", "model": "demo", "aliases": ["brandnew"]})
        assert (made.status_code, made.json()["aliases"]) == (201, ["brandnew"])
        assert s.ask("brandnew").status_code == 200
        none = s.client.post("/admin/models", json={"id": "al2", "model": "demo", "aliases": []})
        assert none.status_code == 201


def test_an_id_that_is_an_alias_is_refused_without_advice_to_remove_its_model(
    stage: Start,
) -> None:
    host = FakeHost()
    host.entries["A"]["aliases"] = ("author",)
    with stage(host) as s:
        told = assert_error(s.client.post("/admin/models", json={"id": "author", "model": "demo"}), 409)
        assert "alias of the model 'A'" in told and "DELETE" not in told


def test_a_rescan_tells_of_a_folder_whose_name_is_another_models_id(
    stage: Start, tmp_path: Path, demo_folder: Path
) -> None:
    shutil.copytree(demo_folder, tmp_path / "A")
    with stage(models_dir=tmp_path) as s:
        found = s.client.post("/admin/rescan").json()
        assert found["added"] == [] and len(found["problems"]) == 1
        assert "'A'" in found["problems"][0] and "rename the folder" in found["problems"][0]


def test_what_is_only_estimated_is_not_called_measured(stage: Start) -> None:
    with stage() as s:
        s.ask("A")
        entries: list[dict[str, Any]] = s.client.get("/admin/memory").json()["entries"]
        assert {e["kind"]: e["stage"] for e in entries} == {"weights": "measured"}
