"""The Strategy: holders only, any order of arrival, true byte counts, and what happens when sites fail."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from clients.app import app as real_client_app
from fomoe_flwr import evaluation as evaluation_module
from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.compose import Composed
from fomoe_flwr.config import RunConfig, SiteConfig
from fomoe_flwr.messages import Reply, Task
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.model.spec import expert_of
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server import health as health_module
from fomoe_flwr.server import run as run_module
from strategies.fomoe import FoMoE
from strategies.local_grid import LocalGrid
from strategies.packing import named_from_flower
from tests.conftest import Compose
from tests.server.federation import config_of
from tests.strategies.helpers import answering, composed_anew, metrics, new_dir, run, without_times


def start_state(composed: Composed) -> dict[str, Tensor]:
    config = composed.config
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    return initial_state(config.model, everything, config.strategy.routing, config.seed)


def final_state(composed: Composed) -> dict[str, Tensor]:
    return read_checkpoint(checkpoint_path(composed.run_dir, composed.config.train.rounds)).parameters


def site_number(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every site answers with 2^site everywhere, so that a mean tells who was in it."""
    return {name: torch.full_like(tensor, 2.0**task.deal.place) for name, tensor in shard.items()}


AVERAGE = (
    "strategy.outer=average",
    "strategy.up=fp32",
    "strategy.down=fp32",
    "train.rounds=1",
    "train.eval_batches=0",
)


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_each_expert_averages_its_holders_and_nobody_else(small: Compose, routing: str) -> None:
    composed = small(*AVERAGE, "strategy.overlap=2", f"strategy.routing={routing}", "federation.num_sites=4")
    start, placement = start_state(composed), FoMoE(composed.config).server.policy.intended(1).placement
    run(composed, answering(site_number))
    for name, value in final_state(composed).items():
        expert = expert_of(name)
        holders = range(4) if expert is None else placement.holders(*expert)
        assert len(holders) == (4 if expert is None else 2)
        expected = start[name] - sum(2.0**site for site in holders) / len(holders)
        torch.testing.assert_close(value, expected, msg=name)


def test_the_mean_is_weighted_by_the_examples_a_site_reports(small: Compose) -> None:
    composed = small(*AVERAGE, "strategy.overlap=2", "federation.num_sites=2")
    run(composed, answering(site_number, examples=lambda task: 1 + 2 * task.deal.place))
    name = "model.norm.weight"
    assert torch.allclose(final_state(composed)[name], start_state(composed)[name] - (1 * 1 + 3 * 2) / 4)


