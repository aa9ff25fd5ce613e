"""A small model of the same architecture: every kind of layer, few of each, narrow.

Purpose: make a config's class run in milliseconds without losing what could break packed execution.
Does not know: attention, caches, what the clone is used for.
Invariant: class, kinds of layers, head sizes, RoPE parameters and switches stay; sizes and counts shrink.

Windows and the like become shorter than the probe's sequences, so that they matter there. There is no
complete list of what configs call their sizes: candidates go from much to little shrinking, and the caller
takes the first one that can be built and run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCAB_SIZE: Final = 128
WINDOW: Final = 6
CHUNK: Final = 8
SOFTCAP: Final = 1.0
_MAX_LAYERS: Final = 12
_FEW_LAYERS: Final = 4
_FREE_HIDDEN_SIZE: Final = 64

_COUNTS: Final = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_WIDTHS: Final = {
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "n_inner": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "hidden_size_per_layer_input": 32,
}
_WIDTH_SUFFIX: Final = "intermediate_size"
_WINDOW_NAME: Final = re.compile(r"^((sliding|attention|local)_)*window(_size)?$")
_PERIOD_NAME: Final = re.compile(r"(period|pattern|interval|freq|sparse_step|every_n_layers|offset)$")
_INDEX_NAME: Final = re.compile(r"(layers|idxs|indices)$")
_HIDDEN_SIZE_COPIES: Final = ("word_embed_proj_dim", "embedding_size")


def small_clones(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Copies of `config`, smallest first, the last one of full size. They may be impossible to build."""
    for steps in (_EVERYTHING, _EVERYTHING[:-1], _EVERYTHING[:3]):
        clone = _copy(config)
        try:
            for step in steps:
                step(clone)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue  # the config has no such sizes, or refuses this combination of them
        yield clone
    yield _copy(config)


