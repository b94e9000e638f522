"""Before round 1 of a checkpoint that goes on, the sites say which experts their text asks for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fomoe_flwr.compose import compose
from fomoe_flwr.records import NAME as PLACEMENTS
from tests.conftest import SMALL_TRAIN
from tests.model.stock_models import stock
from tests.strategies.helpers import metrics, run

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_round_1_is_placed_by_what_the_sites_said(
    routing: str, tmp_path: Path, corpus_dir: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**stock("olmoe").hf)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "open")
    composed = compose(
        [
            "model=hf", f"model.path={tmp_path / 'open'}", *SMALL_TRAIN, "data=text", f"data.path={corpus_dir}",
            f"data.cache_dir={cache_dir}", "data.tokenizer=bytes", "wandb.mode=disabled", "runtime=local",
            "federation.num_sites=2", "strategy.overlap=1", "strategy.placement=affine", "train.rounds=1",
            "train.expert_warmup_steps=1000", f"strategy.routing={routing}", f"hydra.run.dir={tmp_path / 'run'}",
        ]
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "fomoe"):
        run(composed)
    assert "2 of 2 sites said which experts their text asks for" in caplog.text
    start, first = metrics(tmp_path / "run")
    assert start["bytes_down"] > 0
    assert first["failures"] == start["failures"] == {}
    manifest = json.loads((tmp_path / "run/checkpoints/round_00001/manifest.json").read_text())
    demand_MLE = np.array([manifest["memory"]["plan"]["demand"][f"site-{site}"] for site in range(2)])
    assert np.allclose(demand_MLE.sum(axis=2), 1)
    held = json.loads((tmp_path / "run" / PLACEMENTS).read_text().splitlines()[0])["residents"]
    for layer, demand_ME in enumerate(demand_MLE.swapaxes(0, 1)):
        ours, theirs = held["site-0"][layer], held["site-1"][layer]
        assert sorted(ours + theirs) == list(range(8))
        if routing == "partitioned":  # in skip mode the demand is that of round 1, too
            # Nobody gains from an exchange of two experts.
            rather_E = demand_ME[0] - demand_ME[1]
            assert rather_E[ours].min() >= rather_E[theirs].max()