def test_a_name_nobody_returned_stays_as_it_was(small: Compose) -> None:
    composed = small("strategy.up=fp32", "strategy.down=fp32", "train.rounds=2", "train.eval_batches=0")
    kept = ("model.norm.weight", "model.layers.0.mlp.experts.3.up_proj.weight")

    def all_but_two(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        update = site_number(task, shard)
        return {name: value for name, value in update.items() if task.round == 1 or name not in kept}

    run(composed, answering(all_but_two))
    first = read_checkpoint(checkpoint_path(composed.run_dir, 1))
    last = read_checkpoint(checkpoint_path(composed.run_dir, 2))
    for name in kept:
        momentum = f"momentum_buffer/{name}"
        assert torch.equal(last.parameters[name], first.parameters[name])
        assert torch.equal(last.outer[momentum], first.outer[momentum])
    other = "model.embed_norm.weight"
    assert not torch.equal(last.parameters[other], first.parameters[other])


class ShuffledGrid(LocalGrid):
    """Hands replies over late and in a different order than they were asked for."""

    rng = random.Random(0)

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        self.rng.shuffle(ids)
        return super().pull_messages(ids) if self.rng.random() < 0.5 else []


def test_the_result_does_not_depend_on_the_order_of_arrival(small: Compose, tmp_path) -> None:
    def noisy(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 * task.round + task.deal.place)
        time.sleep(random.random() * 0.02)
        return {
            name: torch.randn(tensor.shape, generator=generator) * 1e3**task.deal.place
            for name, tensor in shard.items()
        }

    overrides = ("federation.num_sites=8", "strategy.overlap=4", "train.rounds=2", "train.eval_batches=0")
    overrides += ("strategy.norm_bound=0", "strategy.up=fp32", "strategy.down=fp32")
    finals = []
    for index in range(2):
        composed = small(*overrides, run_dir=tmp_path / str(index))
        run(composed, answering(noisy), ShuffledGrid if index else LocalGrid)
        finals.append(final_state(composed))
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


class CountingGrid(LocalGrid):
    """Adds up what really is in the messages, by a way of its own."""

    down: ClassVar[list[int]] = []
    up: ClassVar[list[int]] = []

    @staticmethod
    def length(message: Message) -> int:
        if message.metadata.message_type == "query" or message.has_error():
            return 0
        arrays = [array for record in message.content.array_records.values() for array in record.values()]
        others = [*message.content.config_records.values(), *message.content.metric_records.values()]
        return sum(len(array.data) for array in arrays) + sum(len(record.deflate()) for record in others)

    def push_messages(self, messages):
        messages = list(messages)
        self.down += [self.length(message) for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        self.up += [self.length(reply) for reply in replies]
        return replies


@pytest.mark.parametrize(
    ("outer", "up", "down"), [("nesterov", "int4", "bf16"), ("local_adamw", "fp32", "fp32")]
)
def test_reported_bytes_are_the_lengths_of_the_payloads(
    small: Compose, outer: str, up: str, down: str
) -> None:
    CountingGrid.down, CountingGrid.up = [], []
    composed = small(
        f"strategy.outer={outer}", f"strategy.up={up}", f"strategy.down={down}", "strategy.fraction_evaluate=1.0",
        "strategy.placement=random",
    )  # fmt: skip
    lines = metrics(run(composed, real_client_app, CountingGrid))
    assert sum(line["bytes_down"] for line in lines) == sum(CountingGrid.down) > 0
    assert sum(line["bytes_up"] for line in lines) == sum(CountingGrid.up) > 0
    for line in lines:
        assert sum(line["bytes_by_class"].values()) == line["bytes_down"] + line["bytes_up"]
        if line["round"]:
            assert sum(site["bytes_down"] for site in line["sites"]) == line["bytes_down"]
            assert sum(site["bytes_up"] for site in line["sites"]) == line["bytes_up"]


def messages_of(config: RunConfig) -> list[Message]:
    """What the sites are sent in round 1."""
    sites = len(config.federation.sites)
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    strategy, grid = FoMoE(config), LocalGrid(answering(site_number), sites)
    strategy.load(initial_state(config.model, everything, config.strategy.routing, config.seed))
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    grid.close()
    return messages


@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_the_number_of_objects_does_not_grow_with_the_number_of_experts(overlap: int) -> None:
    counts = set()
    for num_experts in (4, 8, 32):
        config = config_of(f"strategy.overlap={overlap}", f"model.num_experts={num_experts}")
        counts.add(max(len(message.content["arrays"]) for message in messages_of(config)))
    assert len(counts) == 1
    assert counts.pop() <= 1 + overlap


def headers(sites: int) -> list[ConfigRecord]:
    """The ConfigRecords of a round's messages; every site holds all experts, so that the tasks are alike."""
    config = config_of(f"federation.num_sites={sites}", f"strategy.overlap={sites}")
    config.federation.sites = [SiteConfig(name=f"hospital-{index:03d}") for index in range(sites)]
    return [message.content["config"] for message in messages_of(config)]


def test_a_message_tells_a_site_of_no_other_and_does_not_grow_with_the_federation() -> None:
    few, many = headers(3), headers(300)
    assert (len(few), len(many)) == (3, 300)
    lengths = [len(record.deflate()) for record in few + many]
    assert max(lengths) - min(lengths) < 1000
    for records in (few, many):
        for index, record in enumerate(records):
            assert set(re.findall(r"hospital-\d{3}", str(dict(record)))) == {f"hospital-{index:03d}"}


def test_a_bad_site_is_named_and_refused_whole_and_the_others_go_on(small: Compose) -> None:
    """One fails, one sends a tensor that no model has, and one sends a shape that is wrong."""
    unbounded = ("strategy.norm_bound=0", "strategy.clip=0")
    composed = small(*AVERAGE, "strategy.overlap=6", "federation.num_sites=6", *unbounded)

    def spoilt(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        update = site_number(task, shard)
        if task.deal.place == 2:
            raise OSError("disk full")
        if task.deal.place == 3:
            update["model.stranger"] = torch.ones(3)
        if task.deal.place == 4:
            update["model.norm.weight"] = torch.ones(3)
        return update

    line = metrics(run(composed, answering(spoilt)))[-1]
    assert line["failures"].keys() == {"site-2", "site-3", "site-4"}
    assert line["failures"]["site-2"] == "OSError: disk full"
    assert line["refused"] == {"site-3": "unknown_name", "site-4": "shape"}
    assert [site["site"] for site in line["sites"]] == ["site-0", "site-1", "site-5"]
    for name in ("model.norm.weight", "model.embed_norm.weight"):
        expected = start_state(composed)[name] - (1 + 2 + 32) / 3
        torch.testing.assert_close(final_state(composed)[name], expected)


def test_no_site_reports_its_own_weight_in_the_mean_of_the_metrics() -> None:
    """A sum of zero would be a division by zero, and end the run."""
    strategy = FoMoE(config_of())
    replies = {
        0: Reply("run", 1, "site-0", 30, {"loss": 1.0, "num-examples": -10.0}),
        1: Reply("run", 1, "site-1", 10, {"loss": 5.0, "num-examples": 10.0}),
    }
    assert strategy._mean_metrics(strategy.train_metrics_aggr_fn, replies)["loss"] == pytest.approx(2.0)


def test_a_site_that_never_answers_does_not_hold_the_run_for_ever(small: Compose) -> None:
    composed = small(*AVERAGE, "strategy.timeout_s=1.0")

    def first_is_late(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        if task.deal.place == 0:
            time.sleep(1.5)
        return site_number(task, shard)

    assert metrics(run(composed, answering(first_is_late)))[-1]["failures"] == {
        "site-0": "no reply within 1 s"
    }


def test_sites_evaluate_their_residents_when_asked(small: Compose) -> None:
    composed = small("strategy.fraction_evaluate=1.0", "train.eval_batches=0", "train.rounds=1")
    first, last = metrics(run(composed))
    losses = [site["val_loss"] for site in last["sites"]]
    assert len(losses) == 4
    assert all(1.0 < loss < 7.0 for loss in losses)
    assert first["val_loss"] is None
    assert last["val_loss"] == pytest.approx(sum(losses) / 4)


def test_a_server_in_files_that_evaluates_nothing_never_has_the_whole_model(
    small: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(*_: object) -> None:
        raise AssertionError("the whole model in memory")

    for module in (run_module, health_module, evaluation_module):
        monkeypatch.setattr(module, "build", whole)
    monkeypatch.setattr(FoMoE, "arrays", whole)
    composed = small("checkpoint.state=files", "train.eval_batches=0", "train.rounds=1")
    line = metrics(run(composed))[-1]
    assert line["committed"]
    assert line["routing"]["expert_similarity"] is not None


def test_an_evaluation_may_see_more_tokens_than_a_round_trains_on(small: Compose) -> None:
    """One local step, and eight batches of validation text."""
    composed = small(
        "strategy=ddp", "strategy.fraction_evaluate=1.0", "train.eval_batches=8", "train.rounds=1"
    )
    line = metrics(run(composed))[-1]
    assert line["refused"] == {}
    assert all("val_loss" in site for site in line["sites"])


def test_fraction_train_samples_sites_from_the_seed() -> None:
    def asked() -> list[list[int]]:
        strategy = foreign_strategy("strategy.fraction_train=0.5", "strategy.overlap=4")
        grid = LocalGrid(answering(site_number), 4)
        strategy.load(foreign_model())
        sites = []
        for number in range(1, 7):
            strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            sites.append(strategy.round.asked)
        grid.close()
        return sites

    sites = asked()
    assert sites == asked()
    assert all(len(chosen) == 2 for chosen in sites)
    assert len({tuple(chosen) for chosen in sites}) > 2


def test_random_placement_moves_experts_and_the_same_run_twice_gives_the_same_lines(
    small: Compose, tmp_path
) -> None:
    composed = composed_anew(small, tmp_path, "strategy.placement=random", "strategy.overlap=2")
    lines = metrics(run(composed))
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    policy = FoMoE(composed.config).server.policy
    first, second = (policy.intended(round_).placement.holds_LEM for round_ in (1, 2))
    assert (first != second).any()
    again = run(dataclasses.replace(composed, run_dir=new_dir(tmp_path)))
    assert without_times(metrics(again)) == without_times(lines)


# ----- as a library, in a ServerApp that is not ours


def foreign_model() -> dict[str, Tensor]:
    return {"model.norm.weight": torch.zeros(4)} | {
        f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.zeros(2, 4) for e in range(8)
    }


def foreign_strategy(*overrides: str, **arguments: Any) -> FoMoE:
    return FoMoE(
        config_of(
            "strategy.outer=average", "strategy.up=fp32", "strategy.down=fp32", "model.num_layers=1",
            "strategy.overlap=2", *overrides
        ),
        **arguments,
    )  # fmt: skip


def test_somebody_elses_server_app_can_use_the_strategy() -> None:
    seen = []

    def weigh(records: list[RecordDict], key: str) -> MetricRecord:
        seen.append(key)
        return MetricRecord({"sites": len(records)})

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = foreign_strategy(train_metrics_aggr_fn=weigh, fraction_evaluate=0.0)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(foreign_model()),
            num_rounds=2,
            train_config=ConfigRecord({"theirs": 7}),
            evaluate_fn=lambda round_, arrays: MetricRecord(
                {"norm": float(arrays["model.norm.weight"].numpy().sum())}
            ),
        )
        seen.append(result)

    theirs = []

    def answer(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(sorted(shard))
        return {name: torch.ones_like(tensor) for name, tensor in shard.items()}

    server_app(LocalGrid(answering(answer), 4), Context(1, 1, {}, RecordDict(), {}))
    result = seen[-1]
    assert seen[:-1] == ["num-examples"] * 2
    assert {round_: record["sites"] for round_, record in result.train_metrics_clientapp.items()} == {
        1: 4,
        2: 4,
    }
    assert [record["norm"] for record in result.evaluate_metrics_serverapp.values()] == [0.0, -4.0, -8.0]
    assert all((array.numpy() == -2).all() for array in result.arrays.values())
    assert all(len(names) == 1 + 4 for names in theirs)


def test_flowers_own_loop_can_drive_the_strategy() -> None:
    """`Strategy.start` of Flower instead of ours: our methods keep its contract."""
    strategy = foreign_strategy()
    grid = LocalGrid(answering(lambda task, shard: {n: torch.ones_like(t) for n, t in shard.items()}), 4)
    result = Strategy.start(strategy, grid, ArrayRecord(foreign_model()), num_rounds=2)
    grid.close()
    assert all((array.numpy() == -2).all() for array in result.arrays.values())


def test_user_keys_and_server_round_reach_the_client() -> None:
    configs = []

    class Spy(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            configs.extend(m.content["their-config"] for m in messages if m.metadata.message_type == "train")
            assert len({id(config) for config in configs}) == len(configs), (
                "Flower fails on a shared ConfigRecord"
            )
            return super().push_messages(messages)

    strategy = foreign_strategy(arrayrecord_key="their-arrays", configrecord_key="their-config")
    strategy.load(foreign_model())
    grid = Spy(answering(site_number), 4)
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord({"theirs": 7}), grid)
    assert isinstance(messages, list), "a generator works in simulation and fails in a deployment"
    grid.push_messages(messages)
    grid.close()
    assert [(config["theirs"], config["server-round"]) for config in configs] == [(7, 1)] * 4
    assert set(named_from_flower(messages[0].content["their-arrays"])) <= set(foreign_model())