def shallow_clone(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of full width with few layers, every kind of them among these, and no quantization.

    Raises what a config without a number of layers raises (AttributeError, TypeError or ValueError).
    """
    clone = _copy(config)
    _shrink_depth(clone)
    return clone


def _copy(config: PreTrainedConfig) -> PreTrainedConfig:
    clone = copy.deepcopy(config.get_text_config())
    if getattr(clone, "quantization_config", None) is not None:
        del clone.quantization_config
    return clone


def _shrink_depth(config: Any) -> None:
    kept = _kept_layers(config)
    depth = config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    overrides = _layer_overrides(config)
    for name, value in list(vars(config).items()):
        if _is_index_list(name, value, depth):
            setattr(config, name, [at for at, index in enumerate(kept) if index in value])
        elif _is_layer_list(value, depth):
            setattr(config, name, type(value)(value[index] for index in kept))
    config.num_hidden_layers = len(kept)
    if overrides:
        config.per_layer_config = {at: overrides.get(index, {}) for at, index in enumerate(kept)}
    if shared:
        config.num_kv_shared_layers = sum(index >= depth - shared for index in kept)


def _layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What single layers have otherwise than the config says, where transformers supports that."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(index): settings for index, settings in config.to_dict()["per_layer_config"].items()}


def _is_layer_list(value: object, depth: int) -> bool:
    """A list with one entry for each layer."""
    return isinstance(value, list | tuple) and len(value) == depth


def _is_index_list(name: str, value: object, depth: int) -> bool:
    """A list of layers' numbers, such as those with experts."""
    if not (isinstance(value, list) and value and _INDEX_NAME.search(name)):
        return False
    return (
        all(isinstance(v, int) for v in value)
        and value == sorted(set(value))
        and 0 <= value[0] <= value[-1] < depth
    )


def _kept_layers(config: Any) -> list[int]:
    """Layers that together show every kind there is, at both sides of where layers begin to share KV."""
    depth = config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    kinds = _layer_kinds(config)
    if not shared:
        return _covering(kinds, 0, depth, _fewest_layers(config))
    return _covering(kinds, 0, depth - shared, 1) + _covering(kinds, depth - shared, depth, 1)


def _covering(kinds: list[Hashable], start: int, end: int, fewest: int) -> list[int]:
    """Indices in start..end-1 with all its kinds: the first layers, or one of each if those are too many."""
    firsts = {kind: index for index, kind in reversed(list(enumerate(kinds[start:end], start)))}
    prefix = max(firsts.values()) - start + 1
    if prefix <= _MAX_LAYERS:
        return list(range(start, min(end, start + max(prefix, fewest))))
    return sorted(firsts.values())


def _layer_kinds(config: Any) -> list[Hashable]:
    depth = config.num_hidden_layers
    overrides = _layer_overrides(config)
    kinds: list[list[object]] = [[overrides.get(index)] for index in range(depth)]
    for name, value in vars(config).items():
        if _is_index_list(name, value, depth):
            for index, kind in enumerate(kinds):
                kind.append(index in value)
        elif _is_layer_list(value, depth):
            for kind, entry in zip(kinds, value, strict=True):
                kind.append(entry)
    return [repr(kind) for kind in kinds]


def _fewest_layers(config: Any) -> int:
    """Enough for two turns of anything periodic that the config gives as a number."""
    periods = [
        value
        for name, value in vars(config).items()
        if _PERIOD_NAME.search(name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return min(_MAX_LAYERS, max([_FEW_LAYERS, *(2 * period for period in periods)]))


def _shrink_vocabulary(config: Any) -> None:
    _limit(config, {"vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= config.vocab_size:
            setattr(config, name, 0)


def _shrink_thresholds(config: Any) -> None:
    """What changes attention from some length or size on must do so within the probe's short sequences."""
    for name, value in list(vars(config).items()):
        if _WINDOW_NAME.search(name) and isinstance(value, int) and value > WINDOW:
            setattr(config, name, WINDOW)
    _limit(config, {"attention_chunk_size": CHUNK, "floor_scale": CHUNK})
    if getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = SOFTCAP


def _shrink_widths(config: Any) -> None:
    _limit(config, _COUNTS)
    _limit(config, _WIDTHS)
    for name, value in list(vars(config).items()):
        if not name.endswith(_WIDTH_SUFFIX):
            continue
        if isinstance(value, list):
            setattr(config, name, [min(v, 64) for v in value])
        elif isinstance(value, int):
            setattr(config, name, min(value, 64))


def _shrink_heads(config: Any) -> None:
    """Few heads of the same size, as many kv heads as keep the kind: own, grouped or one for all."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "is_heterogeneous", False):  # heads may be given layer by layer: leave them
        config.hidden_size = min(hidden, _FREE_HIDDEN_SIZE)
        return
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    own_size = _head_size_is_independent(config)
    if heads % kv_heads:
        return
    config.num_attention_heads = min(heads, 4 if 1 < kv_heads < heads else 2)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = min(kv_heads, 2 if kv_heads > 1 else 1)
    smaller = _FREE_HIDDEN_SIZE if own_size else config.num_attention_heads * (hidden // heads)
    config.hidden_size = min(hidden, smaller)
    for name in _HIDDEN_SIZE_COPIES:
        if getattr(config, name, None) == hidden:
            setattr(config, name, config.hidden_size)


def _head_size_is_independent(config: Any) -> bool:
    """Whether heads keep their size when the hidden size changes."""
    head_dim = getattr(config, "head_dim", None)
    stated = isinstance(head_dim, int) and head_dim * config.num_attention_heads != config.hidden_size
    return stated or getattr(config, "kv_lora_rank", None) is not None


def _limit(config: Any, limits: dict[str, int]) -> None:
    for name, most in limits.items():
        value = vars(config).get(name)  # of this very name: transformers maps some to others
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            setattr(config, name, most)


_EVERYTHING: Final = (_shrink_depth, _shrink_vocabulary, _shrink_thresholds, _shrink_widths, _shrink_heads)
