"""Flash attention for a model that plain transformers runs.

Purpose: switch to the best flash kernel that this model, dtype and device can really use.
Does not know: the paged cache, which has attention of its own.
Invariant: a kernel counts as usable only after the model ran with it, torch's other kernels for scaled dot
product attention switched off; what does not work is undone.

    CUDA    FlashAttention-3, FlashAttention-2 where their packages are installed, else torch's flash kernel
    CPU     torch's flash kernel
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory_efficient_gpt.choice import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE_DTYPES: Final = (torch.float16, torch.bfloat16)
_TORCH: Final = "sdpa"
_TRIAL_TOKENS: Final = 8
_REFUSALS: Final = (ImportError, ValueError, RuntimeError, TypeError, NotImplementedError)


def use_flash(model: PreTrainedModel) -> Choice:
    """Switch `model` to the first flash kernel that works on its device; without any it stays as it was."""
    before = str(model.config._attn_implementation)
    obstacles: list[str] = []
    packages = _installed_packages(model, obstacles) if model.device.type == "cuda" else []
    for name in (*packages, _TORCH):
        obstacle = _obstacle(model, name)
        if obstacle is None:
            return Choice(name, True, "; ".join((_describe(model, name), *obstacles)))
        obstacles.append(obstacle)
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    return Choice(before, False, "; ".join(obstacles))


def _installed_packages(model: PreTrainedModel, obstacles: list[str]) -> list[str]:
    """transformers' names of the flash attention packages that can be imported; why others can't be used.

    Asked for one that is absent, transformers would fetch a kernel from its hub: code that nobody chose.
    """
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    probes: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("flash_attention_3", is_flash_attn_3_available),
        ("flash_attention_2", is_flash_attn_2_available),
    )
    found = [name for name, is_available in probes if is_available()]
    obstacles += [f"{name} is not installed" for name, _ in probes if name not in found]
    if found and model.dtype not in PACKAGE_DTYPES:
        obstacles.append(f"{', '.join(found)} compute in float16 or bfloat16, not {_dtype_name(model)}")
        return []
    return found


def _obstacle(model: PreTrainedModel, name: str) -> str | None:
    """Switch to implementation `name` and run a few tokens; why it can't be used, or None."""
    said: list[warnings.WarningMessage] = []
    try:
        model.set_attn_implementation(name)
        taken = model.config._attn_implementation
        if taken != name:
            return f"{type(model).__name__} keeps its own attention ({taken})"
        with warnings.catch_warnings(record=True) as said:  # torch tells its reasons so
            warnings.simplefilter("always")
            _run(model, sdpa_kernel(SDPBackend.FLASH_ATTENTION) if name == _TORCH else nullcontext())
    except _REFUSALS as error:
        hints = [str(warning.message) for warning in said] if "No available kernel" in str(error) else []
        return f"{name} does not work here: {_first_sentence(hints[-1] if hints else str(error))}"
    return None


def _run(model: PreTrainedModel, kernels: AbstractContextManager[None]) -> None:
    ids = torch.zeros((1, _TRIAL_TOKENS), dtype=torch.int64, device=model.device)
    with kernels, torch.inference_mode():
        model(input_ids=ids, use_cache=False)


def _describe(model: PreTrainedModel, name: str) -> str:
    kernel = "torch's flash kernel" if name == _TORCH else name
    return f"{kernel} computes this model's attention in {_dtype_name(model)} on {model.device}"


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _first_sentence(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return line.partition(". ")[0].partition(" (Triggered internally")[0].rstrip(".")
