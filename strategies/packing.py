"""From what the server sends to Flower's messages, and from Flower's records to tensors."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundles import BUNDLE, as_array, blobs_of
from fomoe_flwr.server.rounds import Outgoing
from fomoe_flwr.store.messages import STORED, StoredShard


def pack(
    outgoing: Mapping[int, Outgoing],
    node_of_site: Mapping[int, int],
    message_type: str,
    config: ConfigRecord,
    keys: tuple[str, str],
    round_: int,
    ttl: float,
    traffic: wire.Traffic,
    stored: Mapping[int, StoredShard] | None = None,
) -> list[Message]:
    """One message for each site, counted in `traffic`.

    Args:
        config: what else goes into each message's ConfigRecord.
        keys: of the ArrayRecord and of the ConfigRecord.
        ttl: seconds. A message must not outlive its round, or a straggler works through stale ones before it catches
            up.
        stored: where each site's bundles are, if not in its message.
    """
    # Sites that need the same bundle get the same Array, so that Flower stores it once.
    arrays: dict[int, Array] = {}
    classes: dict[int, dict[str, int]] = {}
    messages = []
    for site, (task, bundles) in outgoing.items():
        for blob in bundles.values():
            if id(blob) not in classes:
                classes[id(blob)] = wire.byte_classes(blob)
        # A ConfigRecord of its own for each message: Flower fails when one is shared.
        record = ConfigRecord({**config, "server-round": round_, "task": task})
        content = RecordDict({keys[1]: record})
        if stored is not None:
            record[STORED] = stored[site].to_json()
        else:
            for blob in bundles.values():
                if id(blob) not in arrays:
                    arrays[id(blob)] = as_array(blob)
            content[keys[0]] = ArrayRecord({key: arrays[id(blob)] for key, blob in bundles.items()})
        traffic.count(site, [classes[id(blob)] for blob in bundles.values()], len(record.deflate()))
        messages.append(Message(content, node_of_site[site], message_type, ttl=ttl, group_id=str(round_)))
    return messages


def one_array_a_name(named: Mapping[str, Tensor]) -> ArrayRecord:
    """A model as an ArrayRecord of Flower's own kind."""
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in named.items()})


def named_from_flower(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of an ArrayRecord made by Flower itself (one Array a name), or of our bundles."""
    if all(array.stype == BUNDLE for array in record.values()):
        return wire.from_blobs(blobs_of(record).values())
    return record.to_torch_state_dict()
