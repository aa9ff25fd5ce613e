"""Which calls may wait: every architecture computes what it did, bit for bit, or the reason is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.fusion.deferral_trial import DeferralReport, try_deferral
from memory_efficient_gpt.fusion.merge import merge_linears
from memory_efficient_gpt.fusion.trial_run import WritesOnly, packed_logits
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.native.deferral import Deferral, DeferredKind
from tests.engine.architectures.configs import CASES, PACKED
from tests.engine.fusion.joining_kernels import JoiningBackend, JoiningKernels
from tests.engine.fusion.test_other_kernels import TorchKernels

CPU = torch.device("cpu")
KINDS: tuple[DeferredKind, ...] = ("sums", "turns", "head_norms")
# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

JOINED = {
    "llama": {"sums": 4, "turns": 2},  # of two layers
    "qwen3": {"sums": 4, "turns": 2, "head_norms": 4},
    "gemma3_text": {"sums": 4, "turns": 2, "head_norms": 4},
    "phi3": {"sums": 4, "turns": 2},
    "granite": {"sums": 4, "turns": 2},
    "gpt_oss": {"sums": 4},  # its rotary function is not one that kernels know
    "deepseek_v3": {"sums": 4},  # turned parts of heads are joined with the others before the cache
    "olmo2": {"sums": 1, "turns": 2},  # norms after the layers: what follows their sums are products
    "starcoder2": {"turns": 2},  # layer norms
    "phi": {},  # half of each head turns, and is joined with the other half
    "gpt2": {},
}


def prepared(
    name: str, kernels: TorchKernels, backend: JoiningBackend, kv_dtype: torch.dtype | None = None
) -> Callable[[], torch.Tensor]:
    """A pass of a merged and fused model."""
    model, layers = CASES[name].model(), probe_geometry(CASES[name].config())
    prepare_model(model)
    merge_linears(model, lambda: packed_logits(model, layers, CPU))
    fuse(model, kernels)
    return lambda: packed_logits(model, layers, CPU, WritesOnly(backend), kv_dtype)


@pytest.mark.parametrize("name", [case.name for case in PACKED])
def test_a_model_whose_calls_wait_computes_what_it_did(name: str) -> None:
    kernels, backend = JoiningKernels(), JoiningBackend()
    run = prepared(name, kernels, backend)
    with torch.inference_mode():
        want = run()
        report = try_deferral(run, KINDS)
        kernels.calls["sum_rms_norm"] = backend.turned = 0
        with Deferral(report.kinds, poison=True):
            got = run()
    assert torch.equal(got, want)
    assert not report.dropped
    assert kernels.calls["sum_rms_norm"] == report.joined["sums"] and backend.turned == report.joined["turns"]
    if name in JOINED:
        assert dict(report.joined) == JOINED[name]


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_a_cache_in_fewer_bits_gets_the_same(kv_dtype: torch.dtype) -> None:
    run = prepared("llama", JoiningKernels(), JoiningBackend(), kv_dtype)
    with torch.inference_mode():
        want = run()
        with Deferral(try_deferral(run, KINDS).kinds):
            assert torch.equal(run(), want)


def test_what_was_found_is_told_in_one_line() -> None:
    report = try_deferral(prepared("llama", JoiningKernels(), JoiningBackend()), KINDS)
    assert report.kinds == {"sums", "turns"}
    assert "4 residual sums computed by norms" in report.summary()
    assert "2 rotary turns by the cache's write" in report.summary()


def test_where_nothing_can_be_joined_nothing_waits_and_nothing_is_told() -> None:
    report = try_deferral(prepared("llama", TorchKernels(), JoiningBackend()), KINDS)
    assert report == DeferralReport() and not report.kinds and report.summary() == ""


def test_a_norm_that_differs_is_dropped_alone_with_the_reason() -> None:
    report = try_deferral(prepared("llama", JoiningKernels("sum_rms_norm"), JoiningBackend()), KINDS)
    assert report.kinds == {"turns"} and set(report.dropped) == {"sums"}
    assert "no residual sums computed by norms: the model's logits differ by" in report.summary()


def test_norms_of_heads_need_no_sums_to_wait() -> None:
    report = try_deferral(prepared("qwen3", JoiningKernels("sum_rms_norm"), JoiningBackend()), KINDS)
    assert report.kinds == {"turns", "head_norms"}
    assert "4 norms of queries and keys by these turns" in report.summary()


def test_a_write_that_differs_is_dropped_alone_with_the_reason() -> None:
    report = try_deferral(prepared("llama", JoiningKernels(), JoiningBackend(wrong=True)), KINDS)
    assert report.kinds == {"sums"} and "logits differ" in report.dropped["turns"]


def test_a_kernel_that_cannot_be_compiled_is_dropped_with_the_reason() -> None:
    class Broken(JoiningKernels):
        def sum_rms_norm(self, *arguments: Any, **settings: Any) -> torch.Tensor:
            raise OSError("no C compiler\nand much more")

    report = try_deferral(prepared("llama", Broken(), JoiningBackend()), KINDS)
    assert report.dropped == {"sums": "the model could not be run with it (OSError: no C compiler)"}
    assert report.kinds == {"turns"}


def test_a_model_that_reads_a_result_behind_torchs_back_lets_nothing_wait() -> None:
    x = torch.ones(1, 2, 4)

    def run() -> torch.Tensor:
        total = x + x
        with torch._C.DisableTorchFunction():  # as compiled code would
            return total * 1

    report = try_deferral(run, ("sums",))
    assert report.dropped == {"sums": "the model's logits differ by nan"}
