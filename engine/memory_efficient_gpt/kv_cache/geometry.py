"""The exact shape of a model's KV cache, layer by layer.

Purpose: what the pool must allocate and what one token costs in bytes, found without reading a weight.
Does not know: block tables, requests, how attention is computed.
Invariant: layers are listed in the order in which a forward pass calls them.

`probe_geometry` builds the model on the meta device, where tensors have shapes and no storage, and runs
one forward pass whose attention function only writes down what it is called with. That is exact for any
architecture whose attention is dispatched through transformers, and it is the same dispatch that serving
uses, so a model that the probe cannot read cannot be served from the paged cache either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache.host_reads import remove_host_reads

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

PROBE_IMPLEMENTATION: Final = "memory_efficient_gpt_probe"
_PROBE_TOKENS: Final = 2


@dataclass(frozen=True, slots=True)
class LayerKV:
    """KV geometry of one attention layer; `module` is its path in the model ("model.layers.0.self_attn")."""

    module: str
    num_kv_heads: int
    key_dim: int
    value_dim: int
    num_query_heads: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


def token_bytes(layers: Iterable[LayerKV], element_bytes: int, scale_bytes: int = 0) -> int:
    """Bytes of cache that one token takes in all layers together.

    element_bytes: of one stored key or value number. scale_bytes: of one quantization scale, of which there
    is one for each token and head of the keys and of the values (0: the cache has none).
    """
    return sum(
        layer.num_kv_heads * ((layer.key_dim + layer.value_dim) * element_bytes + 2 * scale_bytes)
        for layer in layers
    )


def probe_geometry(config: PreTrainedConfig) -> list[LayerKV]:
    """KV geometry of every attention layer of the causal language model that `config` describes.

    Reads no weights and allocates none. `config` is not changed. Raises UnsupportedModelError when the model
    has no causal form, attention is not dispatched through transformers' interface, or a module attends
    twice in one pass (its cache would then need two entries for a token).
    """
    import torch

    model = _build_on_meta(config)
    calls: list[tuple[torch.nn.Module, LayerKV]] = []
    token = _calls.set(calls)
    try:
        with torch.no_grad():
            ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device="meta")
            positions = torch.arange(_PROBE_TOKENS, device="meta")[None]
            model(input_ids=ids, position_ids=positions, use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception as error:  # any model code may run here; any failure means the same
        raise UnsupportedModelError(
            f"{_name(config)} cannot be probed for the paged KV cache: its code failed, in bfloat16 and "
            f"without data, with {type(error).__name__}: {error}"
        ) from error
    finally:
        _calls.reset(token)
    return _name_layers(config, model, calls)


def call_window(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> int | None:
    """The sliding window of one attention call: tokens that a token sees, itself included; None for all.

    The call's own argument decides, then the module's attribute, then the config's entry for the layer:
    some models tell the window only to the mask that transformers would have built.
    """
    if "sliding_window" in kwargs:
        window = kwargs["sliding_window"]
    elif hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = _config_window(module)
    return int(window) if window else None


def require_plain_causal(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError for calls whose mathematics paged attention does not have."""
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise UnsupportedModelError(f"{type(module).__name__} attends to later tokens: not a causal model.")
    for name in ("position_bias", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to attention, which the paged cache cannot honour."
            )


def causal_model_class(config: PreTrainedConfig) -> type:
    """The class that generates text for `config`. Raises UnsupportedModelError when there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{_name(config)} is an encoder-decoder; only decoder models are served.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{_name(config)} has no causal language model in transformers.")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class: type = found[0] if isinstance(found, list | tuple) else found
    return model_class


_calls: ContextVar[list[Any] | None] = ContextVar("megpt_recorded_calls", default=None)


def _build_on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    causal_model_class(config)
    AttentionInterface.register(PROBE_IMPLEMENTATION, _record)
    config = copy.deepcopy(config)  # from_config writes the attention implementation into it
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None  # experts one by one, as quantized ones run, read token values
    from_config: Callable[..., torch.nn.Module] = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):  # bfloat16, because grouped expert GEMMs accept nothing else there
            model = from_config(config, attn_implementation=PROBE_IMPLEMENTATION, dtype=torch.bfloat16)
    except KeyError as error:
        if error.args != (PROBE_IMPLEMENTATION,):
            raise _cannot_build(config, error) from error
        raise UnsupportedModelError(
            f"{_name(config)} chooses its attention from a table of its own, without transformers' interface."
        ) from error
    except Exception as error:  # any model code may run here; any failure means the same
        raise _cannot_build(config, error) from error
    remove_host_reads(model)  # meta tensors have no values to read
    return model.train(False)


def _cannot_build(config: PreTrainedConfig, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{_name(config)} cannot be built with paged attention: {type(error).__name__}: {error}"
    )


def _record(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in for attention: query `[1, Hq, T, Dk]`, key and value `[1, Hkv, T, D]` -> `[1, T, Hq, Dv]`."""
    calls = _calls.get()
    if calls is None:
        raise RuntimeError(f"the {PROBE_IMPLEMENTATION!r} attention function was called outside a probe")
    require_plain_causal(module, kwargs)
    softcap = kwargs.get("softcap")
    layer = LayerKV(
        module="",
        num_kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        num_query_heads=query.shape[1],
        window=call_window(module, kwargs),
        softcap=float(softcap) if softcap else None,
        sinks=kwargs.get("s_aux") is not None,
    )
    calls.append((module, layer))
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3])), None


def _name_layers(
    config: PreTrainedConfig, model: torch.nn.Module, calls: list[tuple[torch.nn.Module, LayerKV]]
) -> list[LayerKV]:
    if not calls:
        raise UnsupportedModelError(f"{_name(config)} never calls transformers' attention interface.")
    paths = {module: path for path, module in model.named_modules()}
    layers = [replace(layer, module=paths[module]) for module, layer in calls]
    seen: set[str] = set()
    for layer in layers:
        if layer.module in seen:
            raise UnsupportedModelError(
                f"{_name(config)} attends twice in one pass in {layer.module}; the paged cache holds one "
                "key and value for a token and module."
            )
        seen.add(layer.module)
    return layers


def _config_window(module: torch.nn.Module) -> int | None:
    config = getattr(module, "config", None)
    window: int | None = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    layer_index = getattr(module, "layer_idx", None)
    if layer_types is None or layer_index is None:
        return window
    return window if layer_types[layer_index] == "sliding_attention" else None


def _name(config: PreTrainedConfig) -> str:
    architectures = getattr(config, "architectures", None)
    return str(architectures[0]) if architectures else type(config).__name__
