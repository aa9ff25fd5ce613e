"""The server against its own engine, and how fast a worker is ready.

Purpose: what HTTP, the worker's process and streaming cost; what the fork server saves.
Does not know: peers.
Invariant: server and engine get the same prompts and threads, in turns.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from benchmarks.measuring import (
    Conditions,
    Figure,
    Outcome,
    Target,
    interleaved,
    random_prompts,
    ratio_of_best,
    spread,
)
from benchmarks.peers.protocol import Generated
from benchmarks.sse_client import Streamed, stream_together
from benchmarks.workloads.bundled import MODEL, VOCAB, engine

HOST = "127.0.0.1"
STREAMS = 8
PROMPT_TOKENS = 128
NEW_TOKENS = 256
READY_TIMEOUT_S = 180.0


def server_and_engine(conditions: Conditions) -> Outcome:
    """Eight streams over HTTP by the same eight in process: tokens per second and time to first token."""
    with engine(conditions) as peer, running_server(conditions.threads) as port:

        def in_process(repetition: int) -> Generated:
            return peer.generate("together", _prompts(repetition), NEW_TOKENS)

        def over_http(repetition: int) -> list[Streamed]:
            return asyncio.run(stream_together(HOST, port, MODEL, _prompts(repetition), NEW_TOKENS))

        measured = interleaved(
            {
                "engine": lambda repetition: _of_engine(in_process(repetition)),
                "server": lambda repetition: _of_server(over_http(repetition)),
            },
            conditions.repetitions,
            conditions.advance,
        )
        facts = {"ours": peer.facts}
    engine_rates, server_rates = (
        [run["tokens_per_s"] for run in measured[arm]] for arm in ("engine", "server")
    )
    engine_first, server_first = (
        [run["first_p50_s"] for run in measured[arm]] for arm in ("engine", "server")
    )
    figures = [
        Figure(
            "server / engine, tokens per second",
            ratio_of_best(server_rates, engine_rates, best=max),
            "x",
            Target(0.85),
            f"server {spread(server_rates)}, engine {spread(engine_rates)} tokens/s",
        ),
        Figure(
            "server / engine, first token p50",
            ratio_of_best(server_first, engine_first, best=min),
            "x",
            Target(1.5, "at most"),
            f"server {spread(server_first)} s, engine {spread(engine_first)} s",
        ),
    ]
    return Outcome(figures, facts, {name: list(runs) for name, runs in measured.items()})


def worker_start(conditions: Conditions) -> Outcome:
    """Seconds until a worker gave its first token: cold, then from the warm fork server."""
    conditions.advance("cold, then warm")
    cold, *warm = asyncio.run(_start_workers(conditions.repetitions + 1))
    figures = [
        Figure(
            "first token of a new worker, warm fork server",
            statistics.median(warm),
            "s",
            Target(2.5, "at most"),
            spread(warm),
        ),
        Figure("first token of a new worker, with the fork server's imports", cold, "s"),
        Figure("warm / cold", statistics.median(warm) / cold),
    ]
    return Outcome(figures, {}, {"ready": [{"cold_s": cold, "warm_s": warm}]})


async def _start_workers(count: int) -> list[float]:
    from memory_efficient_gpt.config import EngineConfig
    from memory_efficient_gpt.frames import Close, Events, Failed, Message, Ready, Submit
    from memory_efficient_gpt.request import Request, SamplingParams
    from memory_efficient_gpt_server.worker_process import WorkerProcess

    times = []
    for _ in range(count):
        news: asyncio.Queue[Message] = asyncio.Queue()
        started = time.perf_counter()
        config = EngineConfig(model=MODEL, device="cpu")
        worker = await WorkerProcess.start(config, news.put_nowait, log_level="WARNING")
        while not isinstance(message := await news.get(), Ready):
            if isinstance(message, Failed):
                raise RuntimeError(f"the worker can't load: {message.error}")
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        worker.send(Submit(Request(id="first", prompt_token_ids=(5, 6, 7), params=params)))
        while not isinstance(await news.get(), Events):
            pass
        times.append(time.perf_counter() - started)
        worker.send(Close())
        await worker.ended
    return times


@contextmanager
def running_server(threads: int) -> Iterator[int]:
    """`megpt serve` with the bundled model on a free port, stopped afterwards; yields the port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "memory_efficient_gpt_server", "serve", "--port", str(port)]
    command += ["--model", MODEL, "--device", "cpu", "--num-threads", str(threads), "--log-level", "WARNING"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEGPT_")}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}; its messages are above")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {READY_TIMEOUT_S:g} s")


def _prompts(repetition: int) -> list[list[int]]:
    return random_prompts(repetition, STREAMS, PROMPT_TOKENS, VOCAB)


def _of_engine(run: Generated) -> dict[str, Any]:
    return {
        "tokens_per_s": run.tokens_per_s,
        "first_p50_s": statistics.median(run.first_token_s),
        **asdict(run),
    }


def _of_server(run: list[Streamed]) -> dict[str, Any]:
    tokens, seconds = sum(stream.tokens for stream in run), max(stream.seconds for stream in run)
    first = statistics.median(stream.first_token_s for stream in run)
    return {"tokens_per_s": tokens / seconds, "first_p50_s": first, "streams": [asdict(s) for s in run]}
