"""Tensors in mapped files: what was touched is given back, room is taken beforehand, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fomoe_flwr import mapped
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.mapped import fill, in_pieces, map_file, mapped_tensors, release

MIB = 2**20


def resident(folder: Path) -> int:
    """Bytes of the process's memory that lie in files of this folder, removed ones too."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf" {re.escape(str(folder))}/.*?\nSize:.*?\nRss: +(\d+) kB", maps, re.DOTALL)
    return 1024 * sum(map(int, found))


def test_they_are_zeros_of_their_shapes_and_keep_what_is_written(tmp_path: Path) -> None:
    tensors = mapped_tensors(tmp_path, {"a": (3, 5), "b": (), "c": (7,)})
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "a": ((3, 5), torch.float32), "b": ((), torch.float32), "c": ((7,), torch.float32),
    }  # fmt: skip
    assert not any(tensor.any() for tensor in tensors.values())
    for number, tensor in enumerate(tensors.values(), start=1):
        tensor.fill_(number)
    release()
    assert [tensor.unique().tolist() for tensor in tensors.values()] == [[1.0], [2.0], [3.0]]


def test_no_file_has_a_name_and_its_room_comes_back(tmp_path: Path) -> None:
    """So a server that was killed leaves nothing half done that could be taken for its state."""
    tensors = mapped_tensors(tmp_path, {"a": (MIB,)})
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps")
    assert f"{tmp_path}/" in maps.read_text()
    del tensors
    gc.collect()
    assert f"{tmp_path}/" not in maps.read_text()


def test_memory_is_a_piece_and_a_tensor_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "PIECE_BYTES", 2 * MIB)
    tensors = mapped_tensors(tmp_path, {str(number): (MIB // 4,) for number in range(24)})
    most = 0

    def drawn():
        nonlocal most
        for name in tensors:
            most = max(most, resident(tmp_path))
            yield name, torch.ones(MIB // 4)

    assert fill(tensors, drawn()) == tensors.keys()
    assert MIB <= most <= 3 * MIB
    assert resident(tmp_path) == 0
    (tmp_path / "file").write_bytes(bytes(8 * MIB))
    mapping, most = map_file(tmp_path / "file"), 0
    for start in in_pieces(range(0, 8 * MIB, MIB), lambda _: MIB):
        assert not any(mapping[start : start + MIB])
        most = max(most, resident(tmp_path))
    # The system maps what is in its cache around a page, too.
    assert MIB <= most <= 4 * MIB
    assert resident(tmp_path) == 0


def test_a_full_disk_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mapped.shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
        with pytest.raises(
            ConfigError, match=r"^checkpoint\.state=files: .* need 4\.19 MB in .* 4\.00 MB are"
        ):
            mapped_tensors(tmp_path, {"a": (MIB,)})
    with monkeypatch.context() as patch:
        # A quota, which the system does not say beforehand.
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(122, "Quota exceeded")))
        with pytest.raises(OSError, match=re.escape(f"Quota exceeded: '{tmp_path}'")):
            mapped_tensors(tmp_path, {"a": (MIB,)})
    with monkeypatch.context() as patch:
        patch.delattr(os, "posix_fallocate")
        with pytest.raises(ConfigError, match="use memory"):
            mapped_tensors(tmp_path, {"a": (MIB,)})


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = mapped_tensors(tmp_path, {"a": (2, 3)})
    with pytest.raises(ValueError, match=r"a: shape \[3\], expected \[2, 3\]"):
        fill(tensors, [("a", torch.zeros(3))])
    with pytest.raises(KeyError, match="b"):
        fill(tensors, [("b", torch.zeros(3))])
