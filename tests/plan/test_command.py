"""`fomoe plan` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr.cli import main
from fomoe_flwr.compose import compose
from fomoe_flwr.plan.picture import bandwidth_points, memory_lines, overlap_points, scaled_links
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.system import plan_sites

HETERO = ("federation=hetero", "plan.tflops=0.05")


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["plan", *arguments, "--json"])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


# ----- what is refused


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """`{}` in a federation of two is what a test puts there."""
    return tmp_path / "sites.yaml"


@pytest.mark.parametrize(
    ("site", "line"),
    [
        ("up_mbps: 0", "federation.sites[0].up_mbps=0.0: must be above 0"),
        ("memory_gib: -4", "federation.sites[0].memory_gib=-4.0: must be above 0"),
        ("memory_gib: 0.001", "federation: site a has memory_gib=0.001, but the dense part and one expert"),
        ("speed: 0", "federation.sites[0].speed=0.0: must be above 0"),
    ],
)
def test_an_impossible_site_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], federation: Path, site: str, line: str
) -> None:
    federation.write_text(f"sites: [{{name: a, {site}}}, {{name: b}}]")
    assert refused(capsys, f"federation={federation}").startswith(line)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line, with exit code 2 and nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["strategy.overlap=5"], "strategy.overlap=5: between 1 and the number of sites, 4"),
        (
            ["strategy.overlap=5", "strategy.placement=planned"],
            "strategy.overlap=5: at most the number of sites, 4",
        ),
        (["plan.assumed_mbps=0"], "plan.assumed_mbps=0.0: must be above 0"),
        (["plan.speed=2"], "plan.speed: unknown key"),
        (["foo"], "'foo': not an override, which is KEY=VALUE"),
        ([""], "'': not an override"),
        (["-1"], "'-1': not an override"),
        (["="], "'=': not an override"),
        (["model="], "model=: no such option"),
        (["plan.measured=/no/run"], "plan.measured=/no/run: "),
        (["figure=8"], "figure=8: the paper's figures"),
        (["sweep=sites"], "sweep=sites: the paper's figures"),
        (["--picture"], "fomoe plan: argument --picture: expected one argument"),
        (["--picture", "--json"], "fomoe plan: argument --picture: expected one argument"),
        (["--picture="], "--picture .: the name must end in .png"),
        (
            ["--picture", "/no/such/folder/plan.png"],
            "--picture /no/such/folder/plan.png: there is no directory",
        ),
        (["--picture", "plan.txt"], "--picture plan.txt: the name must end in .png"),
        (["-m"], "fomoe plan: unrecognized arguments: -m"),
        (["--jason"], "fomoe plan: unrecognized arguments: --jason"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert refused(capsys, *arguments).startswith(line)


@pytest.mark.parametrize("arguments", [()], ids=["plan"])
def test_a_picture_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "taken.png").mkdir()
    assert "is a directory" in refused(capsys, *arguments, "--picture", str(tmp_path / "taken.png"))
    full = Path("/proc/plan.png")  # a directory in which nobody can write, whoever runs this
    if full.parent.is_dir():
        assert "cannot be written" in refused(capsys, *arguments, f"--picture={full}")


# ----- what is done


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *HETERO])
    out = capsys.readouterr().out
    for words in ("workstation", "full-replica DiLoCo", "▸ FoMoE, equal, skip", "assumed:", "advice:"):
        assert words in out


def test_json_is_the_plan_of_the_same_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = (*HETERO, "strategy.placement=planned")
    content, plan = plan_json(capsys, *overrides), make_plan(compose(overrides).config)
    assert content["plan"]["round_s"] == plan.round_s
    assert [site["experts_per_layer"] for site in content["sites"]] == [
        s.experts_per_layer for s in plan.sites
    ]


def test_the_corpus_is_not_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, "data=text", "data.path=/no/such/place", "data.tokenizer=/no/tokenizer.json")


def test_a_thousand_sites_of_the_largest_model(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = (
        "model=xxl",
        "federation.num_sites=1000",
        "strategy.overlap=125",
        "strategy.placement=planned",
    )
    content = plan_json(capsys, *overrides)
    assert len(content["sites"]) == 1000
    assert {row["name"]: row["round_s"] is not None for row in content["strategies"]} == dict.fromkeys(
        (row["name"] for row in content["strategies"]), True
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        HETERO,
        (*HETERO, "strategy.placement=planned"),
        ("federation.num_sites=7", "strategy=diloco"),  # 16 experts do not divide among 7
        ("federation.num_sites=1", "strategy.overlap=1"),
        ("federation.num_sites=64", "strategy.overlap=8"),
    ],
    ids=" ".join,
)
def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = tmp_path / "plan.png"
    content = plan_json(capsys, *overrides, "--picture", str(path))
    assert content["picture"] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_where_the_picture_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["plan", f"--picture={tmp_path}/plan.png"])
    assert capsys.readouterr().out.endswith(f"picture: {tmp_path}/plan.png\n")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fomoe plan")


def test_planning_needs_neither_pytorch_nor_flower() -> None:
    """In a process of its own: imports cannot be taken back. And --json alone is on stdout."""
    program = (
        "import sys; from fomoe_flwr.cli import main; main(['plan', 'federation=hetero', '--json']); "
        "print(sorted({'torch', 'flwr', 'scipy', 'matplotlib', 'wandb'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["plan"]["placement"] == "equal"
    assert done.stderr == "[]\n"


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("fomoe")
    done = subprocess.run(
        [command, "plan", "seed=x"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: seed=x: must be an integer\n"


# ----- the numbers in the picture


def test_points_against_overlap_are_equal_shares_at_each() -> None:
    config = compose(HETERO).config
    for routing in ("skip", "partitioned"):
        points = overlap_points(config, routing)
        assert [point.at for point in points] == [1, 2, 3, 4]
        for point in points:
            plan = make_plan(
                compose([*HETERO, f"strategy.overlap={point.at}", f"strategy.routing={routing}"]).config
            )
            assert point.round_s == plan.round_s
            assert point.site_bytes == plan.sites[0].bytes_down + plan.sites[0].bytes_up
            assert point.memory_bytes == plan.sites[0].memory_bytes


def test_many_overlaps_are_thinned_out_and_the_full_replica_stays() -> None:
    points = overlap_points(compose(["federation.num_sites=100", "model.num_experts=100"]).config, "skip")
    assert len(points) <= 24
    assert points[-1].at == 100


def test_links_a_hundred_times_slower_and_faster() -> None:
    config = compose(HETERO).config
    points = bandwidth_points(config)
    assert points[0].at == pytest.approx(0.01)
    assert points[-1].at == pytest.approx(100)
    assert [point.round_s for point in points] == sorted((point.round_s for point in points), reverse=True)
    assert next(point.round_s for point in points if point.at == 1) == make_plan(config).round_s
    given, scaled = plan_sites(config), plan_sites(scaled_links(config, 10))
    assert [site.up_bytes_per_s for site in scaled] == [10 * site.up_bytes_per_s for site in given]
    assert [site.latency_s for site in scaled] == [site.latency_s for site in given]


def test_links_that_are_assumed_are_scaled_as_well_as_the_servers() -> None:
    config = compose(["plan.server_mbps=2000"]).config  # 500 for each of four
    assert {site.down_bytes_per_s * 8 / 1e6 for site in plan_sites(scaled_links(config, 0.1))} == {50}


def test_memory_lines_of_few_and_of_many() -> None:
    few = memory_lines(plan_sites(compose(HETERO).config))
    assert [says for _, says in few] == [
        "workstation: 91.3 MB",
        "lab-0 and lab-1: 97.2 MB",
        "datacentre: 129 MB",
    ]
    assert memory_lines(plan_sites(compose([]).config)) == []
