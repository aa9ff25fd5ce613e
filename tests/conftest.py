"""What every test process needs before torch, tokenizers or huggingface_hub is imported.

Purpose: offline, quiet, and fair to whatever else runs on the machine.
Does not know: models, engines, servers; their fixtures are in the folders below.
Invariant: imports nothing that could import torch, because OpenMP reads its settings once, when loaded.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
