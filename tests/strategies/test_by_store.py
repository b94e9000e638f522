"""Runs whose bundles travel through an object store have the numbers of those through Flower's messages."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_flwr.checkpoint import checkpoint_path, compose_run, list_checkpoints, read_checkpoint
from fomoe_flwr.compose import Composed, compose
from fomoe_flwr.errors import ConfigError, FomoeError, RunError, StoreError
from fomoe_flwr.site import work as site_room
from fomoe_flwr.store import at_server
from fomoe_flwr.store.at_server import StoredMessages
from fomoe_flwr.store.links import Patience
from fomoe_flwr.store.messages import StoredObject, StoredReply, StoredShard
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import send
from strategies import fomoe as strategy_room
from tests.conftest import SMALL_TRAIN, Compose
from tests.faults.injector import Faults
from tests.faults.server_death import run_until_killed
from tests.faults.test_replies import ROUNDS, SETTINGS, assert_same_model, without
from tests.store.helpers import QUICK, content_of, in_one_line
from tests.store.servers import Line
from tests.strategies.helpers import composed_anew, copy_of, finished, metrics, run, without_times

NO_EVALUATION = "train.eval_batches=0"
BF16, FEW_BITS = ("strategy.up=bf16", "strategy.down=bf16"), ("strategy.up=topk", "strategy.down=int4")
EACH = pytest.mark.parametrize(
    ("url", "codecs"), [("folder", FEW_BITS), ("bucket", BF16)], indirect=["url"], ids=["folder", "bucket"]
)
LINK_BYTES = 1000  # of a link and what is said about its object


@pytest.fixture
def line(s3: tuple[str, Line]) -> Iterator[Line]:
    yield s3[1]
    s3[1].faults.clear()
    s3[1].spoil(0, 0)


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return (tmp_path / "a store").as_uri()
    return str(request.getfixturevalue("s3")[0])


@pytest.fixture
def bucket_url(s3: tuple[str, Line], line: Line) -> str:
    return s3[0]


def by_store(small: Compose, tmp_path: Path, url: str, *overrides: str) -> Composed:
    return composed_anew(small, tmp_path, *SETTINGS, NO_EVALUATION, *overrides, f"store={url!r}")


def by_flower(small: Compose, tmp_path: Path, *overrides: str) -> Path:
    return finished(small, tmp_path, *SETTINGS, NO_EVALUATION, *overrides)


def lacking(small: Compose, tmp_path: Path, lost: Sequence[tuple[str, int]], *overrides: str) -> Path:
    """A run by Flower in which exactly these replies are missing."""
    return without(small, tmp_path, lost, (NO_EVALUATION, *overrides))


def store_of(url: str, run_dir: Path) -> Store:
    manifest = read_checkpoint(list_checkpoints(run_dir)[-1]).manifest
    return Store(url, manifest["run"], QUICK)


def of_tensors(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without what a message says besides tensors: there are links in it."""
    kept = {key: value for key, value in line.items() if key != "bytes_down"}
    kept["bytes_by_class"] = {key: value for key, value in kept["bytes_by_class"].items() if key != "other"}
    kept["sites"] = [{k: v for k, v in site.items() if k != "bytes_down"} for site in kept["sites"]]
    return kept


def assert_same_but_for_links(ours: Path, theirs: Path, objects: int) -> None:
    """The same lines of metrics; a message is longer by its links alone.

    Args:
        objects: that a site reads and writes in a round, at most.
    """
    lines, others = without_times(metrics(ours)), without_times(metrics(theirs))
    assert [of_tensors(line) for line in lines] == [of_tensors(line) for line in others]
    for line, other in zip(lines[1:], others[1:], strict=True):
        assert line["bytes_up"] == other["bytes_up"]
        assert line["bytes_by_class"]["dense"] == other["bytes_by_class"]["dense"] > 0
        more = {
            mine["site"]: mine["bytes_down"] - yours["bytes_down"]
            for mine, yours in zip(line["sites"], other["sites"], strict=True)
        }
        assert all(0 < nbytes < objects * LINK_BYTES for nbytes in more.values()), more
        # Sites whose reply is lost were sent something, too.
        assert sum(more.values()) <= line["bytes_down"] - other["bytes_down"]


