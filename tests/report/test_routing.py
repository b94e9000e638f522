"""`routing.png`: a real picture for every kind of run, and in it what the figures say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from rich.console import Console

from fomoe_flwr.report import report
from fomoe_flwr.report.load import Run, load_run
from fomoe_flwr.report.routing import (
    SIZE_INCHES,
    draw_routing,
    headline,
    least_even_layers,
    load_by_round,
    load_map,
    load_spread,
    relative_loads,
    resident_map,
    router_figures,
    spikes,
)
from tests.report.runs import LARGE, check_picture, compose_config, metrics, with_routing, write_run


def a_run(directory: Path, *overrides: str, rounds: int = 3, dead: bool = False) -> Run:
    config = compose_config(*overrides)
    lines = with_routing(metrics(config, rounds), config, dead)
    return load_run(write_run(directory, *overrides, lines=lines))


@pytest.mark.parametrize(
    ("overrides", "rounds"),
    [
        (("federation.num_sites=1", "strategy.overlap=1", "model.num_layers=1"), 1),
        (("model.num_layers=24", "federation.num_sites=16"), 100),
        (LARGE, 2),
    ],
    ids=["one site, one layer, one round", "24 layers, 16 sites, 100 rounds", "64 sites, 512 layers"],
)
def test_every_kind_of_run_has_a_picture(tmp_path: Path, overrides: tuple[str, ...], rounds: int) -> None:
    path = draw_routing(a_run(tmp_path, *overrides, rounds=rounds, dead=True))
    assert path == tmp_path / "routing.png"
    check_picture(path, SIZE_INCHES)


def test_a_run_without_routing_figures_has_no_picture(tmp_path: Path) -> None:
    assert draw_routing(load_run(write_run(tmp_path / "old"))) is None
    assert draw_routing(a_run(tmp_path / "new", rounds=0)) is None
    assert not list(tmp_path.rglob("routing.png"))


def test_report_says_where_the_picture_is(tmp_path: Path) -> None:
    a_run(tmp_path)
    report(tmp_path, console := Console(record=True, width=200))
    assert str(tmp_path / "routing.png") in console.export_text()


def test_load_is_relative_to_an_even_share(tmp_path: Path) -> None:
    run = a_run(tmp_path, "model.num_experts=4", "model.top_k=2", rounds=2)
    assert relative_loads(run).keys() == {1, 2}
    assert relative_loads(run)[1].tolist() == [[0.4, 0.8, 1.2, 1.6]] * 4  # of 100 + 200 + 300 + 400


def test_dead_experts_are_black_and_dying_ones_marked(tmp_path: Path) -> None:
    run = a_run(tmp_path, "model.num_experts=4", "model.num_layers=2", rounds=2, dead=True)
    axes = Figure().subplots()
    load_map(axes, run)
    (image,) = axes.images
    colors = image.to_rgba(image.get_array())
    black = np.all(np.isclose(colors, to_rgba("black")), axis=2)
    assert np.argwhere(black).tolist() == [[1, 0]]
    marks = axes.collections[0].get_offsets()
    assert np.asarray(marks).tolist() == [[1, 1]]  # expert 1 of layer 1: 5 of an even 176
    assert "1 of 8 experts" in headline(run)
    assert "1 dying" in headline(run)


def test_an_even_load_is_white(tmp_path: Path) -> None:
    config = compose_config()
    lines = with_routing(metrics(config, 1), config)
    lines[1]["routing"]["load"] = [[7] * 16] * 4
    axes = Figure().subplots()
    load_map(axes, load_run(write_run(tmp_path, lines=lines)))
    (image,) = axes.images
    assert image.to_rgba(image.get_array()).min() > 0.95


def test_load_by_round_has_a_column_a_round_and_a_gap_where_nothing_was_measured(tmp_path: Path) -> None:
    config = compose_config("model.num_layers=2")
    lines = with_routing(metrics(config, 4), config)
    lines[3]["routing"] |= {"load": None, "load_entropy": None}
    figure = Figure()
    load_by_round(
        figure.add_subfigure(figure.add_gridspec(1, 1)[0]),
        load_run(write_run(tmp_path, "model.num_layers=2", lines=lines)),
    )
    assert len(figure.axes) == 2
    for axes in figure.axes:
        shown = np.ma.masked_invalid(axes.images[0].get_array())
        assert shown.shape == (16, 4)
        assert shown.mask.all(axis=0).tolist() == [False, False, True, False]
        assert axes.images[0].get_extent()[:2] == [0.5, 4.5]


def test_of_many_layers_the_least_even_are_shown() -> None:
    load_LE = np.ones((10, 4))
    load_LE[[1, 3, 4, 6, 8, 9]] = [0.5, 0.5, 0.5, 2.5]
    assert least_even_layers(load_LE) == [1, 3, 4, 6, 8, 9]
    assert least_even_layers(load_LE[:3]) == [0, 1, 2]


def test_of_a_model_with_too_many_experts_the_layers_are_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path, *LARGE, rounds=2, dead=True)
    axes = Figure().subplots()
    load_map(axes, run)
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (512, 2)
    assert shown[:3, 1].tolist() == [0.9, 0.89, 0.88]
    figure = Figure()
    load_by_round(figure.add_subfigure(figure.add_gridspec(1, 1)[0]), run)
    assert np.argwhere(np.asarray(figure.axes[0].images[0].get_array())).tolist() == [[511, 1]]


def test_curves_are_the_figures_by_round(tmp_path: Path) -> None:
    run = a_run(tmp_path, rounds=2, dead=True)
    spread, routers, jumps = Figure().subplots(1, 3)
    load_spread(spread, run)
    mean, bound = spread.lines
    assert list(mean.get_ydata()) == [0.9, 0.9]
    assert list(bound.get_ydata()) == [0.75, 0.75]  # as if 8 of 16 experts were used: log 8 / log 16
    heights = spread.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.87, 0.9))
    router_figures(routers, run)
    assert [list(line.get_ydata()) for line in routers.lines] == [
        [pytest.approx(0.7), 0.75],
        [0.1] * 2,
        [0.3, 0.15],
        [0.01, 0.02],
    ]
    spikes(jumps, run)
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in jumps.patches] == [(2.0, 0.1)]


def test_resident_map_is_sites_by_layers(tmp_path: Path) -> None:
    axes = Figure().subplots()
    run = a_run(tmp_path, "federation=labs", rounds=2)
    resident_map(axes, run)
    shares = [[site.resident_share] * 4 for site in run.rounds[-1].sites]
    assert np.asarray(axes.images[0].get_array()).tolist() == shares
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["datacentre", "lab-0", "lab-1", "workstation"]


def test_a_run_in_which_nothing_was_defined_has_a_picture(tmp_path: Path) -> None:
    """As if no site had reported anything."""
    config = compose_config()
    lines = with_routing(metrics(config, 2), config)
    for line in lines:
        empty: dict[str, Any] = dict.fromkeys(line["routing"])
        by_layer = dict.fromkeys(line["routing"]["by_layer"], [None] * 4)
        line["routing"] = empty | {"by_layer": by_layer, "residents": {}}
    assert draw_routing(load_run(write_run(tmp_path, lines=lines)))
