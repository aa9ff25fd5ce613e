"""The figures of an estimate: plain data, no torch.

Purpose: bytes by kind, and what they were computed for.
Does not know: how they are found.
Invariant: every kind is counted once; the total is their sum.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a loaded model will take on `device`, in bytes.

    weights_bytes and kv_cache_bytes: what EngineInfo will say of a loaded model. workspace_bytes: what its
    process takes besides. load_peak_bytes: most bytes of weights at once while it loads.
    tier: how it is served. max_model_len: positions that a request gets; wanted_model_len: that it would get
    if the KV cache were large enough. quantization: scheme of most weights ("bitsandbytes" for a checkpoint
    of that library); None if they are stored in `dtype`. kv_context_bytes: KV cache of one request of
    wanted_model_len, the least of a pool that can shrink. kv_can_move: whether it can. notes: what a
    user should know.
    """

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    device: str
    notes: tuple[str, ...] = ()
    tier: str = "B"
    dtype: str = ""
    kv_cache_dtype: str = ""
    max_model_len: int = 0
    wanted_model_len: int = 0
    load_peak_bytes: int = 0
    quantization: str | None = None
    kv_context_bytes: int = 0
    kv_can_move: bool = False

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes

    def by_kind(self) -> dict[str, int]:
        """Bytes by the kinds that the ledger knows."""
        return {
            "weights": self.weights_bytes,
            "kv": self.kv_cache_bytes,
            "workspace": self.workspace_bytes,
        }
