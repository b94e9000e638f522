"""A site whose bundles are in an object store: which folder it goes by, and a worker that is killed while they come."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from clients.relay import hand_over
from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.codecs import down_codec
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import StoreError
from fomoe_flwr.messages import Reply, Task
from fomoe_flwr.site.identity import NodeSettings
from fomoe_flwr.site.memory import Memory
from fomoe_flwr.site.work import TRANSFER, answer, perform
from fomoe_flwr.store.at_server import StoredMessages
from fomoe_flwr.store.messages import StoredReply, StoredShard
from fomoe_flwr.store.objects import Store
from tests.clients.helpers import SITE, bundles_of, shard_of, site_task, state_files, task_of
from tests.conftest import Compose
from tests.store.helpers import in_one_line, sha256
from tests.store.servers import s3_store

MOST = 10**8


def sent_by(store: Store, config: RunConfig, task: Task) -> tuple[StoredMessages, str]:
    """The site's shard in the store, and what its message says of it."""
    sent = StoredMessages(store)
    shards = sent.put({SITE: bundles_of(config, task)}, {SITE: MOST}, task.round, 300)
    return sent, shards[SITE].to_json()


def settings_of(state: Path, **values: object) -> NodeSettings:
    return replace(NodeSettings("site-1", None, None, str(state), None, None), **values)


