"""The command line, run as users run it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.cli import COMMANDS, build_parser, main
from memory_efficient_gpt_server.commands.options import byte_size
from memory_efficient_gpt_server.commands.serve import given_settings

MEGPT = [sys.executable, "-m", "memory_efficient_gpt_server"]
START_TIMEOUT_S = 60


def _environment(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MEGPT_")}
    return {**clean, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **extra}


def megpt(*args: str, stdin: str = "", timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MEGPT, *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=_environment(**env),
        check=False,
    )


@dataclass
class Done:
    """How a command run in this process ended."""

    code: int
    out: str
    err: str


Here = Callable[..., Done]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs a command in this process: importing torch anew for each would take most of the time."""
    for name in [name for name in os.environ if name.startswith("MEGPT_")]:
        monkeypatch.delenv(name)

    def run(*args: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(args)
        return Done(code, *capsys.readouterr())

    return run


class RunningServer:
    """`megpt serve` on a free port, its output collected."""

    def __init__(self, *args: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [*MEGPT, "serve", "--port", "0", "--num-threads", "1", *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(**env),
            start_new_session=True,
        )  # fmt: skip
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """A match in what was printed to standard output so far or later."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if match := re.search(pattern, "".join(self.out)):
                return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} was not printed:\n{''.join(self.out)}\n{''.join(self.err)}")

    def url(self) -> str:
        url = self.wait_for(r"serving on (http://\S+)")[1]
        self.wait_for("try it:")
        return url

    def workers(self) -> list[int]:
        """Process ids of all descendants."""
        found: list[int] = []
        todo = [self.process.pid]
        while todo:
            children = Path(f"/proc/{todo[0]}/task/{todo.pop(0)}/children").read_text().split()
            found += map(int, children)
            todo += map(int, children)
        return found

    def wait(self, timeout_s: float = 20) -> int:
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


@contextlib.contextmanager
def serving(*args: str, **env: str) -> Iterator[RunningServer]:
    server = RunningServer(*args, **env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _assert_gone(pids: list[int]) -> None:
    """Within two seconds of the server's end."""
    deadline = time.monotonic() + 2
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- help, arguments, settings


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from memory_efficient_gpt_server.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'rich', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True
    )
    heavy, seconds = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.2


@pytest.mark.parametrize("command", [command.__name__.rsplit(".", 1)[1] for command in COMMANDS])
def test_every_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert f"  megpt {command}" in capsys.readouterr().out


def test_every_example_in_the_help_is_a_valid_command(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    texts = [parser.epilog or ""]
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parser.parse_args([command.__name__.rsplit(".", 1)[1], "--help"])
        texts.append(capsys.readouterr().out)
    # an example ends at three spaces (its explanation), a comment, a pipe or a redirection
    examples = re.findall(
        r"^  (?:\S+=\S+(?: \S+ \S+\))? )?megpt (.+?)(?:   .*| [|<>#] .*)?$", "\n".join(texts), re.M
    )
    assert len(examples) > 20
    for example in examples:
        assert isinstance(parser.parse_args(shlex.split(example)), argparse.Namespace)


def test_version_names_what_it_runs_on() -> None:
    done = megpt("version")
    assert re.fullmatch(r"megpt \d+\.\d+\.\d+ \(python 3\S+, torch \S+, transformers \S+\)\n", done.stdout)


def test_a_wrong_option_is_exit_code_2() -> None:
    assert megpt("serve", "--prot", "1").returncode == 2


def test_all_wrong_settings_are_told_at_once_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("hots: 0.0.0.0\nmax_sequences: 0\n")
    done = megpt("serve", "--config", str(config), "--port", "99999", MEGPT_LOG_LEVEL="LOUD")
    assert done.returncode == 2
    for word in ("hots", "max_sequences", "port", "log_level"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_told_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = megpt("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "Choose another --port" in done.stderr


def test_engine_options_need_a_model_to_belong_to() -> None:
    done = megpt("serve", "--max-num-seqs", "4")
    assert done.returncode == 2
    assert "--max-num-seqs needs --model" in done.stderr


def _given(*words: str) -> dict[str, Any]:
    return given_settings(build_parser().parse_args(["serve", *words]))


def test_serve_gives_only_the_settings_that_were_given() -> None:
    assert _given() == {}
    assert _given("--port", "0", "--model", "a", "--model", "b", "--kv-cache-bytes", "1MiB") == {
        "port": 0,
        "models": [{"model": "a", "kv_cache_bytes": 1 << 20}, {"model": "b", "kv_cache_bytes": 1 << 20}],
    }


def test_api_keys_come_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# for the web site\nfirst-key-0123456789\n\n second-key-0123456789 \n")
    assert _given("--api-key-file", str(keys)) == {
        "api_keys": ["first-key-0123456789", "second-key-0123456789"]
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1KiB", 1024),
        ("1kb", 1000),
        ("1.5G", 1_500_000_000),
        ("2MiB", 2 << 20),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "MiB", "1QB", "1i"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        byte_size(text)


# ---- commands that need no server


def test_generate_streams_a_text_and_a_seed_repeats_it(here: Here) -> None:
    words = ("generate", "demo", "-n", "12", "--seed", "3")
    first = here(*words, "-p", "The old house stood")
    again = here(*words, stdin="The old house stood")
    assert first.code == 0, first.err
    assert len(first.out.strip()) > 10
    assert again.out == first.out


def test_generate_gives_json(here: Here) -> None:
    answer = json.loads(here("generate", "demo", "-p", "The", "-n", "5", "-t", "0", "--json").out)
    assert answer["completion_tokens"] == 5
    assert answer["finish_reason"] == "length"
    assert answer["text"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate", "no-such-model", "-p", "x"), "no-such-model"),
        (("generate", "demo", "-p", "x", "-t", "9"), "temperature must be"),
        (("generate", "demo"), "prompt is empty"),
    ],
)
def test_generate_says_what_is_wrong(here: Here, words: tuple[str, ...], told: str) -> None:
    done = here(*words)
    assert done.code == 1
    assert told in done.err


def test_chat_keeps_a_conversation(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    template = Tokenizer.apply_chat_template

    def remember(self: Tokenizer, messages: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([message["role"] for message in messages])
        return template(self, messages, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", remember)
    done = here(
        *("chat", "demo", "--system", "Be kind.", "-n", "8", "--seed", "1"),
        stdin="Hello\nAnd now?\n/help\n/nonsense\n/reset\nHi\n/quit\nnever\n",
    )
    assert done.code == 0, done.err
    first = ["system", "user"]
    assert seen == [first, [*first, "assistant", "user"], first]
    assert "/system TEXT" in done.out
    assert "there is no command /nonsense" in done.err


def test_chat_refuses_engine_options_that_a_server_would_ignore(here: Here) -> None:
    done = here("chat", "demo", "--url", "http://127.0.0.1:9", "--dtype", "float32")
    assert done.code == 2
    assert "--dtype" in done.err


def test_chat_says_when_there_is_no_server(here: Here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = here("chat", "demo", "--url", f"http://127.0.0.1:{port}", stdin="Hello\n")
    assert done.code == 1
    assert "Is the server running?" in done.err


def test_bench_measures_what_was_asked(here: Here) -> None:
    words = ("--num-requests", "6", "--input-len", "16", "--output-len", "8", "--concurrency", "3")
    result = json.loads(here("bench", *words, "--json").out)
    assert (result["num_requests"], result["concurrency"]) == (6, 3)
    assert result["output_tokens_per_s"] == pytest.approx(48 / result["seconds"], rel=0.05)
    assert 0 < result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"]
    assert "tokens/s" in here("bench", *words).out


def test_doctor_reports_settings_with_their_sources(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGPT_PORT", "9999")
    done = here("doctor", "--json")
    report = json.loads(done.out)
    assert done.code == 0, report
    findings = {(f["section"], f["name"]): f for f in report["findings"]}
    assert findings["settings", "port"]["value"] == "9999  (MEGPT_PORT)"
    assert findings["settings", "host"]["value"] == "127.0.0.1  (default)"
    assert {"torch", "native kernels", "models"} <= {section for section, _ in findings}
    assert ("models", "demo") in findings


def test_doctor_fails_on_settings_that_would_stop_the_server(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGPT_HOST", "0.0.0.0")
    done = here("doctor")
    assert done.code == 1
    assert re.search(r"X wrong .*API key", done.out)
    assert "1 failures" in done.out


# ---- the server


@pytest.fixture
def damaged_demo(tmp_path: Path) -> Path:
    """The demo model with the end of its weights missing."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in bundled_models()["demo"].iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    return folder


def test_the_server_serves_what_it_can_drains_on_sigterm_and_leaves_nothing(damaged_demo: Path) -> None:
    with serving("--model", "demo", "--model", str(damaged_demo)) as server:
        url = server.url()
        assert re.search(r"damaged: failed \(.*model\.safetensors", "".join(server.out))
        processes = server.workers()
        chat = megpt("chat", "demo", "--url", url, "-n", "5", stdin="Hello\n")
        assert chat.returncode == 0, chat.stderr
        assert chat.stdout.strip()

        body = {"model": "demo", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            refused = httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=30)
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2].replace(" ", "")
        assert server.wait() == 0
        _assert_gone(processes)


def test_a_second_interrupt_ends_the_server_at_once() -> None:
    with serving("--model", "demo") as server:
        url = server.url()
        processes = server.workers()
        body = {
            "model": "demo",
            "prompt": "Once",
            "max_tokens": 400,
            "n": 8,
            "ignore_eos": True,
            "stream": True,
        }
        request = httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30)
        with contextlib.suppress(httpx.HTTPError), request as stream:
            next(stream.iter_lines())
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
            server.process.send_signal(signal.SIGINT)
            assert server.wait(5) == 130
        _assert_gone(processes)
