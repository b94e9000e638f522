"""A run on a stream: sites keep their place in it, and a resumed run has the same losses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fomoe_flwr.data import StreamedText
from tests.conftest import WORDS, Compose
from tests.strategies.helpers import metrics, run


def test_a_resumed_run_has_the_same_losses_and_does_not_begin_the_stream_anew(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    (tmp_path / "text").mkdir()
    for file in range(2):
        rows = [{"text": " ".join(rng.choice(WORDS) for _ in range(60))} for _ in range(100)]
        (tmp_path / "text" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        "data=huggingface", f"data.name={tmp_path / 'text'}", "data.path=null", "data.stream=true",
        "data.val_fraction=0.2",
    ]  # fmt: skip
    whole = metrics(run(small(*data, "train.rounds=3", run_dir=tmp_path / "whole")))
    run(small(*data, "train.rounds=2", run_dir=tmp_path / "parts"))
    begun = []
    window = StreamedText._window

    def counted(self: StreamedText) -> object:
        begun.append(self._position)
        return window(self)

    monkeypatch.setattr(StreamedText, "_window", counted)
    resumed = metrics(
        run(small(f"resume={tmp_path / 'parts'}", *data, "train.rounds=3", run_dir=tmp_path / "parts"))
    )
    assert min(begun) > 0
    for one, other in zip(whole[1:], resumed[1:], strict=True):
        assert one["val_loss"] == other["val_loss"]
        assert [site["last_loss"] for site in one["sites"]] == [site["last_loss"] for site in other["sites"]]
    assert not (tmp_path / "whole" / "corpus.json").exists()
