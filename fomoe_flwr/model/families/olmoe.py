"""OLMoE (arXiv 2409.02060): softmax over all experts, the chosen weigh what it gives them."""

from fomoe_flwr.model.families.family import Family, chosen_scores, switch_balance

OLMOE = Family("olmoe", chosen_scores, switch_balance)
