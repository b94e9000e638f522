"""`fomoe plan model=hf`: who can hold what of public models, and a stock architecture wherever a plan speaks of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.room import fitting
from fomoe_flwr.cli import main
from fomoe_flwr.compose import compose
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.command import look_ahead
from fomoe_flwr.plan.planner import make_plan, plan_placement
from fomoe_flwr.plan.rivals import too_small
from fomoe_flwr.plan.show import assumptions_in_words
from tests.model.configs import FOLDER, GPT_OSS, LITE, MIXTRAL, OLMOE, QWEN, V3, config_of, overrides

BY_MEMORY = ("strategy.placement=memory", "strategy.overlap=1")


def sites(folder: Path, memories_gib: Sequence[float | str]) -> list[str]:
    """A federation of sites with so much memory, and what else is said of them."""
    lines = [f"- {{name: s{index}, memory_gib: {memory}}}" for index, memory in enumerate(memories_gib)]
    file = folder / "sites.yaml"
    file.write_text("\n".join(["sites:", *lines]))
    return ["federation=file", f"federation.path={file}"]


@pytest.mark.parametrize(
    ("name", "memory_gib", "residents", "number"),
    [(OLMOE, 24, 8, 8), (LITE, 48, 6, 11), (GPT_OSS, 80, 4, 8), (QWEN, 80, 13, 10)],
)
def test_so_many_sites_hold_each_expert_once_and_one_fewer_do_not(
    tmp_path: Path, name: str, memory_gib: int, residents: int, number: int
) -> None:
    config = config_of(name, *sites(tmp_path, [memory_gib] * number), *BY_MEMORY)
    # Activations take the room of one expert a layer, or of none.
    assert residents <= fitting(config, memory_gib) <= residents + 1
    outlook = look_ahead(config)
    assert max(site.experts_per_layer for site in outlook.plan.sites) <= residents
    assert too_small(outlook.plan, outlook.sites) == ()
    assert plan_placement(config, outlook.plan).holds_LEM.any(axis=2).all()

    federation = dataclasses.replace(config.federation, sites=config.federation.sites[1:])
    with pytest.raises(ConfigError) as raised:
        make_plan(dataclasses.replace(config, federation=federation))
    needed, room = config.model.num_experts, residents * (number - 1)
    assert str(raised.value) == (
        f"plan.holders=1: {needed} experts a layer must be held, and all sites' memory together has room for {room}"
    )


def test_the_command_says_it_in_words_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *overrides(QWEN), *sites(tmp_path, [80] * 10), *BY_MEMORY]
    main(arguments)
    assert "hf (qwen3_moe): 30.5 B parameters, 1.53 B dense, 29.0 B in experts" in capsys.readouterr().out
    main([*arguments, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"]["params_total"] == 30_532_122_624
    assert [site["experts_per_layer"] for site in shown["sites"]] == [13] * 10


def test_with_too_little_for_the_dense_part_there_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        make_plan(config_of(QWEN, "strategy.routing=skip", *sites(tmp_path, [24, 48])))
    # 1,541,093,376 dense parameters and a router, 48 experts of 4,718,592, 18 bytes each.
    line = str(raised.value)
    assert line.startswith(
        "federation: site s0 has memory_gib=24, but the dense part and one expert a layer need "
    )
    assert ", 29.63 of them for weights, gradients, moments and shard; train.micro_batches and " in line


def test_stand_ins_are_at_every_site(capsys: pytest.CaptureFixture[str]) -> None:
    """Two matrices of rank 8 and a bias for each expert: 48 layers x 128 experts x 17 x 2048 numbers."""
    given = [*overrides(QWEN), "federation.num_sites=4", "strategy.overlap=1"]
    plain, more = (look_ahead(compose([*given, f"model.standins={rank}"]).config) for rank in (0, 8))
    for site, other in zip(plain.plan.sites, more.plan.sites, strict=True):
        assert other.state_bytes - site.state_bytes == 18 * 213_909_504
        assert other.bytes_down - site.bytes_down == other.bytes_up - site.bytes_up == 2 * 213_909_504
    main(["plan", *given, "model.standins=8"])
    shown = capsys.readouterr().out
    assert "30.5 B parameters" in shown
    assert "214 M in stand-ins, at every site" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "changed", "line"),
    [
        (LITE, {"first_k_dense_replace": 27}, "model.hf: no layer has experts"),
        (QWEN, {"mlp_only_layers": list(range(48))}, "model.hf: no layer has experts"),
        (MIXTRAL, {"num_local_experts": 0}, "model.hf.num_local_experts=0: from 1 to 16384 are allowed"),
        (OLMOE, None, "has no config.json; give the folder of a Hugging Face checkpoint"),
    ],
)
def test_what_is_no_mixture_of_experts_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, changed: dict[str, Any] | None, line: str
) -> None:
    if changed is not None:
        values = json.loads((FOLDER / name / "config.json").read_text()) | changed
        (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as exited:
        main(["plan", "model=hf", f"model.path={tmp_path}"])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith(f"{line}\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "routing", "dropped"),
    [(V3, "partitioned", True), (V3, "skip", False), (LITE, "partitioned", False)],
)
def test_groups_that_partitioned_routing_drops_are_said(name: str, routing: str, dropped: bool) -> None:
    config = config_of(name, f"strategy.routing={routing}", "federation.num_sites=2", "strategy.overlap=1")
    said = [line for line in look_ahead(config).advice if "n_group" in line]
    assert [
        line.startswith("strategy.routing=partitioned: a site chooses without the groups of deepseek_v3")
        for line in said
    ] == [True] * dropped
    assert all("strategy.routing=skip keeps them" in line for line in said)


@pytest.mark.parametrize("placement", ["planned", "memory"])
def test_a_partitioned_router_that_ranks_by_two_has_two_to_choose_from(
    tmp_path: Path, placement: str
) -> None:
    # The second has room for two, and so slow a link that one would be better.
    federation = sites(tmp_path, [13000, "400, up_mbps: 10"])
    config = config_of(V3, "strategy.routing=partitioned", f"strategy.placement={placement}", *federation)
    assert make_plan(config).sites[1].experts_per_layer == 2
    less = dataclasses.replace(config.plan, bytes_per_parameter=20)
    # 17.0 B dense, and 58 layers with twice 44.0 M and a row of the router.
    with pytest.raises(
        ConfigError, match=r"the dense part and 2 experts a layer need .* GiB, 412 of them for"
    ):
        make_plan(dataclasses.replace(config, plan=less))


def test_renormalised_is_planned_like_skip() -> None:
    run = config_of(
        OLMOE, "federation.num_sites=4", "strategy.overlap=2", "strategy.routing=skip_renormalised"
    )
    other = config_of(OLMOE, "federation.num_sites=4", "strategy.overlap=2", "strategy.routing=skip")
    outlook, skip = look_ahead(run), look_ahead(other)
    # Weights are kept before and after: a few bytes for each choice.
    for site, other in zip(outlook.plan.sites, skip.plan.sites, strict=True):
        assert dataclasses.replace(site, memory_bytes=other.memory_bytes) == other
        assert 1 < site.memory_bytes / other.memory_bytes < 1.01
    assert [line for line in outlook.advice if "memory_gib" not in line] == [
        line for line in skip.advice if "memory_gib" not in line
    ]
    assert [row.name for row in outlook.rows] == [
        row.name.replace(", skip", ", skip_renormalised") for row in skip.rows
    ]
    assert [row.this_run for row in outlook.rows] == [row.this_run for row in skip.rows]
    assert (
        "90.0 % less in skip_renormalised mode or 20.0 % less in partitioned mode"
        in (assumptions_in_words(outlook)[-1])
    )
