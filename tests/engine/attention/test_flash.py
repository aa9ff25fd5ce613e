"""Flash attention for plain transformers: what is tried, in which order, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.utils import import_utils

from memory_efficient_gpt.attention import flash
from memory_efficient_gpt.attention.flash import use_flash
from tests.engine.architectures.configs import CASES


class OnCuda:
    """A model as it looks on a GPU; the packages' kernels are stood in for by what `obstacles` says."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = torch.device("cuda", 0), dtype
        self.config: Any = type("Config", (), {"_attn_implementation": "eager"})()

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for number in (2, 3):
        answer = f"flash_attention_{number}" in names
        monkeypatch.setattr(import_utils, f"is_flash_attn_{number}_available", lambda answer=answer: answer)


def refusing(monkeypatch: pytest.MonkeyPatch, **errors: Exception) -> None:
    def run(model: Any, kernels: Any) -> None:
        if (error := errors.get(model.config._attn_implementation)) is not None:
            raise error

    monkeypatch.setattr(flash, "_run", run)


def test_the_newest_installed_package_is_taken_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attention_2", "flash_attention_3")
    refusing(monkeypatch)
    model: Any = OnCuda()
    choice = use_flash(model)
    assert (choice.used, choice.available) == ("flash_attention_3", True)
    assert model.config._attn_implementation == "flash_attention_3"


def test_a_package_that_does_not_run_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attention_2", "flash_attention_3")
    refusing(
        monkeypatch,
        flash_attention_3=RuntimeError("FlashAttention only supports Hopper.\nCall stack"),
        flash_attention_2=ImportError("undefined symbol"),
    )
    model: Any = OnCuda()
    choice = use_flash(model)
    assert (choice.used, choice.available) == ("sdpa", True)
    assert "flash_attention_3 does not work here: FlashAttention only supports Hopper;" in choice.reason
    assert choice.reason.endswith("flash_attention_2 does not work here: undefined symbol")


def test_absent_packages_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)  # transformers would download a kernel for a package that is absent
    refusing(monkeypatch, flash_attention_2=AssertionError(), flash_attention_3=AssertionError())
    model: Any = OnCuda()
    choice = use_flash(model)
    assert choice.used == "sdpa" and "flash_attention_3 is not installed" in choice.reason


def test_packages_are_for_half_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attention_2")
    refusing(monkeypatch, sdpa=RuntimeError("No available kernel. Aborting execution."))
    model: Any = OnCuda(torch.float32)
    choice = use_flash(model)
    assert (choice.used, choice.available) == ("eager", False)
    assert "flash_attention_2 compute in float16 or bfloat16, not float32" in choice.reason
    assert "sdpa does not work here: No available kernel" in choice.reason
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchs_kernel_really_runs_the_model_on_a_cpu(dtype: torch.dtype) -> None:
    model: Any = CASES["llama"].model()
    model = model.to(dtype).requires_grad_(False)
    want = model(torch.arange(9)[None]).logits.float()
    choice = use_flash(model)
    assert choice.used == "sdpa" and str(dtype).removeprefix("torch.") in choice.reason
    got = model(torch.arange(9)[None]).logits.float()
    # Scores and shares are rounded in other places: a few units in the last place of the hidden states.
    limit = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    assert float((got - want).abs().max()) <= limit * float(want.abs().max())


def test_the_state_of_random_numbers_and_gradients_is_left_alone() -> None:
    model = CASES["llama"].model()
    state = torch.random.get_rng_state()
    use_flash(model)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()
