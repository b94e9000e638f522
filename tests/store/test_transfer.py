"""Transfers over lines that cut, hang and damage, and in processes that are killed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe_flwr.errors import StoreError
from fomoe_flwr.store.links import Patience
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import send
from tests.store.helpers import (
    PIECE,
    QUICK,
    content_of,
    fetched,
    in_one_line,
    sha256,
    some_bytes,
)
from tests.store.servers import Line

_runs = itertools.count(10**6)

pytestmark = pytest.mark.usefixtures("line")


def test_a_full_disk_is_known_before_anything_travels(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.put(some_bytes(PIECE))

    def full(*_: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen: list[int] = []
    with pytest.raises(StoreError) as caught:
        store.get_file(key, key, PIECE, tmp_path / "object", seen.append)
    in_one_line(caught.value, key, "No space left on device")
    assert seen == []
    assert list(tmp_path.glob("object*")) == []


def test_a_cut_transfer_goes_on_where_it_was(bucket: Store, line: Line) -> None:
    content = some_bytes(8 * PIECE)
    key = bucket.put(content)
    # The link first: it asks nobody.
    link = bucket.bundle_link(key, 60)
    line.faults += [("cut", 3000)] * 6
    seen: list[int] = []
    assert fetched(link, key, len(content), None, QUICK, seen.append) == content
    assert line.faults == []
    # No byte came twice.
    assert seen == sorted(set(seen))
    assert seen[-1] == len(content)


def test_a_killed_transfer_goes_on_in_the_next_process(store: Store, tmp_path: Path) -> None:
    content = some_bytes(8 * PIECE + 3)
    key = store.put(content)
    target = tmp_path / "object"

    class Killed(BaseException):
        pass

    def kill(so_far: int) -> None:
        if so_far > 5 * PIECE:
            raise Killed

    with pytest.raises(Killed):
        store.get_file(key, key, len(content), target, kill)
    assert not target.exists()
    seen: list[int] = []
    store.get_file(key, key, len(content), target, seen.append)
    assert target.read_bytes() == content
    # Of what had come, at most the pieces under way were thrown away.
    assert seen[0] >= (5 - QUICK.parallel) * PIECE
    assert seen[0] > PIECE
    assert seen[-1] == len(content)


def test_what_lay_there_is_verified_too(store: Store, tmp_path: Path) -> None:
    content = some_bytes(3 * PIECE)
    key = store.put(content)
    target = tmp_path / "object"
    part = tmp_path / f"object.part-{key[:16]}"
    # As after a power failure: marked as complete, and other bytes.
    for rest in (some_bytes(3 * PIECE, 1) + b"\1\1\1", b"\1" * 7, b""):
        part.write_bytes(rest)
        store.get_file(key, key, len(content), target)
        assert target.read_bytes() == content
        assert not part.exists()
        target.unlink()


def test_two_processes_do_not_write_one_file(store: Store, tmp_path: Path) -> None:
    content = some_bytes(2 * PIECE)
    key = store.put(content)
    refused: list[str] = []

    def again(_: int) -> None:
        if not refused:
            with pytest.raises(StoreError) as caught:
                store.get_file(key, key, len(content), tmp_path / "object")
            refused.append(str(caught.value))

    store.get_file(key, key, len(content), tmp_path / "object", again)
    assert "another process is fetching it" in refused[0]
    assert (tmp_path / "object").read_bytes() == content


@pytest.mark.parametrize("what", Line.KINDS)
@pytest.mark.parametrize("after", [0, 300, 20_000])
def test_one_fault_of_a_line_is_survived(bucket: Store, line: Line, what: str, after: int) -> None:
    content = some_bytes(8 * PIECE)
    name, link = bucket.reply_link(1, "0", 60)
    # A request that was damaged may have become another one, which the link is not good for.
    allowed = (
        contextlib.suppress(StoreError) if what == "damage" and after < 1000 else contextlib.nullcontext()
    )
    for attempt in (
        lambda: send(link, content, None, QUICK),
        lambda: content_of(bucket, name, sha256(content), len(content)),
    ):
        line.faults.append((what, after))
        with allowed:
            attempt()
        attempt()
    assert content_of(bucket, name, sha256(content), len(content)) == content


def test_a_line_that_stays_dead_ends_in_one_line_in_time(
    bucket: Store, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    short = Patience(seconds=0.3, stall=0.1, first_wait=0.01)
    key = bucket.put(b"bundle")
    link, (name, writing) = bucket.bundle_link(key, 60), bucket.reply_link(1, "0", 60)
    logging.getLogger("fomoe").propagate = True
    for what, reason in (("hang", "no byte in 0.1 s"), ("cut", "")):
        for attempt, shown in (
            (lambda: fetched(link, key, 6, None, short), key),
            (lambda: send(writing, b"reply", None, short), name),
            (lambda: Store(bucket._url.rpartition("/")[0], "run", short).names(), "/some/where/run"),
        ):
            line.faults[:] = [(what, 0)] * 1000
            begin = time.monotonic()
            with pytest.raises(StoreError) as caught:
                attempt()
            assert time.monotonic() - begin < short.seconds + short.stall + 0.5
            in_one_line(
                caught.value, shown, "given up after 0.", reason if shown != "/some/where/run" else ""
            )
    # The server of this test runs in this process too, and has a log of its own.
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fomoe")]
    assert any("trying on" in line for line in said)
    assert not any("Signature" in line for line in said)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_on_a_bad_line_all_ends_in_time_with_right_bytes_or_one_error(
    s3: tuple[str, Line], tmp_path: Path, seed: int
) -> None:
    """Also with other bytes than the store's: they are never taken for right ones."""
    rng = random.Random(seed)
    patience = Patience(seconds=0.8, stall=0.1, first_wait=0.01, parallel=4, seed=seed)
    store = Store(s3[0], f"run-{next(_runs)}", patience)
    content = some_bytes(rng.choice([0, 5, 3 * PIECE, 200_000]), seed)
    s3[1].spoil(seed, rng.choice([0.2, 0.5, 0.9]))
    outcomes: list[object] = []

    def attempt(action: Callable[[], object]) -> None:
        begin = time.monotonic()
        try:
            outcomes.append(action())
        except StoreError as error:
            in_one_line(error)
            outcomes.append(None)
        assert time.monotonic() - begin < patience.seconds + patience.stall + 1

    key, target = sha256(content), tmp_path / f"object-{next(_runs)}"
    attempt(lambda: store.put(content))
    attempt(lambda: content_of(store, key, key, len(content)))
    assert outcomes[0] in (key, None)
    assert outcomes[1] in (content, None)
    attempt(lambda: store.get_file(key, key, len(content), target))
    assert not target.exists() or target.read_bytes() == content
    attempt(lambda: store.sweep({key}))
    s3[1].spoil(0, 0)
    # The line is good again, and everything is as it should be; a put that failed is put again.
    store = Store(s3[0], store._url.rpartition("/")[2], QUICK)
    assert store.put(content) == key
    store.get_file(key, key, len(content), target)
    assert target.read_bytes() == content
