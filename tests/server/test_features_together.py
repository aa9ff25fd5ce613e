"""Over HTTP, with fake engines: sleep, variants, receipts, aliases and events of one and the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from memory_efficient_gpt_server.cli import main
from memory_efficient_gpt_server.commands.event_lines import ServerEvent, line_of
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Stage, Start
from tests.server.test_bad_requests import assert_error

INT4 = VariantKey("A", "int4")
WISH = {"quantization": "int4"}


@pytest.fixture
def s(stage: Start) -> Iterator[Stage]:
    """A with an int4 variant of 20 bytes and the alias `best`, on a GPU of 100 bytes whose host parks 100."""
    host = FakeHost(sizes={str(INT4): 20}, host_budget=100)
    host.choices["A"] = Choices((INT4,))
    host.entries["A"]["aliases"] = ("best",)
    with stage(host) as started:
        yield started


def _post(s: Stage, what: str, **fields: object) -> tuple[int, str]:
    answer = s.client.post(f"/admin/models/best/{what}", json={"wait": True, **fields})
    return answer.status_code, answer.json().get("state", answer.text)


def _states(s: Stage) -> dict[str, str]:
    told = s.client.get("/admin/models/best").json()
    return {variant["variant"]: variant["state"] for variant in told["variants"]}


def test_the_receipt_of_a_request_that_woke_its_model_has_the_wait_and_the_memory(s: Stage) -> None:
    s.ask("A")
    assert _post(s, "sleep") == (200, "asleep")
    answer = s.ask("A", optimizations={"receipt": True})
    told = answer.json()["receipt"]
    assert answer.headers["x-megpt-model-state"] == "asleep"
    assert told["load_ms"] > 0 and round(told["load_ms"]) == int(answer.headers["x-megpt-load-ms"])
    assert told["kv_peak_bytes"] > 0 and told["resumed"] is False
    assert s.ask("A", optimizations={"receipt": True}).headers["x-megpt-model-state"] == "ready"


def test_an_alias_with_optimizations_means_the_models_variant_everywhere(s: Stage) -> None:
    answer = s.ask("best", optimizations={**WISH, "receipt": True}).json()
    assert (answer["model"], answer["receipt"]["model"], answer["receipt"]["variant"]) == (
        "A",
        "A",
        str(INT4),
    )
    assert _states(s) == {"A": "unloaded", str(INT4): "ready"}
    assert s.client.post("/v1/tokenize", json={"model": "best", "prompt": "a"}).json()["count"] == 1
    plan = s.client.post("/admin/plan", json={"model": "best", "optimizations": WISH}).json()
    assert (plan["model"], plan["variant"]) == ("A", str(INT4))
    assert _post(s, "sleep", optimizations=WISH) == (200, "asleep")
    metrics = s.client.get("/metrics").text
    assert 'megpt_model_sleeps_total{model_name="A",reason="admin"} 1.0' in metrics
    assert "best" not in metrics and "int4" not in metrics


def test_removing_a_model_says_which_of_its_variants_is_in_the_way(s: Stage) -> None:
    s.ask("A", optimizations=WISH)
    _post(s, "sleep", optimizations=WISH)
    assert _post(s, "unload") == (200, "unloaded"), "the model as configured, which is not loaded"
    refused = s.client.delete("/admin/models/best")
    assert_error(refused, 409, code="model_busy")
    assert f"{INT4} is asleep" in refused.text and "/admin/models/A/unload" in refused.text
    assert _post(s, "unload", optimizations=WISH) == (200, "unloaded")
    assert s.client.delete("/admin/models/best").json() == {"id": "A", "removed": True}
    assert_error(s.ask("best", optimizations=WISH), 404, code="model_not_found")


def test_a_sleeping_model_shows_the_bytes_that_it_has_kept(s: Stage) -> None:
    s.ask("A")
    _post(s, "sleep")
    told = s.client.get("/admin/models/A").json()
    assert told["measured_bytes"] == {"context": 3, "parked": 60}
    _post(s, "wake")
    assert s.client.get("/admin/models/A").json()["measured_bytes"] == {"weights": 60}


def test_events_tell_of_variants_that_load_sleep_and_wake_and_megpt_has_a_line_for_each(s: Stage) -> None:
    s.ask("A", optimizations=WISH)
    _post(s, "sleep", optimizations=WISH)
    s.ask("A", optimizations=WISH)
    with s.client.stream(
        "GET", "/admin/events", headers={"last-event-id": s.registry.journal.id_of(0)}
    ) as stream:
        received = stream.iter_lines()
        told: list[dict[str, Any]] = []
        while not told or (told[-1]["kind"], told[-1].get("from")) != ("state", "waking"):
            line = next(received)
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
    assert {event["variant"] for event in told} == {str(INT4)} and {event["model"] for event in told} == {"A"}
    passed = [(event["from"], event["to"]) for event in told if event["kind"] == "state"]
    assert passed == [
        ("unloaded", "loading"), ("loading", "ready"), ("ready", "sleeping"), ("sleeping", "asleep"),
        ("asleep", "waking"), ("waking", "ready"),
    ]  # fmt: skip
    assert [event["way"] for event in told if event["kind"] == "eviction"] == ["sleep"]
    assert [event["result"] for event in told if event["kind"] == "load"] == ["success"]
    lines = [line_of(ServerEvent(None, event["kind"], event)) for event in told]
    assert all(f"  {INT4}: " in line for line in lines), lines
    for said in ("waking -> ready", "loaded after", "put to sleep (admin)", "sleep done"):
        assert sum(said in line for line in lines) == 1, said


def test_megpt_top_and_the_metrics_agree_on_a_models_state(
    s: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGPT_ADMIN_KEY", ADMIN)
    s.ask("A")
    s.ask("A", optimizations=WISH)
    _post(s, "sleep")
    assert 'megpt_model_state{model_name="A",state="ready"} 1.0' in s.client.get("/metrics").text
    assert main(["top", "--once", "--url", s.live.url]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("A ")]
    assert line.split()[1] == "ready", "one of its variants serves"


def test_megpt_names_the_variant_that_it_wakes(
    s: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGPT_ADMIN_KEY", ADMIN)
    s.ask("A", optimizations=WISH)
    _post(s, "sleep", optimizations=WISH)
    assert main(["wake", "best", "--quantization", "int4", "--url", s.live.url]) == 0
    assert capsys.readouterr().out.startswith(f"{INT4}: ready, woken in 0.")
