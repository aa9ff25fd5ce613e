"""The random model in the quantized forms that are compared: ours as folders, llama.cpp's as GGUF files.

Purpose: make each form once, with each engine's own quantizer.
Does not know: who measures them.
Invariant: a form that exists is whole: it is written under another name and renamed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.checkpoint import Checkpoint

OUR_SCHEMES = ("int4", "int8")
GGUF_TYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}


def quantized_folder(checkpoint: Checkpoint, scheme: str) -> Path:
    """The checkpoint quantized by this project, as a folder beside it."""
    target = checkpoint.folder.with_name(f"{checkpoint.folder.name}-{scheme}")
    return _made_once(target, lambda scratch: ["--ours", scheme, str(checkpoint.folder), str(scratch)])


def quantized_gguf(checkpoint: Checkpoint, kind: str) -> Path:
    """The checkpoint quantized by llama.cpp, as a file beside the bf16 one."""
    target = checkpoint.gguf.with_name(f"{kind}.gguf")
    return _made_once(target, lambda scratch: ["--gguf", kind, str(checkpoint.gguf), str(scratch)])


def _made_once(target: Path, arguments: Callable[[Path], list[str]]) -> Path:
    """In a process of its own: neither engine's memory stays in the benchmark's."""
    if not target.exists():
        scratch = target.with_name(target.name + ".partial")
        command = [sys.executable, "-m", "benchmarks.peers.quantized_checkpoint", *arguments(scratch)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        scratch.rename(target)
    return target


def write_ours(scheme: str, source: Path, target: Path) -> None:
    """Quantize with the defaults of `--quantization` and save."""
    import torch

    from memory_efficient_gpt.loading import load_config, load_model
    from memory_efficient_gpt.native.build import Unavailable
    from memory_efficient_gpt.native.ops import load_kernels
    from memory_efficient_gpt.quantization.checkpoint import save_quantized
    from memory_efficient_gpt.quantization.layers import find_layers
    from memory_efficient_gpt.quantization.model import quantize_model
    from memory_efficient_gpt.quantization.plans import uniform_plan
    from memory_efficient_gpt.quantization.scheme import parse_scheme

    model = load_model(source, load_config(source), dtype=torch.bfloat16, device=torch.device("cpu"))
    kernels = load_kernels()
    plan = uniform_plan(find_layers(model), parse_scheme(scheme))
    quantize_model(model, plan, kernels=None if isinstance(kernels, Unavailable) else kernels)
    save_quantized(model, target, source=source)


def write_gguf(kind: str, source: Path, target: Path) -> None:
    """Quantize as llama.cpp's own tool does. Raises RuntimeError with its status."""
    import llama_cpp

    from benchmarks.peers.llama_cpp import LOG_CALLBACK

    llama_cpp.llama_log_set(LOG_CALLBACK, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, GGUF_TYPES[kind])
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if status != 0:
        raise RuntimeError(f"llama.cpp's quantizer gave status {status} for {source}")


def main() -> None:
    """Write one form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", metavar="SCHEME")
    parser.add_argument("--gguf", choices=GGUF_TYPES)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.ours:
        write_ours(options.ours, options.source, options.target)
    else:
        write_gguf(options.gguf, options.source, options.target)


if __name__ == "__main__":
    main()
