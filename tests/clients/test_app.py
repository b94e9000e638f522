"""The ClientApp answers train, evaluate and query, and says clearly what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from clients.app import app
from fomoe_flwr.bundles import as_array
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError, WireError
from fomoe_flwr.messages import Reply
from fomoe_flwr.model.build import initial_state
from strategies.local_grid import LocalGrid
from strategies.packing import named_from_flower
from tests.clients.helpers import bundled, task_of
from tests.conftest import Compose

Ask = Callable[..., Message]


@pytest.fixture
def ask(small: Compose, tmp_path) -> Ask:
    """Send a message to site 1 and return its answer."""
    LocalGrid(app, 1).close()  # Flower lets a Message be made only inside a run

    def send(
        kind: str,
        config: RunConfig,
        node: Mapping[str, str] | None = None,
        shard: dict[str, Tensor] | None = None,
    ) -> Message:
        task = task_of(config, run_dir=str(tmp_path))
        if shard is None:
            shard = initial_state(config.model, task.residents, config.strategy.routing, config.seed)
        arrays = {key: as_array(blob) for key, blob in bundled(shard, config).items()}
        content = RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "config": ConfigRecord({"task": task.to_json()}),
            }
        )
        context = Context(1, 7, {"partition-id": 1, **(node or {})}, RecordDict(), {})
        return app(Message(content, 7, kind), context)

    return send


def reply_in(content: RecordDict) -> Reply:
    return Reply.from_json(str(content["config"]["reply"]))


def test_train_answers_with_the_pseudo_gradient_of_what_the_site_holds(ask: Ask, small: Compose) -> None:
    config = small("strategy.up=fp32", "strategy.down=fp32", "strategy.overlap=2").config
    content = ask("train", config).content
    residents = task_of(config).residents
    shard = initial_state(config.model, residents, "skip", config.seed)
    update = named_from_flower(content["arrays"])
    assert update.keys() == shard.keys()
    assert all(update[name].shape == shard[name].shape for name in shard)
    assert any(value.abs().max() > 0 for value in update.values())
    reply, train = reply_in(content), config.train
    metrics = reply.metrics
    assert reply.num_examples == train.local_steps * train.batch_size * train.seq_len
    assert 0 < metrics["resident_share"] < 1
    load_LE = reply.load_LE
    resident = sum(load_LE[layer][expert] for layer, experts in enumerate(residents) for expert in experts)
    assigned = (
        train.local_steps * train.batch_size * train.seq_len * config.model.top_k * config.model.num_layers
    )
    assert sum(map(sum, load_LE)) == assigned
    assert resident == pytest.approx(metrics["resident_share"] * assigned)


def test_a_pseudo_gradient_is_a_descent_direction(ask: Ask, small: Compose) -> None:
    """Sent minus returned: subtracting it lowers the loss."""
    config = small(
        "strategy.up=fp32", "strategy.down=fp32", "train.local_steps=20", "train.warmup_steps=0"
    ).config
    residents = task_of(config).residents
    shard = initial_state(config.model, residents, "skip", config.seed)
    update = named_from_flower(ask("train", config).content["arrays"])
    moved = {name: value - update[name] for name, value in shard.items()}
    before = reply_in(ask("evaluate", config, shard=shard).content).metrics["val_loss"]
    after = reply_in(ask("evaluate", config, shard=moved).content).metrics["val_loss"]
    assert after < before - 0.5


def test_query_tells_the_site(ask: Ask, small: Compose) -> None:
    answer = ask("query", small().config, {"site": "lab"}).content["config"]
    assert (answer["site"], answer["partition-id"]) == ("lab", 1)


@pytest.mark.parametrize(
    ("kind", "node", "error", "reason"),
    [
        ("train", {"site": "other"}, ConfigError, "site=other: was given the work of site site-1"),
        ("train", {"device": "cuda"}, ConfigError, "PyTorch sees no GPU"),
        ("evaluate", {"data-path": "/no/such/place"}, Exception, "/no/such/place: no such file or folder"),
        ("query", {"sight": "x"}, ConfigError, "node-config sight"),
    ],
)
def test_what_cannot_be_done_is_said(
    ask: Ask, small: Compose, kind: str, node: dict, error, reason: str
) -> None:
    if torch.cuda.is_available() and "device" in node:
        node = {"device": "cuda:999"}
        error, reason = Exception, ""
    with pytest.raises(error, match=reason):
        ask(kind, small().config, node)


def test_a_shard_that_lacks_a_name_is_refused(ask: Ask, small: Compose) -> None:
    config = small().config
    residents = task_of(config).residents
    shard = initial_state(config.model, residents, "skip", config.seed)
    shard.pop("model.norm.weight")
    with pytest.raises(WireError, match=r"lacks model.norm.weight"):
        ask("train", config, shard=shard)
