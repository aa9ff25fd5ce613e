"""Settings: where values come from, and every mistake at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt_server.model_settings import LIFECYCLE_FIELDS, ModelSettings
from memory_efficient_gpt_server.settings import Settings, load_settings

CONFIGS = Path(__file__).parents[2] / "configs"
KEY = "k" * 32


def problems_of(command_line: dict[str, Any], environ: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(command_line, environ, file)
    return "\n".join(caught.value.problems)


def write(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nmax_sequences: 2\ndrain_seconds: 3\n")
    loaded = load_settings({"port": 30}, {"MEGPT_PORT": "20", "MEGPT_MAX_SEQUENCES": "21"}, file)
    told = {origin.name: (origin.value, origin.source) for origin in loaded.explain()}
    assert told["port"] == ("30", "command line")
    assert told["max_sequences"] == ("21", "MEGPT_MAX_SEQUENCES")
    assert told["drain_seconds"] == ("3.0", str(file))
    assert told["host"] == ("127.0.0.1", "default")
    assert set(told) == set(Settings.model_fields) and all(o.description for o in loaded.explain())


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 7\n")
    assert load_settings({}, {"MEGPT_CONFIG": str(file), "PATH": "x"}).settings.port == 7


def test_every_problem_of_every_source_is_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "max_sequences: 0\nnonsense: 1\nmodels: [{model: a/b, num_threads: 0, huh: 1}]\n")
    told = problems_of({"port": 70000}, {"MEGPT_KEEPALIVE_S": "soon", "MEGPT_TYPO": "1"}, file)
    for part in (
        "max_sequences", "nonsense", "models.0.num_threads", "models.0.huh", "port (command line)", "70000",
        "keepalive_s (MEGPT_KEEPALIVE_S)", "MEGPT_TYPO", str(file),
    ):  # fmt: skip
        assert part in told, part


def test_a_problem_ends_with_one_full_stop() -> None:
    told = problems_of({"models": [{"model": "demo", "quantization": "int5"}]}, {})
    assert told.endswith("bnb-int8."), told


def test_settings_are_checked_together_though_some_are_wrong_alone(tmp_path: Path) -> None:
    (tmp_path / "bad name").mkdir()
    (tmp_path / "bad name" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "bad name")
    values = {"host": "0.0.0.0", "port": 70000, "admin_key": "short", "models_dir": tmp_path}
    told = problems_of({**values, "models": ["demo", "demo"]}, {"MEGPT_MAX_SEQUENCES": "0"})
    for part in (
        "port", "max_sequences", "can be reached", "admin_key has", "2 models have", "bad name", "link",
    ):  # fmt: skip
        assert part in told, part
    assert len(told.splitlines()) == len(set(told.splitlines())) == 7


def test_no_problem_follows_from_a_value_that_is_not_known(tmp_path: Path) -> None:
    public = {"host": "0.0.0.0"}
    for told in (
        problems_of({**public, "api_keys": 7}, {}),
        problems_of(public, {}, write(tmp_path, "api_keys: [")),
    ):
        assert len(told.splitlines()) == 1 and "can be reached" not in told
    with pytest.raises(ConfigError) as caught:
        load_settings({**public, "port": -1}, {}, None, {"api_keys": "--api-key-file x can't be read."})
    assert [problem[:10] for problem in caught.value.problems] == ["--api-key-", "port (comm"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port: 1\nhost: localhost\nport: 2\n", "port stands twice (lines 1 and 3)"),
        ("models:\n- {model: demo, dtype: auto, dtype: float32}\n", "dtype stands twice (line 2)"),
        ("port: 1\n'port': 2\n", "port stands twice (lines 1 and 2)"),
        ("_env_file: x\n", "_env_file"),
    ],
)
def test_nothing_in_a_file_is_dropped_in_silence(tmp_path: Path, text: str, told: str) -> None:
    assert told in problems_of({}, {}, write(tmp_path, text))


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    text = "models:\n- &base {id: a, model: demo, dtype: float32}\n- {<<: *base, id: b}\n"
    models = load_settings({}, {}, write(tmp_path, text)).settings.models
    assert [(model.id, model.dtype) for model in models] == [("a", "float32"), ("b", "float32")]


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "a: [", "\x00", "!!python/object:os.system {}"])
def test_a_file_that_is_no_mapping_is_a_problem(tmp_path: Path, text: str) -> None:
    assert str(tmp_path) in problems_of({}, {}, write(tmp_path, text))


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    assert "can't be read" in problems_of({}, {}, tmp_path / "none.yaml")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_settings({}, {}, write(tmp_path, "# nothing\n")).settings == Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_served_only_with_a_key(host: str) -> None:
    assert "API key" in problems_of({"host": host}, {})
    assert load_settings({"host": host}, {"MEGPT_API_KEYS": KEY}).settings.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_served_without_a_key(host: str) -> None:
    assert not load_settings({"host": host}, {}).settings.has_keys


def test_keys_come_as_a_list_and_are_never_shown() -> None:
    other = "sha256:" + "0" * 64
    loaded = load_settings({}, {"MEGPT_API_KEYS": f" {KEY}, {other},", "MEGPT_ADMIN_KEY": "a" * 32})
    assert [key.get_secret_value() for key in loaded.settings.api_keys] == [KEY, other]
    assert KEY not in repr(loaded) + repr(loaded.explain())


@pytest.mark.parametrize("key", ["short", "has space in the middle", "ümläüt-ümläüt-ümläü", "sha256:123", ""])
def test_weak_keys_are_problems_and_not_repeated(key: str) -> None:
    told = problems_of({"api_keys": [key]}, {})
    assert "api_keys[0]" in told and (not key or key not in told)


def test_an_admin_key_alone_does_not_open_a_public_server() -> None:
    told = problems_of({"host": "0.0.0.0"}, {"MEGPT_ADMIN_KEY": KEY})
    assert "an admin key alone is not enough" in told and "no API key is set" not in told


def test_one_key_for_two_roles_is_a_problem() -> None:
    assert "differ" in problems_of({"api_keys": [KEY], "admin_key": KEY}, {})


def test_the_demo_is_served_by_default() -> None:
    assert [model.id for model in Settings().served_models()] == ["demo"]


def test_models_by_name_mapping_and_folder(tmp_path: Path) -> None:
    for name in ("beta", "alpha", "not-a-model"):
        (tmp_path / name).mkdir()
    for name in ("beta", "alpha"):
        (tmp_path / name / "config.json").write_text("{}")
    models = ["demo", {"id": "big", "model": "org/name", "max_num_seqs": 4}, {"model": "org/other"}]
    settings = load_settings({"models": models, "models_dir": tmp_path}, {}).settings
    served = settings.served_models()
    assert [model.id for model in served] == ["demo", "big", "other", "alpha", "beta"]
    assert served[1].engine_config() == EngineConfig(model="org/name", max_num_seqs=4)
    assert Path(served[3].model) == tmp_path / "alpha"


def test_models_from_the_environment() -> None:
    assert [m.id for m in load_settings({}, {"MEGPT_MODELS": "demo, org/x"}).settings.models] == ["demo", "x"]
    text = '[{"id": "a", "model": "demo", "dtype": "float32"}]'
    assert load_settings({}, {"MEGPT_MODELS": text}).settings.models[0].dtype == "float32"


def test_a_folder_that_has_a_models_id_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "demo"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    told = problems_of({"models": ["demo"], "models_dir": tmp_path}, {})
    assert "models_dir has a folder 'demo', which is the id of a model under `models`" in told
    assert "2 models" not in told


def test_wrong_models_are_problems(tmp_path: Path) -> None:
    assert "2 models have the id 'demo'" in problems_of({"models": ["demo", "demo"]}, {})
    assert "not a folder" in problems_of({"models_dir": tmp_path / "none"}, {})
    told = problems_of({"models_dir": tmp_path}, {})  # and not the demo instead
    assert str(tmp_path) in told and "has no model" in told
    assert "id" in problems_of({"models": [{"id": "../x", "model": "demo"}]}, {})
    assert "both size" in problems_of(
        {"models": [{"model": "a", "kv_cache_bytes": 1, "num_kv_blocks": 2}]}, {}
    )
    assert "models" in problems_of({}, {"MEGPT_MODELS": "[{"})
    real = tmp_path / "real"
    real.mkdir()
    (real / "config.json").write_text("{}")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "link").symlink_to(real)
    assert "link" in problems_of({"models_dir": folder}, {})


def test_model_settings_follow_the_engines_config() -> None:
    engine = {f.name: f.default for f in dataclasses.fields(EngineConfig)}
    mine = {name: field.default for name, field in ModelSettings.model_fields.items()}
    del engine["kv_reserve_bytes"]  # follows from the KV limits and the budget
    assert set(mine) == {"id", "aliases", *engine, *LIFECYCLE_FIELDS}
    assert {n: d for n, d in mine.items() if n not in ("id", "aliases", "model", *LIFECYCLE_FIELDS)} == {
        n: d for n, d in engine.items() if n != "model"
    }
    assert all(field.description for field in ModelSettings.model_fields.values())


def test_default_yaml_is_complete_and_equal_to_the_defaults() -> None:
    text = (CONFIGS / "default.yaml").read_text()
    values = yaml.safe_load(text)
    assert list(values) == list(Settings.model_fields)
    shown = values.pop("models")
    assert load_settings(values, {}).settings == Settings()
    (example,) = shown
    assert ModelSettings(**example) == ModelSettings(model="demo") and set(example) == set(
        ModelSettings.model_fields
    )
    for fields in (Settings.model_fields, ModelSettings.model_fields):
        for name, field in fields.items():
            assert str(field.description) in text, f"default.yaml does not describe {name} as the settings do"


def test_team_yaml_is_valid() -> None:
    loaded = load_settings({}, {"MEGPT_API_KEYS": KEY}, CONFIGS / "team.yaml")
    assert len(loaded.settings.served_models()) >= 2 and not loaded.settings.loopback
    assert "API key" in problems_of({}, {}, CONFIGS / "team.yaml")


def test_many_models_yaml_is_valid() -> None:
    settings = load_settings({}, {}, CONFIGS / "many_models.yaml").settings
    assert settings.memory_budget_bytes is not None
    house, writer, _ = settings.served_models()
    assert house.pinned and house.load == "start"
    assert writer.load == "on_demand" and writer.ttl_s == 600
    assert writer.aliases == ("author",)
    assert [v.quantization for v in writer.variants if not isinstance(v, str)] == ["int4", "int8"]


@pytest.mark.parametrize("field", LIFECYCLE_FIELDS)
def test_what_only_a_budget_makes_true_needs_one(field: str) -> None:
    values = {"load": "on_demand", "pinned": True, "ttl_s": 60, "min_residency_s": 5, "priority": 1,
              "variants": "any"}  # fmt: skip
    value = values.get(field, 1 << 20)
    models = [{"model": "demo", field: value}]
    told = problems_of({"models": models}, {})
    assert "model demo" in told and field in told and "memory_budget_bytes" in told
    settings = load_settings({"models": models, "memory_budget_bytes": 10**9}, {}).settings
    assert getattr(settings.models[0], field) == value
    assert settings.models[0].engine_config() == EngineConfig(model="demo")


@pytest.mark.parametrize("name", ["kv_soft_limit_bytes", "kv_cache_bytes"])
def test_no_kv_size_may_exceed_the_hard_limit(name: str) -> None:
    models = [{"model": "demo", name: 2_000_000, "kv_hard_limit_bytes": 1_999_999}]
    told = problems_of({"models": models, "memory_budget_bytes": 10**9}, {})
    assert f"{name} is 2,000,000, more than kv_hard_limit_bytes, 1,999,999" in told


def test_a_folder_of_models_is_loaded_on_demand_under_a_budget(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "config.json").write_text("{}")
    settings = load_settings({"models_dir": tmp_path, "memory_budget_bytes": 10**9}, {}).settings
    (model,) = settings.served_models()
    assert model.load == "on_demand"
    (same,) = load_settings({"models_dir": tmp_path}, {}).settings.served_models()
    assert same.load == "start"


def test_settings_that_need_a_budget_are_refused_without_one_unless_they_are_the_defaults() -> None:
    with pytest.raises(ConfigError, match="max_swaps, swap_window_s needs memory_budget_bytes"):
        load_settings({"models": ["demo"], "max_swaps": 3, "swap_window_s": 9}, {})
    defaults = load_settings({"models": ["demo"], "max_swaps": 20, "load_wait_s": 300.0}, {})
    assert defaults.settings.load_wait_s == 300.0
    budgeted = load_settings({"models": ["demo"], "max_swaps": 3, "memory_budget_bytes": 10**9}, {})
    assert budgeted.settings.max_swaps == 3
