"""`fomoe bench`: figures of a step that fit each other, for a person and for a program."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fomoe_flwr.bench_command import bench_command
from fomoe_flwr.compose import compose
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.spec import token_flops

TINY = [
    "model=tiny", "model.d_model=32", "model.num_layers=2", "model.num_experts=4", "model.d_expert=16",
    "train.batch_size=2", "train.seq_len=16", "federation.num_sites=2", "train.device=cpu",
]  # fmt: skip


def measured(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, object]:
    bench_command([*TINY, *overrides, "--steps", "3", "--json"])
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_figures_fit_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "strategy.overlap=2")
    assert (found["experts_per_layer"], found["num_experts"], found["device"]) == (4, 4, "cpu")
    assert found["resident_share"] == 1.0
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["step_s"])  # type: ignore[operator]
    # All experts are here, so a token costs what the formula says.
    model = compose(TINY).config.model
    assert found["flops_per_step"] == pytest.approx(32 * sum(token_flops(model, 16)))
    least, most = found["step_s_range"]  # type: ignore[misc]
    assert least <= found["step_s"] <= most
    parts = found["parts"]
    assert isinstance(parts, dict)
    assert {"experts", "attention", "logits and their loss", "optimizer", "rest"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(1.0, abs=0.02)
    assert all(parts[part] > 0 for part in ("experts", "attention", "logits and their loss", "optimizer"))


def test_half_of_the_experts_take_about_half_of_their_work(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "strategy.overlap=1", "train.micro_batches=2", "train.recompute=full")
    assert (found["experts_per_layer"], found["micro_batches"], found["recompute"]) == (2, 2, "full")
    assert 0.1 < found["resident_share"] < 0.9  # type: ignore[operator]


def test_a_person_reads_tables(capsys: pytest.CaptureFixture[str]) -> None:
    bench_command([*TINY, "--steps", "2"], Console(width=200))
    text = capsys.readouterr().out
    for words in (
        "a training step",
        "tokens/s",
        "MFU",
        "where its time goes",
        "measured with square matrices",
    ):
        assert words in text


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"train\.device=cuda:77: PyTorch sees"):
        bench_command([*TINY[:-1], "train.device=cuda:77"])
