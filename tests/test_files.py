"""A file is whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fomoe_flwr.checkpoint import checkpoint_path, save_checkpoint
from fomoe_flwr.files import write_atomically
from fomoe_flwr.wire import write_tensors


class Crash(Exception):
    """Stands for a process that dies."""


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "state" / "x.json"
    write_atomically(target, lambda path: path.write_text("old"))

    def half(path: Path) -> None:
        path.write_text("ne")
        raise Crash

    with pytest.raises(Crash):
        write_atomically(target, half)
    assert target.read_text() == "old"
    write_atomically(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_named_and_not_kept_full(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        write_atomically(tmp_path / "x.json", full)
    assert error.value.filename == str(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_of_a_checkpoint_for_which_there_is_no_room_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one before it stays."""
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {}, {}, keep=1)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="round_00002"):
        save_checkpoint(tmp_path, 2, {"a": torch.ones(2)}, {}, {}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round_00001"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_others_can_open_our_tensors(tmp_path: Path) -> None:
    """safetensors 0.8 writes for the owner only, and transformers asks for `format`."""
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {}, {}, keep=1)
    for file in checkpoint_path(tmp_path, 1).glob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o640
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_tensors_of_any_kind_are_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).T,
        "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "long": torch.tensor([-(2**40)]),
    }
    first, second = tmp_path / "first", tmp_path / "second"
    write_tensors(first, tensors, {"é": "ü", "state": "{}"})
    write_tensors(second, dict(reversed(tensors.items())), {"é": "ü", "state": "{}"})
    assert first.read_bytes() == second.read_bytes()
    read = load_file(first)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
