"""Sleep and wake over HTTP and by `megpt`, with fake engines on a GPU: what operators and clients see."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memory_efficient_gpt_server.cli import main
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Stage, Start
from tests.server.test_bad_requests import assert_error


def post(s: Stage, what: str, model: str = "A", *, wait: bool = True) -> tuple[int, str]:
    answer = s.client.post(f"/admin/models/{model}/{what}", json={"wait": wait})
    return answer.status_code, answer.json().get("state", answer.text)


def test_sleep_and_wake_are_202_under_way_and_200_when_done(stage: Start) -> None:
    with stage(FakeHost(host_budget=60)) as s, ThreadPoolExecutor() as pool:
        s.ask("A")
        s.live.call(s.host.engine("A").may_move.clear)
        assert post(s, "sleep", wait=False) == (202, "sleeping")
        waits = pool.submit(post, s, "sleep")
        s.live.call(s.host.engine("A").may_move.set)
        assert waits.result(5) == (200, "asleep")
        assert post(s, "sleep", wait=False) == (200, "asleep"), "it is done already"
        told = s.client.get("/admin/models/A").json()
        assert (told["reason"], told["can_sleep"], told["last_wake_s"]) == ("admin", True, None)
        memory = s.client.get("/admin/memory").json()
        kinds = {(entry["device"], entry["kind"]): entry["bytes"] for entry in memory["entries"]}
        assert kinds == {("cuda:0", "context"): 3, ("cpu", "parked"): 60}

        s.live.call(s.host.engine("A").may_move.clear)
        assert post(s, "wake", wait=False) == (202, "waking")
        s.live.call(s.host.engine("A").may_move.set)
        assert post(s, "wake") == (200, "ready")
        assert post(s, "wake", wait=False) == (200, "ready")
        assert s.client.get("/admin/models/A").json()["last_wake_s"] > 0


def test_a_request_wakes_its_model(stage: Start) -> None:
    with stage(FakeHost(host_budget=60)) as s:
        s.ask("A")
        post(s, "sleep")
        refused = s.ask("A", on_cold="fail")
        assert_error(refused, 503, code="model_loading")
        assert "A is asleep" in refused.text and s.state("A") == "asleep"
        answer = s.ask("A")
        assert answer.status_code == 200 and answer.headers["x-megpt-model-state"] == "asleep"
        assert len(s.host.engines["A"]) == 1 and s.client.get("/readyz").status_code == 200


def test_the_plan_says_who_would_sleep(stage: Start) -> None:
    with stage(FakeHost(host_budget=60)) as s:
        s.ask("A")
        told = s.client.post("/admin/plan", json={"model": "B"}).json()
        assert (told["verdict"], told["evict"], told["sleep"]) == ("after_eviction", [], ["A"])


def test_refusals_are_409_or_507_and_say_why(stage: Start) -> None:
    host = FakeHost(host_budget=30, sizes={"C": 20})
    host.entries["C"]["pinned"] = True
    with stage(host) as s:
        for what, told in (("sleep", "only a ready one can sleep"), ("wake", "only a sleeping one can wake")):
            answer = s.client.post(f"/admin/models/A/{what}")
            assert_error(answer, 409, code="wrong_state")
            assert f"it is unloaded; {told}" in answer.text
            assert_error(s.client.post(f"/admin/models/D/{what}"), 404, code="model_not_found")
            assert_error(s.client.post(f"/admin/models/A/{what}", json={"level": 2}), 400)
        s.ask("C")
        assert_error(s.client.post("/admin/models/C/sleep"), 409, code="model_pinned")
        s.ask("A")
        short = s.client.post("/admin/models/A/sleep")
        assert_error(short, 507, code="insufficient_memory")
        assert (
            "60 bytes of host memory, where 30 are left" in short.text and "host_budget_bytes" in short.text
        )


def test_a_model_in_use_does_not_sleep(stage: Start, answer_ids: list[int]) -> None:
    with stage(FakeHost(host_budget=60)) as s, ThreadPoolExecutor() as pool:
        s.ask("A")
        s.host.engine("A").answer, s.host.engine("A").step_s = answer_ids, 0.05
        stream = pool.submit(s.ask, "A", stream=True, max_tokens=200)
        s.until(lambda: s.host.engine("A").num_running == 1)
        assert_error(s.client.post("/admin/models/A/sleep"), 409, code="model_busy")
        assert "[DONE]" in stream.result(10).text
        s.until(lambda: s.client.get("/admin/models/A").json()["leases"] == 0)
        assert post(s, "sleep") == (200, "asleep")


def test_metrics_tell_sleeps_from_evictions_and_how_long_models_take_to_wake(stage: Start) -> None:
    with stage(FakeHost(host_budget=60)) as s:
        s.ask("A")
        s.ask("B")  # A sleeps for it
        s.ask("A")  # B has no room to sleep
        text = s.client.get("/metrics").text
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return values[f"megpt_model_{name}", tuple(sorted(labels.items()))]

    assert value("sleeps_total", model_name="A", reason="budget") == 1
    assert value("sleeps_total", model_name="B", reason="budget") == 0
    assert value("evictions_total", model_name="A", reason="budget") == 0
    assert value("evictions_total", model_name="B", reason="budget") == 1
    assert value("wake_seconds_count", model_name="A") == 1
    assert value("state", model_name="A", state="ready") == 1


def test_megpt_sleep_and_wake_return_when_it_is_done(
    stage: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGPT_ADMIN_KEY", ADMIN)
    with stage(FakeHost(host_budget=60)) as s:

        def megpt(*args: str) -> tuple[int, str, str]:
            code = main([*args, "--url", s.live.url])
            return code, *capsys.readouterr()

        code, out, err = megpt("sleep", "A")
        assert (code, out) == (1, "") and "it is unloaded; only a ready one can sleep" in err
        s.ask("A")
        assert megpt("sleep", "A") == (0, "A: asleep\n", "")
        assert "asleep" in megpt("ps")[1] and "asleep" in megpt("top", "--once")[1]
        code, out, _ = megpt("wake", "A")
        assert code == 0 and out.startswith("A: ready, woken in 0.")
        s.live.call(s.host.engine("A").may_move.clear)
        assert megpt("sleep", "A", "--no-wait") == (0, "A: sleeping; `megpt ps` shows how far it is\n", "")
        assert megpt("wake", "A", "--no-wait") == (0, "A: sleeping; `megpt ps` shows how far it is\n", "")
        s.live.call(s.host.engine("A").may_move.set)
        s.until(lambda: s.state("A") == "ready")
