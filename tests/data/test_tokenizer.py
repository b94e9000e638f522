"""Tokenizers: bytes, and a tiny byte-level BPE trained here."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data import check_vocabulary, load_tokenizer, prepare
from fomoe_flwr.data.tokenizer import at_hand, keep_tokenizer
from fomoe_flwr.errors import ConfigError, DataError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "", "naïve café 🦀"]


def train_bpe(path: Path, end_token: str = "<|endoftext|>") -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end_token], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.save(str(path))
    return bpe


@given(st.lists(st.text(), max_size=5))
def test_bytes_are_utf8(texts: list[str]) -> None:
    tokenizer = load_tokenizer("bytes")
    encoded = tokenizer.encode_batch(texts)
    assert [bytes(tokens.tolist()).decode() for tokens in encoded] == texts


def test_bytes_has_an_end_token_above_all_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert len(tokenizer.fingerprint) == 64


@pytest.mark.parametrize("end_token", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"])
def test_tokenizer_json_round_trip(tmp_path: Path, end_token: str) -> None:
    bpe = train_bpe(tmp_path / "tokenizer.json", end_token)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.eos_id == bpe.token_to_id(end_token)
    assert tokenizer.vocab_size == bpe.get_vocab_size()
    encoded = tokenizer.encode_batch(TEXTS)
    assert [bpe.decode(tokens.tolist()) for tokens in encoded] == TEXTS
    assert sum(map(len, encoded)) < sum(len(text.encode()) for text in TEXTS)


def test_what_the_file_adds_or_cuts_is_turned_off(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    bpe = train_bpe(file)
    plain = load_tokenizer(str(file)).encode_batch(TEXTS)
    bpe.enable_truncation(3)
    bpe.enable_padding(length=64)
    end = ("<|endoftext|>", bpe.token_to_id("<|endoftext|>"))
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    bpe.save(str(file))
    again = load_tokenizer(str(file)).encode_batch(TEXTS)
    assert [tokens.tolist() for tokens in again] == [tokens.tolist() for tokens in plain]


def test_the_text_of_the_end_token_does_not_end_a_document(tmp_path: Path) -> None:
    bpe = train_bpe(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tokens,) = tokenizer.encode_batch(["a<|endoftext|>b"])
    assert tokenizer.eos_id not in tokens
    assert bpe.decode(tokens.tolist(), skip_special_tokens=False) == "a<|endoftext|>b"


def test_ids_with_gaps_need_the_largest_plus_one(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 5, "</s>": 900}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}}
    content["model"]["unk_token"] = "a"  # type: ignore[index]
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (901, 900)


def test_tokens_of_bytes_stand_for_all_of_the_text(tmp_path: Path) -> None:
    train_bpe(tmp_path / "t.json")
    for spec in ("bytes", str(tmp_path / "t.json")):
        tokenizer = load_tokenizer(spec)
        bytes_V = tokenizer.count_bytes()
        assert (len(bytes_V), bytes_V[tokenizer.eos_id]) == (tokenizer.vocab_size, 0)
        texts = [*TEXTS, "日本 Ω<|endoftext|>\0\r\n"]
        covered = [int(bytes_V[tokens].sum()) for tokens in tokenizer.encode_batch(texts)]
        assert covered == [len(text.encode()) for text in texts]


def save_of_characters(path: Path, kind: str) -> None:
    """A tokenizer that knows a, b and the space, or what one makes of them."""
    vocabulary = {"</s>": 0, "a": 1, "b": 2}
    if kind == "fallback":
        vocabulary |= {"▁": 3, **{f"<0x{value:02X}>": 4 + value for value in range(256)}}
        made = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    elif kind == "unknown":
        vocabulary |= {" ": 3, "<unk>": 4}
        made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    elif kind == "words":
        vocabulary |= {"##a": 3, "[UNK]": 4}
        made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.decoder = decoders.WordPiece()
    else:
        made = tokenizers.Tokenizer(models.BPE(vocabulary | {" ": 3}, []))
    made.save(str(path))


@pytest.mark.parametrize(
    ("kind", "text", "covered"),
    [
        ("fallback", "ab é 日", 9),
        ("unknown", "ab é 日", 4),  # ab and two spaces
        ("drops", "ab é 日", 4),
        ("words", "aa b é", 5),  # each word with the space before it; é is unknown
    ],
)
def test_what_is_dropped_or_unknown_has_no_bytes(tmp_path: Path, kind: str, text: str, covered: int) -> None:
    save_of_characters(tmp_path / "t.json", kind)
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    (tokens,) = tokenizer.encode_batch([text])
    assert tokenizer.count_bytes()[tokens].sum() == covered


@pytest.mark.parametrize("kind", ["drops", "unknown"])
def test_text_that_is_dropped_or_unknown_is_said_once(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_of_characters(tmp_path / "t.json", kind)
    (tmp_path / "x.txt").write_text("".join(f"{'a' * (i % 97)}{'b' * (i % 89)} é\n" for i in range(3000)))
    config = DataConfig(
        source="text", path=str(tmp_path / "x.txt"), tokenizer=str(tmp_path / "t.json"),
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        prepare(config)
        prepare(config)
    (line,) = [line for line in caplog.messages if "tokenizer" in line]
    size = (tmp_path / "x.txt").stat().st_size
    share = 9000 / size
    assert line.startswith(f"data.tokenizer={tmp_path / 't.json'}: {share:.2%} of the text's bytes (9,000)")
    assert "such as '\\xe9\\n'" in line
    (tmp_path / "x.txt").write_text("".join(f"{chr(0x4E00 + i)}\n" for i in range(9000)))
    with pytest.raises(
        DataError, match=r"data\.tokenizer=.*100\.00% of the text's bytes .*data\.tokenizer=bytes$"
    ):
        prepare(config)


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        train_bpe(tmp_path / name)
    train_bpe(tmp_path / "c.json", "</s>")
    a, b, c = (load_tokenizer(str(tmp_path / f"{name}.json")).fingerprint for name in "abc")
    assert a == b
    assert len({a, c, load_tokenizer("bytes").fingerprint}) == 3


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.json"
    with pytest.raises(
        DataError, match=r"data\.tokenizer=/nope: no such file; allowed are bytes or the path"
    ):
        load_tokenizer("/nope")
    file.write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"t\.json: not a tokenizer\.json: "):
        load_tokenizer(str(file))
    train_bpe(file, "<bos>")
    with pytest.raises(DataError, match=r"has no end token; looked for <\|endoftext\|>, .*</s>"):
        load_tokenizer(str(file))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs tokenizers; pip install 'fomoe-flwr\[data\]'"):
        load_tokenizer(str(file))


def test_check_vocabulary() -> None:
    tokenizer = load_tokenizer("bytes")
    check_vocabulary(tokenizer, 257)
    with pytest.raises(ConfigError) as caught:
        check_vocabulary(tokenizer, 256)
    assert str(caught.value) == "model.vocab_size=256: too small for tokenizer 'bytes', which needs 257"


def test_a_run_keeps_its_tokenizer_for_when_the_file_is_gone(tmp_path: Path) -> None:
    file, run_dir = tmp_path / "its.json", tmp_path / "run"
    run_dir.mkdir()
    file.write_text("{}")
    keep_tokenizer(str(file), run_dir)
    assert at_hand(str(file), run_dir) == str(file)
    file.unlink()
    assert at_hand(str(file), run_dir) == str(run_dir / "tokenizer.json")
    keep_tokenizer(str(run_dir / "tokenizer.json"), run_dir)
    assert (run_dir / "tokenizer.json").read_text() == "{}"
    # Nothing was kept there, or nothing is needed.
    assert at_hand(str(file), tmp_path) == str(file)
    assert at_hand("bytes", run_dir) == "bytes"
