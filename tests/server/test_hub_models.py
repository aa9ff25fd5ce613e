"""A hub model that is registered while the server runs: the real client downloads it, from our own hub."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from memory_efficient_gpt.loading import resolve_model
from tests.server.command_line import serving
from tests.server.fake_hub import COMMIT, hub
from tests.server.staged_models import ADMIN, AS_ADMIN
from tests.server.test_bad_requests import assert_error


def test_a_hub_model_is_downloaded_registered_loaded_and_served(tmp_path: Path) -> None:
    config = tmp_path / "none.yaml"
    model = {"id": "local", "model": "demo-draft", "load": "on_demand", "num_threads": 1}
    config.write_text(json.dumps({"memory_budget_bytes": 300_000_000, "models": [model]}))
    with hub("org/tale", resolve_model("demo-draft")) as source:
        environment = {
            "MEGPT_ADMIN_KEY": ADMIN, "MEGPT_DRAIN_SECONDS": "1", "HF_ENDPOINT": source.url,
            "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        with serving("--config", str(config), **environment) as server:
            url = server.wait_for(r"serving on (http://\S+)")[1]
            with httpx.Client(base_url=url, headers=AS_ADMIN, timeout=60) as client:
                _register_and_ask(client)
                absent = client.post("/admin/models", json={"id": "no", "model": "org/absent"})
                message = assert_error(absent, 404, code="model_not_found", param="model")
                assert "could not be fetched from the hub" in message
                assert {m["id"] for m in client.get("/v1/models").json()["data"]} == {"local", "tale"}
        weights = [path for path in source.paths if path.endswith("/model.safetensors")]
        assert weights and all(f"/resolve/{COMMIT}/" in path for path in weights), "not of one commit"
    folder = tmp_path / "hub" / "hub" / "models--org--tale" / "snapshots" / COMMIT
    assert (folder / "model.safetensors").is_file()


def _register_and_ask(client: httpx.Client) -> None:
    body = {"id": "tale", "model": "org/tale", "revision": "main", "num_threads": 1}
    made = client.post("/admin/models", json=body)
    assert made.status_code == 201, made.text
    assert made.json()["state"] == "unloaded" and made.headers["location"] == "/admin/models/tale"
    texts = []
    for name in ("tale", "local"):
        asked = {"model": name, "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["text"])
    assert texts[0] == texts[1], "what was downloaded is not what the hub had"
