"""`megpt models | ps | load | unload` against real servers over fake engines."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt_server.cli import main
from memory_efficient_gpt_server.commands.admin_client import AdminClient, ServerRefusedError
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.conftest import Serve
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Stage, Start

CLIENT_KEY = "client-" + "k" * 32
MIB = 1 << 20

Megpt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def megpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Megpt:
    """Runs a command with the admin key in its environment, or another one, or none (key=None)."""

    def run(*args: str, key: str | None = ADMIN) -> tuple[int, str, str]:
        monkeypatch.delenv("MEGPT_ADMIN_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("MEGPT_ADMIN_KEY", key)
        code = main(args)
        return code, *capsys.readouterr()

    return run


def at(s: Stage) -> tuple[str, str]:
    return "--url", s.live.url


def row(out: str, model: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(f"{model} ")]
    return line.split("  ")


def test_models_and_ps_are_tables(stage: Start, megpt: Megpt) -> None:
    host = FakeHost(sizes={"A": 60 * MIB}, budget=100 * MIB)
    host.fails = {"B": "weights.safetensors is\n\x1b[31mtruncated"}
    host.entries["A"]["pinned"] = True
    with stage(host) as s:
        s.ask("A")
        s.ask("B")
        code, listed, _ = megpt("models", *at(s))
        _, running, _ = megpt("ps", *at(s))
    header, *lines = listed.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == ["A", "B", "C"]
    assert header.split("  ")[0].strip() == "model" and header.endswith("why")
    assert lines[0].split()[1:10] == ["ready", "(pinned)", "0", "0", "60.0", "MiB", "60.0", "MiB", "0.0"]
    assert lines[1].split()[1] == "failed"
    assert "weights.safetensors is [31mtruncated" in lines[1] and "\x1b" not in listed
    assert lines[2].split() == ["C", "unloaded", "0", "0", "-", "-", "-"]
    assert [line.split()[0] for line in running.splitlines()[1:]] == ["A", "B"]


def test_json_is_what_the_server_says(stage: Start, megpt: Megpt) -> None:
    with stage() as s:
        s.ask("B")
        told = s.client.get("/admin/models").json()["models"]
        models = json.loads(megpt("models", "--json", *at(s))[1])["models"]
        running = json.loads(megpt("ps", "--json", *at(s))[1])["models"]
    assert [m["id"] for m in models] == [m["id"] for m in told] == ["A", "B", "C"]
    assert [(m["id"], m["measured_bytes"]) for m in running] == [("B", {"weights": 60})]


def test_ps_says_how_to_load_if_nothing_is_loaded(stage: Start, megpt: Megpt) -> None:
    with stage() as s:
        assert megpt("ps", *at(s)) == (0, "no model is loaded; `megpt load ID` loads one\n", "")
        assert json.loads(megpt("ps", "--json", *at(s))[1]) == {"models": []}


def test_load_and_unload_return_when_it_is_done(stage: Start, megpt: Megpt) -> None:
    host = FakeHost(sizes={"A": 60 * MIB}, budget=100 * MIB)
    host.held = {"A"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        loading = pool.submit(megpt, "load", "A", *at(s))
        s.until(lambda: s.state("A") == "loading")
        assert not loading.done()
        s.finish_load("A")
        code, out, _ = loading.result(5)
        assert (code, s.state("A")) == (0, "ready")
        assert out.startswith("A: ready, loaded in 0.") and out.endswith("s, 60.0 MiB\n")
        assert megpt("unload", "A", *at(s)) == (0, "A: unloaded\n", "")
        assert s.state("A") == "unloaded"


def test_a_load_without_evictions_leaves_everybody(stage: Start, megpt: Megpt) -> None:
    with stage() as s:
        s.ask("A")
        code, out, err = megpt("load", "B", "--no-evict", *at(s))
        assert (code, out) == (1, "") and "A would have to leave" in err and "without --no-evict" in err
        assert s.state("A") == "ready"
        listed = megpt("operations", *at(s))[1]
        assert "load (nobody leaves)" in listed and "eviction_needed" in listed
        assert megpt("unload", "A", *at(s))[0] == 0 and megpt("load", "B", "--no-evict", *at(s))[0] == 0


def test_without_waiting_they_say_what_goes_on(stage: Start, megpt: Megpt, answer_ids: list[int]) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        begun = megpt("load", "A", "--no-wait", *at(s))
        assert begun == (0, "A: loading; `megpt ps` shows how far it is\n", "")
        s.finish_load("A")
        s.until(lambda: s.state("A") == "ready")
        s.host.engine("A").answer, s.host.engine("A").step_s = answer_ids, 0.1
        stream = pool.submit(s.ask, "A", stream=True, max_tokens=200)
        s.until(lambda: s.host.engine("A").num_running == 1)

        code, _, busy = megpt("unload", "A", "--mode", "if_idle", *at(s))
        assert code == 1 and "--mode drain waits for its requests" in busy
        drains = megpt("unload", "A", "--no-wait", *at(s))
        assert drains == (0, "A: draining; `megpt ps` shows how far it is\n", "")
        assert megpt("unload", "A", "--mode", "abort", *at(s))[:2] == (0, "A: unloaded\n")
        assert "model_unloading" in stream.result(5).text


def test_a_deadline_ends_what_is_left(stage: Start, megpt: Megpt, answer_ids: list[int]) -> None:
    with stage() as s, ThreadPoolExecutor() as pool:
        s.ask("A")
        s.host.engine("A").answer, s.host.engine("A").step_s = answer_ids, 0.5
        stream = pool.submit(s.ask, "A", stream=True, max_tokens=200)
        s.until(lambda: s.host.engine("A").num_running == 1)
        assert megpt("unload", "A", "--deadline", "0.1", *at(s))[:2] == (0, "A: unloaded\n")
        assert "model_unloading" in stream.result(5).text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("load", "nothing"), "There is no model 'nothing' here. Models: A, B, C."),
        (("load", "a/b ?"), "Models: A, B, C."),
        (("unload", "A"), "`megpt set A pinned=false`"),
        (("load", "B"), "Raise memory_budget_bytes, unpin a model"),
        (("load", "B"), "`megpt models` shows what each takes."),
        (("load", "C"), "Model C could not be loaded: config.json is gone"),
    ],
)
def test_refusals_say_what_to_do(stage: Start, megpt: Megpt, args: tuple[str, ...], said: str) -> None:
    host = FakeHost(sizes={"C": 20})
    host.entries["A"]["pinned"] = True
    host.fails = {"C": "config.json is gone"}
    with stage(host) as s:
        s.ask("A")
        code, out, err = megpt(*args, *at(s))
    assert (code, out) == (1, "") and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        ("models",),
        ("ps",),
        ("load", "A"),
        ("unload", "A"),
        ("top", "--once"),
        ("queue",),
        ("events",),
        ("set", "A", "pinned=true"),
    ],
)
def test_who_may_not_is_told_what_is_missing(serve: Serve, megpt: Megpt, command: tuple[str, ...]) -> None:
    with serve(admin_key=ADMIN, api_keys=[CLIENT_KEY]) as live:
        where = ("--url", live.url)
        code, _, no_key = megpt(*command, *where, key=None)
        _, _, wrong = megpt(*command, *where, key="wrong-" + "w" * 32)
        _, _, clients = megpt(*command, *where, key=CLIENT_KEY)
        _, _, no_budget = megpt(*command, *where)
    assert code == 1 and "wants a key. Set MEGPT_ADMIN_KEY" in no_key and "--admin-key-file" in no_key
    assert "does not know the key from MEGPT_ADMIN_KEY" in wrong and "wwww" not in wrong
    assert "needs the admin key" in clients and "sent is from MEGPT_ADMIN_KEY" in clients
    assert "kkkk" not in clients
    assert "Set memory_budget_bytes" in no_budget


def test_a_server_without_an_admin_key_says_so(serve: Serve, megpt: Megpt) -> None:
    with serve() as live:
        code, _, err = megpt("models", "--url", live.url, key=None)
    assert code == 1 and "No admin key is configured" in err and "openssl rand -hex 32" in err


def test_a_server_that_is_not_there_is_told_with_the_remedy(megpt: Megpt) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, err = megpt("ps", "--url", f"http://127.0.0.1:{port}")
    assert code == 1 and f"http://127.0.0.1:{port} can't be reached" in err
    assert "`megpt serve --config configs/many_models.yaml`" in err and "--url" in err


def test_the_key_may_be_in_a_file(stage: Start, megpt: Megpt, tmp_path: Path) -> None:
    file = tmp_path / "admin.key"
    file.write_text(f"{ADMIN}\n")
    with stage() as s:
        code, out, _ = megpt("models", "--admin-key-file", str(file), *at(s), key="wrong-" + "w" * 32)
        assert code == 0 and row(out, "A")[0] == "A"
        file.write_text("wrong-" + "w" * 32)
        _, _, err = megpt("models", "--admin-key-file", str(file), *at(s))
    assert f"does not know the key from {file}" in err


@pytest.mark.parametrize(
    ("args", "key", "said"),
    [
        (("ps", "--url", "127.0.0.1:8000"), ADMIN, "--url must begin with http://"),
        (("ps", "--url", "http://[::1"), ADMIN, "is no address"),
        (("ps", "--admin-key-file", "/nowhere/key"), None, "can't be read: No such file"),
        (("ps", "--admin-key-file", "/dev/null"), None, "is empty"),
        (("ps",), "sha256:" + "0" * 64, "digest"),
        (("ps",), "schlüssel", "printable ASCII"),
        (("unload", "A", "--mode", "abort", "--deadline", "1"), ADMIN, "--deadline is for --mode drain"),
    ],
)
def test_wrong_use_is_exit_code_2(megpt: Megpt, args: tuple[str, ...], key: str | None, said: str) -> None:
    code, _, err = megpt(*args, key=key)
    assert code == 2 and said in err


@pytest.mark.parametrize("deadline", ["-1", "soon", "inf", "nan"])
def test_a_deadline_is_a_time(megpt: Megpt, deadline: str) -> None:
    with pytest.raises(SystemExit) as ended:
        megpt("unload", "A", f"--deadline={deadline}")
    assert ended.value.code == 2


def mock(answer: httpx.Response | Exception) -> AdminClient:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return AdminClient("http://there/v1", ADMIN, transport=httpx.MockTransport(handle))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(200, text="<html>"), "http://there answered 200, but not as a megpt server"),
        (httpx.Response(200, json=[]), "not as a megpt server"),
        (httpx.Response(502, text="Bad Gateway"), "http://there answered 502"),
        (httpx.Response(404, json={"error": {"code": "not_found", "message": "?"}}), "Give its address"),
        (httpx.Response(504, json={"error": {"code": "request_timeout", "message": "Late."}}), "It goes on"),
        (httpx.ReadTimeout("x"), "did not answer within 10 s"),
        (httpx.RemoteProtocolError("cut off"), "can't be reached: cut off"),
    ],
)
def test_whatever_answers_there_is_one_sentence(answer: Any, said: str) -> None:
    with mock(answer) as client, pytest.raises(ServerRefusedError) as raised:
        client.models()
    assert said in str(raised.value) and ADMIN not in str(raised.value)


def test_variants_have_rows_and_are_loaded_and_unloaded_by_name(stage: Start, megpt: Megpt) -> None:
    int4, kv8 = VariantKey("A", "int4"), VariantKey("A", kv_cache_dtype="int8")
    host = FakeHost(sizes={str(int4): 30 * MIB, "A": 60 * MIB}, budget=100 * MIB)
    host.choices["A"] = Choices((int4, kv8))
    host.entries["A"]["pinned"] = True
    with stage(host) as s:
        code, out, _ = megpt("load", "A", "--quantization", "int4", *at(s))
        assert code == 0 and out.startswith("A[quantization=int4]: ready, loaded in 0.")
        listed, running = (megpt(command, *at(s))[1] for command in ("models", "ps"))
        assert [line.split()[0] for line in listed.splitlines()[1:]] == ["A", str(int4), str(kv8), "B", "C"]
        assert [line.split()[:2] for line in running.splitlines()[1:]] == [[str(int4), "ready"]]
        assert [m["id"] for m in json.loads(megpt("ps", "--json", *at(s))[1])["models"]] == ["A"]
        assert "(pinned)" in listed.splitlines()[1] and "(pinned)" not in listed.splitlines()[2]
        refused = megpt("load", "A", "--kv-cache-dtype", "fp8", *at(s))
        assert refused[0] == 1 and "It can also be had as int4" in refused[2]
        gone = megpt("unload", "A", "--quantization", "int4", *at(s))
        assert gone == (0, "A[quantization=int4]: unloaded\n", "")
