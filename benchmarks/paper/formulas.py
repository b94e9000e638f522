"""The formulas of FoMoE (section 4 and appendix D) that its figures need and a run does not: a ring, and whole runs.

The unit is the end of a name. Bytes are per site and round.
"""

from __future__ import annotations

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.spec import attention_flops, token_flops
from fomoe_flwr.plan.system import Split, expert_work

FORMULAS = ("ours", "paper")


def site_flops(
    model: ModelConfig,
    seq_len: int,
    routing: str,
    residents: float,
    hit_rate: float | None = None,
    formula: str = "ours",
) -> float:
    """Flops of a token at a site with so many residents a layer.

    `F = F_dense + sum_l [sigma · min(k, N_le)/k · F_FFN + (N_le/N_e) · F_gate]`, eq. 3; the router is computed in full
    in `skip` mode.

    Args:
        formula: `paper`: eq. 3 as printed. `ours`: what is computed. They differ in two things. In skip mode the
            paper multiplies sigma by min(k, N_le)/k, but the router chooses k of *all* experts, so sigma alone is the
            share that is computed, however few are held. And the paper counts all attention scores, of which a causal
            model uses half.
    """
    flops = token_flops(model, seq_len)
    gate = 1.0 if routing == "skip" else residents / model.num_experts
    work = expert_work(routing, model.num_experts, model.top_k, residents, hit_rate)
    masked = 0.0
    if formula == "paper":
        masked = attention_flops(model, seq_len)
        if routing == "skip":
            work *= min(model.top_k, residents) / model.top_k
    return flops.dense + masked + work * flops.experts + gate * flops.router


def compute_s(flops_a_token: float, tokens: float, flops_per_s: float) -> float:
    """`t_comp = F · B / (MFU · Phi)`; `flops_per_s` is MFU times peak."""
    return flops_a_token * tokens / flops_per_s


def ring_dense_bytes(num_sites: int, dense_bytes: float) -> float:
    """`B_dense = 2(M-1)/M · S_dense`: ring all-reduce of what everybody holds."""
    return 2 * (num_sites - 1) / num_sites * dense_bytes


def ring_bytes(
    split: Split,
    all_experts: int,
    num_sites: int,
    overlap: int,
    reshuffle_rate: float,
    bytes_per_number: float,
    copies: int = 1,
) -> float:
    """`B_dense + B_sparse` of equal sites on a ring.

    `B_sparse = (R + P) · sum_l N_le · s_expert`, `R = 2(O_e-1)/O_e`, `P = gamma(1 - O_e/M)`.

    Args:
        all_experts: layers times experts of a layer.
        reshuffle_rate: gamma, redraws of a random placement per round; 0: fixed placement, nothing is fetched.
        copies: 3 for LocalAdamW, whose moments travel too.
    """
    held_bytes = all_experts * overlap / num_sites * split.per_expert * bytes_per_number
    reduce = 2 * (overlap - 1) / overlap
    fetch = reshuffle_rate * (1 - overlap / num_sites)
    return copies * (
        ring_dense_bytes(num_sites, split.dense * bytes_per_number) + (reduce + fetch) * held_bytes
    )


def bytes_a_token(num_sites: int, site_bytes: float, round_tokens: float) -> float:
    """`BPT = M · B_site / (K · B_g)`, eq. 9: what all sites exchange for a token; `round_tokens` is K · B_g."""
    return num_sites * site_bytes / round_tokens


def star_bytes(parameters: float, bytes_per_number: float) -> float:
    """One direction between a site and a server: dense part and residents, down as well as up."""
    return bytes_per_number * parameters


def round_s(steps: int, step_s: float, communication_s: float) -> float:
    """`K · t_comp + t_comm`: nothing hides communication."""
    return steps * step_s + communication_s


def rounds_for(total_tokens: float, tokens_a_round: float) -> float:
    """`N_tok / (M · B_l · K)`."""
    return total_tokens / tokens_a_round
