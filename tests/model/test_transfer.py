"""Learning rates transfer along the paper's ladder, where k and N_e grow with the width: muP's coordinate check."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.coordinates import PARTS, ladder, mean_change
from fomoe_flwr.config import ModelConfig

# Of the greatest change to the least. Where the sum over k was forgotten it is 1.8 here, and up to 4 below.
FLAT = 1.4
DOWN = {"part": "down_EDH", "branch": PARTS["down_EDH"]}


optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def spread(models: list[ModelConfig], part: str, branch: str, optimizer: str) -> float:
    changes = [mean_change(model, part, branch, optimizer) for model in models]
    return max(changes) / min(changes)


@optimizers
def test_what_a_few_steps_change_is_the_same_at_every_width(optimizer: str) -> None:
    """Of each part alone, the router too, and of everything together."""
    models = [ladder(width) for width in (64, 128, 256)]
    spreads = {part: spread(models, part, branch, optimizer) for part, branch in PARTS.items()}
    assert {part: value for part, value in spreads.items() if value >= FLAT} == {}


@optimizers
def test_the_fan_in_of_the_down_projections_is_that_of_the_experts_a_token_chooses(optimizer: str) -> None:
    wide = dataclasses.replace(ladder(128), num_experts=32)
    assert (
        spread([dataclasses.replace(wide, top_k=k) for k in (1, 2, 4, 8)], **DOWN, optimizer=optimizer) < FLAT
    )
    # How many there are to choose from is no part of any sum.
    assert (
        spread([dataclasses.replace(wide, num_experts=n) for n in (8, 16, 32)], **DOWN, optimizer=optimizer)
        < FLAT
    )
    assert (
        spread([dataclasses.replace(wide, d_expert=h) for h in (16, 32, 64)], **DOWN, optimizer=optimizer)
        < FLAT
    )


@optimizers
def test_the_fan_in_of_the_shared_experts_is_that_of_all_of_them(optimizer: str) -> None:
    models = [dataclasses.replace(ladder(128), num_shared_experts=shared) for shared in (1, 2, 4)]
    assert spread(models, "shared_experts.down_proj", "post_feedforward_layernorm", optimizer) < FLAT
