"""`megpt operations` against real servers over fake engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from memory_efficient_gpt_server.cli import main
from memory_efficient_gpt_server.commands.operations import _in_full, _row
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start

Megpt = Callable[..., tuple[int, str, str]]


def test_operations_are_a_table_the_newest_first(stage: Start, megpt: Megpt) -> None:
    host = FakeHost()
    host.fails = {"B": "weights are\n\x1b[31mgone"}
    with stage(host) as s:
        at = ("--url", s.live.url)
        nothing = "no administrator has asked for anything yet; `megpt load ID` loads a model\n"
        assert megpt("operations", *at) == (0, nothing, "")
        s.client.post("/admin/models/B/load", json={"wait": True})
        s.client.post("/admin/models/A/load", json={"wait": True})
        s.client.post("/admin/models/A/unload", json={"mode": "drain", "deadline_s": 5, "wait": True})
        code, out, _ = megpt("operations", *at)
        header, unload, load, failed = out.splitlines()
        as_json = json.loads(megpt("operations", "--json", *at)[1])
        assert as_json == s.client.get("/admin/operations").json()
    assert code == 0 and header.split() == ["operation", "what", "model", "state", "began", "took", "why"]
    assert unload.split()[1:7] == ["unload", "(within", "5", "s)", "A", "done"]
    assert load.split()[1:4] == ["load", "A", "done"] and load.endswith("s")
    assert failed.split()[1:4] == ["load", "B", "failed"]
    assert "load_failed: Model B could not be loaded: weights are [31mgone" in failed and "\x1b" not in out


def test_one_is_shown_in_full_and_called_off(stage: Start, megpt: Megpt) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        at = ("--url", s.live.url)
        waiting = pool.submit(s.client.post, "/admin/models/A/load", json={"wait": True})
        s.until(lambda: s.state("A") == "loading")
        (operation,) = s.client.get("/admin/operations").json()["operations"]
        name = operation["id"]
        code, out, _ = megpt("operations", name, *at)
        first, state, began, hint = out.splitlines()
        assert (code, first) == (0, f"{name}: load of A") and state.startswith("  running for ")
        assert began.startswith("  began 20") and hint == f"  `megpt operations --cancel {name}` calls it off"
        assert json.loads(megpt("operations", name, "--json", *at)[1]) == operation
        assert megpt("operations", "--cancel", name, *at) == (0, f"{name}: load of A is cancelled\n", "")
        assert waiting.result(5).status_code == 409
        s.until(lambda: s.state("A") == "unloaded")
        _, out, _ = megpt("operations", name, *at)
        assert "\n  cancelled after " in out and "operation_cancelled: An administrator called" in out
        code, out, err = megpt("operations", "--cancel", name, *at)
        assert (code, out) == (1, "") and "has ended already: it is cancelled" in err


@pytest.mark.parametrize("option", [(), ("--cancel",)])
@pytest.mark.parametrize("name", ["op-1", "a/b", "..", "", "op-1?x=1"])
def test_one_that_there_is_not_is_told_with_the_remedy(
    stage: Start, megpt: Megpt, option: tuple[str, ...], name: str
) -> None:
    with stage() as s:
        code, out, err = megpt("operations", *option, name, "--url", s.live.url)
    assert (code, out) == (1, "") and f"There is no operation {name!r}" in err
    assert "`megpt operations`" in err


def test_showing_one_and_calling_one_off_are_not_asked_for_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["operations", "op-1", "--cancel", "op-2"])
    assert ended.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_the_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["operations", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "megpt operations --cancel op-" in out and "Exit code: 0 shown or called off, 1 refused." in out


def test_a_servers_clock_that_is_ahead_makes_no_negative_times() -> None:
    operation: dict[str, Any] = {
        "id": "op-1", "what": "unload", "variant": "A", "options": {"mode": "abort", "deadline_s": None},
        "state": "running", "began_at": 1000.0, "ended_at": None, "error": None,
    }  # fmt: skip
    assert _row(operation, 900.0)[1:4] == ("unload (abort)", "A", "running")
    assert _row(operation, 900.0)[5] == "0.0 s"
    assert "running for 3.0 s" in _in_full(operation, 1003.0)
