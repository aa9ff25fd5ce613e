"""What a profile says of a step: every microsecond belongs to one kind of kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernel_profile import Kernel, kernels_of, kind_of, shares


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rms_norm_kernel", "norms"),
        ("turned_write_kernel", "rotary and cache writes"),
        ("write_kv_kernel", "rotary and cache writes"),
        ("paged_attention_kernel", "attention"),
        ("join_splits_kernel", "attention"),
        ("gated_kernel", "gated activations"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "products"),
        ("few_rows_kernel", "products"),
        ("one_row_kernel", "products"),
        ("quantized_experts_kernel", "products"),
        ("choose_kernel", "choosing tokens"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>",
         "sums by torch"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::reduce_kernel<512, 1>", "others"),
    ],
)  # fmt: skip
def test_kinds_are_told_by_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_what_kinds_add_is_the_time_from_first_to_last() -> None:
    found = shares(
        [
            Kernel("gemm", 15.0, 30.0),  # after a gap of 5
            Kernel("rms_norm_kernel", 0.0, 10.0),
            Kernel("gated_kernel", 20.0, 33.0),  # starts while the product runs
            Kernel("gemm", 21.0, 32.0),  # is done before what started earlier
        ]
    )
    assert {kind: (share.kernels, share.busy_us, share.added_us) for kind, share in found.items()} == {
        "products": (2, 26.0, 20.0),
        "norms": (1, 10.0, 10.0),
        "gated activations": (1, 13.0, 3.0),
    }
    assert list(found) == ["products", "norms", "gated activations"]


def test_only_what_ran_on_the_device_is_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 1.0, "dur": 2.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 4.0, "dur": 1.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 9.0},
        {"ph": "M", "name": "process_name"},
    ]
    trace.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    assert kernels_of(trace) == [Kernel("gemm", 1.0, 3.0), Kernel("Memcpy", 4.0, 5.0)]
