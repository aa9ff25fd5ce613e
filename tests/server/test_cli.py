"""The command line, run as users run it."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.cli import COMMANDS, build_parser, main
from memory_efficient_gpt_server.commands.options import byte_size
from memory_efficient_gpt_server.commands.serve import given_settings, listen
from memory_efficient_gpt_server.settings import load_settings
from tests.server.command_line import clean_environment, megpt


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


# ---- help, arguments, settings


def _last_line(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=True)
    return done.stdout.splitlines()[-1]


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from memory_efficient_gpt_server.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'rich', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time())"
    )
    seconds, bare = [], []
    for _ in range(3):  # other programs share the machine: the least counts, beside an interpreter alone
        heavy, took = _last_line(code).rsplit(" ", 1)
        assert heavy == "[]"
        seconds.append(float(took))
        bare.append(float(_last_line("import time; print(time.process_time())")))
    assert min(seconds) < 15 * min(bare), "about eight times as long as an interpreter that does nothing"


@pytest.mark.parametrize("command", [command.__name__.rsplit(".", 1)[1] for command in COMMANDS])
def test_every_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert f"  megpt {command}" in capsys.readouterr().out


def _help_texts(capsys: pytest.CaptureFixture[str]) -> str:
    parser = build_parser()
    texts = [parser.epilog or ""]
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parser.parse_args([command.__name__.rsplit(".", 1)[1], "--help"])
        texts.append(capsys.readouterr().out)
    return "\n".join(texts)


def test_every_file_named_in_the_help_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = re.findall(r"(?<![\w/.:])\w[\w.-]*/[\w./-]*\.\w+", _help_texts(capsys))
    assert "configs/default.yaml" in named
    root = Path(__file__).parents[2]
    assert [name for name in named if not (root / name).is_file()] == []


def test_every_example_in_the_help_is_a_valid_command(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    # an example ends at three spaces (its explanation), a comment, a pipe or a redirection
    examples = re.findall(
        r"^  (?:\S+=\S+(?: \S+ \S+\))? )?megpt (.+?)(?:   .*| [|<>#] .*)?$", _help_texts(capsys), re.M
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
        port = taken.getsockname()[1]
        done = megpt("serve", "--port", str(port))
    assert done.returncode == 2
    why = os.strerror(errno.EADDRINUSE)
    assert done.stderr == (
        f"megpt: 127.0.0.1 port {port} can't be listened on: {why}. Another program, perhaps another "
        "`megpt serve`, has it. Choose another --port; --port 0 takes a free one.\n"
    )


@pytest.mark.parametrize(
    ("host", "remedy"), [("a..b", "another --host"), ("203.0.113.7", "that this machine has")]
)
def test_an_address_that_is_not_ours_is_told_with_the_remedy(host: str, remedy: str) -> None:
    settings = load_settings({"host": host, "port": 0, "api_keys": ["k" * 32]}, {}).settings
    with pytest.raises(ConfigError, match=f"{host}.*{remedy}"):
        listen(settings)


def test_a_name_that_is_not_known_is_told_in_the_name_services_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_server(*args: Any, **options: Any) -> socket.socket:
        try:
            raise socket.gaierror(socket.EAI_NONAME, "Name not known")
        except OSError as error:  # as socket.create_server does
            raise OSError(error.errno, "Name not known (while attempting to bind)") from None

    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(ConfigError, match=r"Name not known\. Choose another --host"):
        listen(load_settings({"port": 0}, {}).settings)


def test_the_listener_names_its_protocol_so_that_asyncio_sends_without_delay() -> None:
    with listen(load_settings({"port": 0}, {}).settings) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_what_serve_itself_finds_wrong_is_told_with_the_rest(tmp_path: Path) -> None:
    words = ("--max-num-seqs", "4", "--api-key-file", str(tmp_path / "none"), "--port", "99999")
    done = megpt("serve", "--host", "0.0.0.0", *words, MEGPT_MAX_SEQUENCES="0")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 5
    for part in ("--max-num-seqs needs --model", "--api-key-file", "port (command line)", "max_sequences"):
        assert part in done.stderr


def test_a_key_file_without_a_key_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    wrong: dict[str, str] = {}
    given_settings(build_parser().parse_args(["serve", "--api-key-file", str(tmp_path / "keys")]), wrong)
    assert "has no key" in wrong["api_keys"]


def _given(*words: str) -> dict[str, Any]:
    wrong: dict[str, str] = {}
    given = given_settings(build_parser().parse_args(["serve", *words]), wrong)
    assert not wrong
    return given


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
        (("generate", "demo"), "'demo' was taken as the model"),
        (("generate", "It was a dark"), "megpt generate demo -p 'It was a dark'"),
        (("generate", "word " * 1000), "prompt is empty"),
    ],
)
def test_generate_says_what_is_wrong(here: Here, words: tuple[str, ...], told: str) -> None:
    done = here(*words)
    assert done.code == 1
    assert told in done.err


def test_a_text_without_its_option_is_refused_with_the_command_to_type(here: Here) -> None:
    done = here("generate", "demo", "It was a dark")
    assert done.code == 2
    assert "megpt generate demo -p 'It was a dark'" in done.err


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