def lost_in(run_dir: Path, sites: int = 4) -> list[tuple[str, int]]:
    """Site and round of each reply that is not in the model."""
    return [
        (f"site-{site}", line["round"])
        for line in metrics(run_dir)[1:]
        for site in range(sites)
        if not line["committed"] or f"site-{site}" not in {entry["site"] for entry in line["sites"]}
    ]


def states(run_dir: Path) -> dict[Path, bytes]:
    """What the sites keep."""
    return {path.relative_to(run_dir): path.read_bytes() for path in run_dir.glob("sites/*/*.safetensors")}


def assert_nothing_left(url: str, run_dir: Path) -> None:
    assert store_of(url, run_dir).names() == {}
    assert not list(run_dir.glob("sites/*/incoming*"))
    assert not (run_dir / "inbox").exists()


@EACH
def test_a_run_has_the_same_bits(small: Compose, tmp_path: Path, url: str, codecs: tuple[str, ...]) -> None:
    flower = by_flower(small, tmp_path, *codecs)
    done = run(by_store(small, tmp_path, url, *codecs))
    assert_same_but_for_links(done, flower, objects=10)
    for round_ in range(1, ROUNDS + 1):
        ours, theirs = (read_checkpoint(checkpoint_path(folder, round_)) for folder in (done, flower))
        for kind in ("parameters", "outer", "public"):
            mine, yours = getattr(ours, kind), getattr(theirs, kind)
            assert mine.keys() == yours.keys()
            assert all(torch.equal(value, yours[name]) for name, value in mine.items())
    assert states(done) == states(flower) != {}
    assert_nothing_left(url, done)


@pytest.mark.parametrize("url", ["folder"], indirect=True)
def test_sites_that_evaluate_say_the_same(small: Compose, tmp_path: Path, url: str) -> None:
    overrides = ("strategy.fraction_evaluate=1.0", "train.rounds=2", *FEW_BITS)
    done = run(by_store(small, tmp_path, url, *overrides))
    flower = by_flower(small, tmp_path, *overrides)
    assert_same_but_for_links(done, flower, objects=20)
    assert "val_loss" in metrics(done)[2]["sites"][0]
    assert_nothing_left(url, done)


