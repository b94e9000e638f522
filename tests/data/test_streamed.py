"""A data set of Hugging Face as a stream: all of it once, in order, and from anywhere on with the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data import StreamedText, corpus, prepare
from fomoe_flwr.errors import DataError
from tests.data.helpers import lines_of

SEQ_LEN = 16


@pytest.fixture
def config(tmp_path: Path, write_jsonl: Callable[..., Path]) -> DataConfig:
    """Three files of 40 documents each, some without text."""
    for file in range(3):
        rows = [{"text": "" if row % 9 == 8 else f"{file}:{row} " * (row % 7 + 1)} for row in range(40)]
        write_jsonl(tmp_path / "source" / f"{file}.jsonl", rows)
    return DataConfig(
        source="huggingface",
        name=str(tmp_path / "source"),
        stream=True,
        val_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def opened(config: DataConfig, place: int = 0, sites: int = 1) -> StreamedText:
    return StreamedText(prepare(config), config, place, sites, SEQ_LEN)


def text_of(tokens_BT: torch.Tensor) -> list[str]:
    """The documents in consecutive sequences; the last is cut off."""
    tokens = [*tokens_BT[:, :-1].flatten().tolist(), int(tokens_BT[-1, -1])]
    return "".join("\n" if token == 256 else chr(token) for token in tokens).split("\n")


@pytest.mark.parametrize("sites", [1, 2, 3])
def test_sites_and_validation_have_each_document_once(config: DataConfig, sites: int) -> None:
    """By files where these can be shared out, else by rows."""
    everything = [f"{file}:{row} " * (row % 7 + 1) for file in range(3) for row in range(40) if row % 9 != 8]
    validation = prepare(config)
    kept = bytes(
        token if token < 256 else 10 for token in validation.read(0, int(validation.doc_starts[-1])).tolist()
    ).decode()
    found = kept.split("\n")[:-1]
    assert 10 <= len(found) <= 40
    assert validation.is_val.all()
    for place in range(sites):
        stream = opened(config, place, sites)
        # One pass, and the beginning of the next.
        batches, position = [], 0
        while stream.passes(position) < 1:
            batches.append(stream.batch(position, 1))
            position += 1
        documents = text_of(torch.cat(batches))
        first = documents[0]
        end = documents.index(first, 1) if first in documents[1:] else len(documents) - 1
        found += documents[:end]
    assert sorted(found) == sorted(everything)


@pytest.mark.parametrize("sites", [1, 2, 3])
def test_from_anywhere_on_it_gives_the_same_tokens(config: DataConfig, sites: int) -> None:
    whole = opened(config, sites - 1, sites)
    states, parts = [], []
    # Three passes and more.
    for position in range(0, 600, 4):
        states.append(json.loads(json.dumps(whole.state())))
        parts.append(whole.batch(position, 4))
    assert whole.passes(600) >= 2
    for index in (0, *range(1, 149, 7), 149):
        other = opened(config, sites - 1, sites)
        other.restore(states[index])
        torch.testing.assert_close(other.batch(4 * index, 4), parts[index])
        # Once more, from the state of one that was restored itself.
        again = opened(config, sites - 1, sites)
        again.restore(json.loads(json.dumps(other.state())))
        if index < 149:
            torch.testing.assert_close(again.batch(4 * index + 4, 4), parts[index + 1])
        # Back again, and without a state.
        torch.testing.assert_close(other.batch(8, 4), parts[2])


def test_a_state_saves_reading_what_is_before_it(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(config)
    whole.batch(0, 200)
    state, expected = whole.state(), whole.batch(200, 4)
    other = opened(config)
    tokenised: list[int] = []
    encode = other._tokenizer.encode_batch
    other._tokenizer = replace(
        other._tokenizer, encode_batch=lambda texts: tokenised.append(len(texts)) or encode(texts)
    )
    other.restore(state)
    torch.testing.assert_close(other.batch(200, 4), expected)
    assert len(tokenised) < 15


READER = """
import json, sys
from fomoe_flwr.config import DataConfig, from_dict
from fomoe_flwr.data import StreamedText, prepare
config = from_dict(DataConfig, json.loads(sys.argv[1]))
state = json.loads(sys.argv[2])
stream = StreamedText(prepare(config), config, 1, 2, 16)
stream.restore(state)
for position in range(state.get("position", 0), 240, 4):
    print(json.dumps([stream.batch(position, 4).tolist(), stream.state()]), flush=True)
"""


def test_a_stream_that_is_killed_goes_on_with_the_same_tokens(config: DataConfig) -> None:
    def read(state: object, kill_after: int | None = None) -> list[list[object]]:
        return lines_of(READER, json.dumps(asdict(config)), json.dumps(state), kill_after=kill_after)

    killed = read({}, 23)
    resumed = read(killed[-1][1])
    assert len(killed + resumed) == 60
    # States may be written in several ways.
    assert [tokens for tokens, _ in killed + resumed] == [tokens for tokens, _ in read({})]


def test_what_a_set_lacks(
    config: DataConfig, tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="text_key=body: not in"):
        prepare(replace(config, text_key="body"))
    write_jsonl(tmp_path / "empty" / "0.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="no document with text"):
        prepare(replace(config, name=str(tmp_path / "empty")))
    with pytest.raises(DataError, match=r"the stream has no text for training for site 1 of 1"):
        StreamedText(prepare(config), replace(config, name=str(tmp_path / "empty")), 0, 1, 16).batch(0, 1)
    # No more of it is taken for validation than that.
    monkeypatch.setattr(corpus, "STREAMED_BYTES", 50)
    some = prepare(replace(config, cache_dir=str(tmp_path / "other")))
    assert 50 <= some.doc_bytes.sum() < 100


def test_what_save_to_disk_wrote_can_be_a_stream(config: DataConfig, tmp_path: Path) -> None:
    import datasets

    texts = [f"{row} " * 9 for row in range(50)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    stream = opened(replace(config, name=None, path=str(tmp_path / "saved")))
    assert text_of(stream.batch(0, 30))[0] in texts
