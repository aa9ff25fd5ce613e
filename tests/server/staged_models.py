"""A server under a memory budget over fake engines, for tests of what operators see and do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from memory_efficient_gpt.errors import CheckpointError, ConfigError
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.model_settings import ModelSettings
from memory_efficient_gpt_server.models import ModelCatalog, ServedModel
from memory_efficient_gpt_server.registry.hosted import HostedModel
from memory_efficient_gpt_server.registry.owner import Registry
from tests.server.registry.fake_engines import FakeHost

if TYPE_CHECKING:
    from tests.server.conftest import LiveServer, Serve

ADMIN = "admin-" + "c" * 32
AS_ADMIN = {"authorization": f"Bearer {ADMIN}"}


@dataclass
class Stage:
    """A server over fake engines, and a client with the admin key."""

    live: LiveServer
    host: FakeHost
    registry: Registry
    client: httpx.Client

    def ask(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "a", "max_tokens": 2, **fields}
        return self.client.post("/v1/completions", json=body)

    def state(self, model: str) -> str:
        return str(self.client.get(f"/admin/models/{model}").json()["state"])

    def until(self, condition: Callable[[], bool], timeout_s: float = 5) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def finish_load(self, model: str) -> None:
        self.live.call(self.host.engine(model).may_load.set)


@dataclass(frozen=True)
class FakeMaker:
    """Makes models of a FakeHost, of 60 bytes unless it has other sizes for them."""

    host: FakeHost
    tokenizer: Tokenizer

    def make(
        self, model: ModelSettings, budgets: Mapping[str, int]
    ) -> tuple[HostedModel, Callable[[Registry], ServedModel]]:
        if model.id in self.host.broken:
            raise CheckpointError("config.json names no vocab_size.")
        if model.device not in ("auto", *budgets):
            raise ConfigError([f"device {model.device} has no memory budget."])
        self.host.sizes.setdefault(model.id, 60)
        given = {name: getattr(model, name) for name in ("pinned", "ttl_s", "min_residency_s", "priority")}
        self.host.entries[model.id] = {"source": model.model, "aliases": model.aliases, **given}

        def served(registry: Registry) -> ServedModel:
            return served_model(model.id, registry, self.tokenizer)

        return self.host.hosted(model.id), served


def served_model(model_id: str, registry: Registry, tokenizer: Tokenizer) -> ServedModel:
    """As the API offers it."""
    return ServedModel(
        model_id, registry.engine(model_id), lambda: tokenizer, registry=registry, config_vocab_size=4096,
        aliases=registry.entry(model_id).aliases,
    )  # fmt: skip


Start = Callable[..., contextlib.AbstractContextManager[Stage]]


def stage_starter(serve: Serve, tokenizer: Tokenizer) -> Start:
    """`with start(host, **settings) as stage`."""

    @contextlib.contextmanager
    def start(host: FakeHost | None = None, **settings: Any) -> Iterator[Stage]:
        host = host or FakeHost()
        registry = host.make()
        models = [served_model(model_id, registry, tokenizer) for model_id in registry.models]
        options = {"admin_key": ADMIN, **settings}
        with (
            serve(
                catalog=lambda _: ModelCatalog(models, registry, FakeMaker(host, tokenizer)), **options
            ) as live,
            live.client(headers=AS_ADMIN) as client,
        ):
            yield Stage(live, host, registry, client)

    return start