@pytest.mark.parametrize("url", ["bucket"], indirect=True)
def test_what_sites_say_before_round_1_comes_by_the_store_too(
    tmp_path: Path, url: str, corpus_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for their residents, with the time of a round."""
    transformers = pytest.importorskip("transformers")
    from tests.model.stock_models import stock

    monkeypatch.setattr(at_server, "LEAST_S", 0.0)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**stock("olmoe").hf)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "open")
    overrides = [
        "model=hf", f"model.path={tmp_path / 'open'}", *SMALL_TRAIN, "data=text", f"data.path={corpus_dir}",
        f"data.cache_dir={cache_dir}", "data.tokenizer=bytes", "wandb.mode=disabled", "runtime=local",
        "federation.num_sites=2", "strategy.overlap=1", "strategy.placement=affine", "train.rounds=1",
        "model.standins=8",
    ]  # fmt: skip
    flower, done = (
        run(compose([*overrides, f"store={store!r}", f"hydra.run.dir={tmp_path / name}"]))
        for store, name in (("flower", "run-flower"), (url, "run-stored"))
    )
    start = metrics(done)[0]
    assert start["failures"] == {}
    assert start["bytes_by_class"]["expert"] > 0
    assert_same_but_for_links(done, flower, objects=10)
    assert_same_model(done, flower, 1)
    assert_nothing_left(url, done)


# ----- replies that are lost


def spoil_replies(monkeypatch: pytest.MonkeyPatch, url: str, places: Mapping[tuple[int, int], str]) -> None:
    """Something happens to what sites have written.

    Args:
        places: what, by site and round.
    """
    real = site_room.send_reply

    def send_and_spoil(
        blobs: dict[str, bytes], shard: StoredShard, folder: Path, shared: Path | None, *rest: Any
    ) -> StoredReply:
        reply = real(blobs, shard, folder, shared, *rest)
        (link,) = shard.replies
        found = re.search(r"([^/:]+)/(replies/(\d+)/(\d+)-[0-9a-f]+)", link)
        assert found is not None
        what = places.get((int(found[4]), int(found[3])), "")
        (item,) = reply.objects
        store = Store(url, found[1], QUICK)
        if what == "missing":
            if shared is None:
                store.delete([found[2]])
            else:
                (shared / link.removeprefix("file:")).unlink()
        elif what in ("altered", "longer"):
            content = bytearray(content_of(store, found[2], item.sha256, item.nbytes))
            content[len(content) // 2] ^= 1
            send(link, content + bytes(what == "longer"), shared, QUICK)
        elif what == "says another size":
            key, size = list(item.sizes.items())[-1]
            return StoredReply([StoredObject(item.sha256, {**item.sizes, key: size - 1})])
        elif what == "says a huge size":
            return StoredReply([StoredObject(item.sha256, {**item.sizes, "more": 2**60})])
        elif what == "says little bundles":
            return StoredReply([StoredObject(item.sha256, {str(number): 1 for number in range(2000)})])
        return reply

    monkeypatch.setattr(site_room, "send_reply", send_and_spoil)


SPOILT = {
    "missing": ("there is no such object", None),
    "altered": ("twice other bytes than announced", None),
    "longer": ("were announced", None),
    "says another size": ("were announced", None),
    "says a huge size": ("are expected", "damaged"),
    "says little bundles": ("are expected", "damaged"),
}


@pytest.mark.parametrize("url", ["folder"], indirect=True)
def test_sites_that_begin_before_their_message_have_the_same_bits(
    small: Compose, tmp_path: Path, url: str
) -> None:
    overrides = ("strategy.delay=1", *BF16)
    done = run(by_store(small, tmp_path, url, *overrides))
    flower = by_flower(small, tmp_path, *overrides)
    assert_same_but_for_links(done, flower, objects=10)
    assert_same_model(done, flower)
    assert states(done) == states(flower)


@EACH
def test_a_reply_whose_object_cannot_be_had_is_lost_and_nothing_else(
    small: Compose, tmp_path: Path, url: str, codecs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in each round."""
    places = {(1 + number % 2, 1 + number // 2): what for number, what in enumerate(SPOILT)}
    spoil_replies(monkeypatch, url, places)
    done = run(by_store(small, tmp_path, url, *codecs))
    for line in metrics(done)[1:]:
        spoilt = {f"site-{site}": what for (site, round_), what in places.items() if round_ == line["round"]}
        assert line["failures"].keys() == spoilt.keys()
        for site, what in spoilt.items():
            words, kind = SPOILT[what]
            assert words in line["failures"][site]
            assert line["refused"].get(site) == kind
        assert line["committed"]
    lost = [(f"site-{site}", round_) for site, round_ in places]
    assert lost_in(done) == sorted(lost, key=lambda place: place[::-1])
    assert_same_model(done, lacking(small, tmp_path, lost, *codecs))
    assert_nothing_left(url, done)


# ----- a bad line, and a store that is down


def hurry(monkeypatch: pytest.MonkeyPatch, server_s: float, site_s: float) -> None:
    """Less patience, at the server and at its sites."""
    patience = Patience(seconds=server_s, stall=0.15, first_wait=0.01)
    monkeypatch.setattr(strategy_room, "Store", functools.partial(Store, patience=patience))

    def site_patience(seconds: float, seed: int) -> Patience:
        return Patience(min(seconds, site_s), stall=0.15, first_wait=0.01, seed=seed)

    monkeypatch.setattr(site_room, "Patience", site_patience)
    monkeypatch.setattr(at_server, "START_S", 5.0)
    monkeypatch.setattr(at_server, "SWEEP_S", 0.5)
    monkeypatch.setattr(at_server, "LEAST_S", 0.0)


def persevere(composed: Composed) -> tuple[Path, list[FomoeError]]:
    """A run that is resumed until it is done; and what ended it before."""
    run_dir, errors = composed.run_dir, list[FomoeError]()
    while True:
        try:
            return run(composed), errors
        except (StoreError, RunError) as error:
            in_one_line(error)
            errors.append(error)
            assert len(errors) < 30, errors
        if list_checkpoints(run_dir):
            composed = compose_run([f"resume={run_dir}"])


@pytest.mark.parametrize("seed", range(2))
def test_on_a_bad_line_a_run_ends_with_the_numbers_of_one_without_the_lost_replies(
    small: Compose, tmp_path: Path, bucket_url: str, line: Line, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation is cut, hangs or gets other bytes, at random. Some replies are lost; where the server itself
    cannot go on, it says so in one line and is resumed.
    """
    codecs = FEW_BITS if seed else BF16
    more = ("strategy.max_discarded=9", "strategy.timeout_s=60")
    hurry(monkeypatch, server_s=10, site_s=0.4)
    line.spoil(seed, 0.4)
    before = line.spoilt
    done, errors = persevere(by_store(small, tmp_path, bucket_url, *codecs, *more))
    assert line.spoilt - before > 5
    line.spoil(0, 0)
    lost = lost_in(done)
    for error in errors:
        in_one_line(error)
    for entry in metrics(done)[1:]:
        for reason in entry["failures"].values():
            in_one_line(RuntimeError(reason))
    assert_same_model(done, lacking(small, tmp_path, lost, *codecs, *more))
    # What the last sweep could not delete is little, and of this run alone.
    store_of(bucket_url, done).sweep(())


def test_a_store_that_is_down_at_the_start_is_one_line(
    small: Compose, tmp_path: Path, bucket_url: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, server_s=0.5, site_s=0.5)
    composed = by_store(small, tmp_path, bucket_url)
    line.go_down()
    with pytest.raises(StoreError) as caught:
        run(composed)
    in_one_line(caught.value, bucket_url, "given up after", "the store does not answer")
    line.faults.clear()
    assert_same_run_by_store(run(composed), by_flower(small, tmp_path))


def assert_same_run_by_store(ours: Path, theirs: Path) -> None:
    assert_same_but_for_links(ours, theirs, objects=10)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_goes_down_ends_the_run_in_one_line_and_it_is_resumed(
    small: Compose, tmp_path: Path, bucket_url: str, line: Line, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the messages of round 2 are made: then nothing is lost. Or after that: then the round is, and the next
    one ends the run.
    """
    hurry(monkeypatch, server_s=0.5, site_s=0.5)
    real = StoredMessages.put

    def put(
        self: StoredMessages, bundles: Any, longest: Any, round_: int, seconds: float, afresh: bool
    ) -> Any:
        if (when, round_) == ("before", 2):
            line.go_down()
        shards = real(self, bundles, longest, round_, seconds, afresh)
        if (when, round_) == ("after", 2):
            line.go_down()
        return shards

    composed = by_store(small, tmp_path, bucket_url)
    with monkeypatch.context() as patch:
        patch.setattr(StoredMessages, "put", put)
        with pytest.raises(StoreError) as caught:
            run(composed)
    in_one_line(caught.value, "/some/where/", "given up after")
    lost = lost_in(composed.run_dir)
    assert lost == ([] if when == "before" else [(f"site-{site}", 2) for site in range(4)])
    line.faults.clear()
    done = run(compose_run([f"resume={composed.run_dir}"]))
    assert lost_in(done) == lost
    assert_same_model(done, lacking(small, tmp_path, lost))
    assert_nothing_left(bucket_url, done)


def test_objects_that_are_damaged_in_the_store_cost_one_round(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the size that they should have; after the round that came to nothing all are written afresh."""
    real, folder = StoredMessages.put, tmp_path / "a store"

    def put(self: StoredMessages, *given: Any, afresh: bool) -> Any:
        shards = real(self, *given, afresh=afresh)
        if given[2] == 2:
            for path in folder.rglob("*"):
                if path.is_file():
                    path.write_bytes(bytes(path.stat().st_size))
        return shards

    monkeypatch.setattr(StoredMessages, "put", put)
    done = run(by_store(small, tmp_path, folder.as_uri()))
    assert [line["committed"] for line in metrics(done)[1:]] == [True, False, True]
    monkeypatch.undo()
    assert_same_model(done, lacking(small, tmp_path, [(f"site-{site}", 2) for site in range(4)]))


# ----- resuming


@pytest.mark.parametrize(("url", "codecs"), [("folder", FEW_BITS)], indirect=["url"])
def test_a_run_may_go_from_messages_to_a_store_and_back(
    small: Compose, tmp_path: Path, url: str, codecs: tuple[str, ...]
) -> None:
    whole = by_flower(small, tmp_path, *codecs)
    done = copy_of(by_flower(small, tmp_path, *codecs, "train.rounds=1"))
    done = run(compose_run([f"resume={done}", "train.rounds=2", f"store={url!r}"]))
    assert store_of(url, done).names() == {}
    done = run(compose_run([f"resume={done}", "train.rounds=3", "store=flower"]))
    assert_same_model(done, whole)


@pytest.mark.parametrize(
    ("url", "phase"),
    [
        ("folder", "first reply"),
        ("folder", "after commit"),
        ("bucket", "last reply"),
    ],
    indirect=["url"],
)
def test_a_server_that_was_killed_resumes_to_the_same_numbers(
    small: Compose, tmp_path: Path, url: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it left in the store is no trouble, and goes."""
    composed = by_store(small, tmp_path, url, "strategy.placement=random")
    with monkeypatch.context() as patch:
        patch.setattr(StoredMessages, "__exit__", lambda *_: None)
        run_until_killed(composed, Faults(), phase, 2)
    assert store_of(url, composed.run_dir).names() != {}
    resumed = run(compose_run([f"resume={composed.run_dir}"]))
    whole = by_flower(small, tmp_path, "strategy.placement=random")
    assert_same_run_by_store(resumed, whole)
    assert states(resumed) == states(whole)
    assert_nothing_left(url, resumed)


# ----- secrets


class Everything(logging.Handler):
    """Every record of every logger but those of the S3 server, which runs in this process too."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(("uvicorn", "nanio", "asyncio")):
            self.lines.append(self.format(record))


SIGNED = re.compile(r"Signature(=|%3D)|X-Amz-|AWSAccessKeyId|fomoe-test-secret")


def test_no_link_is_in_any_log_or_file_of_a_run(
    small: Compose,
    tmp_path: Path,
    bucket_url: str,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of one over a bad line, in which many things fail, with all that Flower and its helpers say."""
    everything = Everything()
    names = ("", "fomoe", "fomoe.site", "flwr", "urllib3", "asyncio")
    for logger in map(logging.getLogger, names):
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, everything])
    hurry(monkeypatch, server_s=10, site_s=0.4)
    spoil_replies(monkeypatch, bucket_url, {(1, 1): "missing", (2, 1): "altered", (1, 2): "says a huge size"})
    links: list[str] = []
    real: Callable[..., str] = StoredShard.to_json
    monkeypatch.setattr(StoredShard, "to_json", lambda self: links.append(real(self)) or links[-1])
    line.spoil(7, 0.3)
    done, errors = persevere(by_store(small, tmp_path, bucket_url, "strategy.max_discarded=9"))
    assert all(SIGNED.search(text) for text in links)
    assert len(links) >= 4 * ROUNDS
    said = [*everything.lines, *map(repr, errors), *capfd.readouterr()]
    for path in done.rglob("*"):
        if path.is_file():
            said.append(path.read_bytes().decode("latin1"))
    assert any("StoreError" in text and "/some/where/" in text for text in everything.lines)
    assert any('"failures":{"site' in text.replace(" ", "") for text in said)
    assert [SIGNED.search(text) for text in said if SIGNED.search(text)] == []


def test_a_store_that_cannot_be_is_said_before_anything_starts(small: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store=ftp:…: needs flower, file:///…") as caught:
        small("store='ftp://user:secret@host/x'")
    assert "secret" not in str(caught.value)