def train(task: Task, stored: str, settings: NodeSettings) -> tuple[list[str], StoredReply]:
    """The phases of the work, and what the site says that it has written."""
    phases: list[str] = []
    found = answer("train", task.to_json(), stored, {}, settings, Memory(), phases.append, 300)
    assert found.blobs == {}
    return phases, StoredReply.from_json(found.stored, MOST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "the server's"


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(folder.as_uri(), "run")


def test_a_simulated_site_goes_by_the_servers_folder(small: Compose, tmp_path: Path, store: Store) -> None:
    config = small().config
    task = task_of(config, run_dir=str(tmp_path / "run"))
    sent, stored = sent_by(store, config, task)
    phases, reply = train(task, stored, NodeSettings(None, SITE, None, None, None, None))
    assert (phases[0], phases[-1]) == (TRANSFER, TRANSFER)
    blobs = sent.fetch(SITE, reply, tmp_path / "inbox", 60)
    assert list(blobs) == ["dense", "expert"]
    assert sorted(path.name for path in (tmp_path / "run/sites/site-1").iterdir()) == [
        "round_00001.safetensors"
    ]


def test_a_real_site_goes_by_its_operators_folder_and_no_other(
    small: Compose, tmp_path: Path, folder: Path, store: Store
) -> None:
    config = small().config
    task = site_task(config, 1)
    sent, stored = sent_by(store, config, task)
    assert StoredShard.from_json(stored).folder == str(folder)
    state = tmp_path / "state"
    for told, words in (
        (None, "this site was told of none; give fomoe site --store-dir"),
        (tmp_path / "elsewhere", "there is no such object"),
    ):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(StoreError) as caught:
            train(task, stored, settings_of(state, store_dir=None if told is None else str(told)))
        in_one_line(caught.value, words)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert not state_files(state)
    # A shared disk has another name here.
    (tmp_path / "mounted").symlink_to(folder)
    _, reply = train(task, stored, settings_of(state, store_dir=str(tmp_path / "mounted")))
    assert sent.fetch(SITE, reply, tmp_path / "inbox", 60).keys() == {"dense", "expert"}
    assert len(state_files(state)) == 1


def test_a_server_cannot_have_a_real_site_read_or_write_elsewhere(
    small: Compose, tmp_path: Path, folder: Path, store: Store
) -> None:
    config = small().config
    task = site_task(config, 1)
    _, stored = sent_by(store, config, task)
    (tmp_path / "secret").write_bytes(b"secret")
    told = settings_of(tmp_path / "state", store_dir=str(folder))
    shard = json.loads(stored)
    for link in ("file:../secret", f"file:{tmp_path}/secret", "file:run/../../secret"):
        reading = {**shard, "folder": str(tmp_path), "bundles": {}, "replies": [link]}
        for key, bundle in shard["bundles"].items():
            reading["bundles"][key] = {**bundle, "link": link}
        with pytest.raises(StoreError, match="outside of"):
            train(task, json.dumps(reading), told)
        with pytest.raises(StoreError, match="outside of"):
            train(task, json.dumps({**shard, "replies": [link]}), told)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_the_time_of_a_message_is_for_all_of_it(small: Compose, tmp_path: Path, store: Store) -> None:
    """A site whose time is over still has a second: a reply that comes late may be refused in peace."""
    config = small().config
    task = site_task(config, 1)
    _, stored = sent_by(store, config, task)
    told = settings_of(tmp_path / "state", store_dir=str(store.shared))
    found = answer("evaluate", task.to_json(), stored, {}, told, Memory(), lambda _: None, -5.0)
    assert found.stored == ""
    assert Reply.from_json(found.header).site == "site-1"


# ----- a worker that is killed


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For sockets, whose path must be short; at the end no worker is left."""
    folder = Path(tempfile.mkdtemp(prefix="fomoe-test-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    for process in workers(folder):
        process.kill()
        process.wait(30)
    shutil.rmtree(folder)


def workers(place: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(str(place)) for word in process.info["cmdline"] or [])
    ]


def test_a_worker_that_is_killed_while_bundles_come_costs_only_what_was_under_way(
    small: Compose, tmp_path: Path, place: Path
) -> None:
    """The message goes to a second worker, and the bundles that had come do not travel again."""
    pytest.importorskip("obstore")
    pytest.importorskip("nanio")
    config = small("model.d_model=256", "model.d_expert=128").config
    task = site_task(config, 1)
    parts, _ = down_codec(config.strategy).encode(shard_of(config, task), {})
    bundles = {name: wire.encode({name: part}) for name, part in parts.items()}
    unique = {sha256(blob): len(blob) for blob in bundles.values()}
    names, total, there = list(unique), sum(unique.values()), len(unique) // 2
    with s3_store(tmp_path / "s3") as (url, line):
        store = Store(url, "run")
        sent = StoredMessages(store)
        stored = sent.put({SITE: bundles}, {SITE: MOST}, 1, 300)[SITE].to_json()
        line.downloaded = 0
        # A connection for each bundle: these come, and the next one hangs.
        line.faults[:] = [("none", 0)] * there + [("hang", 0)] * 1000
        settings = settings_of(tmp_path / "state")
        folder = tmp_path / "state/run/site-1"
        killed: list[int] = []
        first: list[int] = []

        def kill() -> None:
            deadline = time.monotonic() + 120
            while not all(list(folder.glob(f"incoming*/{name}")) for name in names[:there]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)
            first.append(line.downloaded)
            killed.extend(process.pid for process in workers(place))
            line.faults.clear()
            os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        found = hand_over("train", task.to_json(), stored, [], settings, 300.0)
        thread.join()
        assert len(killed) == 1
        assert killed != [process.pid for process in workers(place)]
        assert sum(list(unique.values())[:there]) <= first[0] < total
        headers = 1000 * len(unique)
        assert total <= line.downloaded < total + headers
        reply = sent.announced(SITE, found.stored)
        blobs = sent.fetch(SITE, reply, tmp_path / "inbox", 60)
        assert bundle_digests(blobs) == Reply.from_json(found.header).bundle_digests
        assert [path.name for path in folder.iterdir()] == ["round_00001.safetensors"]
        # Without Flower, a worker and a store in between.
        alone = settings_of(tmp_path / "alone", partition=SITE)
        expected, _ = perform("train", task.to_json(), bundles, alone, Memory(), lambda _: None)
        assert bundle_digests(blobs) == bundle_digests(expected)


def test_a_worker_that_begins_the_next_round_by_a_store(
    small: Compose, tmp_path: Path, place: Path, store: Store
) -> None:
    """A thread of its own fetches, another one sends, and the site works ahead; the numbers are those without."""
    config = small("strategy.delay=1", "train.rounds=4").config
    settings = settings_of(tmp_path / "state", store_dir=str(store.shared))
    alone = settings_of(tmp_path / "alone", partition=SITE)
    for round_ in (1, 2, 3):
        task = site_task(config, round_)
        sent, stored = sent_by(store, config, task)
        found = hand_over("train", task.to_json(), stored, [], settings, 300.0)
        blobs = sent.fetch(SITE, sent.announced(SITE, found.stored), tmp_path / "inbox", 60)
        expected, _ = perform(
            "train", task.to_json(), bundles_of(config, task), alone, Memory(), lambda _: None
        )
        assert bundle_digests(blobs) == bundle_digests(expected)
        assert list((tmp_path / "state/run/site-1").glob("incoming*")) == []
    assert len(workers(place)) == 1
    assert "begun" not in (tmp_path / "state/site-1.worker.log").read_text()
