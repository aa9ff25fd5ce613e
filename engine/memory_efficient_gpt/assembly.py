"""Put an engine together: checkpoint, tier, weights, cache, kernels, limits.

Purpose: turn an EngineConfig into the parts an Engine drives, and the facts that describe them.
Does not know: requests, steps.
Invariant: every choice made here for the user ("auto", a fallback) is in `EngineInfo` with its reason.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from memory_efficient_gpt.attention.backends import choose_backend
from memory_efficient_gpt.attention.context import AttentionBackend, TurningBackend
from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.config import BLOCK_SIZE_CPU, EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.hardware import free_memory_bytes, resolve_device
from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.building import KVCache, build_cache, keeps_its_size
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.limit import KVLimit
from memory_efficient_gpt.kv_cache.pool_size import context_length, kv_block_size, kv_dtype
from memory_efficient_gpt.loading import (
    check_checkpoint,
    eos_token_ids,
    load_config,
    load_model,
    quantization_notes,
    quantization_settings,
    resolve_dtype,
    resolve_model,
)
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.deferral import DeferredKind
from memory_efficient_gpt.native.layers import NativeLayer
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization import bitsandbytes
from memory_efficient_gpt.quantization.bitsandbytes_linear import bitsandbytes_modules
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import (
    give_kernels,
    present_schemes,
    quantize_model,
    quantized_modules,
    weight_bytes,
)
from memory_efficient_gpt.quantization.naming import name_of
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import Scheme, parse_scheme
from memory_efficient_gpt.quantization.triton_weights import give_triton_kernels
from memory_efficient_gpt.quantization.triton_weights import summary as triton_summary
from memory_efficient_gpt.runner import PackedRunner, Runner
from memory_efficient_gpt.scheduler import SchedulerConfig
from memory_efficient_gpt.sleeping import SleepableModel
from memory_efficient_gpt.step_replays import choose_replays, replay_note
from memory_efficient_gpt.tiers import TierDecision, decide_tier
from memory_efficient_gpt.transformers_runner import TransformersRunner
from memory_efficient_gpt.weight_memory import apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DETERMINISTIC_NOTE: Final = "deterministic: a token's numbers depend on the tokens before it only"
_DEFERRED: Final[tuple[DeferredKind, ...]] = ("sums", "turns", "head_norms")
_DEFERRED_ALIKE: Final[tuple[DeferredKind, ...]] = ("sums", "turns")
"""Those whose joined kernels give the bits of single ones: steps that are not captured join nothing."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What an Engine drives. kv_limit: None if the KV pool keeps its size."""

    info: EngineInfo
    runner: Runner
    allocator: BlockAllocator
    scheduler_config: SchedulerConfig
    overlap: bool
    sleepable: SleepableModel
    kv_limit: KVLimit | None = None


