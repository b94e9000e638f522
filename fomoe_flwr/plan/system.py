"""The system model of FoMoE (section 4 and appendix D): what a site computes, holds and sends, by formula.

Pure functions of plain numbers; the unit is the end of the name (`_bytes`, `_s`, `_flops`). Bytes are per site
and round. Sizes are decimal except memory, which people give in GiB.
"""

from __future__ import annotations

from typing import NamedTuple

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.spec import expert_parameters, parameter_counts, token_flops

# bf16 weights 2, fp32 master 4, two fp32 moments 8, fp32 gradients 4 (FoMoE, section 4). This program keeps fp32
# weights 4, gradients 4, moments 8, and the shard as it was sent (bf16) 2: the same 18.
STATE_BYTES_PER_PARAMETER = 18

# ----- parameters


class Split(NamedTuple):
    """Parameters by what happens to them (theta_dense and theta_sparse)."""

    dense: int  # at every site
    per_expert: int  # goes with one expert

    def held(self, experts: float) -> float:
        """Parameters of a site with so many experts over all its layers; a mean need not be whole."""
        return self.dense + experts * self.per_expert


def split_parameters(model: ModelConfig, routing: str) -> Split:
    """theta_dense and theta_sparse: the router is dense in `skip` mode and sparse in `partitioned` mode."""
    counts = parameter_counts(model)
    if routing == "skip":
        return Split(counts.dense + counts.router, expert_parameters(model))
    return Split(counts.dense, expert_parameters(model) + model.d_model)


# ----- compute


def expert_work(
    routing: str, num_experts: int, top_k: int, residents: float, hit_rate: float | None
) -> float:
    """`sigma · min(k, N_le)/k`: the part of the k experts' work that a site with N_le residents does for a token.

    In `skip` mode sigma is the share of the assignments that hit a resident, `N_le/N_e` where routing is balanced
    (FoMoE, main text), and top-k always chooses k. In `partitioned` mode every assignment is resident.
    """
    if routing == "partitioned":
        return min(top_k, residents) / top_k
    return residents / num_experts if hit_rate is None else hit_rate


def site_flops(
    model: ModelConfig, seq_len: int, routing: str, residents: float, hit_rate: float | None = None
) -> float:
    """Flops of a token at a site with so many residents a layer.

    `F = F_dense + sum_l [sigma · min(k, N_le)/k · F_FFN + (N_le/N_e) · F_gate]`; the router is computed in full
    in `skip` mode.
    """
    flops = token_flops(model, seq_len)
    gate = 1.0 if routing == "skip" else residents / model.num_experts
    work = expert_work(routing, model.num_experts, model.top_k, residents, hit_rate)
    return flops.dense + work * flops.experts + gate * flops.router


# ----- memory


def state_bytes(parameters: float, bytes_per_parameter: float = STATE_BYTES_PER_PARAMETER) -> float:
    """Memory of a site's weights, gradients and moments, bytes; activations come on top."""
    return parameters * bytes_per_parameter


# ----- bytes of a round


def ring_dense_bytes(num_sites: int, dense_bytes: float) -> float:
    """`B_dense = 2(M-1)/M · S_dense`: ring all-reduce of what everybody holds."""
    return 2 * (num_sites - 1) / num_sites * dense_bytes


def ring_sparse_bytes(
    num_sites: int, overlap: int, reshuffle_rate: float, held_expert_bytes: float, random: bool
) -> float:
    """`B_sparse = (R + P) · sum_l N_le · s_expert`, `R = 2(O_e-1)/O_e`, `P = gamma(1 - O_e/M)`.

    Args:
        reshuffle_rate: gamma, redraws of a random placement per round.
        held_expert_bytes: of all experts that the site holds.
        random: False: the placement is fixed and nothing is fetched.
    """
    reduce = 2 * (overlap - 1) / overlap
    fetch = reshuffle_rate * (1 - overlap / num_sites) if random else 0.0
    return (reduce + fetch) * held_expert_bytes


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

    Args:
        all_experts: layers times experts of a layer.
        reshuffle_rate: gamma; 0: fixed placement.
        copies: 3 for LocalAdamW, whose moments travel too.
    """
    held = all_experts * overlap / num_sites
    dense = ring_dense_bytes(num_sites, split.dense * bytes_per_number)
    sparse = ring_sparse_bytes(
        num_sites, overlap, reshuffle_rate, held * split.per_expert * bytes_per_number, reshuffle_rate > 0
    )
    return copies * (dense + sparse)


def star_bytes(parameters: float, bytes_per_number: float, copies: int = 1) -> float:
    """One direction between a site and a server: dense part and residents, down as well as up.

    Unlike a ring a star sends experts of a single holder too, and a redraw costs nothing extra: what is new comes
    with the shard that is sent anyway (ours; this is what the program measures).
    """
    return copies * bytes_per_number * parameters


# ----- time


def compute_s(flops_a_token: float, tokens: float, flops_per_s: float) -> float:
    """`t_comp = F · B / (MFU · Phi)`; `flops_per_s` is MFU times peak."""
    return flops_a_token * tokens / flops_per_s


def transfer_s(num_bytes: float, bytes_per_s: float, latency_s: float, compression: float = 1.0) -> float:
    """`t_comm = rho · B / B_eff`, and the latency once."""
    return latency_s + compression * num_bytes / bytes_per_s


def round_s(steps: int, step_s: float, communication_s: float, hidden: float = 0.0) -> float:
    """`K · t_comp + (1 - alpha) · t_comm`; `hidden` is alpha, the share that computing hides."""
    return steps * step_s + (1 - hidden) * communication_s


def rounds_for(total_tokens: float, tokens_a_round: float) -> float:
    """`N_tok / (M · B_l · K)`."""
    return total_tokens / tokens_a_round


def bytes_per_token(num_sites: int, site_bytes: float, local_steps: int, tokens_a_step: float) -> float:
    """`BPT = M · B_site / (K · B_g)`: bytes of all sites for each token of the global batch."""
    return num_sites * site_bytes / (local_steps * tokens_a_step)
