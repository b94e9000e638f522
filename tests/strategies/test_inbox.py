"""The inbox: replies outlive the server, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from fomoe_flwr.errors import WireError
from fomoe_flwr.wire import to_arrays
from strategies.inbox import Inbox

KEYS = ("arrays", "config")
UPDATE = {"model.norm.weight": torch.arange(6.0), "model.embed_norm.weight": torch.ones(2, 3)}


def filled(folder: Path) -> Inbox:
    inbox = Inbox(folder)
    inbox.begin(3)
    arrays = ArrayRecord(to_arrays("../../escape", UPDATE, torch.bfloat16))  # a key is never a path
    inbox.put(7, arrays, MetricRecord({"a": 1.5}), ConfigRecord({"digest": b"\x00\xff", "round": 3}))
    return inbox


def test_a_reply_comes_back_as_it_arrived(tmp_path: Path) -> None:
    filled(tmp_path / "inbox").close()
    assert [path.name for path in tmp_path.iterdir()] == ["inbox"]
    again = Inbox(tmp_path / "inbox")
    assert again.begin(3) == [7]
    content = again.get(7, KEYS)
    assert dict(content["metrics"]) == {"a": 1.5}
    assert dict(content["config"]) == {"digest": b"\x00\xff", "round": 3}
    assert list(content["arrays"]) == ["../../escape"]
    tensors = again.tensors(7, ["model.norm.weight", "model.stranger"])
    assert tensors.keys() == {"model.norm.weight"}
    assert torch.equal(tensors["model.norm.weight"], torch.arange(6.0).bfloat16())
    again.clear()
    assert not (tmp_path / "inbox").exists()


def test_another_round_and_what_is_half_written_is_dropped(tmp_path: Path) -> None:
    filled(tmp_path / "inbox").close()
    half = tmp_path / "inbox/round_00003/8.partial"
    half.mkdir()
    assert Inbox(tmp_path / "inbox").begin(3) == [7]
    assert not half.exists()
    assert Inbox(tmp_path / "inbox").begin(4) == []
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["round_00004"]


def test_a_reply_can_be_dropped(tmp_path: Path) -> None:
    inbox = filled(tmp_path / "inbox")
    inbox.drop(7)
    assert inbox.begin(3) == []


def test_a_damaged_bundle_is_not_read(tmp_path: Path) -> None:
    inbox = filled(tmp_path / "inbox")
    path = tmp_path / "inbox/round_00003/7/bundle-0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WireError, match=r"leave bytes over|do not hold"):
        inbox.tensors(7, list(UPDATE))
