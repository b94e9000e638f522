"""A file is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.files import write_atomically


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
