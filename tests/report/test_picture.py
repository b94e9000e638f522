"""A picture for every kind of run: a real PNG, of the size asked for, with something in every panel."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fomoe_flwr.errors import RunError
from fomoe_flwr.report.load import Run, load_run
from fomoe_flwr.report.picture import (
    SIZE_INCHES,
    draw,
    expert_map,
    headline,
    losses,
    resident_share,
    save_figure,
    speed,
    traffic,
)
from tests.report.runs import LARGE, check_picture, compose_config, metrics, write_run


def a_run(directory: Path, *overrides: str, rounds: int = 3, val: bool = True) -> Run:
    return load_run(write_run(directory, *overrides, rounds=rounds, val=val))


@pytest.mark.parametrize(
    ("overrides", "rounds", "val"),
    [
        (("federation=labs",), 12, True),
        (("strategy=ddp",), 100, False),
        (("federation.num_sites=1", "strategy.overlap=1", "model.num_layers=1"), 0, False),
        (LARGE, 1, True),
    ],
    ids=["usual", "DDP without validation, 100 rounds", "one site, before training", "64 sites, 512 layers"],
)
def test_every_kind_of_run_has_a_picture(
    tmp_path: Path, overrides: tuple[str, ...], rounds: int, val: bool
) -> None:
    path = draw(a_run(tmp_path, *overrides, rounds=rounds, val=val))
    assert path == tmp_path / "report.png"
    check_picture(path, SIZE_INCHES)


def test_loss_panel_draws_what_was_measured(tmp_path: Path) -> None:
    axes = Figure().subplots()
    losses(axes, a_run(tmp_path, rounds=3))
    training, validation = axes.lines
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(validation.get_xdata()) == [0, 1, 2, 3]
    (scale,) = axes.child_axes
    axes.set_ylim(1, 2)
    axes.figure.draw_without_rendering()
    assert scale.get_ylim() == pytest.approx((1.4427, 2.8854), abs=1e-3)  # the made-up text: a byte a token


def test_a_run_that_diverged_can_be_drawn(tmp_path: Path) -> None:
    made = metrics(compose_config(), rounds=2)
    for line in made[1:]:
        line |= {"train_loss": math.nan, "val_loss": math.nan, "val_bpb": math.nan}
    run = load_run(write_run(tmp_path, lines=made))
    losses(axes := Figure().subplots(), run)
    assert len(axes.lines) == 2
    assert "nan" in headline(run)


def test_sites_without_a_measured_time_have_a_picture(tmp_path: Path) -> None:
    made = metrics(compose_config(), rounds=1)
    for site in made[1]["sites"]:
        site["tokens_per_second"] = 0.0
    axes = Figure().subplots()
    speed(axes, load_run(write_run(tmp_path, lines=made)))
    assert axes.get_ylim() == (0, 1)


def test_traffic_panel_stacks_the_measured_classes_per_site(tmp_path: Path) -> None:
    made = metrics(compose_config(), rounds=1)
    made[1] |= {
        "bytes_down": 8_000_000,
        "bytes_up": 4_000_000,
        "bytes_by_class": {"dense": 4_000_000, "expert": 6_000_000, "other": 2_000_000},
    }
    axes = Figure().subplots()
    traffic(axes, load_run(write_run(tmp_path, lines=made)))
    assert axes.get_ylabel() == "MB per round"
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.0, 1.5, 0.5])
    assert [bar.get_y() for bar in axes.patches] == pytest.approx([0.0, 1.0, 2.5])
    (diloco,) = axes.lines  # 9.61 MB by formula; DDP's 481 MB are told in words
    assert list(diloco.get_ydata()) == pytest.approx([9.61, 9.61], abs=0.01)
    assert any("481 MB" in text.get_text() for text in axes.texts)


def test_map_colours_the_cells_that_are_held(tmp_path: Path) -> None:
    axes = Figure().subplots()
    expert_map(axes, a_run(tmp_path, "model.num_layers=2"))
    (mesh,) = axes.collections
    cells = np.asarray(mesh.get_array())
    assert cells.shape == (4 * 2, 16, 3)
    held = (cells != cells.max(axis=(0, 1))).any(axis=2)
    assert held.reshape(4, 2, 16).sum(axis=2).tolist() == [[8, 8]] * 4  # N_le = 16 · 2 / 4
    assert held.reshape(4, 2, 16).sum(axis=0).tolist() == [[2] * 16] * 2  # O_e = 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["site-0", "site-1", "site-2", "site-3"]


def test_map_follows_the_random_placement(tmp_path: Path) -> None:
    def cells(rounds: int) -> list[float]:
        axes = Figure().subplots()
        overrides = ("strategy.placement=random", "strategy.reshuffle_every=2")
        expert_map(axes, a_run(tmp_path, *overrides, rounds=rounds))
        return np.asarray(axes.collections[0].get_array()).tolist()

    assert cells(1) == cells(2)
    assert cells(2) != cells(3)


def test_a_large_map_shows_counts(tmp_path: Path) -> None:
    axes = Figure().subplots()
    expert_map(axes, a_run(tmp_path, *LARGE, rounds=1))
    assert [bar.get_height() for bar in axes.patches] == [512 * 128 * 8 / 64] * 64


def test_few_sites_have_a_line_each_and_many_a_range(tmp_path: Path) -> None:
    few, many = Figure().subplots(1, 2)
    run = a_run(tmp_path / "few", "federation=labs", rounds=2)
    speed(few, run)
    assert [line.get_label() for line in few.lines] == ["datacentre", "lab-0", "lab-1", "workstation"]
    assert list(few.lines[3].get_ydata()) == [record.sites[3].tokens_per_second for record in run.rounds[1:]]
    assert few.get_ylim()[1] > max(few.lines[0].get_ydata())
    run = a_run(tmp_path / "many", "federation.num_sites=16", rounds=2)
    resident_share(many, run)
    shares = [[site.resident_share or 0 for site in record.sites] for record in run.rounds[1:]]
    assert list(many.lines[0].get_ydata()) == pytest.approx([np.mean(here) for here in shares])
    assert list(many.lines[1].get_ydata()) == [2 / 16] * 2  # O_e / M
    heights = many.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((np.min(shares), np.max(shares)))


def test_headline_has_the_figures(tmp_path: Path) -> None:
    text = headline(a_run(tmp_path, rounds=1))
    assert all(figure in text for figure in ("410 k", "5.500", "4.726", "5.42 MB", "1.77x", "88.7x"))


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "report.png").mkdir()
    with pytest.raises(RunError, match=r"report\.png"):
        save_figure(Figure(), tmp_path / "report.png")


def test_a_run_without_recorded_placements_has_no_map(tmp_path: Path) -> None:
    run = a_run(tmp_path, rounds=0)
    axes = Figure().subplots()
    expert_map(axes, run)
    assert not axes.collections
    assert run.placement(0) is None
    assert run.held_share == 2 / 4  # as configured: O_e / M
