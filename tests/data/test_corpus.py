"""Reading documents: what each source yields, and the one line a user gets when it cannot."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data import Document, read_documents
from fomoe_flwr.data.corpus import PIECE, _pieces, name_some, source_digest
from fomoe_flwr.errors import DataError


def read(source: str, path: object = None, **options: object) -> list[Document]:
    return list(read_documents(config_of(source, path, **options)))


def config_of(source: str, path: object = None, **options: object) -> DataConfig:
    return DataConfig(source=source, path=None if path is None else str(path), **options)  # type: ignore[arg-type]


def error_of(source: str, path: object = None, **options: object) -> str:
    """The one line that reading ends with."""
    with pytest.raises(DataError) as caught:
        read(source, path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `datasets` off the network and out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


# --- stdlib


def test_stdlib_is_this_pythons_own_source() -> None:
    documents = read("stdlib")
    domains = {document.domain for document in documents}
    assert {"modules", "json", "asyncio", "email"} <= domains
    assert not domains & {"test", "tests", "idlelib", "site-packages", "lib-dynload", "__pycache__"}
    assert 5e6 < sum(len(document.text) for document in documents) < 5e7
    assert Path(__import__("json.decoder").decoder.__file__).read_text() in {d.text for d in documents}


def test_stdlib_order_is_fixed_and_capped() -> None:
    assert read("stdlib", max_documents=40) == read("stdlib")[:40]


# --- text


def test_text_folder_gives_a_document_a_file_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "law/2.txt", "law/deep/1.txt", "a.md", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"in {name}\r\n".encode())
    assert read("text", tmp_path) == [
        Document("in a.md\r\n", "a"),
        Document("in b.txt\r\n", "b"),
        Document("in law/2.txt\r\n", "law"),
        Document("in law/deep/1.txt\r\n", "law"),
    ]


def test_a_lone_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 200 + "\n" + "more " * 200 + "\n\n"
    text = paragraph * 50
    (tmp_path / "book.txt").write_text(text)
    documents = read("text", tmp_path / "book.txt")
    assert len(documents) == -(-len(text) // (-(-PIECE // len(paragraph)) * len(paragraph)))
    assert "".join(document.text for document in documents) == text
    assert all(document.text.endswith("\n\n") for document in documents)
    assert {document.domain for document in documents} == {"book"}


@given(st.lists(st.sampled_from(["\n", "x\n", "y" * 6000 + "\n", "z" * 40_000]), max_size=30))
def test_pieces_lose_nothing_and_stay_short(lines: list[str]) -> None:
    pieces = list(_pieces(lines))
    assert "".join(pieces) == "".join(lines)
    longest_line = max(map(len, lines), default=0)
    assert all(len(piece) < 2 * PIECE + longest_line for piece in pieces)
    assert all(len(piece) >= PIECE for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("content", "reason"), [(b"caf\xe9", "is not UTF-8 text"), (b"PK\x03\x00\x00", "is binary, not text")]
)
def test_a_lone_file_that_is_no_text_is_refused_and_in_a_folder_passed_over(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    for name in ("image.png", "sub/other.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    bad = tmp_path / "image.png"
    assert f"{bad} {reason}" in error_of("text", bad)
    what = f"2 files that are not UTF-8 text or cannot be opened: {bad}, … (1 more)"
    assert error_of("text", tmp_path) == f"data.source=text: no document with text in {tmp_path}; {what}"
    (tmp_path / "good.txt").write_text("good")
    warnings: list[str] = []
    found = list(read_documents(config_of("text", tmp_path), warnings.append))
    assert found == [Document("good", "good")]
    assert warnings == [f"data.path={tmp_path}: passed over {what}"]


def test_a_file_that_may_not_be_opened_is_passed_over_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"in {name}")
    opened = Path.open

    def closed(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", closed)
    warnings: list[str] = []
    config = config_of("text", tmp_path)
    assert [document.text for document in read_documents(config, warnings.append)] == ["in b.txt"]
    assert str(tmp_path / "a.txt") in warnings[0]
    assert len(source_digest(config)) == 64
    # Rows are another matter: who lists a file of them wants it.
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    monkeypatch.setattr(Path, "open", lambda path, *_: closed(path.with_name("a.txt")))
    assert "cannot be read" in error_of("jsonl", tmp_path)


@pytest.mark.parametrize(("source", "content"), [("text", "t"), ("jsonl", '{"text": "t"}')])
def test_a_folder_that_may_not_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, content: str
) -> None:
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"x.{source}").write_text(content)
    scanned = os.scandir

    def scan(folder: object) -> object:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scanned(folder)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scan)
    warnings: list[str] = []
    assert len(list(read_documents(config_of(source, tmp_path), warnings.append))) == 1
    assert warnings == [f"data.path={tmp_path}: 1 folders cannot be opened: {tmp_path / 'closed'}"]
    shutil.rmtree(tmp_path / "open")
    assert f"that can be opened (not {tmp_path / 'closed'})" in error_of("jsonl", tmp_path)


# --- JSON lines


def test_jsonl_reads_all_three_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "tw\xc3\xb6"}')
    (tmp_path / "b.json").write_text('{"text": "three"}\n')
    (tmp_path / "web").mkdir()
    with gzip.open(tmp_path / "web" / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "four"}\n')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "five"}\n')
    (tmp_path / "ignored.txt").write_text("no")
    assert [(d.text, d.domain) for d in read("jsonl", tmp_path)] == [
        ("one", "a"),
        ("twö", "a"),
        ("three", "b"),
        ("five", "d"),
        ("four", "web"),
    ]


def test_jsonl_takes_text_and_domain_from_the_keys(tmp_path: Path, write_jsonl) -> None:
    rows = [{"body": "a", "lang": "de"}, {"body": None, "lang": "en"}, {"body": " \n", "lang": "en"}]
    file = write_jsonl(tmp_path / "x.jsonl", [*rows, {"body": "b", "lang": 7}])
    found = read("jsonl", file, text_key="body", domain_key="lang")
    assert found == [Document("a", "de"), Document("b", "7")]


def test_a_row_without_a_domain_has_that_of_its_file(tmp_path: Path, write_jsonl) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "lang": None}, {"text": "b", "lang": "None"}])
    assert read("jsonl", file, domain_key="lang") == [Document("a", "x"), Document("b", "None")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'["text"]', "is a JSON list, not an object"),
        (b'{"txt": "x", "url": 1}', "data.text_key=text: not in"),
        (b'{"text": 5}', "a int in"),
        (b'{"text": "\\ud800"}', "not valid Unicode in"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "after"}\n')
    message = error_of("jsonl", tmp_path)
    assert reason in message
    assert f"{tmp_path / 'x.jsonl'}, line 3" in message


def test_missing_keys_say_what_is_there(tmp_path: Path, write_jsonl) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"body": "b", "url": "u"}])
    assert error_of("jsonl", file) == f"data.text_key=text: not in {file}, line 1, which has body, url"
    message = error_of("jsonl", file, text_key="body", domain_key="lang")
    assert message == f"data.domain_key=lang: not in {file}, line 1, which has body, url"


def test_a_damaged_gzip_names_the_file(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-12])
    assert f"{tmp_path / 'x.jsonl.gz'} cannot be read" in error_of("jsonl", tmp_path)


# --- parquet


def test_parquet_reads_rows_in_order(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": [f"t{i}" for i in range(3000)], "lang": ["de", "en"] * 1500, "n": range(3000)}),
        tmp_path / "p.parquet",
        row_group_size=700,
    )
    assert read("parquet", tmp_path, domain_key="lang") == [
        Document(f"t{i}", ("de", "en")[i % 2]) for i in range(3000)
    ]
    assert read("parquet", tmp_path, text_key="lang", domain_key="lang")[1] == Document("en", "en")
    assert read("parquet", tmp_path / "p.parquet", max_documents=2) == [
        Document("t0", "p"),
        Document("t1", "p"),
    ]


def test_parquet_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"body": ["x"], "url": ["u"]}), file)
    assert error_of("parquet", tmp_path) == f"data.text_key=text: not in {file}, which has body, url"
    file.write_bytes(b"PAR1 but no more")
    assert f"{file} is not a readable parquet file" in error_of("parquet", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert error_of("parquet", tmp_path).endswith("needs pyarrow; pip install 'fomoe-flwr[data]'")


# --- Hugging Face, from local folders


def test_huggingface_reads_a_local_folder(tmp_path: Path, write_jsonl) -> None:
    folder = tmp_path / "speeches"
    write_jsonl(folder / "x.jsonl", [{"text": f"t{i}", "lang": "de", "n": i} for i in range(5)])
    found = read("huggingface", name=str(folder))
    assert found == [Document(f"t{i}", "speeches") for i in range(5)]
    found = read("huggingface", name=str(folder), text_key="lang", domain_key="lang", max_documents=1)
    assert found == [Document("de", "de")]
    found = read("huggingface", name=str(folder), domain_key="lang", max_documents=2, split="train[1:]")
    assert found == [Document("t1", "de"), Document("t2", "de")]


def test_huggingface_reads_by_loader(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "data" / "p.parquet")
    found = read("huggingface", tmp_path / "data", name="parquet")
    assert [document.text for document in found] == ["a", "b"]


def test_huggingface_reads_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "lang": ["x", "y"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(str(tmp_path / "more"))
    assert read("huggingface", tmp_path / "one") == [Document("a", "one"), Document("b", "one")]
    assert read("huggingface", tmp_path / "more", split="dev", domain_key="lang") == [Document("b", "y")]
    assert read("huggingface", name=str(tmp_path / "one")) == read("huggingface", tmp_path / "one")
    assert len(source_digest(config_of("huggingface", tmp_path / "one"))) == 64
    message = error_of("huggingface", tmp_path / "more", split="test")
    assert message == f"data.path={tmp_path / 'more'} (data.split=test): it has train, dev"
    assert "not a folder that save_to_disk wrote" in error_of("huggingface", tmp_path)
    # A state.json there would be read as rows.
    for source in ("text", "jsonl", "parquet"):
        for name in ("one", "more"):
            assert f"read it by data=huggingface data.path={tmp_path / name}" in error_of(
                source, tmp_path / name
            )


def test_huggingface_errors(tmp_path: Path, write_jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_jsonl(tmp_path / "x" / "x.jsonl", [{"body": "b", "url": "u"}]).parent)
    assert error_of("huggingface", name=folder) == f"data.text_key=text: not in {folder}, which has body, url"
    message = error_of("huggingface", name=folder, split="dev")
    assert message.startswith(f"data.name={folder} (data.split=dev): ")
    assert "train" in message  # the splits there are
    assert error_of("huggingface", name=f"{folder}-no").startswith(
        f"data.name={folder}-no (data.split=train): "
    )
    (tmp_path / "x" / "x.jsonl").write_text("{nope\n")
    message = error_of("huggingface", name=folder)
    assert message.startswith(f"data.name={folder} ")
    assert "JSON" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("huggingface", name=folder).endswith("needs datasets; pip install 'fomoe-flwr[data]'")


def test_huggingface_digest_follows_the_content(tmp_path: Path, write_jsonl) -> None:
    folder = write_jsonl(tmp_path / "x" / "x.jsonl", [{"text": "b"}]).parent
    config = config_of("huggingface", name=str(folder))
    first = source_digest(config)
    assert source_digest(config) == first
    write_jsonl(folder / "x.jsonl", [{"text": "b"}, {"text": "c"}])
    assert source_digest(config) != first


# --- all sources


def test_no_such_path() -> None:
    for source in ("text", "jsonl", "parquet"):
        assert error_of(source, "/nope") == "data.path=/nope: no such file or folder"


def test_a_folder_without_files_and_files_without_text(tmp_path: Path) -> None:
    message = f"data.path={tmp_path}: no file *.jsonl or *.jsonl.gz or *.json in this folder"
    assert error_of("jsonl", tmp_path) == message
    (tmp_path / "x.jsonl").write_text('\n{"text": ""}\n')
    assert error_of("jsonl", tmp_path) == f"data.source=jsonl: no document with text in {tmp_path}"


def test_digest_names_content_and_not_place(tmp_path: Path, write_jsonl) -> None:
    old = write_jsonl(tmp_path / "old" / "x.jsonl", [{"text": "b"}])
    config = config_of("jsonl", old.parent)
    first = source_digest(config)
    shutil.copytree(old.parent, tmp_path / "new")
    assert source_digest(config_of("jsonl", tmp_path / "new")) == first
    assert source_digest(config_of("jsonl", old)) != first  # a lone file may be read in another way
    (old.parent / "y.jsonl").write_text("")
    assert source_digest(config) != first
    (old.parent / "y.jsonl").unlink()
    renamed = old.rename(old.with_name("z.jsonl"))  # a name may be a domain
    assert source_digest(config) != first
    renamed.rename(old)
    assert source_digest(config) == first
    write_jsonl(old, [{"text": "c"}])
    assert source_digest(config) != first


def test_name_some_is_readable() -> None:
    assert name_some(["a", "b"]) == "a, b"
    assert name_some(range(15), limit=3) == "0, 1, 2, … (12 more)"
    # As Python has a file's name that is not UTF-8, and a very long one.
    assert name_some([os.fsdecode(b"caf\xe9"), "x" * 5000]) == "caf\\udce9, " + "x" * 300


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.txt", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(DataError, match=r"data\.path: the name .*caf\\xe9\.txt' is not UTF-8; rename it"):
        source_digest(DataConfig(source="text", path=str(tmp_path)))
