"""Push messages, and yield each reply as it arrives: no barrier, no list of all replies in memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fomoe_flwr.errors import RunError

# The pause between two looks is a share of the time waited so far: a short round is not kept waiting by more than
# that share, and a long one is not polled all the time.
FIRST_PAUSE_S = 0.002
PAUSE_SHARE = 0.05
LONGEST_PAUSE_S = 1.0


def exchange(grid: Grid, messages: list[Message], timeout: float) -> Iterator[tuple[int, Message]]:
    """Yield (index of the message answered, reply) in order of arrival, until all have come or time is up.

    The index is found by the message's id, for an error made by Flower itself does not name the right node. A
    message that is answered twice yields twice: whoever reads must judge. The list is emptied once the
    messages are pushed: they hold the round's shards.

    Args:
        timeout: seconds from here.
    """
    ids = list(grid.push_messages(list(messages)))
    if len(ids) != len(messages):
        raise RunError(f"Flower accepted {len(ids)} of {len(messages)} messages")
    messages.clear()
    waiting = {message_id: index for index, message_id in enumerate(ids)}
    began = time.monotonic()
    while waiting:
        arrived = False
        # One id at a time: asked for all of them, Flower would hand over every finished reply at once.
        for message_id, index in list(waiting.items()):
            for reply in grid.pull_messages([message_id]):
                arrived = True
                waiting.pop(message_id, None)
                yield index, reply
        if arrived:
            continue
        waited = time.monotonic() - began
        if waited > timeout:
            return
        time.sleep(min(max(FIRST_PAUSE_S, PAUSE_SHARE * waited), LONGEST_PAUSE_S))


def error_line(reply: Message) -> str:
    """The reason of an error reply as one line, without the layers Flower wraps around it."""
    reason = str(reply.error.reason)
    inner = re.search(r"Message: (.*?)'?>?\s*$", reason, re.DOTALL)
    return " ".join((inner[1] if inner else reason).split())
