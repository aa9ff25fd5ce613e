"""What can be loaded: a model's entry, its load-affecting options, and the bytes these take.

Purpose: the registry's vocabulary.
Does not know: states, who holds what.
Invariant: two requests whose keys are equal can be served by one worker; adapters and sampling are no part
of a key. A fine-tuning job is a variant as well: one whose lease is held until the job ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

HOST: Final = "cpu"
"""The device whose bytes are the host's memory."""


class Kind(StrEnum):
    """What bytes are used for.

    CONTEXT is what a process keeps on its device while it lives (the CUDA context), PROCESS its own host
    memory, PARKED the weights of a sleeping model in host memory, LEAKED what stayed after a process ended.
    """

    WEIGHTS = "weights"
    KV = "kv"
    WORKSPACE = "workspace"
    GRAPHS = "graphs"
    CONTEXT = "context"
    PROCESS = "process"
    PARKED = "parked"
    LEAKED = "leaked"


_FREED_ON_HOST: Final = frozenset({Kind.KV})
_FREED_BY_PARKING: Final = frozenset({Kind.WEIGHTS, Kind.KV, Kind.WORKSPACE, Kind.GRAPHS})


MEASURED_KINDS: Final = frozenset({Kind.WEIGHTS, Kind.KV})
"""What a worker tells of itself once it is ready. Of the rest it takes what it needs as it works, so that
stays booked as it was estimated."""


class Amount(NamedTuple):
    """Bytes of one kind on one device."""

    device: str
    kind: Kind
    bytes: int


@dataclass(frozen=True, slots=True)
class VariantKey:
    """A model and the options that decide how it is loaded. `model_id` is a registered id, never an alias.

    Options say what differs from the model's settings: without any it is the model as it is configured.
    quantization: the name of a scheme, "bf16" for none.
    """

    model_id: str
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    dtype: str = "auto"
    revision: str | None = None

    @property
    def as_configured(self) -> bool:
        """Whether it is what a request gets that asks for nothing special."""
        return self == VariantKey(self.model_id)

    def __str__(self) -> str:
        options = [
            *(f"{name}={value}" for name, value in self._options() if value is not None and value != "auto")
        ]
        return f"{self.model_id}[{','.join(options)}]" if options else self.model_id

    def _options(self) -> Iterable[tuple[str, object]]:
        yield "quantization", self.quantization
        yield "kv", self.kv_cache_dtype
        yield "len", self.max_model_len
        yield "dtype", self.dtype
        yield "revision", self.revision


class KvLimits(NamedTuple):
    """What an operator said of a model's KV cache, in bytes; None: nothing.

    soft_bytes: what it begins with, and keeps when others want some. hard_bytes: most that it may grow to.
    """

    soft_bytes: int | None = None
    hard_bytes: int | None = None

    def problem(self) -> str | None:
        """Why they can't hold together, if they can't."""
        return beyond_hard_limit("kv_soft_limit_bytes", self.soft_bytes, self.hard_bytes)


NO_LIMITS: Final = KvLimits()


