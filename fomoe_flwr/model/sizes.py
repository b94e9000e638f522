"""How many parameters a model has, by class, without building it."""

from __future__ import annotations

from typing import NamedTuple

from fomoe_flwr.config import ModelConfig


class ParameterCounts(NamedTuple):
    """Numbers of parameters. `router` is dense in skip mode and goes with the experts in partitioned mode."""

    dense: int  # embedding, attention, norms, shared experts
    router: int
    experts: int  # all routed experts of all layers

    @property
    def total(self) -> int:
        return self.dense + self.router + self.experts


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of one expert: an up- and a down-projection (FoMoE, appendix B)."""
    return 2 * model.d_model * model.d_expert


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Parameters of the whole model by class."""
    attention = 4 * model.d_model**2
    norms = 4 * model.d_model  # Peri-LN: one before and one after each of the two branches
    shared = model.num_shared_experts * expert_parameters(model)
    dense = model.num_layers * (attention + norms + shared) + (model.vocab_size + 2) * model.d_model
    router = 0 if model.router == "grap" else model.num_layers * model.num_experts * model.d_model
    return ParameterCounts(dense, router, model.num_layers * model.num_experts * expert_parameters(model))
