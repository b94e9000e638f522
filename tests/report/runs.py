"""Writes run directories as a finished run would leave them."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from omegaconf import OmegaConf

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.placement import draw_for_round, draw_placement
from fomoe_flwr.plan.rivals import compare_strategies
from fomoe_flwr.records import NAME as PLACEMENTS
from fomoe_flwr.records import append_placement
from fomoe_flwr.report.picture import DPI

HEADERS = 1000  # bytes a site and round that are not tensors
LARGE = ("model=xxl", "federation.num_sites=64", "strategy.overlap=8")


@cache
def compose_config(*overrides: str) -> RunConfig:
    return compose(("train.local_steps=50", *overrides)).config  # figures in the tests are for K = 50


def metrics(config: RunConfig, rounds: int, val: bool = True) -> list[dict[str, Any]]:
    """Round 0 and `rounds` rounds of 10 s, with bytes as by formula plus headers, evenly up and down."""
    sites = config.federation.sites
    payload = round(compare_strategies(config)[0].site_bytes)
    tokens = config.train.local_steps * config.train.batch_size * config.train.seq_len
    held = config.overlap / len(sites)
    lines = []
    for number in range(rounds + 1):
        loss = 2 + 3.5 * math.exp(-number / 4)
        share = held + (1 - held) * 0.3 * (1 - math.exp(-number / 5))
        site_rows = [
            {
                "site": site.name,
                "tokens": tokens,
                "train_loss": loss + 0.3,
                "bytes_down": payload // 2 + HEADERS // 2,
                "bytes_up": payload // 2 + HEADERS // 2,
                "tokens_per_second": (1000 + 150 * math.sin(number)) * site.speed * (1 + index / 20),
                "resident_share": share + 0.01 * index / len(sites),
            }
            for index, site in enumerate(sites)
        ]
        trained = number > 0
        dense = round(0.2 * payload) * len(sites)
        lines.append(
            {
                "round": number,
                "committed": True,
                "failures": {},
                "refused": {},
                "tokens": number * tokens * len(sites),
                "train_loss": loss + 0.3 if trained else None,
                "val_loss": loss if val else None,
                "val_bpb": loss / math.log(2) if val else None,
                "bytes_down": (payload + HEADERS) // 2 * len(sites) if trained else 0,
                "bytes_up": (payload + HEADERS) // 2 * len(sites) if trained else 0,
                "bytes_by_class": {
                    "dense": dense if trained else 0,
                    "expert": payload * len(sites) - dense if trained else 0,
                    "other": HEADERS * len(sites) if trained else 0,
                },
                "resident_share": share if trained else None,
                "seconds": {
                    "round": 10.0 if trained else 1.5,
                    "train": 8.0,
                    "wire": 1.0,
                    "aggregate": 0.2,
                    "evaluate": 0.5,
                    "checkpoint": 0.3,
                },
                "sites": site_rows if trained else [],
                "unknown": "key",
            }
        )
    return lines


def with_routing(lines: list[dict[str, Any]], config: RunConfig, dead: bool = False) -> list[dict[str, Any]]:
    """The lines with routing figures as a run writes them.

    Every expert has 100 assignments more than the one before it; with `dead`, expert 0 of the last layer has none
    in the last round, and expert 1 a few.
    """
    layers, experts = config.model.num_layers, config.model.num_experts
    for line in lines:
        number = line["round"]
        load = [[100 * (expert + 1) for expert in range(experts)] for _ in range(layers)]
        if dead and number == lines[-1]["round"]:
            load[-1][:2] = [0, 5]
        by_layer = {
            "load_entropy": [0.9 - 0.01 * layer for layer in range(layers)] if number else [None] * layers,
            "expert_similarity": [0.01 * number] * layers,
            "dead_experts": [0] * (layers - 1) + [int(dead and number == lines[-1]["round"])],
        }
        line["routing"] = {
            "load_entropy": 0.9 if number else None,
            "load_cv": 0.4 if number else None,
            "dead_experts": int(dead and number == lines[-1]["round"]) if number else None,
            "agreement": 0.8 - 0.1 / number if number else None,
            "js_distance": 0.1 if number else None,
            "drift": 0.3 / number if number else None,
            "expert_similarity": 0.01 * number,
            "spike": 0.1 if number > 1 else None,
            "resident_share_by_layer": [line["resident_share"]] * layers,
            "by_layer": by_layer,
            "load": load if number and layers * experts <= 4096 else None,
            "residents": {site["site"]: [site["resident_share"]] * layers for site in line["sites"]},
        }
    return lines


def write_run(
    directory: Path,
    *overrides: str,
    rounds: int = 3,
    val: bool = True,
    lines: list[dict[str, Any]] | None = None,
) -> Path:
    """A run directory, with `lines` instead of made-up metrics if they are given."""
    config = compose_config(*overrides)
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), directory / "config.yaml")
    records = metrics(config, rounds, val) if lines is None else lines
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    model, strategy = config.model, config.strategy
    names = [site.name for site in config.federation.sites]
    (directory / PLACEMENTS).unlink(missing_ok=True)
    before = None
    for number in range(1, records[-1]["round"] + 1):
        draw = draw_for_round(strategy.placement, strategy.reshuffle_every, number)
        if draw != before:
            sizes = (len(names), model.num_experts, config.overlap, model.num_layers)
            placement = draw_placement(*sizes, config.seed, draw)
            append_placement(
                directory, number, {name: placement.residents(site) for site, name in enumerate(names)}
            )
            before = draw
    return directory


def check_picture(path: Path, size_inches: tuple[float, float]) -> None:
    """A picture of this size with something in each quarter and nothing cut off at its edges."""
    dark = imread(path)[:, :, :3].min(axis=2) < 0.8
    height, width = dark.shape
    assert (width, height) == tuple(round(side * DPI) for side in size_inches)
    for half in (dark[: height // 2], dark[height // 2 :]):
        assert half[:, : width // 2].any()
        assert half[:, width // 2 :].any()
    assert not np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).any()
