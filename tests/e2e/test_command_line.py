"""The `fomoe` command as a person uses it: exit codes, one clear line, sweeps, reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fomoe_flwr.checkpoint import checkpoint_path
from fomoe_flwr.cli import main
from tests.conftest import SMALL_MODEL, SMALL_TRAIN
from tests.strategies.helpers import metrics, without_times

TWO_SITES = ("federation.num_sites=2", "data=text", "data.path=.")


def run_arguments(corpus_dir: Path, cache_dir: Path) -> list[str]:
    return [
        *SMALL_MODEL, *SMALL_TRAIN, "data=text", f"data.path={corpus_dir}", f"data.cache_dir={cache_dir}",
        "runtime=local", "wandb.mode=disabled",
    ]  # fmt: skip


@pytest.fixture
def arguments(corpus_dir: Path, cache_dir: Path) -> list[str]:
    return run_arguments(corpus_dir, cache_dir)


def fomoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    command = Path(sys.executable).with_name("fomoe")
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=120, check=False)


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line with which `fomoe train` refuses, its exit code not 0."""
    with pytest.raises(SystemExit) as stop:
        main(["train", *overrides])
    assert stop.value.code in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.lrr=1"], "train.lrr: unknown key; did you mean train.lr?"),
        (["+train.new=1"], "train.new: unknown key"),
        (["train.rounds=many"], "train.rounds=many: must be an integer"),
        (["train.lr=-1"], "train.lr=-1.0: must be at least 0"),
        (
            ["model=huge"],
            "model=huge: no such option; allowed are hf, large, medium, olmoe_tiny, proxy, qwen3_moe_tiny, tiny, ",
        ),
        (
            ["strategy.routing=other"],
            "strategy.routing=other: allowed are skip, skip_renormalised, partitioned",
        ),
        (
            ["strategy.overlap=5"],
            "strategy.overlap=5: between 1 and the number of sites, 4 (federation.num_sites)",
        ),
        (["data=text", "data.path=/no/such/place"], "data.path=/no/such/place: no such file or folder"),
        (["data=text"], "data.path=null: data=text needs data.path=FILE_OR_FOLDER"),
        (["model.vocab_size=100"], "model.vocab_size=100: too small for tokenizer 'bytes', which needs 257"),
        (["data.tokenizer=/no/tokenizer.json"], "data.tokenizer=/no/tokenizer.json: no such file"),
        (["resume=/no/run"], "resume=/no/run: no such directory"),
        (["federation=/no/sites.yaml"], "federation.path=/no/sites.yaml: no such file"),
        (
            [
                "federation.sites=[{name:a,data_path:/no/text},{name:b}]",
                "federation.num_sites=2",
                "data=text",
                "data.path=.",
            ],
            "federation.sites: data_path=/no/text of site a: no such file or folder",
        ),
        (
            [
                "federation.sites=[{name:a,data_path:''},{name:b}]",
                "federation.num_sites=2",
                "data=text",
                "data.path=.",
            ],
            "federation.sites[0].data_path= is empty",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    assert refused(capsys, *overrides).startswith(line)


@pytest.fixture(scope="module")
def finished(corpus_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round; tests that change it copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *run_arguments(corpus_dir, cache_dir), "train.rounds=1", f"hydra.run.dir={run}"])
    return run


def test_a_damaged_checkpoint_is_one_clear_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    checkpoint = checkpoint_path(run, 1)
    (checkpoint / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refused(capsys, f"resume={checkpoint}")
    with pytest.raises(SystemExit):
        main(["train", f"resume={run}"])
    warning, error = capsys.readouterr().err.splitlines()
    assert "round_00001: manifest.json is damaged" in warning
    assert error.startswith(f"error: resume={run}: no checkpoint is whole")


def test_a_run_directory_in_use_is_not_overwritten(
    arguments: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert "holds a run already" in refused(capsys, *arguments, f"hydra.run.dir={finished}")
    assert (finished / "metrics.jsonl").read_text() == before


def test_report_can_be_drawn_again(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "report.png").unlink()
    main(["report", str(run)])
    assert (run / "report.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nothing")])


def test_manifest_holds_what_a_checkpoint_needs(finished: Path) -> None:
    manifest = json.loads((checkpoint_path(finished, 1) / "manifest.json").read_text())
    assert set(manifest) >= {
        "format", "round", "sha256", "run", "tokens", "config", "overrides", "placement", "rng",
    }  # fmt: skip


