"""What every architecture is to the rest of the program: a language model with residents, and its tensors by name.

Letters: B sequences, S positions, T = B·S tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.cross_entropy import linear_cross_entropy
from fomoe_flwr.model.moe import Experts, Reach, Router
from fomoe_flwr.model.spec import Residents, slots


class Losses(NamedTuple):
    """Scalars of a batch: cross-entropy in nats a token, and the routers' own losses to be added to it."""

    cross_entropy: Tensor
    balance: Tensor  # of the load; with locality=loss, that loss too


@dataclass(frozen=True)
class MoELayer:
    """A layer of experts, as the trainer and the figures of routing need it."""

    gate: Router
    num_experts: int
    resident_experts: Sequence[int]
    candidates: Sequence[int]  # the experts that the router chooses among
    experts: Experts  # of the residents
    reach: Reach


class LanguageModel(nn.Module):
    """The model of a site: dense part and resident experts. Only residents are allocated.

    Args:
        residents: the experts held, one list a layer with experts.
        routing: `skip` and `skip_renormalised` (choose among all experts, skip ghosts) or `partitioned` (choose among
            residents).
    """

    def __init__(self, model: ModelConfig, residents: Residents, routing: str) -> None:
        super().__init__()
        self.config, self.routing = model, routing
        self.resident_experts = [list(experts) for experts in residents]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, from the bottom."""
        raise NotImplementedError

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The layers with experts, from the bottom."""
        raise NotImplementedError

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden state x_BSD after its norm, and the routers' losses times their coefficients."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, float]:
        """Weights head_VD, and the factor by which their product with the hidden state is multiplied."""
        raise NotImplementedError

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits [T, V]."""
        head_VD, multiplier = self.head()
        return F.linear(hidden_TD, head_VD) * multiplier

    def finish_building(self, device: str) -> None:
        """Fill the buffers of a module that was built without memory and is on its device now."""
        raise NotImplementedError

    def recompute(self, what: str) -> None:
        """From now on compute this once more in the backward pass instead of keeping it (train.recompute).

        Routers are not part of it: they count their choices, and chosen once, experts stay chosen.
        """
        raise NotImplementedError

    def begin_round(
        self, bias_L: Sequence[Sequence[float]], offset_LE: Sequence[Sequence[float]] | None
    ) -> None:
        """Set what the routers go by besides their weights.

        Args:
            bias_L: this site's own, as `biases()` gave it; empty: as at the start.
            offset_LE: by which the federation's shares of each layer's assignments differ from the site's own.
        """
        for layer, moe in enumerate(self.moe_layers):
            gate = moe.gate
            gate.reset_buffers()
            if bias_L and self.config.locality == "bias":
                bias, trend = bias_L[layer]
                gate.bias.fill_(bias)
                gate.trend.fill_(trend)
            if offset_LE is not None:
                gate.offset_C = gate.load_C.new_tensor(offset_LE[layer])

    def biases(self) -> list[list[float]]:
        """The site's own bias towards its residents and its trend, in each layer; empty where there is none."""
        if self.config.locality != "bias":
            return []
        return [[float(moe.gate.bias), float(moe.gate.trend)] for moe in self.moe_layers]

    def forward(self, tokens_BT: Tensor) -> Losses:
        """Losses of predicting tokens_BT[:, 1:] from tokens_BT[:, :-1]."""
        hidden_BSD, balance = self.hidden(tokens_BT[:, :-1])
        head_VD, multiplier = self.head()
        targets_T = tokens_BT[:, 1:].flatten()
        loss = linear_cross_entropy(hidden_BSD.flatten(0, 1), head_VD, targets_T, multiplier)
        return Losses(loss, balance)


class NamedView(NamedTuple):
    """A parameter of the module, or one slice of it, under its wire name."""

    name: str
    parameter: nn.Parameter
    slot: int | None  # the slice; None: the whole parameter

    def of(self, tensor: Tensor) -> Tensor:
        """The same slice of another tensor of the parameter's shape (its data, its gradient)."""
        return tensor if self.slot is None else tensor[self.slot]


def named_views(module: LanguageModel) -> list[NamedView]:
    """The site's shard as views into the module: stacked experts (and, partitioned, router rows) one by one.

    In the order of the module's parameters.

    Raises:
        KeyError: module and table (`spec.table`) do not list the same parameters.
    """
    views: dict[str, list[NamedView]] = {path: [] for path, _ in module.named_parameters()}
    parameter_at = dict(module.named_parameters())
    for name, param, path in slots(module.config, module.resident_experts, module.routing):
        slot = len(views[path]) if param.stacked else None
        views[path].append(NamedView(name, parameter_at[path], slot))
    # It would neither be trained nor sent; only the stack of a layer without residents has no slot.
    for path, parameter in parameter_at.items():
        if parameter.numel() and not views[path]:
            raise KeyError(f"{path} is not in the table of tensors")
    return [view for in_one in views.values() for view in in_one]


@torch.no_grad()
def load_shard(module: LanguageModel, shard: Mapping[str, Tensor]) -> None:
    """Copy a shard into the module.

    Raises:
        WireError: a name missing, left over, or of another shape.
    """
    views = named_views(module)
    targets = {view.name: view.of(view.parameter.data) for view in views}
    check_shard({name: target.shape for name, target in targets.items()}, shard)
    for name, target in targets.items():
        target.copy_(shard[name])


def check_shard(shapes: Mapping[str, Sequence[int]], shard: Mapping[str, Tensor]) -> None:
    """Raises WireError for a name missing, left over, or of another shape."""
    expected = set(shapes)
    for problem, names in (("lacks", expected - set(shard)), ("has an unexpected", set(shard) - expected)):
        if names:
            raise WireError(f"shard {problem} {min(names)} ({len(names)} such names)")
    for name, shape in shapes.items():
        if tuple(shape) != tuple(shard[name].shape):
            raise WireError(f"{name}: shape {tuple(shard[name].shape)}, expected {tuple(shape)}")


def read_shard(module: LanguageModel) -> dict[str, Tensor]:
    """The module's parameters by name, as views (no copy)."""
    return {view.name: view.of(view.parameter.data) for view in named_views(module)}