def assemble(config: EngineConfig, progress: Callable[[str, float], None]) -> Parts:
    """Load a model and everything around it.

    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError or ConfigError, before any weight
    is read wherever that is possible.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    scheme = parse_scheme(config.quantization) if config.quantization is not None else None
    if scheme is not None and scheme.by_bitsandbytes:
        bitsandbytes.require()
    progress("checking files", 0.0)
    folder = resolve_model(config.model, config.revision)
    files = check_checkpoint(folder)
    origin = quantization_notes(folder)
    model_config = load_config(folder)
    progress("probing the architecture", 0.1)
    decision = decide_tier(
        model_config, forced=config.tier, max_model_len=config.max_model_len, remembers=True
    )
    dtype, notes = resolve_dtype(config.dtype, model_config, device)
    progress("loading weights", 0.3)
    quantizes = scheme is not None and quantization_settings(folder) is None
    home = torch.device("cpu") if quantizes else device  # float weights go to a GPU one by one then
    model = load_model(folder, model_config, dtype=dtype, device=home)
    notes = (*origin, *notes)
    if scheme is not None:
        with apart(device):
            notes = (*notes, *_quantize(model, scheme, config, device, progress))
    progress("preparing the cache", 0.9)
    parts = build(model, decision, config, device=device, name=config.model, folder=folder, notes=notes)
    logger.info(
        "%s: tier %s (%s), %d weight files, %s, %d KV blocks of %d tokens",
        config.model, parts.info.tier, parts.info.tier_reason, len(files), parts.info.dtype,
        parts.info.num_kv_blocks, parts.info.block_size,
    )  # fmt: skip
    progress("ready", 1.0)
    return parts


def _quantize(
    model: PreTrainedModel,
    scheme: Scheme,
    config: EngineConfig,
    device: torch.device,
    progress: Callable[[str, float], None],
) -> tuple[str, ...]:
    """Quantize as was asked; returns what became of it, for people."""
    if (present := name_of(present_schemes(model))) is not None:
        if present == str(scheme):
            return ()
        raise ConfigError(
            [f"{config.model} is quantized already, as {present}; {scheme} was asked for. "
             "Leave quantization out, or give the checkpoint it was made from."]
        )  # fmt: skip
    layers = find_layers(model)
    plan = uniform_plan(layers, scheme)
    report = quantize_model(
        model,
        plan,
        kernels=cpu_kernels(config, device),
        progress=lambda name, share: progress(f"quantizing {name}", 0.4 + 0.5 * share),
        device=device,
    )
    return (report.summary(), *bitsandbytes.left_alone(layers, scheme))


def cpu_kernels(config: EngineConfig, device: torch.device) -> Kernels | None:
    """The native kernels, if they may be used and there are any."""
    if device.type != "cpu" or not config.native_kernels:
        return None
    kernels = load_kernels()
    return None if isinstance(kernels, Unavailable) else kernels


def build(
    model: PreTrainedModel,
    decision: TierDecision,
    config: EngineConfig,
    *,
    device: torch.device,
    name: str,
    folder: Path | None = None,
    notes: tuple[str, ...] = (),
) -> Parts:
    """The parts around a model that is loaded already; the model is changed in place."""
    if decision.tier == "C":
        return _build_unpacked(model, decision, config, device, name, folder, notes)
    layers = decision.layers
    assert layers is not None, "a packed tier always knows its layers"
    prepare_model(model)
    notes = (*notes, *bitsandbytes.prepare(model))
    if device.type == "cpu" and config.native_kernels:
        from memory_efficient_gpt.fusion.apply import fuse

        notes = (*notes, fuse(model).summary())
    elif device.type == "cuda" and config.native_kernels:
        with apart(device):
            notes = (*notes, *_fuse_on_cuda(model, layers, device, deterministic=config.deterministic))
    computed_in = model.dtype
    dtype = kv_dtype(config, computed_in, device)
    with apart(device):
        backend, reason = choose_backend(
            device, computed_in, dtype, layers=layers, block_size=kv_block_size(config, device),
            native=config.native_kernels, deterministic=config.deterministic,
        )  # fmt: skip
    notes = (*notes, reason, *decision.notes)
    graphs = config.cuda_graphs and backend.name == "triton"
    replays = choose_replays(config, backend)
    defers: frozenset[DeferredKind] = frozenset()
    if graphs and config.native_kernels:
        kinds = _DEFERRED if not config.deterministic else _DEFERRED_ALIKE
        defers, note = _try_deferral(model, layers, backend, dtype, device, kinds)
        notes = (*notes, note)
    if config.deterministic:
        from memory_efficient_gpt.fusion.determinism import require_determinism

        block_size = kv_block_size(config, device)
        require_determinism(config.model, model, layers, backend, device, dtype, block_size, defers)
        notes = (*notes, DETERMINISTIC_NOTE)
    else:
        notes = (*notes, *_batch_dependence(model, backend, device))
    wanted_len, own_notes = context_length(config, model.config, decision.max_model_len)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading and packing left over is free for the KV cache
    cache = build_cache(
        config, layers, dtype, device, wanted_len=wanted_len, free_bytes=free_memory_bytes(device)
    )
    cache.pool.attach(model)
    notes = (*notes, *own_notes, *cache.notes)
    eos = eos_token_ids(model, folder)
    overlap = config.overlap if config.overlap is not None else device.type == "cuda"
    runner = PackedRunner(
        model, cache.pool, backend, device=device, max_num_seqs=config.max_num_seqs,
        max_model_len=cache.max_len, end_ids=eos, overlap=overlap, replays=replays,
        defers=defers,
    )  # fmt: skip
    if device.type == "cuda" or replays is not None:
        obstacle = runner.check_replays(_vocab_size(model))
        if obstacle is None and device.type == "cuda":
            decision = replace(decision, tier="A")
        notes = (*notes, replay_note(device, backend, obstacle))
    info = _info(
        model, decision, name, device, cache.max_len, eos, backend, cache, notes,
        prefix_cache=config.prefix_cache,
    )  # fmt: skip
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        window=_common_window(layers),
        variant=f"{name}@{config.revision or ''}",
    )
    sleepable = SleepableModel(model, cache.pool, device, cache.limit)
    return Parts(info, runner, cache.allocator, scheduler_config, overlap, sleepable, cache.limit)


def _fuse_on_cuda(
    model: PreTrainedModel, layers: list[LayerKV], device: torch.device, *, deterministic: bool
) -> tuple[str, ...]:
    """Merge products first: what is fused around them is then tried on what will really run."""
    from memory_efficient_gpt.fusion.apply import fuse
    from memory_efficient_gpt.fusion.kernels import kernels_for
    from memory_efficient_gpt.fusion.merge import merge_linears
    from memory_efficient_gpt.fusion.trial_run import packed_logits

    give_triton_kernels(model, deterministic=deterministic)
    kernels = kernels_for(model, deterministic=deterministic)
    own = None if isinstance(kernels, Unavailable) else kernels
    merged = merge_linears(
        model, lambda: packed_logits(model, layers, device), own.linear if own is not None else None,
        deterministic=deterministic,
    )  # fmt: skip
    return merged.summary(), fuse(model, own).summary()


def _try_deferral(
    model: PreTrainedModel,
    layers: list[LayerKV],
    backend: AttentionBackend,
    kv_dtype: torch.dtype,
    device: torch.device,
    kinds: tuple[DeferredKind, ...],
) -> tuple[frozenset[DeferredKind], str]:
    """What may wait for the next call in captured steps, where the host's time is nothing."""
    from memory_efficient_gpt.fusion.deferral_trial import try_deferral
    from memory_efficient_gpt.fusion.trial_run import WritesOnly, packed_logits

    assert isinstance(backend, TurningBackend), "the Triton backend turns and writes"
    writes = WritesOnly(backend)
    report = try_deferral(lambda: packed_logits(model, layers, device, writes, kv_dtype), kinds)
    return report.kinds, report.summary()


