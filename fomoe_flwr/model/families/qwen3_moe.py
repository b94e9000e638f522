"""Qwen3-MoE (arXiv 2505.09388): as OLMoE, the weights of the chosen come to 1; some layers may be dense."""

from fomoe_flwr.model.families.family import Family, chosen_scores, switch_balance

QWEN3_MOE = Family("qwen3_moe", chosen_scores, switch_balance)
