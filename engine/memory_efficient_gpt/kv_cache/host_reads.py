"""Take out of a transformers model what looks at token values from Python.

Purpose: a forward pass that only queues work: it runs on meta tensors, which have no values (the geometry
probe), and never waits for the device (serving).
Does not know: attention, weights.
Invariant: afterwards a sequence's result depends on its own tokens only, whatever is packed beside it.

Two places in transformers look: the check for padding without a mask, and RoPE kinds that choose their
frequencies by the longest position of the batch. The second is also wrong for packed rows: LongRoPE and
dynamic NTK scaling change all frequencies once any position passes the length that the model was trained
on, so a long request would change the short ones beside it. Frozen, they stay those of short sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_BATCH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")
_PADDING_CHECK: Final = "warn_if_padding_and_no_attention_mask"
REPLACED_ATTRIBUTES: Final = ("rope_type", _PADDING_CHECK)
"""Of modules; what `remove_host_reads` sets on instances."""


def remove_host_reads(model: torch.nn.Module) -> None:
    """Silence the padding checks and freeze the RoPE layers of `model`, in place.

    Exact for positions below `rope_length_limit(config)`.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, _PADDING_CHECK):
            object.__setattr__(module, _PADDING_CHECK, _no_check)
        kinds = getattr(module, "rope_type", None)  # read after construction by the update hook only
        if isinstance(kinds, str) and _depends_on_batch(kinds):
            _take_short_frequencies(module)
            module.rope_type = "default"
        elif isinstance(kinds, dict) and any(map(_depends_on_batch, kinds.values())):
            _take_short_frequencies(module)
            module.rope_type = {k: "default" if _depends_on_batch(v) else v for k, v in kinds.items()}


def rope_length_limit(config: PreTrainedConfig) -> int | None:
    """Positions up to which frozen RoPE equals the model's own; None when it always does.

    LongRoPE takes its short factors up to `original_max_position_embeddings` positions; dynamic NTK scaling
    leaves the frequencies alone up to `max_position_embeddings`.
    """
    config = config.get_text_config()
    limits = []
    for parameters in _rope_parameter_sets(config):
        kind = str(parameters.get("rope_type", "default"))
        if "longrope" in kind:
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limits.append(int(original or config.max_position_embeddings))
        elif _depends_on_batch(kind):
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def _rope_parameter_sets(config: PreTrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):  # one set for each layer type
        return [value for value in parameters.values() if isinstance(value, dict)]
    return [parameters]


def _depends_on_batch(rope_type: str) -> bool:
    return any(kind in rope_type for kind in _BATCH_DEPENDENT_ROPE)


def _take_short_frequencies(module: torch.nn.Module) -> None:
    """A long text may have gone through the model before; the next one beyond the limit starts anew."""
    buffers = module._buffers
    for name in [name for name in buffers if name.endswith("original_inv_freq")]:
        original = buffers[name]
        buffers[name.replace("original_", "")] = original.clone() if original is not None else None
    cached = [name for name in vars(module) if name.endswith("max_seq_len_cached")]
    for name in cached if hasattr(module, "original_max_seq_len") else ():
        setattr(module, name, module.original_max_seq_len)


def _no_check(input_ids: object, attention_mask: object) -> None:
    """Packed rows have no padding to warn of."""