def beyond_hard_limit(name: str, size: int | None, hard_bytes: int | None) -> str | None:
    """What is wrong with the setting `name` of a model whose KV cache may have `hard_bytes`, if anything."""
    if size is None or hard_bytes is None or size <= hard_bytes:
        return None
    return f"{name} is {size:,}, more than kv_hard_limit_bytes, {hard_bytes:,}. Lower it."


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A registered model; its variants share these settings.

    source: bundled name, checkpoint folder or hub id. defaults: sampling fields of requests that leave them
    out. pinned: never evicted (see `pins`). ttl_s: idle seconds after which it is unloaded; None: never.
    min_residency_s: seconds after becoming ready in which it is not evicted. priority: greater loads first
    and is evicted last. kv_soft_limit_bytes: KV bytes that it keeps when others want some (None: what it was
    loaded with); kv_hard_limit_bytes: most KV bytes it may grow to (None: no limit of its own).
    """

    id: str
    source: str
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    pinned: bool = False
    ttl_s: float | None = None
    min_residency_s: float = 0.0
    priority: int = 0
    kv_soft_limit_bytes: int | None = None
    kv_hard_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where a time or a limit makes no sense."""
        if self.min_residency_s < 0 or (self.ttl_s is not None and self.ttl_s < 0):
            raise ValueError(f"times of {self.id} must not be negative")
        if (problem := self.kv_limits.problem()) is not None:
            raise ValueError(f"{self.id}: {problem}")

    @property
    def kv_limits(self) -> KvLimits:
        """Both of them."""
        return KvLimits(self.kv_soft_limit_bytes, self.kv_hard_limit_bytes)

    def pins(self, key: VariantKey) -> bool:
        """Whether that variant stays. A pin is the operator's wish for what was configured; if it held what
        clients choose, too, they could fill the memory for good."""
        return self.pinned and key.as_configured


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a loaded variant takes, in bytes: predicted before a load, measured after it.

    device: where the model computes. context_bytes: what its process keeps on the device as long as it
    lives. host_bytes: host memory of the process itself. can_sleep: whether it can give back most of that
    without ending. On a device that is not the host its weights are parked in host memory, which frees
    everything on the device but the context; on the host itself only the KV cache is freed. kv_least_bytes,
    kv_most_bytes: between which its KV cache can be moved while it is loaded; None: it keeps its size.
    """

    device: str
    weights_bytes: int
    kv_bytes: int = 0
    workspace_bytes: int = 0
    graphs_bytes: int = 0
    context_bytes: int = 0
    host_bytes: int = 0
    can_sleep: bool = False
    kv_least_bytes: int | None = None
    kv_most_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for negative bytes, a sleep that would free nothing, or half a range."""
        if min(amount.bytes for amount in self._all()) < 0:
            raise ValueError("an estimate's bytes must not be negative")
        if self.can_sleep and self.device == HOST and not (self.kv_bytes or self.kv_most_bytes):
            raise ValueError(
                "weights in host memory cannot be parked there, and there is no KV cache to free"
            )
        if (self.kv_least_bytes is None) is not (self.kv_most_bytes is None):
            raise ValueError("a KV cache that can be moved has both a least and a most size")

    def awake(self) -> tuple[Amount, ...]:
        """Everything held while it is loaded and ready."""
        return tuple([amount for amount in self._all() if amount.bytes])

    @property
    def parked_bytes(self) -> int:
        """Host memory for the copy of its weights that it holds asleep."""
        return 0 if self.device == HOST else self.weights_bytes

    @property
    def freed_by_sleep(self) -> frozenset[Kind]:
        """The kinds of bytes that it gives back by sleeping."""
        return _FREED_ON_HOST if self.device == HOST else _FREED_BY_PARKING

    def parked(self) -> tuple[Amount, ...]:
        """What a sleeping model holds in addition."""
        return (Amount(HOST, Kind.PARKED, self.parked_bytes),) if self.parked_bytes else ()

    def to_wake(self) -> tuple[Amount, ...]:
        """What a sleeping model needs in addition to become ready."""
        return tuple([amount for amount in self.awake() if amount.kind in self.freed_by_sleep])

    def by_kind(self) -> dict[Kind, int]:
        """Bytes of each kind while it is awake."""
        return {amount.kind: amount.bytes for amount in self.awake()}

    def _all(self) -> tuple[Amount, ...]:
        return (
            Amount(self.device, Kind.WEIGHTS, self.weights_bytes),
            Amount(self.device, Kind.KV, self.kv_bytes),
            Amount(self.device, Kind.WORKSPACE, self.workspace_bytes),
            Amount(self.device, Kind.GRAPHS, self.graphs_bytes),
            Amount(self.device, Kind.CONTEXT, self.context_bytes),
            Amount(HOST, Kind.PROCESS, self.host_bytes),
        )


def per_device(amounts: Iterable[Amount]) -> dict[str, int]:
    """Sums by device, in bytes."""
    sums: dict[str, int] = {}
    for device, _, size in amounts:
        sums[device] = sums.get(device, 0) + size
    return sums


def find_entry(entries: Mapping[str, ModelEntry], name: str) -> ModelEntry | None:
    """The entry with that id or alias; an id wins over another entry's alias."""
    if name in entries:
        return entries[name]
    return next((entry for entry in entries.values() if name in entry.aliases), None)
