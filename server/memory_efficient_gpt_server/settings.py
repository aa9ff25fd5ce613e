"""What an operator may choose, where each value came from, and every mistake at once.

Purpose: one checked `Settings` from the command line, the environment, a YAML file and the defaults.
Does not know: FastAPI, workers, how any of it is used.
Invariant: precedence is command line > environment > YAML > default; an unknown name is an error; a server
that others can reach has a key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from memory_efficient_gpt.config import Dtype, EngineConfig, KVCacheDtype
from memory_efficient_gpt.errors import ConfigError

ENV_PREFIX: Final = "MEGPT_"
CONFIG_FILE_ENV: Final = "MEGPT_CONFIG"
NO_SETTINGS: Final = frozenset({CONFIG_FILE_ENV, "MEGPT_CACHE_DIR", "MEGPT_NATIVE_ISA"})
"""Variables with the prefix that others read: the settings file's path; the native kernels' build."""
MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEAST_KEY_CHARACTERS: Final = 16
_HASHED_KEY: Final = re.compile(r"sha256:([0-9a-f]{64})")


class ModelSettings(BaseModel):
    """One model to serve: its id in the API, where it is, and how its engine runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field("", description="name in the API; empty takes the last part of `model`")
    model: str = Field(
        min_length=1, description="bundled model's name, checkpoint folder, or hub id (org/name)"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="of the weights")
    kv_cache_dtype: KVCacheDtype = Field("auto", description="of the KV cache")
    max_model_len: int | None = Field(None, ge=2, description="positions of a request; null: the model's own")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="size of the KV cache in bytes; null: automatic"
    )
    num_kv_blocks: int | None = Field(
        None, ge=2, description="size of the KV cache in blocks instead of bytes"
    )
    block_size: int | None = Field(
        None, ge=1, description="tokens of a KV block; null: 16 on CPU, 64 on CUDA"
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences computed together")
    max_batched_tokens: int = Field(2048, ge=1, description="tokens of one engine step")
    prefix_cache: bool = Field(True, description="whether prompts that begin alike share their KV blocks")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; null: an equal share")
    overlap: bool | None = Field(None, description="launch a step before the last one is read; null: on CUDA")
    native_kernels: bool = Field(True, description="whether the C++ CPU kernels may be used")
    tier: Literal["B", "C"] | None = Field(None, description="force how it is run; null: the probe decides")
    debug_checks: bool = Field(False, description="check the engine's invariants at every step (slow)")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """`demo` is short for `{model: demo}`; an absent id is the last part of the model's name."""
        if isinstance(value, str):
            value = {"model": value}
        if isinstance(value, Mapping) and not value.get("id") and isinstance(value.get("model"), str):
            value = {**value, "id": Path(value["model"].rstrip("/")).name}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not MODEL_ID.fullmatch(self.id):
            raise ValueError(
                f"id {self.id!r} must be a letter or digit and up to 63 letters, digits, '.', '_' or '-'"
            )
        try:
            self.engine_config()
        except ConfigError as error:
            raise ValueError(" ".join(error.problems)) from error
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's view of this."""
        return EngineConfig(**self.model_dump(exclude={"id"}))


def _split(value: Any) -> Any:
    """Environment variables and options hold lists as `a,b` or as JSON."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            return json.loads(text)
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


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
        None, description="folder; each folder in it with a config.json is served"
    )
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
        if not self.loopback and not self.api_keys:
            problems.append(
                f"host {self.host} can be reached from other machines but no API key is set. "
                f"Set {ENV_PREFIX}API_KEYS (for example to the output of `openssl rand -hex 32`) "
                "or listen on 127.0.0.1."
            )
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

    def served_models(self) -> tuple[ModelSettings, ...]:
        """`models`, then those of `models_dir`; the bundled demo if there are neither."""
        found = self.models + tuple(_models_in(self.models_dir) if self.models_dir else ())
        return found or (ModelSettings(model="demo"),)


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
    command_line: Mapping[str, Any], environ: Mapping[str, str], config_file: Path | None = None
) -> LoadedSettings:
    """Settings from all sources. Raises ConfigError with every problem of every source.

    command_line: only the options that were given. config_file: None takes MEGPT_CONFIG's, if that is set.
    """
    if config_file is None and environ.get(CONFIG_FILE_ENV):
        config_file = Path(environ[CONFIG_FILE_ENV])
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for given, source in (
        (_read_yaml(config_file, problems), str(config_file)),
        (_read_environ(environ, problems), ""),
        (dict(command_line), "command line"),
    ):
        values |= given
        sources |= {name: source or ENV_PREFIX + name.upper() for name in given}
    settings = _validated(values, sources, problems)
    if settings is None or problems:
        raise ConfigError(problems)
    return LoadedSettings(settings, sources)


def _validated(values: dict[str, Any], sources: Mapping[str, str], problems: list[str]) -> Settings | None:
    try:
        return Settings(**values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            name = ".".join(map(str, item["loc"]))
            message = item["msg"].removeprefix("Value error, ")
            if not name:
                problems += message.split("\n")
            elif item["type"] == "extra_forbidden":
                problems.append(f"{name} ({_source_of(item['loc'], sources)}): there is no such setting.")
            else:
                problems.append(f"{name} ({_source_of(item['loc'], sources)}): {message}{_got(item)}.")
        return None


def _source_of(loc: tuple[int | str, ...], sources: Mapping[str, str]) -> str:
    return sources.get(str(loc[0]), "default")


def _got(item: Mapping[str, Any]) -> str:
    """The offending value, unless it could be a secret or says nothing."""
    secret = item["loc"][0] in ("api_keys", "admin_key")
    plain = isinstance(item["input"], str | int | float) and item["type"] != "value_error"
    return f", got {item['input']!r:.80}" if plain and not secret else ""


def _read_yaml(path: Path | None, problems: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"config file {path} can't be read: {' '.join(str(error).split())}")
        return {}
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        problems.append(f"config file {path} must hold a mapping of settings, got {type(raw).__name__}.")
        return {}
    return raw


def _read_environ(environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in NO_SETTINGS:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in Settings.model_fields:
            problems.append(f"{variable} (environment): there is no such setting.")
        elif value or name == "api_keys":
            values[name] = None if value == "null" else value
    return values


def _key_problems(settings: Settings) -> list[str]:
    named = [(f"api_keys[{i}]", key) for i, key in enumerate(settings.api_keys)]
    if settings.admin_key is not None:
        named.append(("admin_key", settings.admin_key))
    problems = []
    for name, key in named:
        text = key.get_secret_value()
        if text.startswith("sha256:"):
            if not _HASHED_KEY.fullmatch(text):
                problems.append(f"{name} must be sha256: and 64 lower-case hex digits.")
        elif not text.isascii() or not text.isprintable() or " " in text or len(text) < LEAST_KEY_CHARACTERS:
            problems.append(
                f"{name} has {len(text)} characters; it must have at least {LEAST_KEY_CHARACTERS}, "
                "all printable ASCII and none a space. Make one with `openssl rand -hex 32`."
            )
    digests = [key_digest(key.get_secret_value()) for _, key in named]
    if len(set(digests)) < len(digests):
        problems.append("api_keys and admin_key must all differ.")
    return problems


def key_digest(key: str) -> bytes:
    """SHA-256 of a key as configured: plain, or already hashed as sha256:<hex>."""
    hashed = _HASHED_KEY.fullmatch(key)
    return bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(key.encode()).digest()


def _model_problems(settings: Settings) -> list[str]:
    if settings.models_dir is not None and not settings.models_dir.is_dir():
        return [f"models_dir {settings.models_dir} is not a folder."]
    try:
        ids = [model.id for model in settings.served_models()]
    except ValueError as error:
        return [str(error)]
    return [
        f"{ids.count(i)} models have the id {i!r}; give them different ids."
        for i in dict.fromkeys(ids)
        if ids.count(i) > 1
    ]


def _models_in(folder: Path) -> list[ModelSettings]:
    """The models of `folder`. Raises ValueError for a link or a name that can't be an id."""
    models = []
    for path in sorted(folder.iterdir()):
        if not (path / "config.json").is_file():
            continue
        if path.is_symlink():
            raise ValueError(f"models_dir has the link {path.name}; list its target under `models` instead.")
        if not MODEL_ID.fullmatch(path.name):
            raise ValueError(f"models_dir has a folder {path.name!r} whose name can't be an id; rename it.")
        models.append(ModelSettings(id=path.name, model=str(path.absolute())))
    return models


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, ModelSettings):
        return f"{value.id}: " + json.dumps(value.model_dump(exclude={"id"}, exclude_defaults=True))
    return "null" if value is None else str(value)
