"""Flower's nodes: which of them is which site, and the exchange of messages with them.

The server cannot see a node's configuration, so each new node is asked once. Nobody is waited for: the question goes
out in one round and the answer may be read in a later one, so a node that never answers holds up nothing. A node that
makes no sense is named in the log and left alone, for one institution's mistake must not end the run of the others.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fomoe_flwr.bundles import record_in
from fomoe_flwr.checks import check_own_source
from fomoe_flwr.config import DataConfig
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.server.replies import Refused, refusing
from fomoe_flwr.untrusted import one_line

log = logging.getLogger("fomoe")

QUESTION_TTL_S = 120.0  # after which a node that did not answer is asked again
_LONGEST_LOOK_S = 0.5  # between two looks at who is connected
# The pause between two looks is a share of the time waited so far: a short round is not kept waiting by more than
# that share, and a long one is not polled all the time.
FIRST_PAUSE_S = 0.002
PAUSE_SHARE = 0.05
LONGEST_PAUSE_S = 1.0
LONGEST_REASON = 10_000  # characters of an error reply that are looked at


class SiteDirectory:
    """Node ids by site index, learnt from the nodes' answers to `query`.

    A node says its site's name (`--node-config 'site="a"'`), or in a simulation its partition number. A site may
    come back under another node id. Until its old node is known to be gone, the new one stands by.

    What a node says is held against what Flower knows of it. A node that was registered under a name
    (`flwr supernode register KEY --name a`) is that site and no other. Where keys are registered but names are not, the
    first key that is a site remains that site for the run; one that is registered under its name takes its place.

    Args:
        registered: whether the SuperLink takes registered keys only. Without that each SuperNode makes up a key of its
            own whenever it starts, which proves nothing.
        data: the run's. A site with text of its own that this cannot read is none of this run's sites.
    """

    def __init__(
        self, site_names: Sequence[str], registered: bool = False, data: DataConfig | None = None
    ) -> None:
        self._data = data
        self._names = list(site_names)
        self._index = {name: index for index, name in enumerate(site_names)}
        self.node_of_site: dict[int, int] = {}
        self._standby: dict[int, int] = {}  # site -> the newest node that says the same
        self._asked: dict[int, tuple[str, float]] = {}  # node -> the question's id and when it was asked
        self._answered: set[int] = set()
        self.problems: dict[int, str] = {}  # node -> why it is no site of ours
        self._registered = registered
        self.keys: dict[
            str, str
        ] = {}  # SHA-256 (hex) of each site's public key, by its name; a checkpoint keeps it
        self._online: dict[int, NodeInfo] = {}
        self._hopeless: dict[int, str] = {}  # node -> why waiting for its site does not help
        self.simulated = False  # whether nodes said their partition number, which only simulated ones have

    def connected(self, grid: Grid, minimum: int, timeout: float) -> dict[int, int]:
        """Node ids by site, of the sites that are connected now; waits until there are `minimum` of them.

        Raises:
            RunError: not enough within `timeout` seconds; it says which are missing. At once if one of them is there
                but cannot take part.
        """
        deadline, pause = time.monotonic() + timeout, FIRST_PAUSE_S
        next_word = time.monotonic() + 5
        while True:
            self._look(grid)
            if len(self.node_of_site) >= minimum:
                return dict(sorted(self.node_of_site.items()))
            if self._hopeless:
                raise RunError("; ".join([self._missing(minimum), *self._hopeless.values()]))
            now = time.monotonic()
            if now > deadline:
                raise RunError(
                    "; ".join([f"{self._missing(minimum)} within {timeout:g} s", *self.problems.values()])
                )
            if now > next_word:
                log.info("waiting for sites: %s", self._missing(minimum))
                next_word = now + 30
            time.sleep(pause)
            pause = min(pause * 1.3, _LONGEST_LOOK_S)

    def lost(self, site: int) -> None:
        """The site's node did not answer: from now on it is the one that stands by, if there is one."""
        if site in self._standby:
            self.node_of_site[site] = self._standby.pop(site)
            log.info("site %s is now node %d", self._names[site], self.node_of_site[site])

    def _missing(self, minimum: int) -> str:
        absent = [name for site, name in enumerate(self._names) if site not in self.node_of_site]
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        return f"{len(self.node_of_site)} of {minimum} sites connected, missing {', '.join(absent[:8])}{more}"

    def _look(self, grid: Grid) -> None:
        """Who is online, who is new, and what the new ones answered; does not wait."""
        self._online = {node.node_id: node for node in grid.get_nodes()}
        online = set(self._online)
        self._standby = {site: node for site, node in self._standby.items() if node in online}
        for site, node in list(self.node_of_site.items()):
            if node not in online:
                del self.node_of_site[site]
                self.lost(site)
        self._answered &= online  # a node that comes back under its old id may be another site now
        self._hopeless = {node: why for node, why in self._hopeless.items() if node in online}
        now = time.monotonic()
        for node in [node for node, (_, asked) in self._asked.items() if now - asked > QUESTION_TTL_S]:
            del self._asked[node]
            if node in online:
                # Seen of a SuperNode of Flower 1.41 whose run had ended in the middle of its work: from then on it sent
                # each answer when the next message came.
                name = self._online[node].name or "not known"
                self._refuse(
                    node,
                    f"node {node} (site: {name}) is online but did not answer within {QUESTION_TTL_S:g} s; if that "
                    "goes on, end `fomoe site` there and start it again",
                )
        new = sorted(online - self._answered - self._asked.keys())
        questions = [
            Message(RecordDict({"config": ConfigRecord()}), node, MessageType.QUERY, ttl=QUESTION_TTL_S)
            for node in new
        ]
        for node, message_id in zip(new, grid.push_messages(questions) if questions else (), strict=True):
            self._asked[node] = (message_id, now)
        for node, (message_id, _) in sorted(self._asked.items()):
            for reply in grid.pull_messages([message_id]):
                self._asked.pop(node, None)
                self._read(node, reply)

    def _read(self, node: int, reply: Message) -> None:
        self._answered.add(node)
        try:
            with refusing():
                self._take(node, reply)
        except Refused as refused:
            self._refuse(node, f"node {node} gave no answer that can be read: {refused}")

    def _take(self, node: int, reply: Message) -> None:
        if reply.has_error():
            self._refuse(node, f"node {node} could not say which site it is: {error_line(reply)}")
            self._answered.discard(node)  # it may be able to later
            return
        answer = record_in(reply.content, "config", ConfigRecord) or ConfigRecord()
        name, partition = answer.get("site", ""), answer.get("partition-id", -1)
        if isinstance(name, str) and name in self._index:  # a list, which may come too, cannot be looked up
            site = self._index[name]
        elif not name and type(partition) is int and 0 <= partition < len(self._names):
            site, self.simulated = partition, True
        else:
            self._refuse(
                node,
                f"node {node} is site {one_line(repr(name or partition), 80)}, which this federation does not have; "
                f"it has {', '.join(self._names[:8])}",
            )
            return
        if (problem := self._not_proven(node, self._names[site])) is not None:
            self._refuse(node, problem)
            return
        if self._data is not None and answer.get("own-text") is True:
            try:
                check_own_source(self._data, f"fomoe site --data-path of site {self._names[site]}")
            except ConfigError as error:
                self._hopeless[node] = str(error)
                self._refuse(node, str(error))
                return
        self.problems.pop(node, None)
        now = self._online.get(self.node_of_site.get(site, 0))
        if now is None or (self._online[node].name and not now.name):
            self.node_of_site[site] = node
        else:
            self._standby[site] = node
            self._refuse(
                node,
                f"nodes {self.node_of_site[site]} and {node} both say they are site {self._names[site]}; "
                f"the second stands by until the first is gone",
            )

    def _not_proven(self, node: int, name: str) -> str | None:
        """Why this node cannot be the site that it says it is; None if it can."""
        info = self._online.get(node)
        if info is None:
            return f"node {node} went away after it had said that it is site {name}"
        if info.name:
            if info.name != name:
                return f"node {node} says it is site {name}, but its key is registered as {info.name!r}"
        elif not self._registered:
            return None
        key = hashlib.sha256(info.public_key).hexdigest()
        if not info.name and self.keys.get(name, key) != key:
            return (
                f"node {node} says it is site {name} with another key than the site has had in this run; if it is, "
                f"register its new key under its name: flwr supernode register KEY.pub --name {name}"
            )
        self.keys[name] = key
        return None

    def _refuse(self, node: int, problem: str) -> None:
        problem = one_line(problem)
        if self.problems.get(node) != problem:
            log.warning("%s", problem)
        self.problems[node] = problem


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
    # Cut first, and no regular expression: it takes long for a text that is made for it.
    reason = str(reply.error.reason)[:LONGEST_REASON]
    _, wrapped, inner = reason.partition("Message: ")
    if wrapped:
        reason = inner.rstrip().removesuffix(">").removesuffix("'")
    kind, wrapped, inner = reason.strip().partition("'>:<'")
    if wrapped and kind.startswith("<class '"):
        reason = f"{kind.rpartition('.')[2]}: {inner.removesuffix('>').removesuffix(chr(39))}"
    return one_line(" ".join(reason.split()))
