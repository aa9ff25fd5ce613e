"""Settings of an engine: frozen, validated together, no torch.

Purpose: what a user may choose when a model is loaded into an engine.
Does not know: the model's own architecture config, the server's settings, devices' state.
Invariant: nothing mutates a config; "auto" (None) resolves to a new value that is logged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from memory_efficient_gpt.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
TierName = Literal["B", "C"]

BLOCK_SIZE_CPU: Final = 16
BLOCK_SIZE_CUDA: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one model is loaded and served.

    model: a bundled model's name, a Hugging Face folder, or a hub id.
    device: "auto", "cpu", "cuda" or "cuda:N".
    quantization: how weights are stored ("int4", "int8", "int4-g128" ..., "bnb-nf4" ... with bitsandbytes);
    None leaves them as the checkpoint has them.
    max_model_len: positions of a request (prompt + output); None takes the model's own limit.
    kv_cache_bytes: size of the KV pool in bytes; None sizes it from `max_num_seqs` and free memory.
    num_kv_blocks: the pool in blocks instead of bytes (tests, benchmarks).
    kv_reserve_bytes: most bytes that `Engine.set_kv_limit` may let the pool grow to: address space, which is
    no memory until it is used. None: the pool keeps its size. Where memory can't be moved a note says why.
    block_size: tokens of a KV block; None takes 16 on CPU, 64 on CUDA.
    max_num_seqs: sequences computed together.
    max_batched_tokens: tokens of one step; longer prompts are computed in chunks.
    num_threads: CPU threads of this engine; None leaves torch's choice.
    overlap: whether a step is launched before the last one's tokens are read; None: only on CUDA.
    native_kernels: whether own kernels may be used: C++ on CPUs, Triton on CUDA.
    cuda_graphs: whether steps may be captured as CUDA graphs (where attention runs on Triton kernels).
    record_steps: whether decoding steps on a CPU may be recorded and replayed (by the native kernels).
    deterministic: whether a greedy or seeded request must give the same tokens alone, in any batch, with any
    chunks of its prompt and with prefix-cache hits; a model that can't is refused. Costs speed on CUDA.
    tier: force "B" (packed paged) or "C" (transformers' own cache); None lets the probe decide.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    quantization: str | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    num_kv_blocks: int | None = None
    kv_reserve_bytes: int | None = None
    block_size: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    prefix_cache: bool = True
    num_threads: int | None = None
    overlap: bool | None = None
    native_kernels: bool = True
    cuda_graphs: bool = True
    record_steps: bool = True
    deterministic: bool = False
    tier: TierName | None = None
    debug_checks: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError listing every problem."""
        problems = [
            f"{name} must be at least {least}, got {value}."
            for name, least in _MINIMA
            if (value := getattr(self, name)) is not None and value < least
        ]
        problems += [
            f"{name} must be {', '.join(map(str, allowed))}, got {value!r}."
            for name, allowed in _CHOICES
            if (value := getattr(self, name)) not in allowed
        ]
        if self.kv_cache_bytes is not None and self.num_kv_blocks is not None:
            problems.append("kv_cache_bytes and num_kv_blocks both size the KV pool; give one.")
        if self.deterministic and not self.native_kernels:
            problems.append(
                "deterministic needs native_kernels: other libraries' sums depend on the number of rows. "
                "Leave native_kernels on, or switch deterministic off."
            )
        if problems:
            raise ConfigError(problems)


_CHOICES: Final = (
    ("dtype", get_args(Dtype)),
    ("kv_cache_dtype", get_args(KVCacheDtype)),
    ("tier", (*get_args(TierName), None)),
)
_MINIMA: Final = (
    ("max_model_len", 2),
    ("kv_cache_bytes", 1),
    ("num_kv_blocks", 2),
    ("kv_reserve_bytes", 1),
    ("block_size", 1),
    ("max_num_seqs", 1),
    ("max_batched_tokens", 1),
    ("num_threads", 1),
)
