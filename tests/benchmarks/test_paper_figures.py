"""The modelled figures: the numbers they draw, and that there is a whole picture of each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.paper.figures import (
    BytesRow,
    FlopsRow,
    HoursRow,
    SitesRow,
    bytes_rows,
    figure_8,
    figure_9,
    figure_10,
    figure_sites,
    flops_rows,
    hours_rows,
    paper_models,
    sites_rows,
)
from benchmarks.paper.scale import GBPS, SITES, Scale, Strategy, throughput
from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import RunError


@pytest.fixture(scope="module")
def models() -> list[ModelConfig]:
    return paper_models()


@pytest.fixture(scope="module")
def flops(models: list[ModelConfig]) -> dict[tuple[str, str, int], float]:
    return {row[:3]: row.flops for row in flops_rows(models)}


@pytest.fixture(scope="module")
def large_bytes(models: list[ModelConfig]) -> list[BytesRow]:
    return bytes_rows(models[2])


@pytest.fixture(scope="module")
def hours() -> list[HoursRow]:
    return hours_rows(compose(["model=xl", "model.num_layers=64"]).config.model)


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "row_type", "count"),
    [(figure_8, FlopsRow, 5 * 2 * 8), (figure_9, BytesRow, 5 * 2 * 20), (figure_10, HoursRow, 2 * 4 * 10),
     (figure_sites, SitesRow, (8 + 3) * 4 * 8)],
)  # fmt: skip
def test_a_picture_and_its_rows(
    tmp_path: Path, figure: Callable[[Path], list[Any]], row_type: type, count: int
) -> None:
    path = tmp_path / "figure.png"
    rows = figure(path)
    assert len(set(rows)) == len(rows) == count
    assert all(isinstance(row, row_type) for row in rows)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) < 150_000
    # Ink, but none on the rim: nothing is cut off.
    dark = imread(path)[:, :, :3].min(axis=2) < 0.8
    assert dark.any()
    assert not np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).any()


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^[^\n]*absent/x\.png: cannot write the picture: [^\n]+$"):
        figure_9(tmp_path / "absent" / "x.png")


def test_a_picture_of_other_models(tmp_path: Path) -> None:
    tiny = compose(["model=tiny", "federation.num_sites=4"]).config.model
    assert {row.model for row in figure_8(tmp_path / "8.png", [tiny])} == {"tiny"}
    assert figure_9(tmp_path / "9.png", tiny) == bytes_rows(tiny)
    assert figure_10(tmp_path / "10.png", tiny) == hours_rows(tiny)
    assert figure_sites(tmp_path / "sites.png", Scale(tiny, server_bytes_per_s=None))


# -- figure 8 ------------------------------------------------------------------------------------------------


def test_the_five_models(models: list[ModelConfig]) -> None:
    assert [model.name for model in models] == ["proxy", "medium", "large", "xl", "xxl"]


def test_flops_by_hand(flops: dict[tuple[str, str, int], float]) -> None:
    """large: attention 128·(24·1024² + 6·2048·1024), unembedding 6·200019·1024, experts 128·8·12·1024·128."""
    attention, unembedding = 128 * (24 * 1024**2 + 6 * 2048 * 1024), 6 * 200019 * 1024
    experts, router = 128 * 8 * 12 * 1024 * 128, 128 * 6 * 32 * 1024
    replica = attention + unembedding + experts + router
    assert replica == pytest.approx(7.697e9, rel=1e-4)
    assert flops["large", "skip", 8] == flops["large", "partitioned", 8] == replica
    # O_e = 1: 4 of 32 experts resident; a token finds 1/8 of its choices, or 4 experts of the 8 it may have
    assert flops["large", "skip", 1] == replica - 7 / 8 * experts
    assert flops["large", "partitioned", 1] == replica - experts / 2 - 7 / 8 * router
    # from O_e = 2 on there are k residents, and only the router still shrinks
    assert flops["large", "partitioned", 2] == replica - 3 / 4 * router


def test_more_overlap_is_never_less_work(flops: dict[tuple[str, str, int], float]) -> None:
    for name, routing, _ in flops:
        line = [flops[name, routing, overlap] for overlap in range(1, 9)]
        assert all(less < more for less, more in pairwise(line))


# -- figure 9 ------------------------------------------------------------------------------------------------


def last(rows: list[BytesRow], strategy: str, overlap: int, network: str) -> BytesRow:
    return [row for row in rows if row[:3] == (strategy, overlap, network)][-1]


@pytest.mark.parametrize("network", ["ring", "star"])
def test_the_paper_s_ratios_are_in_the_figure(large_bytes: list[BytesRow], network: str) -> None:
    """With M=4, O_e=2, gamma=1 a star saves by the same factor: (S_d + S_e) / (S_d + S_e/2) both."""
    fomoe = last(large_bytes, "FoMoE", 2, network)
    assert fomoe.tokens == 640 * 1024 * 2048  # the paper's 1.34 B
    diloco, ddp = (last(large_bytes, name, 4, network) for name in ("DiLoCo", "DDP"))
    assert diloco.site_bytes / fomoe.site_bytes == pytest.approx(1.4207, abs=5e-5)
    assert ddp.site_bytes / fomoe.site_bytes == pytest.approx(45.44, abs=0.03)
    assert last(large_bytes, "LocalAdamW", 4, network).site_bytes == 3 * diloco.site_bytes


def test_bytes_by_hand(large_bytes: list[BytesRow]) -> None:
    """large: dense 742,191,104 (embedding, attention, norms), experts with their router rows 1,077,936,128."""
    dense, experts = 200_021 * 1024 + 128 * (4 * 1024**2 + 4 * 1024), 4096 * (2 * 1024 * 128 + 1024)
    rounds = 20
    star = 2 * 2 * (dense + experts / 4) * rounds
    assert last(large_bytes, "FoMoE", 1, "star").site_bytes == star == pytest.approx(80.9e9, rel=1e-3)
    # O_e = 1: nothing to reduce, 3 of 4 residents are new in every round
    ring = 2 * (1.5 * dense + 0.75 * experts / 4) * rounds
    assert last(large_bytes, "FoMoE", 1, "ring").site_bytes == ring == pytest.approx(52.6e9, rel=1e-3)


def test_bytes_a_token_are_what_all_sites_sent_for_it(large_bytes: list[BytesRow]) -> None:
    for row in large_bytes:
        assert row.bytes_a_token == pytest.approx(4 * row.site_bytes / row.tokens)
    assert last(large_bytes, "FoMoE", 2, "ring").bytes_a_token == pytest.approx(229.1, abs=0.05)


def test_bytes_grow_in_proportion_to_tokens(large_bytes: list[BytesRow]) -> None:
    for kind in {row[:3] for row in large_bytes}:
        line = [row.site_bytes / row.tokens for row in large_bytes if row[:3] == kind]
        assert len(line) == 20
        assert line == pytest.approx([line[0]] * 20)


# -- figure 10 -----------------------------------------------------------------------------------------------


def test_hours_by_hand(hours: list[HoursRow]) -> None:
    """Full replica at 1 Gbit/s: compute 18.16 h and a synchronisation of 102 s in each of 894 rounds, 25.3 h."""
    attention, unembedding = 64 * (24 * 2048**2 + 6 * 2048 * 2048), 6 * 200019 * 2048
    experts, router = 64 * 16 * 12 * 2048 * 128, 64 * 6 * 64 * 2048
    compute_h = 60e9 * (attention + unembedding + experts + router) / (32 * 0.4 * 989e12) / 3600
    parameters = 200_021 * 2048 + 64 * (4 * 2048**2 + 4 * 2048) + 64 * 64 * (2 * 2048 * 128 + 2048)
    sync_s = 2 * 7 / 8 * parameters * 2 / 0.125e9 + 0.05
    expected = compute_h + 60e9 / (32 * 1024 * 2048) * sync_s / 3600
    assert expected == pytest.approx(43.47, abs=0.005)
    for routing in ("skip", "partitioned"):
        (row,) = [row for row in hours if row[:3] == (routing, 8, 1)]
        assert row.hours == pytest.approx(expected, rel=1e-12)


def test_the_papers_formula_gives_the_fastest_point_of_its_figure() -> None:
    """5.8e4 s: skip mode, O_e = 1, links that cost nothing."""
    rows = hours_rows(compose(["model=xl", "model.num_layers=64"]).config.model, "paper")
    assert min(row.hours for row in rows) * 3600 == pytest.approx(5.8e4, rel=0.015)
    assert min(rows, key=lambda row: row.hours)[:3] == ("skip", 1, 1000)


def test_more_bandwidth_is_never_slower_and_more_overlap_never_faster(hours: list[HoursRow]) -> None:
    table = {row[:3]: row.hours for row in hours}
    for routing, overlap, gbps in table:
        faster = [table[key] for key in table if key[:2] == (routing, overlap) and key[2] > gbps]
        assert all(other < table[routing, overlap, gbps] for other in faster)
        wider = [table[key] for key in table if key[::2] == (routing, gbps) and key[1] > overlap]
        assert all(other > table[routing, overlap, gbps] for other in wider)


# -- the scale sweep -----------------------------------------------------------------------------------------


def test_the_rows_of_the_sweep(models: list[ModelConfig]) -> None:
    scale = Scale(models[-1])
    rows = sites_rows(scale)
    assert {row.point.num_sites for row in rows} == set(SITES)
    assert {row.point.bytes_per_s for row in rows} == {0.1 * GBPS, GBPS, 10 * GBPS, 100 * GBPS}
    assert {row.point.strategy for row in rows if row.limited} == set(Strategy)
    free = [row.point for row in rows if not row.limited]
    assert {point.strategy for point in free} == {Strategy.DILOCO, Strategy.PARTITIONED, Strategy.SKIP}
    for point in free:
        limited = throughput(scale, point.strategy, point.num_sites, point.bytes_per_s)
        assert SitesRow(True, limited) in rows
        assert point.tokens_per_s >= limited.tokens_per_s
