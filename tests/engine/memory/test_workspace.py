"""The allowance for a process covers what a process really takes, and is not far above it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.memory import estimate

NUM_SEQS = 64
PROMPT = 256
_PROGRAM = """
import json, sys
import memory_efficient_gpt.worker_preload
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

options = json.loads(sys.argv[1])
num_seqs, prompt = options["max_num_seqs"], tuple(range(5, 5 + int(sys.argv[2])))
import torch, transformers
before = resident("VmRSS")
engine = Engine.load(EngineConfig(**options))
params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=4, ignore_eos=True)
for number in range(num_seqs):
    engine.submit(Request(id=str(number), prompt_token_ids=(5 + number, *prompt[1:]), params=params))
running = num_seqs
while running:
    running -= sum(event.finish_reason is not None for event in engine.step())
print(json.dumps(resident("VmHWM") - before))
"""


def taken(options: dict[str, Any]) -> int:
    """Bytes by which a process grew for a model and 64 requests."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(options), str(PROMPT)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    return int(done.stdout)


SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 32000},
    "many words": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "vocab_size": 128256,
    },
}


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of 75 million random weights by name."""
    folders = {name: str(tmp_path_factory.mktemp("model")) for name in SHAPES}
    for name, shape in SHAPES.items():
        config = LlamaConfig(
            **shape, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
            max_position_embeddings=2048,
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("model", ["demo", *SHAPES])
def test_a_process_takes_no_more_than_was_predicted(
    model: str, quantization: str | None, random_models: dict[str, str]
) -> None:
    options = {
        "model": random_models.get(model, model), "quantization": quantization,
        "max_num_seqs": NUM_SEQS, "num_kv_blocks": NUM_SEQS * (PROMPT // 16 + 1),
    }  # fmt: skip
    predicted = estimate(EngineConfig(**options))  # type: ignore[arg-type]  # one dict for both processes
    grown = taken(options)
    mapped = estimate(EngineConfig(model=str(options["model"]))).weights_bytes if quantization else 0
    assert 0.3 * predicted.total_bytes < grown <= predicted.total_bytes + mapped  # the float file's pages
