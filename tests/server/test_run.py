"""A run around its rounds: what is checked before the first one, and the line of metrics of each."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from fomoe_flwr.checkpoint import (
    checkpoint_path,
)
from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.messages import Reply
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.server.rounds import Round
from fomoe_flwr.server.run import (
    alone_in,
    check_unused,
    metrics_line,
    open_run,
    warn_of_memory,
)
from tests.conftest import Compose
from tests.model.stock_models import stock
from tests.server.federation import config_of


def round_of(config: RunConfig, *replies: Reply) -> Round:
    names = [site.name for site in config.federation.sites]
    current = Round(3, *POLICIES["fixed"](config).intended(3), names)
    current.replies = {names.index(reply.site): reply for reply in replies}
    return current


def test_means_are_weighted_by_tokens_and_every_metric_is_there() -> None:
    """A metric that nobody here knows too; the figures that the server counted are its own."""
    config = config_of()
    current = round_of(
        config,
        Reply("run", 3, "site-2", 300, {"train_loss": 2.0, "seconds": 3.0, "a_new_figure": 7}),
        Reply("run", 3, "site-0", 100, {"train_loss": 4.0, "tokens": 1e9, "site": 5.0, "bytes_up": 1.0}),
    )
    current.evaluations[2] = Reply("run", 3, "site-2", 10, {"val_loss": 9.0})
    current.down.count(2, [{"dense": 10, "expert": 20, "other": 3}], 7)
    current.up.count(2, [{"dense": 1, "expert": 2, "other": 3}], 4)
    current.fail(1, "lost")
    line = json.loads(json.dumps(metrics_line(current, 1000, 1.5, 3.0, {"round": 5.0})))
    assert (line["round"], line["tokens"], line["val_loss"]) == (3, 1000, 1.5)
    assert line["train_loss"] == (300 * 2 + 100 * 4) / 400
    assert line["val_bpb"] == pytest.approx(1.5 / math.log(2) / 3)
    assert (line["bytes_down"], line["bytes_up"]) == (40, 10)
    assert line["bytes_by_class"] == {"dense": 11, "expert": 22, "other": 17}
    assert line["failures"] == {"site-1": "lost"}
    first, second = line["sites"]
    assert (first["site"], first["tokens"], first["bytes_up"], first["tokens_per_second"]) == (
        "site-0",
        100,
        0,
        0,
    )
    assert second == {
        "site": "site-2", "tokens": 300, "bytes_down": 40, "bytes_up": 10, "tokens_per_second": 100.0,
        "train_loss": 2.0, "seconds": 3.0, "a_new_figure": 7, "val_loss": 9.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"flops": 6.0, "seconds": 3.0}, {"flops_per_second": 2.0}),
        ({"flops": 6.0, "seconds": 3.0, "peak_flops": 8.0}, {"flops_per_second": 2.0, "mfu": 0.25}),
        ({"flops": 6.0, "seconds": 3.0, "peak_flops": 0.0}, {"flops_per_second": 2.0}),
        ({"flops": 6.0}, {}),
        ({"seconds": 3.0}, {}),
    ],
)
def test_speed_is_told_as_far_as_a_site_says_what_it_follows_from(
    metrics: dict[str, float], expected: dict[str, float]
) -> None:
    line = metrics_line(round_of(config_of(), Reply("run", 3, "site-0", 100, metrics)), 1, None, None, {})
    (site,) = line["sites"]
    assert {key: site[key] for key in ("flops_per_second", "mfu") if key in site} == expected


def test_a_round_of_which_nothing_is_known_has_no_means() -> None:
    line = metrics_line(round_of(config_of("federation.num_sites=2")), 0, None, None, {})
    assert line["train_loss"] is line["val_loss"] is line["val_bpb"] is None
    assert line["sites"] == []


def test_a_run_does_not_begin_where_another_one_lives(small: Compose) -> None:
    composed = small()
    check_unused(composed)
    checkpoint_path(composed.run_dir, 1).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*resume="):
        check_unused(composed)


def test_one_process_at_a_time_works_in_a_run_directory(tmp_path: Path) -> None:
    """Also before the first checkpoint, and whether it is begun or resumed."""
    with alone_in(tmp_path / "run"):
        with (
            pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*another process"),
            alone_in(tmp_path / "run"),
        ):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "run"):
        pass


def test_a_run_that_ended_before_its_first_checkpoint_may_be_begun_again(small: Compose) -> None:
    """It cannot be resumed. What it wrote is kept aside."""
    composed = small()
    (composed.run_dir / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "placements.jsonl"):
        (composed.run_dir / name).write_text("old\n")
    with open_run(composed):
        pass
    assert (composed.run_dir / "metrics.jsonl").read_text() == ""
    assert not (composed.run_dir / "placements.jsonl").exists()
    assert (composed.run_dir / "placements.jsonl.before").read_text() == "old\n"


def test_a_site_that_is_given_more_than_it_has_is_named(
    small: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(
        "federation.sites=[{name:large,memory_gib:1},{name:small,memory_gib:0.0006}]",
        "federation.num_sites=2",
    ).config
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        warn_of_memory(make_plan(config), config)
    (line,) = caplog.messages
    assert "small" in line
    assert "memory_gib=0.0006" in line


def test_groups_of_experts_that_the_routing_drops_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    hf = stock("deepseek_v3").hf
    (tmp_path / "config.json").write_text(json.dumps(hf))
    composed = compose(
        [
            "model=hf", f"model.path={tmp_path}", "model.init=random", "federation.num_sites=2", "strategy.overlap=1",
            "strategy.routing=partitioned", "train.eval_batches=0", "wandb.mode=disabled",
            f"hydra.run.dir={tmp_path / 'run'}",
        ]
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="fomoe"), open_run(composed):
        pass
    (line,) = (line for line in caplog.messages if "n_group" in line)
    assert line.endswith("strategy.routing=skip keeps them")
