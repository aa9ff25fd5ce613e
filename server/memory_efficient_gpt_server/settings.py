"""What an operator may choose, where each value came from, and every mistake at once.

Purpose: one checked `Settings` from the command line, the environment, a YAML file and the defaults.
Does not know: FastAPI, workers, how any of it is used.
Invariant: precedence is command line > environment > YAML > default; an unknown name is an error; a server
that others can reach has a key.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt_server.keys import key_problems
from memory_efficient_gpt_server.model_settings import LIFECYCLE_FIELDS, LoadTime, ModelSettings, models_in
from memory_efficient_gpt_server.settings_sources import (
    CONFIG_FILE_ENV,
    ENV_PREFIX,
    read_environ,
    read_yaml,
)


def _split(value: Any) -> Any:
    """Environment variables and options hold lists as `a,b` or as JSON."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            return json.loads(text)
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


_NEED_BUDGET: Final = ("host_budget_bytes", "load_wait_s", "max_swaps", "swap_window_s")
"""Settings that mean nothing without a memory budget."""

_Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
_Models = Annotated[tuple[ModelSettings, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """The server's settings. Build them with `load_settings`, which knows where values come from."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )

    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need an API key")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    api_keys: _Keys = Field((), description="keys that may use the API, plain or as sha256:<hex>; none: open")
    admin_key: SecretStr | None = Field(
        None, description="key that may do everything, plain or as sha256:<hex>"
    )
    metrics_public: bool = Field(False, description="whether /metrics answers without a key")
    models: _Models = Field((), description="models to serve: names or mappings (see below)")
    models_dir: Path | None = Field(
        None, description="folder; each folder in it with a config.json is served, on demand under a budget"
    )
    memory_budget_bytes: int | None = Field(
        None,
        ge=1,
        description="what loaded models may take together on a device; null: all models are loaded and stay",
    )
    host_budget_bytes: int | None = Field(
        None,
        ge=1,
        description="host memory for models on GPUs, mostly for sleeping ones; null: half; not used on CPUs",
    )
    load_wait_s: float = Field(
        300.0, gt=0, description="longest wait of a request for a model that is not loaded, in seconds"
    )
    max_swaps: int = Field(
        20,
        ge=1,
        description="models unloaded for others within swap_window_s; more wait while any model is in use",
    )
    swap_window_s: float = Field(120.0, gt=0, description="time over which swaps are counted, in seconds")
    max_body_bytes: int = Field(2_000_000, ge=1_000, description="largest request body, in bytes")
    body_timeout_s: float = Field(30.0, gt=0, description="time for a request body to arrive, in seconds")
    max_sequences: int = Field(256, ge=1, description="sequences (prompts x n) under way at once; more: 503")
    max_reserved_tokens: int = Field(
        1_000_000, ge=1, description="tokens (prompt + output) under way at once; more: 503"
    )
    max_sequences_per_key: int | None = Field(
        128, ge=1, description="sequences one key may have under way; more: 429; null: no limit"
    )
    request_timeout_s: float = Field(600.0, gt=0, description="longest time for one request, in seconds")
    resume_wait_s: float = Field(
        120.0, gt=0, description="time that a dead worker's requests wait for the next one, in seconds"
    )
    stall_s: float = Field(
        10.0, gt=0, description="a worker with work that makes no step for so long is stuck, in seconds"
    )
    stall_steps: float = Field(
        20.0, ge=1, description="the same as a multiple of its 99th percentile step; the longer time counts"
    )
    stall_kill_factor: float = Field(
        2.5, ge=1, description="a stuck worker that uses no CPU either is killed after so many times that"
    )
    max_step_s: float = Field(
        600.0, gt=0, description="a stuck worker is killed after so long though it computes, in seconds"
    )
    keepalive_s: float = Field(15.0, gt=0, description="silence before a stream gets a comment, in seconds")
    stream_stall_s: float = Field(30.0, gt=0, description="time a client may not read its stream, in seconds")
    stream_interval_s: float = Field(
        0.02,
        ge=0,
        le=1,
        description="least time between writes of a stream while more than 4 run, in seconds",
    )
    drain_seconds: float = Field(30.0, ge=0, description="time for running requests at shutdown, in seconds")
    tokenizer_threads: int = Field(1, ge=1, le=64, description="threads that tokenize long texts")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least level logged")
    log_format: Literal["auto", "json", "human"] = Field(
        "auto", description="auto: human on a terminal, else json"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only given values: `load_settings` reads the other sources, to know which value came from where."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = [*_key_problems(self), *_model_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def has_keys(self) -> bool:
        """Whether clients must show a key."""
        return bool(self.api_keys) or self.admin_key is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def _folder_load(self) -> LoadTime:
        """When models of `models_dir` are loaded."""
        return "start" if self.memory_budget_bytes is None else "on_demand"

    def served_models(self) -> tuple[ModelSettings, ...]:
        """`models`, then those of `models_dir`; the bundled demo if neither is set."""
        if self.models_dir is not None:
            return self.models + tuple(models_in(self.models_dir, self._folder_load, []))
        return self.models or (ModelSettings(model="demo"),)


@dataclass(frozen=True, slots=True)
class SettingOrigin:
    """One setting as it stands: `source` is "command line", an environment variable, a file or "default"."""

    name: str
    value: str
    source: str
    description: str


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings and where each value came from."""

    settings: Settings
    sources: Mapping[str, str]

    def explain(self) -> list[SettingOrigin]:
        """Every setting in order of declaration; keys are not shown."""
        return [
            SettingOrigin(
                name,
                _shown(getattr(self.settings, name)),
                self.sources.get(name, "default"),
                str(f.description),
            )
            for name, f in Settings.model_fields.items()
        ]


def load_settings(
    command_line: Mapping[str, Any],
    environ: Mapping[str, str],
    config_file: Path | None = None,
    wrong: Mapping[str, str] = MappingProxyType({}),
) -> LoadedSettings:
    """Settings from all sources. Raises ConfigError with every problem of every source.

    command_line: only the options that were given. config_file: None takes MEGPT_CONFIG's, if that is set.
    wrong: setting -> what the caller has found wrong with it already.
    """
    if config_file is None and environ.get(CONFIG_FILE_ENV):
        config_file = Path(environ[CONFIG_FILE_ENV])
    problems, unsure = list(wrong.values()), set(wrong)
    known = Settings.model_fields
    from_file = {} if config_file is None else read_yaml(config_file, known, problems)
    if from_file is None:
        unsure.add("host")  # the keys that it needs may stand in that file
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for given, source in (
        (from_file or {}, str(config_file)),
        (read_environ(environ, known, problems), ""),
        (command_line, "command line"),
    ):
        values |= given
        sources |= {name: source or ENV_PREFIX + name.upper() for name in given}
    settings = _validated(_without(values, unsure), sources, problems)
    if settings is None or problems:
        raise ConfigError(problems)
    return LoadedSettings(settings, sources)


def _without(values: Mapping[str, Any], unsure: Set[str]) -> dict[str, Any]:
    """The values whose checks against each other can be trusted while `unsure` ones are not known."""
    if "api_keys" in unsure:
        unsure = unsure | {"host"}  # whether it may be reached from outside depends on the keys
    return {name: value for name, value in values.items() if name not in unsure}


def _validated(values: dict[str, Any], sources: Mapping[str, str], problems: list[str]) -> Settings | None:
    """None if anything is wrong: then `problems` has it all, of single settings and of several together."""
    try:
        return Settings(**values)
    except ValidationError as error:
        items = error.errors(include_url=False)
    for item in items:
        problems += _sentences(item, sources)
    if wrong := {str(item["loc"][0]) for item in items if item["loc"]}:
        # pydantic checks settings together only once each is right by itself
        _validated(_without(values, wrong), sources, problems)
    return None


def _sentences(item: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    name = ".".join(map(str, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return list(message.split("\n"))
    if item["type"] == "extra_forbidden":
        return [f"{name} ({_source_of(item['loc'], sources)}): there is no such setting."]
    return [f"{name} ({_source_of(item['loc'], sources)}): {message.removesuffix('.')}{_got(item)}."]


def _source_of(loc: tuple[int | str, ...], sources: Mapping[str, str]) -> str:
    return sources.get(str(loc[0]), "default")


def _got(item: Mapping[str, Any]) -> str:
    """The offending value, unless it could be a secret or says nothing."""
    secret = item["loc"][0] in ("api_keys", "admin_key")
    plain = isinstance(item["input"], str | int | float) and item["type"] != "value_error"
    return f", got {item['input']!r:.80}" if plain and not secret else ""


def _key_problems(settings: Settings) -> list[str]:
    named = [(f"api_keys[{i}]", key) for i, key in enumerate(settings.api_keys)]
    if settings.admin_key is not None:
        named.append(("admin_key", settings.admin_key))
    problems = key_problems([(name, key.get_secret_value()) for name, key in named])
    if not settings.loopback and not settings.api_keys:
        lacking = "no API key is set" if settings.admin_key is None else "an admin key alone is not enough"
        problems.append(
            f"host {settings.host} can be reached from other machines but {lacking}: clients need a key of "
            f"their own. Set {ENV_PREFIX}API_KEYS (for example to the output of `openssl rand -hex 32`) "
            "or listen on 127.0.0.1."
        )
    return problems


def _model_problems(settings: Settings) -> list[str]:
    problems: list[str] = []
    models = list(settings.models)
    if settings.models_dir is not None:
        listed = {model.id for model in models}
        found = models_in(settings.models_dir, settings._folder_load, problems)
        problems += [
            f"models_dir has a folder {model.id!r}, which is the id of a model under `models`; rename the "
            "folder, or give that model another id."
            for model in found
            if model.id in listed
        ]
        models += [model for model in found if model.id not in listed]
    if settings.memory_budget_bytes is None:
        problems += [
            f"model {model.id} sets {', '.join(given)}, which needs memory_budget_bytes: without a budget "
            "all models are loaded at start and stay."
            for model in settings.models
            if (given := [name for name in LIFECYCLE_FIELDS if name in model.model_fields_set])
        ]
        if idle := [name for name in _NEED_BUDGET if _differs(settings, name)]:
            problems.append(
                f"{', '.join(idle)} needs memory_budget_bytes: without a budget all models are loaded at "
                "start and stay. Set that, too, or leave it out."
            )
    ids = [model.id for model in models]
    problems += _alias_problems(models)
    return problems + [
        f"{ids.count(i)} models have the id {i!r}; give them different ids."
        for i in dict.fromkeys(ids)
        if ids.count(i) > 1
    ]


def _differs(settings: Settings, name: str) -> bool:
    """Whether it is not its default, which files may spell out."""
    return bool(getattr(settings, name) != Settings.model_fields[name].default)


def _alias_problems(models: Sequence[ModelSettings]) -> list[str]:
    """A name must mean one model."""
    ids = [model.id for model in models]
    aliases = [(alias, model.id) for model in models for alias in model.aliases]
    counted = Counter(alias for alias, _ in aliases)
    problems = [
        f"model {model_id} has the alias {alias!r}, which is the id of a model; give it another one."
        for alias, model_id in aliases
        if alias in ids
    ]
    return problems + [
        f"{count} models have the alias {alias!r}, or one has it twice; a name must mean one model."
        for alias, count in counted.items()
        if count > 1
    ]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, ModelSettings):
        return f"{value.id}: " + json.dumps(value.model_dump(exclude={"id"}, exclude_defaults=True))
    return "null" if value is None else str(value)
