"""Architectures of transformers that a federation can train, one file a family: what must be known beside the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from fomoe_flwr.model.families.family import Family
from fomoe_flwr.model.families.gpt_oss import GPT_OSS
from fomoe_flwr.model.families.mixtral import MIXTRAL
from fomoe_flwr.model.families.olmoe import OLMOE
from fomoe_flwr.model.families.qwen3_moe import QWEN3_MOE

FAMILIES = {
    family.model_type: family for family in (OLMOE, QWEN3_MOE, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS)
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: an architecture that is not known here.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model.hf.model_type={model_type!s:.80}: allowed are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
