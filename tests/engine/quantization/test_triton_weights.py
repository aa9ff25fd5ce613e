"""What is said of modules that the Triton kernels take, and of those that they don't."""

from __future__ import annotations

from collections import Counter

import pytest

from memory_efficient_gpt.quantization.triton_weights import give_triton_kernels, summary
from tests.engine.quantization.test_model import QUANTIZED, quantized, tiny


def test_modules_off_a_gpu_keep_their_weights_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized("llama")
    with caplog.at_level("INFO"):
        assert give_triton_kernels(model) == {"on cpu": QUANTIZED["llama"]}
    assert f"Triton kernels: 0 quantized; {QUANTIZED['llama']} by torch: on cpu" in caplog.text


def test_nothing_is_said_of_a_model_that_is_not_quantized() -> None:
    assert summary(give_triton_kernels(tiny("llama"))) == ""


def test_each_reason_is_counted() -> None:
    outcome = Counter({"triton": 2, "fp8 with fp8": 224, "a": 1})
    assert summary(outcome) == "Triton kernels: 2 quantized; 1 by torch: a; 224 by torch: fp8 with fp8"
