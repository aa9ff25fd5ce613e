"""Kernels compiled before anybody waits for them.

Purpose: build the native CPU kernels, and make Triton compile what an engine of a model will launch, by the
steps that it will run: on random weights of few layers, since all layers share kernels.
Does not know: who asks (a command, an image's build), what a kernel computes.
Invariant: only what really ran is said to be built; no checkpoint's weights are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError, UnsupportedModelError
from memory_efficient_gpt.hardware import resolve_device
from memory_efficient_gpt.loading import load_config, resolve_dtype, resolve_model
from memory_efficient_gpt.native.build import Unavailable, cache_folder
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.step_shape import ROWS, TOKENS
from memory_efficient_gpt.tier_probe.small_clone import shallow_clone
from memory_efficient_gpt.triton_kernels.availability import binaries_folder, triton_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Progress = Callable[[str, float], None]
_DECODED: Final = 4
"""Tokens of a request: a shape is captured when it comes up for the second time."""
_LONG: Final = 4096
"""A context that is walked in many splits."""
_BINARY: Final = "*.cubin"


@dataclass(frozen=True, slots=True)
class Build:
    """What was built where. what: "cpu" or a model's name; new: binaries that were not there before.

    notes: of the engine that ran, or of the CPU's kernels.
    """

    what: str
    folder: Path
    new: int
    seconds: float
    notes: tuple[str, ...]


def build_native() -> Build:
    """The C++ kernels for this machine's CPU; they are the same for all models.

    Raises ConfigError where they can't be built.
    """
    start, folder = time.monotonic(), cache_folder()
    before = _count(folder, "*.so")
    kernels = load_kernels()
    if isinstance(kernels, Unavailable):
        raise ConfigError([f"the CPU's kernels can't be built: {kernels.reason}"])
    notes = (f"built for {kernels.isa}",)
    return Build("cpu", folder, _count(folder, "*.so") - before, time.monotonic() - start, notes)


def build_for_model(config: EngineConfig, progress: Progress) -> Build:
    """Triton's kernels for engines with this config, on its CUDA device.

    Raises ConfigError where there is none, or where the checkpoint is quantized and no scheme is given;
    ModelNotFoundError and UnsupportedModelError as a load does.
    """
    device = resolve_device(config.device)
    start, folder = time.monotonic(), binaries_folder()
    before = _count(folder, _BINARY)  # the question whether kernels can run compiles the first one
    if (reason := triton_obstacle(device)) is not None:
        raise ConfigError(
            [f"kernels for {config.model} are compiled by running them, on a CUDA device: {reason}. "
             "The CPU's kernels are the same for all models: leave the model out."]
        )  # fmt: skip
    engine = random_engine(config, device, progress)
    try:
        run_steps(engine, config, progress)
    finally:
        engine.close()
    torch.cuda.synchronize(device)
    new = _count(folder, _BINARY) - before
    return Build(config.model, folder, new, time.monotonic() - start, engine.info.notes)


def random_engine(config: EngineConfig, device: torch.device, progress: Progress) -> Engine:
    """An engine of the model's architecture, width and schemes: random weights, few layers."""
    progress("reading the config", 0.0)
    full = load_config(resolve_model(config.model, config.revision, weights=False))
    quantized = getattr(full, "quantization_config", None) is not None
    if quantized and config.quantization is None:
        raise ConfigError(
            [f"{config.model} is quantized; which kernels it needs can't be seen without its weights. "
             "Name the scheme that is most like it with --quantization."]
        )  # fmt: skip
    try:
        shallow = shallow_clone(full)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{config.model}: no copy with fewer layers can be made ({error})."
        ) from error
    dtype, _ = resolve_dtype(config.dtype, full, device)
    progress("making random weights", 0.02)
    model = _random_model(shallow, dtype, device)
    if config.quantization is not None:
        quantize_model(model, uniform_plan(find_layers(model), parse_scheme(config.quantization)))
    progress("checking layers", 0.05)
    return Engine.from_model(model, config)


def _random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        model = from_config(config, dtype=dtype)
    model.train(False)
    return model


def run_steps(engine: Engine, config: EngineConfig, progress: Progress) -> None:
    """Steps of every size that an engine tells apart: prompts, decoding rows, both together, both choices."""
    cases = list(_cases(config, engine.info.max_model_len))
    for number, (rows, prompt) in enumerate(cases):
        what = f"{rows} sequences" if rows > 1 else f"a prompt of {prompt} tokens"
        progress(what, 0.1 + 0.9 * number / len(cases))
        for row in range(rows):
            engine.submit(_request(engine, f"{number}-{row}", 2 * number, prompt, float(number % 2)))
        late = rows == 1
        while engine.has_work:
            engine.step()
            if late:  # a prompt beside a decoding row
                engine.submit(_request(engine, f"{number}-late", 2 * number + 1, prompt, 0.0))
                late = False
    progress("done", 1.0)


def _cases(config: EngineConfig, max_model_len: int) -> Iterator[tuple[int, int]]:
    """Sequences at once, and tokens of a prompt."""
    longest = max_model_len - _DECODED
    prompts = {n for n in (1, *TOKENS, config.max_batched_tokens, _LONG) if n <= longest}
    yield from ((1, prompt) for prompt in sorted(prompts))
    yield from ((rows, min(2, longest)) for rows in ROWS if 1 < rows <= config.max_num_seqs)


def _request(engine: Engine, name: str, first: int, prompt: int, temperature: float) -> Request:
    """first: of the prompt's tokens; prompts of one beginning would be found in the prefix cache."""
    params: dict[str, Any] = {"temperature": temperature, "max_tokens": _DECODED, "ignore_eos": True}
    last = engine.info.vocab_size - 1
    tokens = tuple(min(last, 3 + (first + place) % 127) for place in range(prompt))
    return Request(id=name, prompt_token_ids=tokens, params=SamplingParams(**params))


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.rglob(pattern)) if folder.is_dir() else 0
