"""How often a site reads its text: counted, and said before the run and when it happens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.conftest import Compose
from tests.strategies.helpers import metrics, run


def test_passes_are_counted_and_many_are_said(
    small: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two sites that share the corpus one takes large batches; a third has 600 bytes of its own."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"{index} " * 50}) + "\n" for index in range(10, 14)))
    sites = f"[{{name:calm}},{{name:busy,batch_size:300}},{{name:own,data_path:{own}}}]"
    common = tmp_path / "common.jsonl"
    common.write_text("".join(json.dumps({"text": f"{index:04} " * 60}) + "\n" for index in range(60)))
    composed = small(
        f"federation.sites={sites}", "federation.num_sites=3", "strategy.overlap=3", "train.rounds=3",
        "train.seq_len=16", "data=jsonl", f"data.path={common}",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        run_dir = run(composed)

    content = json.loads((run_dir / "corpus.json").read_text())
    (whole, domain), by_site = content["domains"], content["sites"]
    assert (whole["domain"], domain["domain"]) == (None, "common")
    assert whole["train"] == domain["train"]
    # Each document has 300 bytes and an end token.
    assert whole["validation"] == {"documents": 3, "bytes": 900, "tokens": 903}
    assert whole["train"] == {"documents": 57, "bytes": 57 * 300, "tokens": 57 * 301}
    assert set(by_site) == {"calm", "busy"}
    assert sorted(site["documents"] for site in by_site.values()) == [28, 29]
    assert any("(5.0 %) for validation; see corpus.json" in line for line in caplog.messages)

    windows = {site: (figures["tokens"] - 1) // 16 for site, figures in by_site.items()}
    for line in metrics(run_dir)[1:]:
        passes = {site["site"]: site["passes"] for site in line["sites"]}
        for site, batch in (("calm", 2), ("busy", 300)):
            # Each round has 3 steps.
            assert passes[site] == pytest.approx(line["round"] * 3 * batch / windows[site], rel=1e-12)
    # 600 bytes less one document for validation are 28 windows: said by nobody.
    assert passes["own"] == pytest.approx(18 / 28)
    times = 2700 / windows["busy"]
    before, later = [line for line in caplog.messages if "more than 4 times" in line]
    assert before.startswith("1 sites will read their text more than 4 times, ")
    assert before.endswith(f"busy ({times:.3g} times)")
    assert later.startswith("round 3: 1 sites have read")


def test_a_site_says_it_of_its_own_text(
    small: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"{index} " * 50}) + "\n" for index in range(10, 14)))
    sites = ",".join(f"{{name:{name},data_path:{own}}}" for name in ("a", "b"))
    composed = small(
        f"federation.sites=[{sites}]", "federation.num_sites=2", "strategy.overlap=2", "train.batch_size=64",
        "data=jsonl", "data.path=null", "data.partition=own", "train.eval_batches=0",
        "strategy.fraction_evaluate=1.0",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        run_dir = run(composed)
    said = [line for line in caplog.messages if "will read its own text" in line]
    assert sorted(line.split()[1] for line in said) == ["a", "b"]
    (later,) = [line for line in caplog.messages if "have read" in line]
    assert later.startswith("round 1: 2 sites")
    # A server without text has the sites' losses and nothing of its own.
    last = metrics(run_dir)[-1]
    assert last["val_loss"] == pytest.approx(sum(site["val_loss"] for site in last["sites"]) / 2)
    assert last["val_bpb"] is None
    assert not (run_dir / "corpus.json").exists()
    assert not (run_dir / "evaluation.json").exists()
