"""One model as operators describe it: where it is, how its engine runs, when it is loaded.

Purpose: the entries of the setting `models`, and those that a folder of models stands for.
Does not know: the server's other settings, where values come from.
Invariant: an entry that was made can be turned into an EngineConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from memory_efficient_gpt.config import Dtype, EngineConfig, KVCacheDtype
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt_server.registry.variants import beyond_hard_limit
from memory_efficient_gpt_server.variant_settings import Variants, VariantSettings

LIFECYCLE_FIELDS: Final = (
    "load", "pinned", "ttl_s", "min_residency_s", "priority", "variants", "kv_soft_limit_bytes",
    "kv_hard_limit_bytes",
)  # fmt: skip
"""Fields of a model that say when and in which variants it is loaded, how long it stays, and how much KV
memory it may have."""

LoadTime = Literal["start", "on_demand"]

MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _checked_id(value: str) -> str:
    if not MODEL_ID.fullmatch(value):
        raise ValueError(
            f"{value!r:.80} must be a letter or digit and up to 63 letters, digits, '.', '_' or '-'"
        )
    return value


def _listed(value: Any) -> Any:
    """A JSON array, which a strict check would not take for a tuple."""
    return tuple(value) if isinstance(value, list) else value


class ModelSettings(BaseModel):
    """One model to serve: its id in the API, where it is, and how its engine runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: Annotated[str, AfterValidator(_checked_id)] = Field(
        "", description="name in the API; empty takes the last part of `model`"
    )
    aliases: Annotated[tuple[Annotated[str, AfterValidator(_checked_id)], ...], BeforeValidator(_listed)] = (
        Field((), description="other names for it that requests may use")
    )
    model: str = Field(
        min_length=1, description="bundled model's name, checkpoint folder, or hub id (org/name)"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="in which is computed; of the weights unless quantized")
    quantization: str | None = Field(
        None, description="int4, int8, int4-g128, bnb-nf4 ...; null: weights as the checkpoint has them"
    )
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
    native_kernels: bool = Field(
        True, description="whether own kernels may be used: C++ on CPUs, Triton on CUDA"
    )
    cuda_graphs: bool = Field(True, description="whether steps may be captured as CUDA graphs")
    record_steps: bool = Field(True, description="whether decoding steps on a CPU may be recorded")
    deterministic: bool = Field(
        False, description="same tokens whatever is computed beside a request; refused where it can't be"
    )
    tier: Literal["B", "C"] | None = Field(None, description="force how it is run; null: the probe decides")
    debug_checks: bool = Field(False, description="check the engine's invariants at every step (slow)")
    load: LoadTime = Field(
        "start", description="when: with the server, or when first asked for (needs memory_budget_bytes)"
    )
    pinned: bool = Field(False, description="whether it stays loaded once it is (needs memory_budget_bytes)")
    ttl_s: float | None = Field(
        None,
        gt=0,
        description="idle seconds after which it is unloaded; null: none (needs memory_budget_bytes)",
    )
    min_residency_s: float = Field(
        0.0, ge=0, description="seconds for which it stays once loaded (needs memory_budget_bytes)"
    )
    priority: int = Field(
        0, description="greater ones load first and are unloaded last (needs memory_budget_bytes)"
    )
    variants: Variants = Field(
        (),
        description="what requests may choose instead: schemes, mappings, or any (needs memory_budget_bytes)",
    )
    kv_soft_limit_bytes: int | None = Field(
        None,
        ge=1,
        description="KV cache kept when others need room; null: as loaded (needs memory_budget_bytes)",
    )
    kv_hard_limit_bytes: int | None = Field(
        None, ge=1, description="most its KV cache may grow to; null: automatic (needs memory_budget_bytes)"
    )

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
        try:
            if self.quantization is not None:
                parse_scheme(self.quantization)
            self.engine_config()
            self._check_kv_limits()
            self._check_variants()
        except ConfigError as error:
            raise ValueError(" ".join(error.problems)) from error
        return self

    def _check_kv_limits(self) -> None:
        for name in ("kv_soft_limit_bytes", "kv_cache_bytes"):
            if problem := beyond_hard_limit(name, getattr(self, name), self.kv_hard_limit_bytes):
                raise ConfigError([problem])

    def _check_variants(self) -> None:
        listed = () if self.variants == "any" else self.variants
        if self.quantization is None and VariantSettings(quantization="bf16") in listed:
            raise ConfigError(
                ["variants lists bf16, but without quantization that is the model itself. Leave it out."]
            )

    def engine_config(self) -> EngineConfig:
        """The engine's view of this."""
        return EngineConfig(**self.model_dump(exclude={"id", "aliases", *LIFECYCLE_FIELDS}))


def models_in(folder: Path, load: LoadTime, problems: list[str]) -> list[ModelSettings]:
    """The models of `folder`. What can't be served (a link, a name that is no id) goes to `problems`."""
    try:
        found = [path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
    except (NotADirectoryError, FileNotFoundError):
        problems.append(f"models_dir {folder} is not a folder.")
        return []
    except OSError as error:
        problems.append(f"models_dir {folder} can't be read: {error.strerror}.")
        return []
    if not found:
        problems.append(
            f"models_dir {folder} has no model: no folder in it has a config.json. Give the folder that "
            "holds model folders, or name one model with `models`."
        )
    for path in found:
        if path.is_symlink():
            problems.append(f"models_dir has the link {path.name}; list its target under `models` instead.")
        elif not MODEL_ID.fullmatch(path.name):
            problems.append(f"models_dir has a folder {path.name!r} whose name can't be an id; rename it.")
    return [
        ModelSettings(id=path.name, model=str(path.absolute()), load=load)
        for path in found
        if not path.is_symlink() and MODEL_ID.fullmatch(path.name)
    ]
