"""A layer of experts in three parts: router, dispatcher (skip-token lives here) and experts; and the σ-MoE's own.

Letters: T tokens, D d_model, C candidates of the router, K experts a token, P token-expert pairs that stay,
E resident experts, H d_expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.experts import (
    LINEARS,
    SILU,
    Dispatch,
    Projections,
    compute_dtype,
    experts_of_tokens,
    grouped_linear,
    plain_experts,
)
from fomoe_flwr.model.locality import bias_for, entry_biases, locality_loss
from fomoe_flwr.model.recompute import kept_or_again
from fomoe_flwr.model.shared_batch import averaged, collected, summed
from fomoe_flwr.model.standins import StandIns, standins_of

# What a batch needs for its resident share drifts as the router learns, in one direction for many steps, and whoever
# goes by the batch before comes too late each time. So the bias is what that batch needed and the trend, which is
# averaged over batches with this weight of the newest. Without a trend the share stays up to 0.1 below its target.
_TREND = 0.4


# ----- from a token to one logit for each expert
#
# linear       rows that learn (σ-MoE).
# orthogonal   rows that learn and are kept orthonormal (LocMoE, arXiv 2401.13920): logits are cosines, so no row can
#              win by its length, and no two start alike.
# grap         LocMoE's grouped average pooling: fixed rows, each the mean of a slice. Nothing to learn, to send or
#              to average, so no two sites' routers can drift apart.
#
# All three have logits of standard deviation 1 for a normalised token of random direction, so they start alike.


def linear_logits(x_TD: Tensor, rows_CD: Tensor) -> Tensor:
    """A scalar product with each row."""
    return x_TD @ rows_CD.T


def cosine_logits(x_TD: Tensor, rows_CD: Tensor) -> Tensor:
    """The cosine with each row, times √d: between random directions its standard deviation is 1/√d."""
    return math.sqrt(x_TD.shape[1]) * (F.normalize(x_TD, dim=1) @ F.normalize(rows_CD, dim=1).T)


def grap_logits(x_TD: Tensor, num_candidates: int) -> Tensor:
    """Logit c is the mean of the c-th of n equal slices of the token, times √(d/n).

    That makes the fixed rows orthonormal. Without it the scores would all be next to ½: a mean over d/n numbers is
    that much smaller than one of them.
    """
    slices_TCW = x_TD.view(len(x_TD), num_candidates, -1)  # W = d/n
    return slices_TCW.mean(2) * math.sqrt(slices_TCW.shape[2])


@torch.no_grad()
def orthonormal_rows(rows_CD: Tensor) -> Tensor:
    """The orthonormal rows nearest to these: `(W Wᵀ)^(-1/2) W`, which is U Vᵀ where W = U S Vᵀ.

    From the singular vectors and not from the inverse root, which does not exist where rows have become dependent.
    """
    left_CC, _, right_CD = torch.linalg.svd(rows_CD.double(), full_matrices=False)
    nearest_CD: Tensor = (left_CC @ right_CD).to(rows_CD.dtype)
    return nearest_CD


# ----- router


class Routing(NamedTuple):
    """What the router decided."""

    weights_TK: Tensor  # by which the outputs of the chosen are multiplied
    chosen_TK: Tensor  # indices into the candidates
    load_C: Tensor  # how often each candidate was chosen
    share_C: Tensor  # mean share of its score


class Router(nn.Module):
    """What every router does beside its logits: it counts its choices, and has losses of balance and of locality.

    In partitioned mode the candidates are the residents alone, else all experts.

    Load balancing is the auxiliary loss of Switch/GShard, `C · Σ_c f_c · P_c`, over all *candidates*, with
    f_c the share of assignments and P_c the mean share of the score. The paper states none. A loss was chosen over
    DeepSeek's bias update because its effect is a gradient: it is averaged between sites with the rest of
    the router, and there is no second state that could drift apart between two synchronisations.

    f_c is the batch's own; with balance=global `offset_C` is added, by which the federation's load differs from the
    site's. The mean over the sites of the gradients is then that of one site with all their tokens.

    Args:
        residents: where some candidates may be ghosts, those that are not; they are what locality prefers.
    """

    load_C: Tensor
    offset_C: Tensor | None  # the federation's shares of the assignments minus the site's own
    resident_C: Tensor
    bias: Tensor  # of this site and layer; never sent, and only there with locality
    trend: Tensor  # of what the batches need of it
    needed: Tensor  # by the batch before; nan before the first of a round
    devices: dist.ProcessGroup | None = None  # of the site, where they share each batch

    def __init__(
        self, model: ModelConfig, num_candidates: int, residents: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.config, self.num_candidates = model, num_candidates
        self.top_k = min(model.top_k, num_candidates)
        # Assignments since the trainer last set it to zero.
        self.register_buffer("load_C", torch.zeros(num_candidates, dtype=torch.float64), persistent=False)
        self.register_buffer("offset_C", None, persistent=False)
        self.locality, self.is_resident = "off", [True] * num_candidates
        if residents is not None and model.locality != "off":
            self.is_resident = [candidate in residents for candidate in range(num_candidates)]
            if len(set(self.is_resident)) == 2:  # without ghosts, or without residents, there is no choice
                self.locality = model.locality
            self.register_buffer("resident_C", torch.tensor(self.is_resident), persistent=False)
            for name in ("bias", "trend", "needed"):
                self.register_buffer(name, torch.zeros(()), persistent=False)
            self.needed.fill_(torch.nan)

    def reset_buffers(self) -> None:
        """Fill the buffers of a module that was built without memory, and forget the load and the bias."""
        self.load_C.zero_()
        self.offset_C = None
        if self.config.locality != "off":
            self.resident_C.copy_(torch.tensor(self.is_resident, device="cpu"))
            self.bias.zero_()
            self.trend.zero_()
            self.needed.fill_(torch.nan)

    def judge(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores of each candidate, logits_TC and scores_TC; the larger, the sooner it is chosen."""
        raise NotImplementedError

    def choose(self, x_TD: Tensor, scores_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and places of the chosen candidates, weights_TK and chosen_TK."""
        raise NotImplementedError

    def weigh(self, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
        """By what the outputs of these candidates are multiplied if they are the chosen ones, weights_TK."""
        raise NotImplementedError

    def scores(self, x_TD: Tensor) -> Tensor:
        """Of each candidate, scores_TC."""
        return self._judge(x_TD)[1]

    def weights(self, x_TD: Tensor, chosen_TK: Tensor) -> Tensor:
        """`weigh`, for choices that somebody else made."""
        logits_TC, scores_TC = self._judge(x_TD)
        return self.weigh(logits_TC, scores_TC, chosen_TK)

    def _judge(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_TD.device.type, enabled=False):  # a rounded score would flip choices
            return self.judge(_exact(x_TD))

    def forward(self, x_TD: Tensor) -> Routing:
        """Its choices for a device's tokens; what they cost say `losses`."""
        logits_TC, scores_TC = self._judge(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.training and self.locality == "bias":
                chosen_TK = self._choose_with_bias(logits_TC.detach())
                weights_TK = self.weigh(logits_TC, scores_TC, chosen_TK)
            else:
                weights_TK, chosen_TK = self.choose(_exact(x_TD), scores_TC)
            load_C = torch.zeros_like(scores_TC[0]).scatter_add(
                0, chosen_TK.flatten(), torch.ones_like(chosen_TK, dtype=scores_TC.dtype).flatten()
            )
            share_C = (scores_TC / scores_TC.sum(-1, keepdim=True)).mean(0)
        return Routing(weights_TK, chosen_TK, load_C, share_C)

    def losses(self, load_C: Tensor, share_C: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch: the loss of balance, 1 when balanced, and that of locality, 0 when as local as wished, or not
        asked for. Counts the load.
        """
        with torch.autocast(share_C.device.type, enabled=False):
            assigned_C = load_C / load_C.sum()
            if self.offset_C is not None:
                assigned_C = assigned_C + self.offset_C.to(share_C.dtype)
            balance_loss = len(share_C) * (assigned_C * share_C).sum()
            local_loss = balance_loss.new_zeros(())
            if self.locality == "loss":
                local_loss = locality_loss(share_C, self.resident_C, self.config.locality_epsilon)
        if self.training:
            self.load_C += load_C
        return balance_loss, local_loss

    def _choose_with_bias(self, logits_TC: Tensor) -> Tensor:
        """Choices with the residents preferred, chosen_TK; and the bias moves on, for the next batch.

        Not for this one: what a later token needs must not decide where an earlier one goes.
        """
        target = self.config.locality_target
        assert target is not None
        chosen_TK = (logits_TC + self.bias * self.resident_C).topk(self.top_k, dim=-1).indices
        entries_TK = collected(entry_biases(logits_TC, self.resident_C, self.top_k), self.devices)
        needed = bias_for(entries_TK, target).to(self.bias.dtype)
        # The first batch of a round says no trend: before it the router was another.
        step = torch.where(self.needed.isnan(), self.trend, needed - self.needed)
        self.trend.lerp_(step, _TREND)
        self.needed.copy_(needed)
        self.bias.copy_(needed + self.trend)
        return chosen_TK


def _exact(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.dtype == torch.float64 else x_TD.float()


class SigmaRouter(Router):
    """Sigmoid scores, top-k, no softmax and no renormalisation (σ-MoE; FoMoE, appendix B)."""

    def __init__(
        self, model: ModelConfig, num_candidates: int, residents: Sequence[int] | None = None
    ) -> None:
        super().__init__(model, num_candidates, residents)
        if model.router != "grap":
            self.weight = nn.Parameter(torch.empty(num_candidates, model.d_model))

    def judge(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.router == "grap":
            logits_TC = grap_logits(x_TD, self.num_candidates)
        else:
            logits = cosine_logits if self.config.router == "orthogonal" else linear_logits
            logits_TC = logits(x_TD, self.weight.to(x_TD.dtype))
        return logits_TC, torch.sigmoid(logits_TC)

    def choose(self, x_TD: Tensor, scores_TC: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, chosen_TK = scores_TC.topk(self.top_k, dim=-1)
        return weights_TK, chosen_TK

    def weigh(self, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
        return scores_TC.gather(1, chosen_TK)


def router_losses(routers: Sequence[Router], routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
    """Means over the layers of their losses of balance and of locality.

    Where devices share a batch, loads and scores are those of all of its tokens. They are exchanged once for all
    layers, because a message costs its time whatever its size.
    """
    sizes = [router.num_candidates for router in routers]
    loads_C = summed(torch.cat([routing.load_C for routing in routings]), routers[0].devices)
    shares_C = averaged(torch.cat([routing.share_C for routing in routings]), routers[0].devices)
    of_layers = zip(routers, torch.split(loads_C, sizes), torch.split(shares_C, sizes), strict=True)
    losses = [router.losses(load_C, share_C) for router, load_C, share_C in of_layers]
    balance, locality = (torch.stack(kind).mean() for kind in zip(*losses, strict=True))
    return balance, locality


# ----- dispatcher


def slots_of(residents: Sequence[int], candidates: Sequence[int]) -> list[int]:
    """Position of each candidate among the residents; their number for a ghost."""
    slots = {expert: slot for slot, expert in enumerate(residents)}
    return [slots.get(expert, len(residents)) for expert in candidates]


def dispatch(
    chosen_TK: Tensor, slot_C: Tensor, num_slots: int, ghosts: bool = True, padded: bool = False
) -> Dispatch:
    """Sort pairs by expert and drop the ghosts.

    A dropped pair costs nothing after this point, forward or backward, and the weights of the token's other
    experts are as they were: with all of its experts elsewhere, the token goes on along the residual.

    Args:
        slot_C: position of each candidate among the residents; `num_slots` for a ghost.
        ghosts: whether there are any.
        padded: leave the ghosts at the end: how many they are is not asked, for a GPU would be waited for.
    """
    slot_Q = slot_C[chosen_TK.flatten()]
    sorted_Q, order_Q = slot_Q.sort(stable=True)
    slots_E = torch.arange(num_slots, device=slot_Q.device)
    offsets_E = torch.searchsorted(sorted_Q, slots_E, right=True).to(torch.int32)
    if ghosts and not padded:
        order_Q = order_Q[: int(offsets_E[-1])]
    return Dispatch(order_Q, offsets_E, ghosts and padded)


def renormalised(weights_TK: Tensor, resident_TK: Tensor) -> Tensor:
    """The residents' weights, scaled so that they come to what all k would have; zeros where none is here."""
    kept_TK = weights_TK * resident_TK
    kept_T1 = kept_TK.sum(1, keepdim=True)
    # A weight may itself be zero; nothing is divided by nothing, forward or backward.
    scale_T1 = weights_TK.sum(1, keepdim=True) / torch.where(kept_T1 > 0, kept_T1, torch.ones_like(kept_T1))
    return kept_TK * scale_T1


# Outputs of rows in the order of their experts, from the rows x_PD and the ends of each expert's, offsets_E.
Experts = Callable[[Tensor, Tensor], Tensor]


def routed(
    x_TD: Tensor,
    weights_TK: Tensor,
    chosen_TK: Tensor,
    slot_C: Tensor,
    num_slots: int,
    routing: str,
    experts: Experts,
    projections: Projections | None,
    standins: StandIns | None = None,
) -> Tensor:
    """`y = Σ_{i chosen, resident} w_i · E_i(x)`, y_TD; with stand-ins also `Σ_{i chosen, ghost} w_i · S_i(x)`.

    Args:
        routing: with skip_renormalised the weights are those of `renormalised`.
        experts: from rows in the order of their experts, and the ends of each expert's, to their outputs.
        projections: the same experts, where they have the usual form.
    """
    if routing == "skip_renormalised":
        weights_TK = renormalised(weights_TK, (slot_C < num_slots)[chosen_TK].to(weights_TK.dtype))
    y_TD: Tensor
    if projections is None:
        y_TD = _through(x_TD, weights_TK, chosen_TK, slot_C, num_slots, experts)
    elif torch.compiler.is_compiling() and compute_dtype(x_TD) != torch.bfloat16:
        # It cannot trace grouped_mm of other types.
        y_TD = _as_one_apart(x_TD, weights_TK, chosen_TK, slot_C, num_slots, projections)
    else:
        y_TD = _as_one(x_TD, weights_TK, chosen_TK, slot_C, num_slots, projections)
    if standins is not None:
        y_TD = y_TD + _through(x_TD, weights_TK, chosen_TK, standins.slot_E, standins.num, standins)
    return y_TD


def _as_one(
    x_TD: Tensor,
    weights_TK: Tensor,
    chosen_TK: Tensor,
    slot_C: Tensor,
    num_slots: int,
    projections: Projections,
) -> Tensor:
    """Experts of the usual form."""
    ghosts = num_slots < len(slot_C)
    pairs = dispatch(chosen_TK, slot_C, num_slots, ghosts, _padded(x_TD))
    return experts_of_tokens(x_TD, weights_TK, pairs, projections)


_as_one_apart = torch.compiler.disable(_as_one)  # type: ignore[no-untyped-call]


def _padded(x_TD: Tensor) -> bool:
    """Whether to go on without the number of pairs that stay: on a CPU it is at hand, and rows that are not there cost
    nothing."""
    return x_TD.is_cuda or torch.compiler.is_compiling()


# The number of pairs that stay depends on the data, so torch.compile steps aside here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _through(
    x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, slot_C: Tensor, num_slots: int, experts: Experts
) -> Tensor:
    """Experts of any form."""
    pairs_P, offsets_E, _ = dispatch(chosen_TK, slot_C, num_slots)
    tokens_P = pairs_P // chosen_TK.shape[1]
    # index_select and index_add, not x[i]: the backward of plain indexing is several times slower.
    y_PD = experts(x_TD.index_select(0, tokens_P), offsets_E)
    weights_P = weights_TK.flatten().index_select(0, pairs_P)
    y_PD = (y_PD * weights_P.unsqueeze(1)).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, tokens_P, y_PD)


@dataclass
class Reach:
    """How a device comes to experts that other devices of its site hold (train.parallel=ep); alone it needs nothing."""

    # From its own weights to those of all experts that it computes.
    gather: Callable[[Tensor], Tensor] = lambda weight_E: weight_E
    # Sends rows to where their experts are computed, and brings back the outputs. None: all of them are here.
    exchange: Callable[[Experts, Tensor, Tensor], Tensor] | None = None

    def through(self, experts: Experts, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        """Outputs of the rows, wherever they are computed."""
        return experts(x_PD, offsets_E) if self.exchange is None else self.exchange(experts, x_PD, offsets_E)


# ----- the σ-MoE


class SigmaExperts(nn.Module):
    """Weights of the resident experts, stacked; the stacking is known in `fomoe_flwr/model/` alone."""

    def __init__(self, model: ModelConfig, num_local: int) -> None:
        super().__init__()
        self.up_EHD = nn.Parameter(torch.empty(num_local, model.d_expert, model.d_model))
        self.down_EDH = nn.Parameter(torch.empty(num_local, model.d_model, model.d_expert))
        self.linear = LINEARS[model.experts_impl]
        self.reach = Reach()

    @property
    def projections(self) -> Projections | None:
        """For `experts_of_tokens`; None: this implementation goes without."""
        if self.linear is not grouped_linear or self.reach.exchange is not None:
            return None
        return Projections(SILU, self.reach.gather(self.down_EDH), [self.reach.gather(self.up_EHD)])

    def forward(self, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        return self.reach.through(self._compute, x_PD, offsets_E)

    def _compute(self, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        up_EHD, down_EDH = self.reach.gather(self.up_EHD), self.reach.gather(self.down_EDH)
        return plain_experts(self.linear, x_PD, up_EHD, down_EDH, offsets_E)


class SharedExperts(nn.Module):
    """Experts that every token passes; synchronised as dense."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.num_shared_experts * model.d_expert
        self.up_proj = nn.Linear(model.d_model, width, bias=False)
        self.down_proj = nn.Linear(width, model.d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(F.silu(self.up_proj(x_TD)))
        return y_TD


class MoE(nn.Module):
    """`y = Σ_{i in top-k, resident} s_i · E_i(x)`, plus the shared experts."""

    slot_C: Tensor

    def __init__(self, model: ModelConfig, residents: Sequence[int], routing: str) -> None:
        super().__init__()
        whole = routing != "partitioned"
        self.num_experts, self.resident_experts, self.routing = model.num_experts, list(residents), routing
        self.candidates = list(range(model.num_experts)) if whole else self.resident_experts
        self.gate = SigmaRouter(model, len(self.candidates), residents if whole else None)
        self.experts = SigmaExperts(model, len(residents))
        self.standins = standins_of(model, residents)
        self.shared_experts = SharedExperts(model) if model.num_shared_experts else None
        self.slots = slots_of(residents, self.candidates)
        self.register_buffer("slot_C", torch.tensor(self.slots), persistent=False)
        self.again = False  # whether to compute the experts again in the backward pass

    def reset_buffers(self) -> None:
        """Fill the buffers of a module that was built without memory, and forget the load."""
        self.slot_C.copy_(torch.tensor(self.slots, device="cpu"))
        self.gate.reset_buffers()
        if self.standins is not None:
            self.standins.reset_buffers()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        """Returns y_TD, and what the router decided."""
        routing = self.gate(x_TD)
        num_slots = len(self.resident_experts)
        y_TD: Tensor = kept_or_again(
            self.again,
            routed,
            x_TD,
            routing.weights_TK,
            routing.chosen_TK,
            self.slot_C,
            num_slots,
            self.routing,
            self.experts,
            self.experts.projections,
            self.standins,
        )
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD, routing
