"""Stand-ins: what a site computes in the place of an expert that it lacks. Ours; in FoMoE a ghost is skipped.

An expert's stand-in is an affine map of low rank, `S_e(x) = U_e V_e x + b_e`. All sites hold all of them and average
them like dense tensors: at rank 8 one has a hundredth of the numbers of a large model's expert. A site trains those of
its ghosts. Before round 1 of a run that continues a checkpoint, the holders fit them to their experts (`fit`), so that
the other sites begin near the whole model's function.

Letters: E experts, P token-expert pairs, D d_model, R rank, T tokens, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.experts import LINEARS, rows_of
from fomoe_flwr.model.spec import standin_name

TOKENS = 4096  # of a site and layer, from which stand-ins are fitted
_MOST = 1024  # of one expert
# Added to the diagonal of the Gram matrix, as a share of its mean. Tried on a model of 2 M parameters.
_RIDGE = 1e-2


class StandIns(nn.Module):
    """Those of a layer, behind the call that experts have. They take the pairs of ghosts alone."""

    slot_E: Tensor

    def __init__(self, model: ModelConfig, residents: Sequence[int]) -> None:
        super().__init__()
        self.num, held = model.num_experts, set(residents)
        self.down_ERD = nn.Parameter(torch.empty(self.num, model.standins, model.d_model))
        self.up_EDR = nn.Parameter(torch.empty(self.num, model.d_model, model.standins))
        self.bias_ED = nn.Parameter(torch.empty(self.num, model.d_model))
        self.linear = LINEARS[model.experts_impl]
        self.slots = [self.num if expert in held else expert for expert in range(self.num)]
        self.register_buffer("slot_E", torch.tensor(self.slots), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the buffer of a module that was built without memory."""
        self.slot_E.copy_(torch.tensor(self.slots, device="cpu"))

    def forward(self, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        y_PD = self.linear(self.linear(x_PD, self.down_ERD, offsets_E), self.up_EDR, offsets_E)
        return y_PD + rows_of(self.bias_ED, offsets_E, len(x_PD)).to(y_PD.dtype)


def standins_of(model: ModelConfig, residents: Sequence[int]) -> StandIns | None:
    """A layer's, where the model has any."""
    return StandIns(model, residents) if model.standins else None


# ----- from an expert to its stand-in


class Fit(NamedTuple):
    """`S(x) = U V x + b`."""

    down: Tensor  # V, [R, D]
    up: Tensor  # U, [D, R]
    bias: Tensor  # b, [D]


def fit(x_ND: Tensor, y_ND: Tensor, rank: int) -> Fit:
    """The affine map of this rank that is next to an expert's outputs on these tokens.

    Ridge regression, then the best approximation of this rank to what it predicts (reduced-rank regression: A. J.
    Izenman, J. Multivariate Analysis 5, 1975). Through the tokens' Gram matrix: an expert has seen fewer tokens than a
    wide model has dimensions.

    Args:
        x_ND: at least one token.
    """
    x_D, y_D = x_ND.mean(0), y_ND.mean(0)
    x_ND, y_ND = x_ND - x_D, y_ND - y_D
    gram_NN = x_ND @ x_ND.T
    # A single token has a Gram matrix of zero.
    ridge = (_RIDGE * gram_NN.diagonal().sum() / len(x_ND)).clamp(min=1e-20)
    dual_ND = torch.linalg.solve(gram_NN + ridge * torch.eye(len(x_ND), device=x_ND.device), y_ND)
    fitted_ND = gram_NN @ dual_ND
    # Its right singular vectors: the directions in which the output varies most.
    _, _, right_KD = torch.linalg.svd(fitted_ND, full_matrices=False)
    up_DR = torch.zeros(y_ND.shape[1], rank, dtype=x_ND.dtype, device=x_ND.device)
    kept = min(rank, len(right_KD))
    up_DR[:, :kept] = right_KD[:kept].T
    down_RD = (dual_ND @ up_DR).T @ x_ND
    return Fit(down_RD, up_DR, y_D - up_DR @ (down_RD @ x_D))


class Sample:
    """Tokens of a layer, as they reach its router, and their choices; of each batch the same number."""

    def __init__(self, batches: int) -> None:
        self._of_a_batch = max(1, TOKENS // max(batches, 1))
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, x_TD: Tensor, chosen_TK: Tensor) -> None:
        every = max(1, len(x_TD) // self._of_a_batch)
        self._kept.append((x_TD[::every].float(), chosen_TK[::every]))

    def fit(
        self, experts: Callable[[Tensor, Tensor], Tensor], residents: Sequence[int], rank: int
    ) -> dict[int, Fit]:
        """Stand-ins of the residents that these tokens chose.

        Args:
            experts: outputs of rows in the order of their experts, from the rows and the ends of each expert's.
        """
        x_TD = torch.cat([x_TD for x_TD, _ in self._kept])
        chosen_TK = torch.cat([chosen_TK for _, chosen_TK in self._kept])
        found: dict[int, Fit] = {}
        for slot, expert in enumerate(residents):
            x_ND = x_TD[(chosen_TK == expert).any(1)][:_MOST]
            if not len(x_ND):
                continue
            ends_E = torch.full((len(residents),), len(x_ND), dtype=torch.int32, device=x_ND.device)
            ends_E[:slot] = 0
            found[expert] = fit(x_ND, experts(x_ND, ends_E).float(), rank)
        return found


def as_tensors(layer: int, found: Mapping[int, Fit], num_experts: int) -> dict[str, Tensor]:
    """A layer's tensors by name, with zeros for the experts that are not in `found`; none if that is empty.

    Args:
        layer: its number, as names have it.
    """
    if not found:
        return {}
    any_fit = next(iter(found.values()))
    tensors = {}
    for part, row in any_fit._asdict().items():
        rows = torch.zeros(num_experts, *row.shape)
        for expert, own in found.items():
            rows[expert] = getattr(own, part)
        tensors[standin_name(layer, part)] = rows
    return tensors


def take_over(
    tensors: Mapping[str, Tensor],
    fitted: Mapping[int, Mapping[str, Tensor]],
    holds_LEM: NDArray[np.bool_],
    layers: Sequence[int],
) -> int:
    """Write into the model what the sites fitted; of an expert, that of its first holder in the order of the sites.

    Args:
        tensors: the model's, by name.
        fitted: by site, what `as_tensors` gave there.
        layers: numbers of the layers with experts, as names have them.

    Returns:
        How many experts now have one.
    """
    taken_LE = np.zeros(holds_LEM.shape[:2], dtype=bool)
    for site, own in sorted(fitted.items()):
        for row, layer in enumerate(layers):
            names = [standin_name(layer, part) for part in Fit._fields]
            if not own.keys() >= set(names):
                continue
            there_E = own[standin_name(layer, "bias")].any(1).numpy()
            new_E = there_E & holds_LEM[row, :, site] & ~taken_LE[row]
            rows_E = torch.from_numpy(new_E)
            for name in names:
                tensors[name][rows_E] = own[name][rows_E].float()
            taken_LE[row] |= new_E
    return int(taken_LE.sum())
