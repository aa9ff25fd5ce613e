"""A real server on a real socket for every test that wants one, with scripted models behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.app import create_app
from memory_efficient_gpt_server.commands.serve import listen
from memory_efficient_gpt_server.deps import Server
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.settings import Settings, load_settings
from tests.server.quantize_runs import quantize as quantize
from tests.server.quantize_runs import unloadable as unloadable
from tests.server.scripted_model import ScriptedEngine
from tests.server.staged_models import Start, stage_starter

ANSWER = "The old house stood at the end of the lane, and nobody had lived there for years."


@dataclass
class LiveServer:
    """A server in a thread. `engine` is the first model's."""

    url: str
    host: str
    port: int
    server: Server
    engine: ScriptedEngine
    loop: asyncio.AbstractEventLoop

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, **options)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` on the server's event loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)


Serve = Callable[..., contextlib.AbstractContextManager[LiveServer]]


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return bundled_models()["demo"]


@pytest.fixture(scope="session")
def tokenizer(demo_folder: Path) -> Tokenizer:
    return Tokenizer.load(demo_folder)


@pytest.fixture(scope="session")
def answer_ids(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.encode(ANSWER))


@pytest.fixture(scope="session")
def serve(tokenizer: Tokenizer, answer_ids: list[int]) -> Serve:
    """Start a server: `with serve(engine=..., **settings) as live`. catalog: instead of the demo's engine."""

    @contextlib.contextmanager
    def start(
        engine: ScriptedEngine | None = None,
        defaults: dict[str, float] | None = None,
        catalog: Callable[[Settings], ModelCatalog] | None = None,
        **settings: Any,
    ) -> Iterator[LiveServer]:
        engine = engine or ScriptedEngine(list(answer_ids))
        model = ServedModel("demo", engine, tokenizer, defaults or {})
        checked = load_settings({"port": 0, **settings}, {}).settings
        app = create_app(checked, ModelCatalog([model]) if catalog is None else catalog(checked))
        config = uvicorn.Config(
            app, http="h11", log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        loops: list[asyncio.AbstractEventLoop] = []
        listener = listen(checked)  # as `megpt serve` does, so that tests see its connections

        async def run() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.005)
        host, port = listener.getsockname()[:2]
        try:
            yield LiveServer(f"http://{host}:{port}", host, port, app.state.megpt, engine, loops[0])
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"

    return start


@pytest.fixture(scope="module")
def live(serve: Serve) -> Iterator[LiveServer]:
    """One server for a module, for tests that leave it as it was."""
    with serve() as running:
        yield running


@pytest.fixture
def stage(serve: Serve, tokenizer: Tokenizer) -> Start:
    """Start a server under a memory budget: `with stage(host, **settings) as s`."""
    return stage_starter(serve, tokenizer)
