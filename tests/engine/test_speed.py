"""FLOPs that were really needed, by hand, and the peak that they are held against."""

from __future__ import annotations

import pytest
import torch

from fomoe_flwr.engine.speed import PEAKS, active_flops, known_peak, measured_peak
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.spec import token_flops
from tests.engine.helpers import FULL, MODEL, SOME

TOKENS, SEQ_LEN = 24, 8


def test_all_experts_here_is_the_whole_models_token() -> None:
    module = build(MODEL, FULL, "skip", initial_state(MODEL, FULL, "skip", 0), "cpu")
    loads_LC = [[12.0] * MODEL.num_experts] * MODEL.num_layers  # 48 choices of 24 tokens, two each
    whole = token_flops(MODEL, SEQ_LEN)
    assert active_flops(module, SEQ_LEN, TOKENS, loads_LC) == TOKENS * (
        whole.dense + whole.experts + whole.router
    )


def test_ghosts_count_nothing_and_rows_that_are_not_there_neither() -> None:
    whole = token_flops(MODEL, SEQ_LEN)
    # Two matrices of 8 x 16, forward and backward.
    expert = 2 * 8 * 16 * 6
    skip = build(MODEL, SOME, "skip", initial_state(MODEL, SOME, "skip", 0), "cpu")
    # Residents are 0 and 2, then 1 and 3.
    loads_LC = [[10.0, 20.0, 5.0, 13.0], [1.0, 2.0, 40.0, 5.0]]
    assert (
        active_flops(skip, SEQ_LEN, TOKENS, loads_LC) == TOKENS * (whole.dense + whole.router) + 22 * expert
    )
    partitioned = build(MODEL, SOME, "partitioned", initial_state(MODEL, SOME, "partitioned", 0), "cpu")
    found = active_flops(partitioned, SEQ_LEN, TOKENS, [[24.0, 24.0]] * 2)
    assert found == TOKENS * (whole.dense + whole.router / 2) + 96 * expert


def test_a_peak_is_known_by_the_devices_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert known_peak("cuda:1", "bf16") == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert known_peak("cuda", "bf16") == 756e12
    assert known_peak("cuda", "fp32") is known_peak("cpu", "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Something new")
    assert known_peak("cuda", "bf16") is None
    # A name that is part of another comes after it.
    names = [name for name, _ in PEAKS]
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]


def test_a_peak_is_measured_where_it_is_not_known() -> None:
    assert 1e8 < measured_peak("cpu", "fp32") < 1e14
