"""The one command that draws the paper's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper import figures
from benchmarks.paper.__main__ import DRAWINGS, main


@pytest.mark.parametrize("which", list(DRAWINGS))
def test_a_figure_is_drawn_and_its_numbers_are_printed(
    which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Path] = []

    def drawing(path: Path, **options: str) -> list[figures.FlopsRow]:
        assert not options
        drawn.append(path)
        return [figures.FlopsRow("tiny", "skip", 1, 2.0)]

    monkeypatch.setitem(DRAWINGS, which, drawing)
    main([which, "--picture", str(tmp_path / "mine.png")])
    assert capsys.readouterr().out == f"picture: {tmp_path}/mine.png\n"
    main([which, "--json"])
    assert json.loads(capsys.readouterr().out) == [
        {"model": "tiny", "routing": "skip", "overlap": 1, "flops": 2.0}
    ]
    assert drawn == [tmp_path / "mine.png", Path(f"{which.replace('=', '_')}.png")]


def test_flops_by_the_papers_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for formula in ([], ["--formula", "ours"], ["--formula", "paper"]):
        main(["figure=8", *formula, "--json", "--picture", str(tmp_path / "x.png")])
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] != printed[2]
    with pytest.raises(SystemExit):
        main(["figure=9", "--formula", "paper"])
    assert "figure=9 has none" in capsys.readouterr().err


def test_another_figure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["figure=7"])
    assert stopped.value.code == 2
    assert "figure=8" in capsys.readouterr().err
