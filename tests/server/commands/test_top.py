"""`megpt top`: frames of a real server over fake engines."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt_server.cli import main
from memory_efficient_gpt_server.commands.admin_client import AdminClient, ServerRefusedError
from memory_efficient_gpt_server.commands.top import watch
from memory_efficient_gpt_server.commands.top_display import frame
from memory_efficient_gpt_server.commands.top_readings import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    Reading,
    per_second,
    read,
)
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Start

MIB = 1 << 20


def shown(before: Reading | None, now: Reading, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(frame("http://there", before, now, **options))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str, model: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{model} ")]
    return line.split()


def test_once_prints_one_frame_and_ends(
    stage: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGPT_ADMIN_KEY", ADMIN)
    host = FakeHost(sizes={"A": 60 * MIB, "B": 75 * MIB}, budget=100 * MIB)
    with stage(host) as s:
        s.ask("A")
        s.ask("B")
        assert main(["top", "--once", "--interval", "0.05", "--url", s.live.url]) == 0
        once = capsys.readouterr().out
        assert main(["top", "--interval", "0.05", "--url", s.live.url]) == 0  # standard output is a pipe
        piped = capsys.readouterr().out
    assert once == piped and "\x1b" not in once
    assert once.count("megpt top") == 1 and s.live.url in once
    assert re.search(r"cpu +\[#{22}\.{8}\] 75\.0 MiB of 100\.0 MiB \(75%\)\n", once)
    assert "evictions 1 (budget 1)   waiting 0" in once
    assert cells(once, "A") == ["A", "unloaded", "0", "0", "-", "0.0", "0.0"]
    assert cells(once, "B") == ["B", "ready", "0", "0", "75.0", "MiB", "0.0", "0.0"]


def test_tokens_per_second_are_differences_of_the_servers_counters(stage: Start) -> None:
    with stage() as s, AdminClient(s.live.url, ADMIN) as client:
        s.ask("A")
        engine = s.host.engine("A")
        engine.stats = EngineStats(prompt_tokens=100, generated_tokens=10)
        before = read(client, clock=lambda: 5.0)
        engine.stats = EngineStats(prompt_tokens=400, generated_tokens=35)
        now = read(client, clock=lambda: 7.0)
    assert per_second(before, now, PROMPT_TOKENS, "A") == 150
    assert per_second(before, now, GENERATED_TOKENS, "A") == 12.5
    assert per_second(before, now, GENERATED_TOKENS, "B") == 0
    assert cells(shown(before, now), "A")[-2:] == ["150.0", "12.5"]
    assert cells(shown(None, now), "A")[-2:] == ["-", "-"]


def test_a_server_that_was_started_anew_counts_from_zero() -> None:
    tokens = {GENERATED_TOKENS: {"A": 900.0}}
    before = Reading(0.0, [], {}, {}, tokens, {})
    now = replace(before, at_s=2.0, tokens={GENERATED_TOKENS: {"A": 30.0}})
    assert per_second(before, now, GENERATED_TOKENS, "A") == 15
    assert per_second(now, now, GENERATED_TOKENS, "A") is None


def test_waiting_requests_and_what_a_model_does_are_shown(stage: Start) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s, AdminClient(s.live.url, ADMIN) as client:
        s.client.post("/admin/models/A/load")
        now = read(client)
        assert now.waiting == 1
        text = shown(None, now)
        assert cells(text, "A")[:4] == ["A", "loading", "0", "1"] and "waiting 1" in text
        s.finish_load("A")


def test_text_of_the_server_is_no_markup_and_moves_no_cursor() -> None:
    model = {
        "id": "[red]x", "state": "failed", "reason": "bad [/] \x1b[2J\nfile", "leases": 0, "waiting": 0,
    }  # fmt: skip
    text = shown(None, Reading(0.0, [model], {}, {}, {PROMPT_TOKENS: {}, GENERATED_TOKENS: {}}, {"a": 2.0}))
    assert "[red]x" in text and "bad [/] [2J file" in text and "\x1b" not in text


def test_freed_and_leaked_bytes_and_an_overrun_are_told() -> None:
    device = {"used_bytes": 3 * MIB, "budget_bytes": 2 * MIB, "freeing_bytes": MIB, "leaked_bytes": MIB}
    text = shown(None, Reading(0.0, [], {"cuda:0": device}, {}, {}, {}))
    assert f"[{'#' * 30}] 3.0 MiB of 2.0 MiB (150%), 1.0 MiB being freed, 1.0 MiB leaked" in text


def test_it_refreshes_tells_when_the_server_goes_and_ends_with_ctrl_c(stage: Start) -> None:
    host = FakeHost()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with stage(host) as s, AdminClient(s.live.url, ADMIN) as client:
        pauses = 0

        def pause(seconds: float) -> None:
            nonlocal pauses
            pauses += 1
            assert seconds == 1.0
            if pauses == 1:
                assert "unloaded" in out.getvalue() and "ready" not in out.getvalue()
                s.ask("A")
            elif pauses == 2:
                assert "ready" in out.getvalue()
                client.url = "http://127.0.0.1:9"
                client._client.base_url = "http://127.0.0.1:9"
            elif pauses == 3:
                assert "can't be reached" in out.getvalue()
                client._client.base_url = s.live.url
                out.truncate(0)
            else:
                assert "can't be reached" not in out.getvalue() and "ready" in out.getvalue()
                raise KeyboardInterrupt

        watch(client, console, 1.0, pause)
    assert pauses == 4


def test_it_does_not_begin_with_a_server_that_is_not_there() -> None:
    with (
        AdminClient("http://127.0.0.1:9", None) as client,
        pytest.raises(ServerRefusedError, match="reached"),
    ):
        watch(client, Console(file=io.StringIO()), 1.0, lambda _: None)


def test_a_models_variants_are_one_row_with_all_their_requests(stage: Start, answer_ids: list[int]) -> None:
    int4 = VariantKey("A", "int4")
    host = FakeHost(sizes={str(int4): 30 * MIB, "A": 60 * MIB}, budget=100 * MIB)
    host.choices["A"] = Choices((int4,))
    with stage(host) as s, AdminClient(s.live.url, ADMIN) as client, ThreadPoolExecutor() as pool:
        wish = {"optimizations": {"quantization": "int4"}}
        s.ask("A", **wish)
        engine = host.engine(str(int4))
        engine.answer, engine.step_s = answer_ids, 0.05
        streams = [pool.submit(s.ask, "A", max_tokens=200, **wish) for _ in range(2)]
        s.until(lambda: engine.num_running == 2)
        row = cells(shown(None, read(client)), "A")
        assert row[:6] == ["A", "ready", "2", "0", "30.0", "MiB"]
        engine.step_s = 0.0
        assert all(stream.result(10).status_code == 200 for stream in streams)
