"""Stores of a test: a folder, and a real S3 server behind a line that may be spoiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_flwr.store import links, transfer
from fomoe_flwr.store.objects import Store
from tests.store.helpers import BLOCK, PIECE, QUICK
from tests.store.servers import Line

_runs = itertools.count()


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, s3: tuple[str, Line]) -> Iterator[Line]:
    """A good line, over which objects travel in small pieces."""
    monkeypatch.setattr(transfer, "PIECE", PIECE)
    monkeypatch.setattr(links, "BLOCK", BLOCK)
    yield s3[1]
    s3[1].faults.clear()
    s3[1].spoil(0, 0)


@pytest.fixture
def bucket(s3: tuple[str, Line], line: Line) -> Store:
    return Store(s3[0], f"run-{next(_runs)}", QUICK)


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: tuple[str, Line], line: Line) -> Store:
    url = s3[0] if request.param == "bucket" else (tmp_path / "a store").as_uri()
    return Store(url, f"run-{next(_runs)}", QUICK)
