"""Which Flower node is which site. The server cannot see a node's configuration, so each new node is asked once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fomoe_flwr.errors import RunError
from strategies.exchange import error_line, exchange

log = logging.getLogger("fomoe")

_PAUSE_S = 0.5


class SiteDirectory:
    """Node ids by site index, learnt from the nodes' answers to `query`.

    A node says its site's name (`--node-config 'site="a"'`), or in a simulation its partition number.
    """

    def __init__(self, site_names: Sequence[str]) -> None:
        self._names = list(site_names)
        self._index = {name: index for index, name in enumerate(site_names)}
        self.node_of_site: dict[int, int] = {}
        self._asked: set[int] = set()

    def connected(self, grid: Grid, minimum: int, timeout: float) -> dict[int, int]:
        """Node ids by site, of the sites that are connected now; waits until there are `minimum` of them.

        Raises:
            RunError: not enough within `timeout` seconds, or a node that is no site of this federation.
        """
        deadline = time.monotonic() + timeout
        next_word = time.monotonic() + 5
        while True:
            online = set(grid.get_node_ids())
            self.node_of_site = {site: node for site, node in self.node_of_site.items() if node in online}
            self._ask(grid, sorted(online - self._asked), max(deadline - time.monotonic(), 1.0))
            if len(self.node_of_site) >= minimum:
                return dict(sorted(self.node_of_site.items()))
            now = time.monotonic()
            if now > deadline:
                raise RunError(f"{len(self.node_of_site)} of {minimum} sites connected within {timeout:g} s")
            if now > next_word:
                log.info("waiting for sites: %d of %d are connected", len(self.node_of_site), minimum)
                next_word = now + 30
            time.sleep(_PAUSE_S)

    def _ask(self, grid: Grid, nodes: Sequence[int], timeout: float) -> None:
        messages = [
            Message(RecordDict({"config": ConfigRecord()}), node, MessageType.QUERY) for node in nodes
        ]
        for index, reply in exchange(grid, messages, timeout) if messages else ():
            node = nodes[index]
            self._asked.add(node)
            if reply.has_error():
                raise RunError(f"node {node} could not say which site it is: {error_line(reply)}")
            site = self._site(node, reply.content.config_records["config"])
            if site in self.node_of_site:
                raise RunError(
                    f"nodes {self.node_of_site[site]} and {node} both say they are site {self._names[site]}"
                )
            self.node_of_site[site] = node

    def _site(self, node: int, answer: ConfigRecord) -> int:
        name, partition = str(answer.get("site", "")), answer.get("partition-id", -1)
        if name in self._index:
            return self._index[name]
        if not name and isinstance(partition, int) and 0 <= partition < len(self._index):
            return partition
        raise RunError(
            f"node {node} is site {name or partition!r}, which this federation does not have; "
            f"it has {', '.join(self._names[:8])}"
        )