def _build_unpacked(
    model: PreTrainedModel,
    decision: TierDecision,
    config: EngineConfig,
    device: torch.device,
    name: str,
    folder: Path | None,
    notes: tuple[str, ...],
) -> Parts:
    """Tier C: one sequence at a time, its blocks a formality that never runs out."""
    model.eval()
    notes = (*notes, *bitsandbytes.prepare(model))
    if quantized_modules(model) and (kernels := cpu_kernels(config, device)) is not None:
        give_kernels(model, kernels)
    elif device.type == "cuda" and config.native_kernels:
        notes = (*notes, triton_summary(give_triton_kernels(model)))
    max_len, own_notes = context_length(config, model.config, decision.max_model_len)
    notes = (*notes, *decision.notes, *own_notes)
    if config.deterministic:
        notes = (*notes, "deterministic: each sequence is computed alone")
    if config.kv_reserve_bytes is not None:
        notes = (*notes, keeps_its_size("transformers owns it"))
    if config.prefix_cache or config.max_num_seqs > 1:
        notes = (*notes, "no prefix cache, one sequence at a time: transformers owns the cache")
    block_size = config.block_size or BLOCK_SIZE_CPU
    num_blocks = math.ceil(max_len / block_size) + 2
    eos = eos_token_ids(model, folder)
    runner = TransformersRunner(model, device=device, end_ids=eos)
    info = _info(model, decision, name, device, max_len, eos, None, None, notes)
    scheduler_config = SchedulerConfig(max_num_seqs=1, max_batched_tokens=max_len, forks=False, chunks=False)
    allocator = BlockAllocator(num_blocks, block_size, prefix_cache=False)
    sleepable = SleepableModel(model, None, device)
    return Parts(info, runner, allocator, scheduler_config, overlap=False, sleepable=sleepable)


