"""Public models by their config.json, as their makers have it on Hugging Face; facts, without weights.

DeepSeek-V3 has no quantization_config here: its fp8 weights are refused, a copy in bf16 is not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig

FOLDER = Path(__file__).parent
OLMOE, LITE, QWEN, GPT_OSS = "OLMoE-1B-7B-0924", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "gpt-oss-20b"
MIXTRAL, V3 = "Mixtral-8x7B-v0.1", "DeepSeek-V3"
FOUR = (OLMOE, LITE, GPT_OSS, QWEN)  # by size


def overrides(name: str) -> list[str]:
    """For a run that goes on with this model, and skips ghosts."""
    pytest.importorskip("transformers")
    return ["model=hf", f"model.path={FOLDER / name}", "model.standins=0"]


def config_of(name: str, *more: str) -> RunConfig:
    """The configuration of such a run."""
    return compose([*overrides(name), *more]).config
