"""`megpt plan`: the models' estimates side by side, and the changes that would make them fit.

Purpose: lay models out in a budget one after the other; try quantization, contexts, a smaller cache.
Does not know: how a plan looks.
Invariant: what is proposed was estimated like the plan itself, with the options that it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError, UnsupportedModelError
from memory_efficient_gpt.memory.figures import MemoryEstimate

CONTEXTS: Final = (65536, 32768, 16384, 8192, 4096, 2048)
"""Tried from the longest on; the first that fits is proposed."""
REQUESTS: Final = (32, 16, 8, 4, 2, 1)
"""Likewise, of requests computed together."""
_SCHEMES: Final = ("int8", "int4")
_SMALLEST: Final = {"quantization": "int4", "kv_cache_dtype": "int8"}
_SMALLEST_NAME: Final = "with int4 weights, an int8 KV cache"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a plan."""

    config: EngineConfig
    estimate: MemoryEstimate

    @property
    def is_shortened(self) -> bool:
        """Whether its KV cache is too small for its context."""
        return self.estimate.max_model_len < self.estimate.wanted_model_len


@dataclass(frozen=True, slots=True)
class Layout:
    """Models in a budget. server_bytes: what the server takes beside its workers, where that counts."""

    entries: tuple[Entry, ...]
    budget_bytes: int
    server_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All models and the server."""
        return self.server_bytes + sum(entry.estimate.total_bytes for entry in self.entries)

    @property
    def peak_bytes(self) -> int:
        """The most that there is at once, models being loaded one after the other."""
        peak, before = 0, self.server_bytes
        for entry in self.entries:
            peak = max(peak, before + entry.estimate.load_peak_bytes)
            before += entry.estimate.total_bytes
        return max(peak, before)

    @property
    def has_room(self) -> bool:
        """Whether all models fit once they are loaded, each with its whole context."""
        short = any(entry.is_shortened for entry in self.entries)
        return self.needed_bytes <= self.budget_bytes and not short

    @property
    def fits(self) -> bool:
        """Whether they can be loaded, too."""
        return self.has_room and self.peak_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Change:
    """What would fit. options: to give instead. quantize_before: loading the float weights would not fit."""

    text: str
    options: tuple[str, ...]
    needed_bytes: int
    quantize_before: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The models as they were asked for, and the changes that would do if they do not fit."""

    layout: Layout
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether all models fit as asked."""
        return self.layout.fits


def make_plan(configs: Sequence[EngineConfig], budget_bytes: int | None) -> Plan:
    """Estimate all models together. budget_bytes: for the models alone, as a server's memory_budget_bytes;
    None is what is free on the device now, for the server as well.

    Raises what `estimate` raises.
    """
    from memory_efficient_gpt.hardware import free_memory_bytes, resolve_device
    from memory_efficient_gpt.memory import SERVER_BYTES

    device = resolve_device(configs[0].device)
    if budget_bytes is not None:
        layout = lay_out(configs, budget_bytes, 0)
    else:
        layout = lay_out(configs, free_memory_bytes(device), SERVER_BYTES if device.type == "cpu" else 0)
    return Plan(layout, () if layout.fits else tuple(_changes(layout)))


def lay_out(configs: Sequence[EngineConfig], budget_bytes: int, server_bytes: int) -> Layout:
    """The models one after the other, each with what the ones before it leave of the budget."""
    from memory_efficient_gpt.memory import estimate

    free = budget_bytes - server_bytes
    entries: list[Entry] = []
    for config in configs:
        entry = Entry(config, estimate(config, free_bytes=max(0, free)))
        free -= entry.estimate.total_bytes
        entries.append(entry)
    return Layout(tuple(entries), budget_bytes, server_bytes)


def _changes(layout: Layout) -> Iterator[Change]:
    """One change at a time; several together only if no single one will do."""
    found = False
    for change in (*_one_change(layout), *_fewer_models(layout)):
        found = True
        yield change
    if not found:
        yield from _all_changes(layout)


def _one_change(layout: Layout) -> Iterator[Change]:
    for scheme in _SCHEMES:
        yield from _try(layout, f"with {scheme} weights", quantization=scheme)
    yield from _try(layout, "with an int8 KV cache", kv_cache_dtype="int8")
    yield from _longest_context(layout, "with")
    yield from _most_requests(layout, "with")


def _all_changes(layout: Layout) -> Iterator[Change]:
    text = f"{_SMALLEST_NAME} and"
    yield from _most_requests(layout, text, **_SMALLEST) or _longest_context(layout, text, **_SMALLEST)


def _longest_context(layout: Layout, text: str, **options: Any) -> list[Change]:
    longest = max(entry.estimate.wanted_model_len for entry in layout.entries)
    for length in CONTEXTS:
        words = f"{text} a context of {length:,} tokens"
        if length < longest and (found := _try(layout, words, **options, max_model_len=length)):
            return found
    return []


def _most_requests(layout: Layout, text: str, **options: Any) -> list[Change]:
    most = max(entry.config.max_num_seqs for entry in layout.entries)
    for number in REQUESTS:
        words = f"{text} at most {number} request{'s' if number > 1 else ''} at once"
        if number < most and (found := _try(layout, words, **options, max_num_seqs=number)):
            return found
    return []


def _fewer_models(layout: Layout) -> Iterator[Change]:
    """Without one of several models."""
    entries = layout.entries
    for number, left_out in enumerate(entries):
        rest = [entry.config for entry in (*entries[:number], *entries[number + 1 :])]
        if rest and (smaller := lay_out(rest, layout.budget_bytes, layout.server_bytes)).fits:
            yield Change(f"without {left_out.config.model}", (), smaller.needed_bytes)


def _try(layout: Layout, text: str, **options: Any) -> list[Change]:
    """The change if it fits and differs from what was asked for."""
    configs = [_changed(entry, options) for entry in layout.entries]
    if configs == [entry.config for entry in layout.entries]:
        return []
    try:
        changed = lay_out(configs, layout.budget_bytes, layout.server_bytes)
    except (ConfigError, UnsupportedModelError):  # not for these models
        return []
    if not changed.has_room:
        return []
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return [Change(text, tuple(words), changed.needed_bytes, quantize_before=not changed.fits)]


def _changed(entry: Entry, options: dict[str, Any]) -> EngineConfig:
    """The config with those `options` that make this model smaller."""
    config, estimate = entry.config, entry.estimate
    kept = dict(options)
    if estimate.quantization is not None and config.quantization is None:  # the checkpoint is quantized
        kept.pop("quantization", None)
    if estimate.kv_cache_bytes == 0:  # transformers' own cache
        kept.pop("kv_cache_dtype", None)
    limits = {"max_model_len": estimate.wanted_model_len, "max_num_seqs": config.max_num_seqs}
    for name, present in limits.items():
        if kept.get(name, 0) >= present:
            kept.pop(name, None)
    return replace(config, **kept)
