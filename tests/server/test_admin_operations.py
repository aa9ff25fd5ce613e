"""Operations and the queue over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start
from tests.server.test_bad_requests import assert_error


def test_a_load_is_an_operation_that_can_be_asked_for(stage: Start) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s:
        begun = s.client.post("/admin/models/A/load")
        operation = begun.json()["operation"]
        assert begun.status_code == 202 and operation["state"] == "running"
        assert begun.headers["location"] == f"/admin/operations/{operation['id']}"
        assert begun.json()["state"] == "loading", "the model itself is in the answer as well"
        again = s.client.post("/admin/models/A/load").json()["operation"]
        assert again["id"] == operation["id"]
        listed = s.client.get("/admin/operations").json()["operations"]
        assert [(o["id"], o["what"], o["model"], o["state"]) for o in listed] == [
            (operation["id"], "load", "A", "running")
        ]
        s.finish_load("A")
        s.until(lambda: s.client.get(begun.headers["location"]).json()["state"] == "done")
        done = s.client.get(begun.headers["location"]).json()
        assert done["began_at"] <= done["ended_at"] and done["error"] is None
        at_once = s.client.post("/admin/models/A/load")
        assert at_once.status_code == 200 and "location" not in at_once.headers
        assert at_once.json()["operation"]["state"] == "done" and at_once.json()["operation"]["ended_at"]


def test_what_was_refused_is_a_failed_operation(stage: Start) -> None:
    host = FakeHost(sizes={"B": 101})
    host.fails = {"A": "weights are gone"}
    with stage(host) as s:
        assert s.client.post("/admin/models/B/load").status_code == 507
        assert_error(s.client.post("/admin/models/A/load", json={"wait": True}), 500, code="load_failed")
        newest, older = s.client.get("/admin/operations").json()["operations"]
        assert (newest["model"], newest["error"]["code"]) == ("A", "load_failed")
        assert "weights are gone" in newest["error"]["message"]
        assert (older["model"], older["state"], older["error"]["code"]) == (
            "B",
            "failed",
            "insufficient_memory",
        )


def test_an_operation_can_be_called_off_while_it_goes_on(stage: Start) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        waits = pool.submit(s.client.post, "/admin/models/A/load", json={"wait": True})
        s.until(lambda: s.state("A") == "loading")
        (operation,) = s.client.get("/admin/operations").json()["operations"]
        path = f"/admin/operations/{operation['id']}"
        called_off = s.client.delete(path)
        assert (called_off.status_code, called_off.json()["state"]) == (200, "cancelled")
        assert_error(waits.result(5), 409, code="operation_cancelled")
        s.until(lambda: s.state("A") == "unloaded")
        assert s.client.get(path).json()["error"]["code"] == "operation_cancelled"
        message = assert_error(s.client.delete(path), 409, code="wrong_state")
        assert "has ended already" in message
        assert_error(s.client.delete("/admin/operations/op-1"), 404, code="operation_not_found")


def test_unknown_operations_are_404(stage: Start) -> None:
    with stage() as s:
        message = assert_error(s.client.get("/admin/operations/op-1"), 404, code="operation_not_found")
        assert "GET /admin/operations" in message


def test_the_queue_says_who_waits_and_why(stage: Start) -> None:
    host = FakeHost()
    host.held = {"B"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        waits = pool.submit(s.ask, "B")
        s.until(lambda: s.state("B") == "loading")
        operation = s.client.post("/admin/models/A/load").json()["operation"]["id"]
        seen = s.client.get("/admin/queue").json()
        first, second = seen["groups"]
        assert (first["model"], first["position"], first["why"]["code"]) == ("B", 1, "loading")
        assert [w["kind"] for w in first["waiters"]] == ["request"]
        assert (second["model"], second["position"], second["why"]["code"]) == ("A", 2, "busy")
        assert second["waiters"][0]["operation"] == operation
        assert second["why"]["blocked_by"] == ["B"] and second["why"]["missing_bytes"] == {"cpu": 20}
        assert seen["waiting"] == 2 and seen["churn"]["wait_s"] == 0
        s.finish_load("B")
        assert waits.result(5).status_code == 200
        s.until(lambda: s.client.get("/admin/queue").json()["groups"] == [])
