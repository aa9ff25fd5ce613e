"""Flash attention for plain transformers on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention.flash import use_flash
from tests.engine.architectures.configs import CASES

pytestmark = pytest.mark.gpu


def test_half_precision_gets_a_flash_kernel() -> None:
    model: Any = CASES["llama"].model()
    model = model.to("cuda", torch.bfloat16).requires_grad_(False)
    ids = torch.arange(9, device="cuda")[None]
    want = model(ids).logits.float()
    choice = use_flash(model)
    assert choice.available and choice.used in ("sdpa", "flash_attention_2", "flash_attention_3")
    got = model(ids).logits.float()
    assert float((got - want).abs().max()) <= 0.08 * float(want.abs().max())


def test_float32_gets_none_and_the_reason() -> None:
    model: Any = CASES["llama"].model()
    choice = use_flash(model.to("cuda"))
    assert not choice.available and choice.used == "eager" and choice.reason
