"""Text and JSON of somebody else: bounded in length and time, and shown as one plain line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.errors import WireError
from fomoe_flwr.untrusted import LONGEST_FILE, MAX_DIGITS, MOST_NESTED, one_line, parse_json, parse_json_file


@settings(max_examples=50)
@given(st.text(max_size=60) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl"]), max_size=60))
def test_any_text_becomes_one_line_that_can_be_printed(text: str) -> None:
    line = one_line(text, 40)
    assert len(line) <= 40
    assert line == "" or line.isprintable()
    line.encode()  # no lone surrogate


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("é 中 ok", "é 中 ok"),
        ("two\nlines", "two lines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\ud800b\u202e", "a\\ud800b\\u202e"),
        ("x" * 30 + "y" * 11, "x" * 17 + " ... " + "x" * 6 + "y" * 11),
    ],
)
def test_lines_by_hand(text: str, line: str) -> None:
    assert one_line(text, 40) == line


def test_an_error_is_cut_and_escaped() -> None:
    said = str(WireError("\x1b[2J" + "x" * 10**6))
    assert said.startswith("\\x1b[2Jx")
    assert 1990 < len(said) <= 2000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":1,"b":{"c":1,"c":2}}', "twice"),
        ("[" * 500, "line 1|nested|Expecting"),
        ("[" * 50_000 + "]" * 50_000, "nested"),
        (b'{"\xff": 1}', "utf"),
        (" " * 200_001, "200001 characters"),
    ],
)
def test_json_that_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text, 200_000)


def test_a_file_of_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    deepest = "[" * MOST_NESTED + "]" * MOST_NESTED
    file.write_text(deepest)
    assert json.dumps(parse_json_file(file)) == deepest
    file.write_text(f'{{"a": {deepest}}}')
    with pytest.raises(ValueError, match="nested"):
        parse_json_file(file)
    os.truncate(file, LONGEST_FILE + 1)
    with pytest.raises(ValueError, match="at most 100000000 are expected"):
        parse_json_file(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        parse_json_file(file)
    os.mkfifo(file)
    for odd in (file, tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            parse_json_file(odd)


def test_a_number_of_too_many_digits_is_infinite() -> None:
    digits = "9" * MAX_DIGITS
    assert parse_json(f'[{digits},{digits}9,-1,2.5,true,"x"]', 1000) == [
        int(digits),
        math.inf,
        -1,
        2.5,
        True,
        "x",
    ]
