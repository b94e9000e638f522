"""A run on text that was tokenised elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import WORDS, Compose
from tests.data.test_tokenised import write_megatron, write_raw
from tests.strategies.helpers import metrics, run


def test_a_run_on_tokens_that_lie_elsewhere(small: Compose, tmp_path: Path) -> None:
    rng = random.Random(0)
    docs = [np.array([*" ".join(rng.choice(WORDS) for _ in range(60)).encode(), 256]) for _ in range(120)]
    write_raw(tmp_path / "text" / "web" / "0.npy", docs[:80])
    write_megatron(tmp_path / "text" / "code" / "0.bin", docs[80:])
    composed = small(
        "data=tokens", f"data.path={tmp_path / 'text'}", "train.rounds=2", "data.mix={web: 1, code: 1}"
    )
    run_dir = run(composed)
    last = metrics(run_dir)[-1]
    assert last["val_loss"] < 6
    assert last["val_bpb"] > 0
    assert {"passes/web", "passes/code"} <= last["sites"][0].keys()
    content = json.loads((run_dir / "corpus.json").read_text())
    tokens = {
        row["domain"]: row["train"]["tokens"] + row["validation"]["tokens"] for row in content["domains"]
    }
    assert tokens == {
        None: sum(map(len, docs)),
        "web": sum(map(len, docs[:80])),
        "code": sum(map(len, docs[80:])),
    }
    # Bytes are an estimate, by the tokens of the samples.
    whole = content["domains"][0]
    assert whole["train"]["bytes"] + whole["validation"]["bytes"] == pytest.approx(
        tokens[None] - len(docs), rel=0.01
    )
