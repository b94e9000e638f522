"""The tables hold the numbers of the run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console, RenderableType

from fomoe_flwr.errors import RunError
from fomoe_flwr.records import noted_failure
from fomoe_flwr.report import report
from fomoe_flwr.report.load import load_run
from fomoe_flwr.report.tables import (
    all_ok,
    comparison_table,
    differing,
    job_dirs,
    run_table,
    status,
    sweep_table,
)
from fomoe_flwr.units import count, duration, in_bytes, times
from tests.report.runs import HEADERS, compose_config, metrics, write_run


def lines(renderable: RenderableType, width: int = 200) -> list[list[str]]:
    """What is printed, line by line, cut where two spaces or more part the cells."""
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def cells(run_dir: Path) -> dict[str, str]:
    return dict(line for line in lines(run_table(load_run(run_dir))) if len(line) == 2)


def test_run_table(tmp_path: Path) -> None:
    # 4 sites · 50 steps · 8 sequences · 256 tokens = 409,600 a round; three rounds of 10 s and 1.5 s before them
    made = metrics(compose_config("train.rounds=3"), rounds=3)
    for line, val_loss in zip(made, (5.0, 4.0, None, 2.5), strict=True):
        line |= {
            "val_loss": val_loss,
            "val_bpb": val_loss and val_loss / 2,
            "bytes_up": line["bytes_down"] // 2,
        }
    made[3]["resident_share"] = 0.625
    found = cells(write_run(tmp_path, "train.rounds=3", lines=made))
    assert found["rounds"] == "3 of 3"
    assert found["tokens"] == "1.23 M"
    assert found["validation loss"] == "5.000 -> 2.500 (-50.0 %)"
    assert found["validation bits per byte"] == "2.500 -> 1.250 (-50.0 %)"
    down = made[1]["bytes_down"]
    assert found["bytes down, all sites"] == in_bytes(3 * down)
    assert found["bytes up, all sites"] == in_bytes(3 * (down // 2))
    assert found["router choices held by the site"] == "62.5 %"
    assert found["tokens/s, all sites, wire included"] == "41.0 k"
    assert found["wall time"] == "31.5 s"
    assert "2.40 M parameters, 87 % in experts" in found["setting"]


def test_a_run_that_never_trained(tmp_path: Path) -> None:
    assert cells(write_run(tmp_path, rounds=0))["validation loss"] == "5.500"
    found = cells(write_run(tmp_path, rounds=0, val=False))
    assert found["validation loss"] == found["tokens/s, all sites, wire included"] == "-"
    assert not any("measured" in line for line in lines(comparison_table(load_run(tmp_path))))


def test_missing_replies_are_counted_by_site_and_reason(tmp_path: Path) -> None:
    made = metrics(compose_config("train.rounds=3"), rounds=3)
    made[1] |= {
        "failures": {"site-1": "update of RMS 3"},
        "refused": {"site-1": "norm", "site-2": "duplicate"},
    }
    made[2] |= {"failures": {"site-1": "no reply within 9 s", "site-0": "killed"}, "committed": False}
    made[3] |= {"failures": {"site-1": "update of RMS 4"}, "refused": {"site-1": "norm"}}
    found = cells(write_run(tmp_path, lines=made))
    assert found["rounds discarded"] == "1"
    assert found["replies missing of site-0"] == "1 (1 failed or late)"
    assert found["replies missing of site-1"] == "3 (2 refused: norm, 1 failed or late)"
    assert found["replies missing of site-2"] == "1 (1 refused: duplicate)"


def test_a_change_of_the_inputs_is_named_with_its_round(tmp_path: Path) -> None:
    """Losses before and after it cannot be compared."""
    made = metrics(compose_config("train.rounds=3"), rounds=3)
    for line, tokenizer in zip(made[1:], ("a", "a", "b"), strict=True):
        line["inputs"] = {"tokenizer": tokenizer, "corpus": "c"}
    found = cells(write_run(tmp_path, lines=made))
    assert found["other input from round 3 on"] == "data.tokenizer: the tokenizer is b, before a"
    assert not any("round 1" in key or "round 2" in key for key in found)


def test_comparison_table(tmp_path: Path) -> None:
    # tiny: 256·128·3.03 dense, 16·4·32768 in experts. A site with half of them sends 2·2·1,354,240 bytes by formula.
    made = metrics(compose_config(), rounds=2)
    for line in made[1:]:
        line |= {"bytes_down": 10_000_000, "bytes_up": 4_000_000}  # 3.5 MB for each of the 4 sites
    rows = {
        tuple(line[:2]): line[2:]
        for line in lines(comparison_table(load_run(write_run(tmp_path, lines=made))))
    }
    measured, formula = rows["this run", "measured"], rows["this run", "by formula"]
    assert measured[0] == "3.50 MB"
    assert measured[1] == "34.2 B"  # over 102,400 tokens
    assert formula == ["5.42 MB", "52.9 B", "1.00x", "56.4 %"]
    assert measured[2:] == ["0.65x", "56.4 %"]
    assert rows["full-replica DiLoCo", "by formula"] == ["9.61 MB", "93.9 B", "1.77x", "100.0 %"]
    assert rows["DDP", "by formula"] == ["481 MB", "4.69 kB", "88.7x", "100.0 %"]


def test_bytes_are_shared_among_the_sites_that_took_part(tmp_path: Path) -> None:
    made = metrics(compose_config(), rounds=1)
    made[1] |= {"sites": made[1]["sites"][:2], "bytes_down": 4_000_000, "bytes_up": 2_000_000}
    assert load_run(write_run(tmp_path, lines=made)).rounds[1].site_bytes == 3_000_000


def sweep(directory: Path, jobs: dict[str, list[str]], hydra: bool = True) -> Path:
    for job, overrides in jobs.items():
        write_run(directory / job, *overrides, rounds=2)
        if hydra:
            (directory / job / ".hydra").mkdir()
            OmegaConf.save(OmegaConf.create(overrides), directory / job / ".hydra" / "overrides.yaml")
    return directory


def test_a_job_that_ended_in_vain_or_with_an_error_is_failed(tmp_path: Path) -> None:
    sweep(tmp_path, {str(job): ["train.rounds=2", f"seed={job}"] for job in range(3)})
    assert all_ok(tmp_path)
    rounds = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    rounds[-1]["committed"] = False
    (tmp_path / "1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    with pytest.raises(RunError), noted_failure(tmp_path / "2"):
        raise RunError("the loss is too high")
    assert not all_ok(tmp_path)
    printed = [" ".join(line) for line in lines(sweep_table(tmp_path))]
    assert [sum(f" {word} " in line for line in printed) for word in ("ok", "failed")] == [1, 2]
    assert "job 1: nothing was committed in the last round" in printed
    assert "job 2: the loss is too high" in printed
    # Begun again, and well this time.
    with noted_failure(tmp_path / "2"):
        pass
    assert status(load_run(tmp_path / "2")) == "ok"


def test_overrides_of_a_sweep_are_only_shown(tmp_path: Path) -> None:
    sweep(tmp_path, {"0": ["train.rounds=2", "data.cache_dir=${oc.env:HOME}"], "1": ["train.rounds=2"]})
    assert differing(job_dirs(tmp_path))[0] == {"data.cache_dir": "${oc.env:HOME}"}


def test_sweep_table_with_a_failed_and_a_partial_job(tmp_path: Path) -> None:
    jobs = {
        str(job): ["train.rounds=2", f"strategy.overlap={overlap}"]
        for job, overlap in ((0, 1), (2, 2), (10, 4))
    }
    sweep(tmp_path, jobs)
    (tmp_path / "2" / "metrics.jsonl").unlink()
    partial = (tmp_path / "10" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "10" / "metrics.jsonl").write_text("\n".join(partial[:2]) + "\n")
    (tmp_path / "wandb").mkdir()

    assert [path.name for path in job_dirs(tmp_path)] == ["0", "2", "10"]
    printed = lines(sweep_table(tmp_path))
    rows = {line[0]: line[1:] for line in printed if line and line[0] in jobs}
    assert list(rows) == ["0", "2", "10"]
    # 2 (dense + router + a quarter of the experts) numbers of 2 bytes down and up, and the headers
    site_bytes = in_bytes(4 * (297_216 + 8_192 + 524_288) + HEADERS)
    assert rows["0"][:5] == ["strategy.overlap=1", "ok", "2/2", "819 k", "4.123"]
    assert rows["0"][6] == site_bytes
    assert rows["2"] == ["strategy.overlap=2", "failed", *["-"] * 7]
    assert rows["10"][:4] == ["strategy.overlap=4", "partial", "1/2", "410 k"]
    assert any("job 2:" in cell for line in printed for cell in line)


def test_without_hydras_overrides_the_configurations_tell_the_jobs_apart(tmp_path: Path) -> None:
    jobs = {"0": ["strategy.overlap=1", "seed=7"], "1": ["strategy.overlap=null", "seed=7"]}
    sweep(tmp_path, jobs, hydra=False)
    (tmp_path / "2").mkdir()  # failed before it wrote anything
    assert differing(job_dirs(tmp_path)) == [{"strategy.overlap": "1"}, {"strategy.overlap": "null"}, {}]


def test_an_override_of_one_job_alone_sets_it_apart(tmp_path: Path) -> None:
    sweep(tmp_path, {"0": ["train.rounds=2"], "1": ["train.rounds=2", "++seed=7"]})
    assert differing(job_dirs(tmp_path)) == [{}, {"seed": "7"}]


def test_brackets_are_text_and_not_markup(tmp_path: Path) -> None:
    sweep(tmp_path / "[red]", {"0": ["data.text_key='[bold]'"], "1": ["seed=1"]})
    text = " ".join(cell for line in lines(sweep_table(tmp_path / "[red]")) for cell in line)
    assert "[red]" in text
    assert "data.text_key='[bold]'" in text


def print_report(directory: Path) -> str:
    console = Console(file=io.StringIO(), width=60)
    report(directory, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_report_of_a_run_draws_and_cuts_nothing_off_in_a_file(tmp_path: Path) -> None:
    text = print_report(write_run(tmp_path))
    assert (tmp_path / "report.png").is_file()
    assert f"picture: {tmp_path / 'report.png'}" in text
    assert "5.42 MB" in text
    assert "…" not in text


def test_report_of_a_sweep_draws_nothing(tmp_path: Path) -> None:
    text = print_report(sweep(tmp_path, {"0": ["seed=1"], "1": ["seed=2"]}))
    assert "seed=1" in text
    assert "seed=2" in text
    assert "…" not in text
    assert "tokens/s" in text
    assert not list(tmp_path.rglob("report.png"))


@pytest.mark.parametrize("name", ["", "missing"], ids=["empty", "missing"])
def test_report_of_something_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="neither a run" if not name else "no such directory"):
        print_report(tmp_path / name)


def test_importing_the_report_is_cheap() -> None:
    code = "import sys, fomoe_flwr.report; print([m for m in ('matplotlib', 'torch', 'rich') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_bytes(0), "0 B"),
        (in_bytes(999), "999 B"),
        (in_bytes(1000), "1.00 kB"),
        (in_bytes(5_417_960), "5.42 MB"),
        (in_bytes(None), "-"),
        (count(104_000_000_000), "104 B"),
        (times(0.333), "0.33x"),
        (times(88.72), "88.7x"),
        (times(119.4), "119x"),
        (duration(59.9), "59.9 s"),
        (duration(59.99), "1 min 00 s"),
        (duration(5025), "1 h 23 min"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected
