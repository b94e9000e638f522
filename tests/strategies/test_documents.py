"""A run whose attention keeps to documents: sites, validation and the evaluation at the end have one mask."""

from __future__ import annotations

import json
from pathlib import Path

from fomoe_flwr.checkpoint import compose_run
from fomoe_flwr.report.load import load_run
from tests.conftest import Compose
from tests.strategies.helpers import copy_of, finished, metrics

MASKED = "data.document_mask=true"


def test_a_run_within_documents(small: Compose, tmp_path: Path) -> None:
    plain, masked = finished(small, tmp_path), finished(small, tmp_path, MASKED)
    config = load_run(masked).config
    assert (config.data.document_mask, config.model.document_end) == (True, 256)
    lines, others = metrics(masked), metrics(plain)
    assert [line["failures"] for line in lines[1:]] == [{}, {}]
    # Before training, on the same text with the same weights: another function.
    assert lines[0]["val_loss"] != others[0]["val_loss"]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    evaluated = json.loads((masked / "evaluation.json").read_text())["all_experts"]
    assert evaluated["loss"] != json.loads((plain / "evaluation.json").read_text())["all_experts"]["loss"]


def test_a_run_that_goes_on_keeps_its_mask_until_it_is_told_otherwise(small: Compose, tmp_path: Path) -> None:
    run_dir = copy_of(finished(small, tmp_path, MASKED))
    asked = [f"resume={run_dir}", "train.rounds=3"]
    assert compose_run(asked).config.model.document_end == 256
    assert compose_run([*asked, "data.document_mask=false"]).config.model.document_end is None
