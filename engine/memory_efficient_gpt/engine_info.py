"""What an engine says of itself: plain data that crosses processes, no torch.

Purpose: the facts of a loaded model, the counters of a running engine, the figures of a sleeping one.
Does not know: how either came about.
Invariant: every field is a plain number, string or tuple, so that it fits a msgpack frame.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """A loaded model. Sizes in bytes; `tier` and `tier_reason` say how it is run and why.

    quantization: scheme of the weights, or "mixed (...)" with all of them; None if they are stored in
    `dtype`. prefix_cache: whether prompts that begin alike can share KV blocks. kv_cache_bytes: the KV
    pool's at the start; kv_block_bytes: of one block. kv_least_bytes, kv_most_bytes: between which it can be
    moved; None: it keeps its size. kv_granule_bytes: by about how much it moves at least.
    """

    model: str
    architecture: str
    tier: str
    tier_reason: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    kv_cache_dtype: str
    weights_bytes: int
    kv_cache_bytes: int
    attention_backend: str
    quantization: str | None = None
    prefix_cache: bool = True
    kv_block_bytes: int = 0
    kv_granule_bytes: int = 0
    kv_least_bytes: int | None = None
    kv_most_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine began (totals) and its present state (num_running .. num_cached_blocks).

    num_kv_blocks: those that may be used now. num_waiting_for_blocks: sequences that wait because KV blocks
    are short, not for a slot. host_seconds: time of steps spent outside the model's forward and sampling.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_blocks: int = 0
    num_kv_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    last_step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    """What an engine gave back when it fell asleep, and what it keeps. Sizes in bytes.

    parked_bytes: host memory that its weights take now; pinned: whether that is page-locked. device_bytes:
    what torch still has on a device that is not the host. kv_bytes: the KV cache's memory, given back.
    dropped_bytes: weights on the host that are read from their file again when they are needed.
    """

    parked_bytes: int = 0
    pinned: bool = False
    device_bytes: int = 0
    kv_bytes: int = 0
    dropped_bytes: int = 0
    seconds: float = 0.0
