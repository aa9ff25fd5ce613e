"""Real worker processes: one checkpoint as bf16, int4 and int8 under one budget, chosen by requests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.description import METHOD
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.registry.sizing import sized
from memory_efficient_gpt_server.registry.variants import VariantKey
from memory_efficient_gpt_server.settings import Settings, load_settings
from memory_efficient_gpt_server.worker_process import start_fork_server
from tests.server.conftest import LiveServer, Serve
from tests.server.staged_models import ADMIN, AS_ADMIN
from tests.server.test_bad_requests import assert_error

CONFIG = EngineConfig(model="demo", num_kv_blocks=200)
PROMPT = "The old house stood at the end of the lane, and nobody had lived there for many years."


def catalog(settings: Settings) -> ModelCatalog:
    return build_catalog(settings, worker_log_level="WARNING", worker_log_json=False)


def taken_bytes(**options: Any) -> int:
    _, estimate = sized(replace(CONFIG, **options), 1 << 40)
    return sum(amount.bytes for amount in estimate.awake())


@pytest.fixture(scope="module")
def live(serve: Serve) -> Iterator[LiveServer]:
    """Room for the int4 and the int8 variant together, or for one of them and the original."""
    start_fork_server()
    int8_kv = {"quantization": "int8", "kv_cache_dtype": "int8"}
    budget = taken_bytes() + taken_bytes(quantization="int4") + 1_000_000
    model = {
        "id": "house", "model": "demo", "aliases": ["home"], "load": "on_demand", "num_threads": 1,
        "num_kv_blocks": 200, "variants": ["int4", int8_kv],
    }  # fmt: skip
    free = {"id": "free", "model": "demo", "load": "on_demand", "num_kv_blocks": 200, "variants": "any"}
    options = {"models": [model, free], "memory_budget_bytes": budget, "admin_key": ADMIN}
    with serve(catalog=catalog, **options) as running:
        yield running


@pytest.fixture
def client(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60, headers=AS_ADMIN) as made:
        yield made


def ask(client: httpx.Client, wish: dict[str, Any], model: str = "house", **fields: Any) -> httpx.Response:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 20,
        "temperature": 0,
        "optimizations": wish,
        **fields,
    }
    return client.post("/v1/completions", json=body)


def loaded(client: httpx.Client, model: str = "house") -> set[str]:
    shown = client.get(f"/admin/models/{model}").json()["variants"]
    return {variant["variant"] for variant in shown if variant["state"] == "ready"}


def test_requests_choose_variants_which_share_the_budget(client: httpx.Client) -> None:
    original = ask(client, {}).json()
    int4 = ask(client, {"quantization": "int4", "receipt": True}, model="home").json()
    assert int4["model"] == "house" and int4["receipt"]["quantization"] == "int4"
    assert int4["receipt"]["load_ms"] > 10 and int4["receipt"]["variant"] == "house[quantization=int4]"
    assert loaded(client) == {"house", "house[quantization=int4]"}, "they fit side by side"
    int8 = ask(client, {"kv_cache_dtype": "int8", "receipt": True}).json()["receipt"]
    assert (int8["quantization"], int8["kv_cache_dtype"]) == ("int8", "int8")
    ready = loaded(client)
    assert "house[quantization=int8,kv=int8]" in ready and "house" not in ready, "the oldest made room"
    shown = {v["variant"]: v for v in client.get("/admin/models/house").json()["variants"]}
    for name in ready:
        assert shown[name]["measured_bytes"] == shown[name]["estimated_bytes"], "the estimate is wrong"
    again = ask(client, {"quantization": "bf16"})
    assert (
        again.json()["choices"] == original["choices"] and again.headers["x-megpt-model-state"] == "unloaded"
    )


def test_a_receipt_has_the_measured_memory_and_the_reused_tokens(client: httpx.Client) -> None:
    wish = {"quantization": "int4", "receipt": True}
    salt = {"cache_salt": "receipts"}
    first, second = (ask(client, wish, **salt).json() for _ in range(2))
    info = client.get("/v1/models/house").json()
    assert info["kv_cache_bytes"] is not None
    block_bytes = info["kv_cache_bytes"] // (info["num_kv_blocks"] + 1)
    num_tokens = first["usage"]["prompt_tokens"] + 19  # the last one is never read
    blocks = -(-num_tokens // info["block_size"])
    assert first["receipt"]["kv_peak_bytes"] == blocks * block_bytes == second["receipt"]["kv_peak_bytes"]
    assert first["receipt"]["kv_byte_seconds"] > 0 and first["receipt"]["queue_ms"] >= 0
    assert first["receipt"]["cached_tokens"] == 0 and second["receipt"]["cached_tokens"] >= info["block_size"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert second["receipt"]["cached_tokens"] == cached
    streamed = ask(client, wish, stream=True).text.split("data: ")
    assert '"receipt":{' in streamed[-2] and '"choices":[]' in streamed[-2] and "[DONE]" in streamed[-1]


def test_any_variant_of_a_model_that_allows_it_but_not_what_the_device_lacks(client: httpx.Client) -> None:
    told = ask(client, {"quantization": "int4-g128", "receipt": True}, model="free").json()["receipt"]
    assert told["quantization"] == "int4-g128"
    refused = ask(client, {"kv_cache_dtype": "fp8"}, model="free")
    assert_error(refused, 400, param="optimizations")
    assert "fp8 is for CUDA; on a CPU use auto, bfloat16, float32 or int8" in refused.text
    refused = ask(client, {"quantization": "int8-g64"})
    assert_error(refused, 400, param="optimizations.quantization")
    assert "int8 with a KV cache in int8" in refused.text and loaded(client, "free") != set()


def test_a_stream_goes_on_after_its_variants_worker_died_and_its_receipt_says_so(
    client: httpx.Client, live: LiveServer
) -> None:
    registry = live.server.catalog.registry
    assert registry is not None
    body = {
        "model": "house", "prompt": PROMPT, "max_tokens": 500, "ignore_eos": True, "stream": True,
        "optimizations": {"quantization": "int4", "receipt": True},
    }  # fmt: skip
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data:"))
        next(lines)
        pid = registry.pid(VariantKey("house", "int4"))
        assert pid is not None
        os.kill(pid, 9)
        *_, last, done = lines
    told = json.loads(last.removeprefix("data: "))["receipt"]
    assert done == "data: [DONE]" and told["resumed"] is True
    assert told["kv_peak_bytes"] >= 500 * 24_576 / 16 and told["kv_byte_seconds"] > 0


def test_a_scheme_for_a_quantized_checkpoint_is_the_operators_mistake(
    demo_folder: Path, tmp_path: Path
) -> None:
    for file in demo_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = (demo_folder / "config.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(
        f'{config}, "quantization_config": {{"quant_method": "{METHOD}"}}}}'
    )
    models = [{"id": "q", "model": str(tmp_path), "load": "on_demand", "variants": ["int4"]}]
    settings = load_settings({"models": models, "memory_budget_bytes": 10**9}, {}).settings
    with pytest.raises(ConfigError, match="model q lists the variant int4, but its checkpoint is quantized"):
        catalog(settings)