def _info(
    model: PreTrainedModel,
    decision: TierDecision,
    name: str,
    device: torch.device,
    max_len: int,
    eos: tuple[int, ...],
    backend: AttentionBackend | None,
    cache: KVCache | None,
    notes: tuple[str, ...],
    prefix_cache: bool = False,
) -> EngineInfo:
    """cache: None if transformers owns it."""
    pool, limit = (cache.pool, cache.limit) if cache else (None, None)
    return EngineInfo(
        model=name,
        architecture=type(model).__name__,
        tier=decision.tier,
        tier_reason=decision.reason,
        dtype=_dtype_name(model.dtype),
        device=str(device),
        max_model_len=max_len,
        vocab_size=_vocab_size(model),
        eos_token_ids=eos,
        num_kv_blocks=cache.num_blocks - 1 if cache else 0,
        block_size=pool.block_size if pool else 0,
        kv_cache_dtype=_dtype_name(pool.dtype) if pool else "transformers",
        weights_bytes=weight_bytes(model),
        kv_cache_bytes=cache.held_bytes if cache else 0,
        kv_block_bytes=pool.block_bytes if pool else 0,
        kv_granule_bytes=pool.granule_bytes if pool and limit else 0,
        kv_least_bytes=limit.least_bytes if limit else None,
        kv_most_bytes=limit.most_bytes if limit else None,
        attention_backend=backend.name if backend else "transformers",
        quantization=name_of(present_schemes(model)),
        prefix_cache=prefix_cache,
        notes=tuple(note for note in notes if note),
    )


def _vocab_size(model: PreTrainedModel) -> int:
    """Rows of the output head; without a look at its weight, which may be quantized."""
    head = model.get_output_embeddings()
    return int(head.out_features if isinstance(head, torch.nn.Linear) else head.weight.shape[0])


def _batch_dependence(
    model: PreTrainedModel, backend: AttentionBackend, device: torch.device
) -> tuple[str, ...]:
    """What users must know of a seed's promise where torch or bitsandbytes multiplies: its sums depend on the
    row count."""
    foreign = bool(bitsandbytes_modules(model))
    native = backend.name == "cpu-native" and any(isinstance(m, NativeLayer) for m in model.modules())
    if (native and not foreign) or (device.type == "cpu" and model.dtype == torch.float32):
        return ()
    who = "bitsandbytes" if foreign else "torch"
    dtype = _dtype_name(model.dtype)
    return (
        f"{who} computes some layers in {dtype}: near ties, a seed's text may depend on what else is in the "
        "batch",
    )


def _common_window(layers: list[LayerKV]) -> int | None:
    """The widest window if every layer has one: what is older can be freed."""
    windows = [layer.window for layer in layers]
    return max(w for w in windows if w is not None) if None not in windows else None


def _dtype_name(dtype: torch.dtype) -> str:
    return "fp8" if dtype is torch.float8_e4m3fn else str(dtype).removeprefix("torch.")
