"""Other names for a model: requests may use them, answers say the id."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt_server.settings import load_settings
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start
from tests.server.test_bad_requests import assert_error


def test_an_alias_is_as_good_as_the_id_everywhere(stage: Start) -> None:
    host = FakeHost()
    host.entries["A"]["aliases"] = ("gpt-4o", "best")
    with stage(host) as s:
        assert s.ask("best").json()["model"] == "A"
        listed = {m["id"]: m["aliases"] for m in s.client.get("/v1/models").json()["data"]}
        assert listed == {"A": ["gpt-4o", "best"], "B": [], "C": []}
        assert s.client.get("/v1/models/gpt-4o").json()["id"] == "A"
        assert s.client.post("/v1/tokenize", json={"model": "best", "prompt": "a"}).status_code == 200
        assert s.client.get("/admin/models/best").json()["aliases"] == ["gpt-4o", "best"]
        assert s.client.post("/admin/plan", json={"model": "best"}).json()["model"] == "A"
        assert s.client.post("/admin/models/best/unload", json={"wait": True}).json()["state"] == "unloaded"
        assert 'model_name="best"' not in s.client.get("/metrics").text
        assert_error(s.ask("worst"), 404, code="model_not_found")


def settings_with(*models: dict[str, Any]) -> Any:
    return load_settings({"models": list(models)}, {}).settings


def test_aliases_need_no_budget() -> None:
    (model,) = settings_with({"model": "demo", "aliases": ["a.b", "c"]}).served_models()
    assert model.aliases == ("a.b", "c") and model.engine_config().model == "demo"


@pytest.mark.parametrize(
    ("models", "said"),
    [([{"id": "a", "model": "demo", "aliases": ["b"]}, {"id": "b", "model": "demo"}],
      "model a has the alias 'b', which is the id of a model"),
     ([{"id": "a", "model": "demo", "aliases": ["a"]}], "the alias 'a', which is the id"),
     ([{"id": "a", "model": "demo", "aliases": ["x"]}, {"id": "b", "model": "demo", "aliases": ["x"]}],
      "2 models have the alias 'x'"),
     ([{"id": "a", "model": "demo", "aliases": ["x", "x"]}], "or one has it twice"),
     ([{"id": "a", "model": "demo", "aliases": ["../x"]}], "must be a letter or digit")],
)  # fmt: skip
def test_a_name_must_mean_one_model(models: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_with(*models)