def test_a_run_leaves_what_it_promises_and_resumes(arguments: list[str], tmp_path: Path) -> None:
    done = fomoe("train", *arguments, "wandb.mode=offline", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "full-replica DiLoCo" in done.stdout
    assert "by formula" in done.stdout
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert present >= {"config.yaml", "metrics.jsonl", "checkpoints", "wandb", "report.png", "routing.png"}
    lines = metrics(tmp_path / "run")
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert set(lines[-1]) >= {
        "round", "tokens", "train_loss", "val_loss", "val_bpb", "bytes_down", "bytes_up", "bytes_by_class",
        "resident_share", "routing", "seconds", "sites",
    }  # fmt: skip
    phases = {"round", "train", "wire", "aggregate", "evaluate", "routing", "checkpoint"}
    assert set(lines[-1]["seconds"]) == phases
    main(["train", f"resume={tmp_path}/run", "train.rounds=3"])
    after = metrics(tmp_path / "run")
    assert without_times(after[:3]) == without_times(lines)
    assert [line["round"] for line in after] == [0, 1, 2, 3]


def test_a_failed_run_has_an_exit_code(arguments: list[str], tmp_path: Path) -> None:
    failed = fomoe("train", *arguments, "train.lr=1e30", f"hydra.run.dir={tmp_path}/run")
    assert failed.returncode == 1
    assert "error: round 2: nothing was committed in the last 2 rounds" in failed.stderr
    assert "training loss is" in failed.stderr


def test_a_sweep_runs_every_job_and_prints_one_table(arguments: list[str], tmp_path: Path) -> None:
    done = fomoe(
        "train", "-m", *arguments, "strategy.overlap=1,4", "strategy.routing=partitioned", "train.rounds=1",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == list("01")
    table = done.stdout[done.stdout.rindex("overrides") :]
    assert [table.count(f"strategy.overlap={overlap}") for overlap in (1, 4)] == [1, 1]
    assert table.count(" ok ") == 2


def test_a_sweep_with_an_impossible_job_starts_none(arguments: list[str], tmp_path: Path, capsys) -> None:
    line = refused(capsys, "-m", *arguments, "strategy.overlap=1,2,9", f"hydra.sweep.dir={tmp_path}/sweep")
    assert line.startswith("strategy.overlap=9")
    assert not (tmp_path / "sweep").exists()


def test_sites_may_be_listed_in_a_file_of_the_users(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "sites:\n  - {name: big, memory_gib: 80, domain: botany}\n  - {name: lab, count: 3, up_mbps: 100}\n"
    )
    run = [item for item in arguments if not item.startswith("train.rounds")]
    main(
        ["train", *run, f"federation={tmp_path}/mine.yaml", "data.partition=domain", "train.rounds=1",
         f"hydra.run.dir={tmp_path}/run"]
    )  # fmt: skip
    assert [site["site"] for site in metrics(tmp_path / "run")[-1]["sites"]] == [
        "big", "lab-0", "lab-1", "lab-2",
    ]  # fmt: skip


def test_hydras_options_may_stand_anywhere(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", f"resume={finished}", "--cfg", "job", "seed=7", "--resolve"])
    shown = OmegaConf.create(capsys.readouterr().out)
    # Those of the run that is resumed are in it.
    assert (shown.seed, shown.model.d_model, shown.resume) == (7, 32, str(finished))
    main(["train", "seed=7", "-p", "train", "--cfg", "job"])
    assert capsys.readouterr().out.startswith("# @package train")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.lr=-1", "--cfg", "job"], "train.lr=-1.0: must be at least 0"),
        (["--info", "defaults", "seed=x"], "seed=x: must be an integer"),
        (["--cfg", "job", "resume=/no/run"], "resume=/no/run: no such directory"),
        (["seed=1,2", "-m", "--cfg", "job"], "fomoe train: only one of --multirun and --cfg"),
        (["--resolve"], "fomoe train: --resolve: needs --cfg"),
        (["--cfg"], "fomoe train: argument --cfg/-c: expected one argument"),
        (["--nope"], "fomoe train: unrecognized arguments: --nope"),
        (["--config-dir", "/no/folder"], "--config-dir /no/folder: no such directory"),
        (["--config-name", "other"], "fomoe train: --config-name: "),
        (["train.lr=interval(0.1,1)", "-m"], "train.lr=interval(0.1,1): not a list of values"),
        (["-m", "seed=glob(*)"], "seed=glob(*): no job"),
        (["strategy=glob(*)"], "strategy=glob(*): several values, for which there is fomoe train -m"),
        # glob finds what there is: ddp, whose steps the overlap does not suit, and others before it starts
        (["strategy=glob(*)", "train.lr=-1", "-m"], "train.lr=-1.0: must be at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_beside_an_option_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert refused(capsys, *arguments).startswith(line)


def test_a_sweep_with_a_job_that_fails_says_so(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                *arguments,
                "train.rounds=1",
                "train.lr=1e30,0.001",
                "-m",
                f"hydra.sweep.dir={tmp_path}/s",
            ]
        )
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert [printed.out.count(word) for word in (" ok ", " failed ")] == [1, 1]
    assert "job 0: round 1: nothing was committed" in printed.out
    assert "Traceback" not in printed.err


def test_wrong_words_show_the_usage() -> None:
    done = fomoe("trian")
    assert done.returncode == 2
    assert "usage: fomoe train" in done.stderr
