"""`fomoe train --help` knows every key and says what it means."""

from __future__ import annotations

import dataclasses

import pytest

from fomoe_flwr.cli import main
from fomoe_flwr.config import schema
from fomoe_flwr.keys import all_keys, comments


def test_every_key_has_a_meaning() -> None:
    told = {key.name: key for key in all_keys()}
    keys = {key for key, _ in schema()}
    leaves = keys - {key.partition(".")[0] for key in keys if "." in key} - {"federation.sites"}
    assert {"seed", "store", "train.lr"} <= leaves <= told.keys()
    assert {key.rpartition(".")[0] for key in told.keys() - leaves} == {"federation.sites[]"}
    assert [key for key, about in told.items() if len(about.meaning) < 5 and key not in SYMBOLS] == []
    assert told["train.lr"].default == "0.003"
    assert told["strategy.overlap"][1:] == (
        "null",
        ">= 1",
        "O_e, sites holding each expert; null: all of them",
    )
    assert told["model.num_layers"].allowed == "1 to 1024"
    assert told["strategy.routing"].allowed == "skip, skip_renormalised, partitioned"


SYMBOLS = {"federation.num_sites", "train.local_steps"}  # M and K of the paper


def test_comments_above_and_beside_a_field_are_its_meaning() -> None:
    @dataclasses.dataclass
    class Section:
        """Not a meaning: x: this."""

        one: int = 1
        # Above it,
        # on two lines,
        two: int = 2  # and beside it: with a colon
        three: int = max(
            3,
            0,
        )  # behind a wrapped line

    assert comments(Section) == {
        "one": "",
        "two": "Above it, on two lines, and beside it: with a colon",
        "three": "behind a wrapped line",
    }


@pytest.mark.parametrize(
    ("line", "follows"),
    [
        ("fomoe ", "train\nplan\nbench\neval\nimport\nexport\ngenerate\nreport\nserver\nsite\nsubmit\n"),
        ("fomoe pl", "plan\n"),
        ("fomoe train runtime=", "runtime=flower runtime=local\n"),
        ("fomoe plan model.d_", "model.d_expert= model.d_model=\n"),
    ],
)
def test_tab_completes_commands_and_keys(
    line: str, follows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    main(["-sc", "query=bash"])
    assert capsys.readouterr().out == follows


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"{key.name} " in out for key in all_keys())
    assert "usage: fomoe train" in out
