"""Make a transformers model fit for packed steps.

Purpose: what must be changed in a loaded model before `forward_packed` may be called on it.
Does not know: weights, caches, the scheduler.
Invariant: afterwards a sequence's result depends on its own tokens only, whatever is packed beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memory_efficient_gpt.attention.interface import ATTENTION_NAME, register
from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache.host_reads import REPLACED_ATTRIBUTES, remove_host_reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_model(model: PreTrainedModel) -> None:
    """Switch `model` to paged attention and take away what looks at the whole batch. Changes it in place.

    Sets evaluation mode, removes host reads, and turns off the router losses that some mixture-of-experts
    configs ask for: they would be computed over all sequences of a step, for nobody. Raises
    UnsupportedModelError when the model does not take an attention implementation by name.
    """
    model.train(False)
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    taken = model.config._attn_implementation
    if taken != ATTENTION_NAME:
        raise UnsupportedModelError(f"{type(model).__name__} kept its own attention ({taken!r}).")
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False
    remove_host_reads(model)


@contextmanager
def setup_kept(model: PreTrainedModel) -> Iterator[None]:
    """Undo afterwards what `prepare_model` does within: plain transformers may then use `model` again.

    Weights and caches stay as they are then, and layers keep the kernels they were given.
    """
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    text_config = model.config.get_text_config()
    router_logits = getattr(text_config, "output_router_logits", None)
    instances: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (attributes, {name: attributes[name] for name in REPLACED_ATTRIBUTES if name in attributes})
        for module in model.modules()
        if any(hasattr(module, name) for name in REPLACED_ATTRIBUTES)
        for attributes in (vars(module),)
    ]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        if router_logits is not None:
            text_config.output_router_logits = router_logits
        for attributes, own in instances:
            for name in REPLACED_ATTRIBUTES:
                attributes.pop(name, None)
            attributes.update(own)
