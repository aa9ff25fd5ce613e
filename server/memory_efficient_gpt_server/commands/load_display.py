"""What a person sees while models load: bars on a terminal, lines otherwise, then how to call the server.

Purpose: the start of `megpt serve`, shown.
Does not know: how models load.
Invariant: bars go to standard error and only to a terminal; the address goes to standard output.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TextIO, cast

if TYPE_CHECKING:
    from memory_efficient_gpt_server.workers import WorkerModel

REFRESH_S: Final = 0.1


def late_stderr() -> TextIO:
    """A stream to whatever sys.stderr is at that time, so that log lines appear above a live bar."""
    return cast(TextIO, _LateStderr())


class _LateStderr(io.TextIOBase):
    def write(self, text: str) -> int:
        """Pass on."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Pass on."""
        sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether standard error is a terminal."""
        return sys.stderr.isatty()


async def show_loading(models: Sequence[WorkerModel], url: str, *, key_needed: bool) -> None:
    """Print the address, show the loads until each is ready or failed, then print a command to try."""
    print(f"serving on {url}", flush=True)
    if sys.stderr.isatty():
        await _bars(models)
    await asyncio.gather(*(model.wait_ready() for model in models), return_exceptions=True)
    ready = [model for model in models if model.ready]
    for model in models:
        print(_state_line(model), flush=True)
    if ready:
        print(f"try it:\n{_curl(url, ready[0].name, key_needed=key_needed)}", flush=True)


async def _bars(models: Sequence[WorkerModel]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = [(model, bars.add_task(model.name, total=1.0)) for model in models]
        while any(model.state == "loading" for model in models):
            for model, task in tasks:
                text = f"{model.name}: {model.progress.phase}"
                bars.update(task, description=text, completed=model.progress.fraction)
            await asyncio.sleep(REFRESH_S)


def _state_line(model: WorkerModel) -> str:
    if model.info is None or not model.ready:
        return f"{model.name}: {model.state} ({model.reason})"
    info, seconds = model.info, model.times.ready_s or 0.0
    return (
        f"{model.name}: ready in {seconds:.1f} s on {info.device} ({info.quantization or info.dtype}, "
        f"{info.weights_bytes / 2**20:.0f} MiB of weights, tier {info.tier}, {info.max_model_len} tokens, "
        f"KV cache {info.kv_cache_bytes / 2**20:.0f} MiB)"
    )


def _curl(url: str, model: str, *, key_needed: bool) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if key_needed else ""
    return f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
