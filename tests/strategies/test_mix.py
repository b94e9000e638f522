"""A run on a mixture: counted by part, resumed to the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.errors import ConfigError
from tests.conftest import Compose
from tests.strategies.helpers import metrics, run

MIX = "data.mix={anatomy: 3, botany: 1}"


def test_parts_are_counted_and_a_resumed_run_has_the_same_losses(small: Compose, tmp_path: Path) -> None:
    whole = metrics(run(small(MIX, "train.rounds=3", run_dir=tmp_path / "whole")))
    run(small(MIX, "train.rounds=2", run_dir=tmp_path / "parts"))
    resumed = metrics(
        run(small(f"resume={tmp_path / 'parts'}", MIX, "train.rounds=3", run_dir=tmp_path / "parts"))
    )
    for one, other in zip(whole[1:], resumed[1:], strict=True):
        assert [site["last_loss"] for site in one["sites"]] == [site["last_loss"] for site in other["sites"]]
        for site in one["sites"]:
            parts = {key: value for key, value in site.items() if key.startswith("passes/")}
            assert set(parts) == {"passes/anatomy", "passes/botany"}
            assert site["passes"] == max(parts.values()) > 0


def test_a_domain_that_is_not_there_is_said_at_the_start(small: Compose) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.mix: anatomie is not a domain of the corpus; allowed are anatomy"
    ):
        run(small("data.mix={anatomie: 1}"))
