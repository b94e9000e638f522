"""Whole runs with other routers, with locality, with the federation's balance, and with a floor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint
from fomoe_flwr.compose import Composed
from fomoe_flwr.load import Shares
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import expert_of, gate_name
from tests.conftest import Compose
from tests.strategies.helpers import composed_anew, metrics, run
from tests.strategies.test_resume import assert_same_run

BIAS = ("model.locality=bias", "model.locality_target=0.8", "strategy.overlap=2")


def ran(composed: Composed) -> list[dict[str, Any]]:
    """The metrics of a whole run."""
    return metrics(run(composed))


@pytest.fixture
def fresh(small: Compose, tmp_path: Path) -> Compose:
    """`small`, each run in a directory of its own."""
    return lambda *overrides: composed_anew(small, tmp_path, *overrides)


def parameters_of(run_dir: Path, round_: int) -> dict[str, Tensor]:
    return read_checkpoint(checkpoint_path(run_dir, round_)).parameters


@pytest.mark.parametrize(
    ("choice", "outer"),
    [
        ("model.locality=loss", "local_adamw"),
        ("model.router=orthogonal", "nesterov"),
        ("model.router=orthogonal", "local_adamw"),
        ("model.router=grap", "nesterov"),
    ],
)
def test_each_choice_trains(fresh: Compose, choice: str, outer: str) -> None:
    """The linear router is in every other test."""
    composed = fresh(
        choice, f"strategy.outer={outer}", "train.rounds=3", "train.lr=0.01", "strategy.overlap=2"
    )
    lines = ran(composed)
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.5
    parameters = parameters_of(composed.run_dir, 3)
    gates = {name: value for name, value in parameters.items() if "gate" in name}
    kinds = 3 if outer == "local_adamw" else 1  # with both moments
    assert len(gates) == (0 if "grap" in choice else 2 * kinds)
    if "orthogonal" in choice:
        for name in map(gate_name, range(2)):
            torch.testing.assert_close(gates[name] @ gates[name].T, torch.eye(8), rtol=0, atol=1e-6)
            moved = gates[name] - parameters_of(composed.run_dir, 2)[name]
            assert moved.norm() > 1e-3  # it is projected, not put back


# -- locality ------------------------------------------------------------------------------------------------


def test_the_bias_brings_the_resident_share_to_its_target(fresh: Compose) -> None:
    """Half of the experts are at each site, so without it half of the assignments hit one."""
    lines = ran(fresh("train.rounds=5", "train.local_steps=8", *BIAS))
    assert lines[1]["resident_share"] < 0.75  # it has begun with half
    assert [line["resident_share"] for line in lines[3:]] == pytest.approx([0.8] * 3, abs=0.05)


def states_on_disk(composed: Composed) -> dict[str, str]:
    found = {}
    for path in sorted(composed.run_dir.glob("sites/*/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[str(path.relative_to(composed.run_dir))] = file.metadata()["state"]
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (*BIAS, "model.router=grap", "model.balance=global"),
        (*BIAS, "model.router=orthogonal", "strategy.outer=local_adamw", "strategy.placement=random"),
    ],
    ids=" ".join,
)
def test_a_resumed_run_has_the_same_bias_load_and_routers_bit_for_bit(
    fresh: Compose, overrides: tuple[str, ...]
) -> None:
    composed = fresh("train.rounds=3", *overrides)
    whole, half = run(composed), run(fresh("train.rounds=2", *overrides))
    resumed = compose_run([f"resume={half}", "train.rounds=3"])
    assert_same_run(run(resumed), whole, 3)
    states, expected = states_on_disk(resumed), states_on_disk(composed)
    # The last round that was planned differs, for the run was prolonged.
    assert [re.sub(r'"last_round": \d+', "", state) for state in states.values()] == [
        re.sub(r'"last_round": \d+', "", state) for state in expected.values()
    ]
    assert not any('"bias": []' in state for state in states.values())
    assert any('"load": null' in state for state in states.values()) == (
        "model.balance=global" not in overrides
    )
    memories = [read_checkpoint(checkpoint_path(folder, 3)).manifest["memory"] for folder in (half, whole)]
    assert memories[0]["load"] == memories[1]["load"] is not None


# -- the federation's load -----------------------------------------------------------------------------------


def test_sites_balance_the_federations_load_from_the_second_round_on(
    fresh: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Shares | None] = []
    real = Transformer.begin_round

    def watched(self: Transformer, bias_L, offset_LE) -> None:
        given.append(offset_LE)
        real(self, bias_L, offset_LE)

    monkeypatch.setattr(Transformer, "begin_round", watched)
    run(fresh("model.balance=global", "train.rounds=2", "data.partition=domain"))
    assert given[:4] == [None] * 4
    assert all(any(map(any, offset_LE)) for offset_LE in given[4:])
    # Equal sites: what one has more than the federation, the others have less.
    assert np.abs(np.mean(given[4:], axis=0)).max() == pytest.approx(0, abs=1e-12)
    given.clear()
    run(fresh("train.rounds=2"))
    assert given == [None] * 8


# -- the capacity floor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["nesterov", "local_adamw"])
def test_a_starved_expert_is_named_and_stays_as_it_was(fresh: Compose, outer: str, caplog) -> None:
    """A floor between the most and the least loaded expert: for some rounds some are below it."""
    composed = fresh(
        f"strategy.outer={outer}", "train.rounds=3", "strategy.overlap=2", "checkpoint.keep=9",
        "strategy.capacity_floor=0.9999", "strategy.capacity_delta=0.13",
    )  # fmt: skip
    lines, run_dir = ran(composed), composed.run_dir
    everyone = {(layer, expert) for layer in range(2) for expert in range(8)}
    seen = set()
    for round_ in (2, 3):
        starved = {tuple(expert) for expert in lines[round_]["experts"]["starved"]}
        assert lines[round_]["experts"]["num_starved"] == len(starved)
        for layer, expert in starved:
            assert re.search(rf"round {round_}: .* starved.*layer {layer} expert {expert}(,|\n)", caplog.text)
        before, after = (read_checkpoint(checkpoint_path(run_dir, r)) for r in (round_ - 1, round_))
        for kind in ("parameters", "outer"):
            old, new = getattr(before, kind), getattr(after, kind)
            for name, value in new.items():
                expert = expert_of(name)
                if expert in starved:
                    assert name not in old or value.equal(old[name]), name
                elif expert is not None and "exp_avg" not in name:
                    assert name not in old or not value.equal(old[name]), name
        seen |= starved
    assert seen
    assert seen != everyone
