"""`megpt serve`: settings, workers, app and uvicorn put together, and taken apart in order.

Purpose: start everything, show it, and stop it without losing an accepted request.
Does not know: routes, engines.
Invariant: the first signal drains and ends with exit code 0; a second SIGINT ends at once, and so does the
first while the server is still being put together.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memory_efficient_gpt_server.commands.options import Commands, byte_size, new_command

if TYPE_CHECKING:
    from memory_efficient_gpt_server.graceful import GracefulServer
    from memory_efficient_gpt_server.settings import Settings
    from memory_efficient_gpt_server.workers import WorkerModel

BACKLOG: Final = 2048

_EXAMPLES = """\
  megpt serve                                        the bundled demo model on http://127.0.0.1:8000
  megpt serve --model demo --model ./my-model        two models, each in a process of its own
  megpt serve --models-dir ~/models --port 9000      every model folder in ~/models
  megpt serve --config configs/default.yaml          all settings from a file
  MEGPT_API_KEYS=$(openssl rand -hex 32) megpt serve --host 0.0.0.0

Every setting can also be an environment variable (MEGPT_PORT) or stand in the YAML file; this order wins:
command line, environment, file, default. `megpt doctor` shows each value and where it came from.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(commands, "serve", summary="serve models over HTTP", examples=_EXAMPLES)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with settings (default: $MEGPT_CONFIG)"
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--model", action="append", metavar="MODEL", help="bundled name, folder or hub id; repeat for several"
    )
    parser.add_argument("--models-dir", type=Path, metavar="DIR", help="serve every model folder in DIR")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with API keys, one on a line")
    parser.add_argument(
        "--drain-seconds", type=float, metavar="S", help="for running requests at shutdown (default: 30)"
    )
    parser.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="default: INFO")
    parser.add_argument(
        "--log-format", choices=("auto", "json", "human"), help="auto: human on a terminal, else json"
    )
    _add_model_options(parser)
    parser.set_defaults(run=run)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine options of the models given with --model")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--dtype", help="auto, float32, bfloat16 or float16, of the weights")
    group.add_argument(
        "--quantization",
        metavar="SCHEME",
        help="store weights as int4, int8, int4-g128, bnb-nf4 ... (default: as they are)",
    )
    group.add_argument("--kv-cache-dtype", metavar="DTYPE", help="as --dtype, or int8, of the KV cache")
    group.add_argument("--kv-cache-bytes", type=byte_size, metavar="SIZE", help="for example 512MiB")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt + output of a request")
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="sequences computed together (default: 64)"
    )
    group.add_argument(
        "--num-threads", type=int, metavar="N", help="CPU threads of each (default: an equal share)"
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="same tokens whatever is computed beside a request (costs speed on GPUs)",
    )


_MODEL_OPTIONS: Final = (
    "device", "dtype", "quantization", "kv_cache_dtype", "kv_cache_bytes", "max_model_len", "max_num_seqs",
    "num_threads", "deterministic",
)  # fmt: skip
_SERVER_OPTIONS: Final = ("host", "port", "models_dir", "drain_seconds", "log_level", "log_format")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    import asyncio

    from memory_efficient_gpt_server.settings import load_settings

    wrong: dict[str, str] = {}
    settings = load_settings(given_settings(args, wrong), os.environ, args.config, wrong).settings

    with listen(settings) as listener:
        from memory_efficient_gpt_server.worker_process import start_fork_server

        start_fork_server()  # its imports take seconds: they go on while this process does its own

        from memory_efficient_gpt_server.commands.load_display import late_stderr
        from memory_efficient_gpt_server.logs import configure_logging

        configure_logging(settings.log_level, settings.log_format, late_stderr())
        with _interrupts_end_at_once():
            server, workers = _put_together(settings)
        return asyncio.run(_serve(server, workers, listener, settings.has_keys))


def given_settings(args: argparse.Namespace, wrong: dict[str, str]) -> dict[str, Any]:
    """The settings that the command line gives. What is wrong there goes to `wrong`: setting -> problem."""
    given = {name: value for name in _SERVER_OPTIONS if (value := getattr(args, name)) is not None}
    engine = {name: value for name in _MODEL_OPTIONS if (value := getattr(args, name)) is not None}
    if engine and not args.model:
        names = ", ".join("--" + name.replace("_", "-") for name in engine)
        wrong["models"] = f"{names} needs --model: it says how models given there are run."
    if args.model:
        given["models"] = [{"model": model, **engine} for model in args.model]
    if args.api_key_file is not None:
        given["api_keys"] = _read_keys(args.api_key_file, wrong)
    return given


def _read_keys(path: Path, wrong: dict[str, str]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        wrong["api_keys"] = f"--api-key-file {path} can't be read: {error}."
        return []
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        wrong["api_keys"] = f"--api-key-file {path} has no key. Write one on each line."
    return keys


def listen(settings: Settings) -> socket.socket:
    """The listening socket, bound before anything is loaded. Raises ConfigError."""
    from memory_efficient_gpt.errors import ConfigError

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        made = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that no name service could know
        raise ConfigError([_why_not_listening(settings, error)]) from error
    # asyncio sets TCP_NODELAY only where the protocol is named, and a socket passes its own on to those it
    # accepts; without it every answer on a kept-alive connection waits 40 ms for the client's delayed ACK
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())


def _why_not_listening(settings: Settings, error: OSError | UnicodeError) -> str:
    where = f"{settings.host} port {settings.port} can't be listened on"
    code = error.errno if isinstance(error, OSError) else None
    if code is None or code < 0:  # the name service's own numbers
        why = getattr(error.__context__, "strerror", None) or error
        return f"{where}: {why}. Choose another --host."
    why = os.strerror(code)  # create_server's text repeats the address
    if code == errno.EADDRINUSE:
        return (
            f"{where}: {why}. Another program, perhaps another `megpt serve`, has it. Choose another --port; "
            "--port 0 takes a free one."
        )
    if code == errno.EADDRNOTAVAIL:
        return f"{where}: {why}. Choose a --host that this machine has."
    return f"{where}: {why}. Choose another --port; --port 0 takes a free one."


@contextmanager
def _interrupts_end_at_once() -> Iterator[None]:
    """Ctrl-C ends the process by itself: an exception may get lost in the imports that go on meanwhile.

    Nothing is served yet that needs a goodbye; the fork server ends when it sees that its parent is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _put_together(settings: Settings) -> tuple[GracefulServer, list[WorkerModel]]:
    from memory_efficient_gpt_server.app import create_app, lifecycle_of
    from memory_efficient_gpt_server.graceful import GracefulServer
    from memory_efficient_gpt_server.hosting import build_catalog
    from memory_efficient_gpt_server.workers import WorkerModel

    json_logs = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    catalog = build_catalog(settings, worker_log_level=settings.log_level, worker_log_json=json_logs)
    app = create_app(settings, catalog)
    server = GracefulServer(app, drain_s=settings.drain_seconds, drained=lifecycle_of(app).drained)
    return server, [model.engine for model in catalog if isinstance(model.engine, WorkerModel)]


async def _serve(
    server: GracefulServer, workers: list[WorkerModel], listener: socket.socket, key_needed: bool
) -> int:
    import asyncio

    from memory_efficient_gpt_server.commands.load_display import show_loading

    showing = asyncio.create_task(show_loading(workers, _url(listener), key_needed=key_needed))
    try:
        await server.serve(sockets=[listener])
    finally:
        showing.cancel()
    return server.exit_code


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
