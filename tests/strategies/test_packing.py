"""Between the server's bundles and Flower's messages and records."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType
from flwr.supercore.task_identity import TaskIdentity

from fomoe_flwr import wire
from fomoe_flwr.bundles import as_array
from fomoe_flwr.codecs import CASTS
from fomoe_flwr.server.rounds import Outgoing
from strategies.packing import named_from_flower, one_array_a_name, pack

NAMED = {
    "model.norm.weight": torch.arange(3.0),
    "model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(2, 3),
}


def blob(named: dict[str, torch.Tensor]) -> bytes:
    parts, _ = CASTS["fp32"].encode(named, {})
    return wire.encode(parts)


def test_sites_share_the_array_of_a_bundle_and_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Flower has it in a process that serves a run.
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    dense, own = blob(NAMED), [blob({"model.x": torch.ones(site + 1)}) for site in range(2)]
    outgoing = {site: Outgoing(f"task {site}", {"dense": dense, "own": own[site]}) for site in range(2)}
    traffic = wire.Traffic()
    config = ConfigRecord({"theirs": 7})

    messages = pack(outgoing, {0: 100, 1: 101}, MessageType.TRAIN, config, ("a", "c"), 5, 60.0, traffic)

    assert [message.metadata.dst_node_id for message in messages] == [100, 101]
    assert messages[0].content["a"]["dense"].data is messages[1].content["a"]["dense"].data
    assert messages[0].content["c"] is not messages[1].content["c"]
    for site, message in enumerate(messages):
        assert dict(message.content["c"]) == {"theirs": 7, "server-round": 5, "task": f"task {site}"}
        assert message.content["a"]["own"].data == own[site]
        assert message.metadata.ttl == 60.0
        header = len(message.content["c"].deflate())
        assert traffic.by_site[site] == len(dense) + len(own[site]) + header
    assert traffic.total == sum(traffic.by_site.values())


def test_a_record_of_ours_and_one_of_flowers_own_are_read() -> None:
    for record in (ArrayRecord({"dense": as_array(blob(NAMED))}), one_array_a_name(NAMED)):
        read = named_from_flower(record)
        assert read.keys() == NAMED.keys()
        assert all(torch.equal(read[name], value) for name, value in NAMED.items())
    assert isinstance(one_array_a_name(NAMED)["model.norm.weight"], Array)
