"""Parts of the model in turn: which tensors a round synchronises, and which rest (after Streaming DiLoCo, arXiv
2501.18512).

With strategy.fragments=P the tensors are dealt into P fragments, and round r synchronises fragment (r-1) mod P alone:
so a round has about a P-th of the bytes. A fragment has every P-th layer, its dense part and its experts together. What
belongs to no layer goes where the dense part is smallest.

With strategy.sole_every=T an expert that only one site holds is synchronised in every T-th turn of its fragment: until
another site gets it nobody else can use what it has learnt (ours).

No PyTorch here: server, sites and plan ask the same function.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from fomoe_flwr.config import ModelConfig, StrategyConfig
from fomoe_flwr.model.spec import expert_layers, expert_of, table

_LAYER = re.compile(r"model\.layers\.(\d+)\.", re.ASCII)


def takes_turns(strategy: StrategyConfig) -> bool:
    """Whether a tensor may rest in some round."""
    return strategy.fragments > 1 or strategy.sole_every > 1


def turns_in_words(strategy: StrategyConfig) -> str:
    """What of delay and turns a run has, as more of a list; empty for none."""
    return (
        (", a delay of one round" if strategy.delay else "")
        + (f", {strategy.fragments} parts in turn" if strategy.fragments > 1 else "")
        + (f", experts of one site every {strategy.sole_every} turns" if strategy.sole_every > 1 else "")
    )


def resting(
    names: Iterable[str],
    model: ModelConfig,
    strategy: StrategyConfig,
    round_: int,
    last_round: int,
    sole: Collection[tuple[int, int]] = (),
    moving: Collection[tuple[int, int]] = (),
) -> frozenset[str]:
    """Those of these tensors that a round does not synchronise; all others are due.

    In the run's last round everything is due, so that the model has all that was learnt. An expert that other sites
    hold in the next round is due, too, whosever turn it is: who loses it could not send it later.

    Args:
        names: of parameters.
        round_: counted from 1.
        sole: the experts that one site alone holds in this round, as (layer, expert) of their names.
        moving: those that other sites hold in the next one.
    """
    if not takes_turns(strategy) or round_ >= last_round:
        return frozenset()
    of_no_layer = _of_no_layer(model, strategy)
    fragment, turn = (round_ - 1) % strategy.fragments, (round_ - 1) // strategy.fragments + 1

    def rests(name: str) -> bool:
        expert, layer = expert_of(name), _layer_of(name)
        if expert in moving:
            return False
        own = of_no_layer[name] if layer is None else layer % strategy.fragments
        return own != fragment or (expert in sole and turn % strategy.sole_every > 0)

    return frozenset(name for name in names if rests(name))


def turn_name(strategy: StrategyConfig, round_: int, last_round: int) -> str:
    """The same for rounds that synchronise the same tensors, as long as no expert moves; empty: all tensors."""
    if not takes_turns(strategy) or round_ >= last_round:
        return ""
    fragment, turn = (round_ - 1) % strategy.fragments, (round_ - 1) // strategy.fragments + 1
    return f"fragment {fragment}" + (", not sole experts" if turn % strategy.sole_every else "")


def count_layers(model: ModelConfig, routing: str) -> int:
    """Layers of the model, those without experts too."""
    dense = [layer for param in table(model, routing) if (layer := _layer_of(param.name)) is not None]
    return max([*dense, *expert_layers(model)]) + 1


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def _of_no_layer(model: ModelConfig, strategy: StrategyConfig) -> dict[str, int]:
    """The fragment of each tensor that belongs to no layer (embedding, head, last norm), the largest first.

    By dense parts, for how many of the experts a site holds is another matter at each.
    """
    sizes, rest = [0] * strategy.fragments, dict[str, int]()
    for param in table(model, strategy.routing):
        if "{layer}" in param.name:
            for layer in () if param.per_expert else expert_layers(model):
                sizes[layer % strategy.fragments] += param.numel
        elif (own := _layer_of(param.name)) is not None:
            sizes[own % strategy.fragments] += param.numel
        else:
            rest[param.name] = param.numel
    found = {}
    for name in sorted(rest, key=lambda name: (-rest[name], name)):
        found[name] = sizes.index(min(sizes))
        sizes[found[name]] += rest[name]
    return found
