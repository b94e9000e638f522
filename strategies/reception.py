"""Takes in the replies of a round: good ones go to the inbox, bad ones are refused with their reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fomoe_flwr.bundles import record_in
from strategies.check import (
    Expected,
    Refused,
    check_facts,
    check_reply,
    check_start,
    facts_of,
    metrics_of,
    outliers,
)
from strategies.exchange import error_line
from strategies.inbox import Inbox
from strategies.round import Round

log = logging.getLogger("fomoe")


class Reception:
    """What came of the messages to these sites.

    Args:
        expected: of each site that was asked.
        keys: of the ArrayRecord, of the ConfigRecord, and of the weight in the MetricRecord.
    """

    def __init__(
        self, current: Round, expected: Mapping[int, Expected], inbox: Inbox, keys: tuple[str, str, str]
    ) -> None:
        self._round, self._expected, self._inbox, self._keys = current, expected, inbox, keys
        self.figures: dict[int, RecordDict] = {}  # the good replies without their arrays

    def take(self, site: int, reply: Message) -> bool:
        """A reply to a training message has come; whether it is good."""
        name, current = self._expected[site].site, self._round
        if site in self.figures or name in current.failures:
            current.refused.setdefault(name, "duplicate")
            log.warning("round %d: site %s: answered twice, the second is refused", current.number, name)
            return False
        if reply.has_error():
            current.fail(name, error_line(reply))
            return False
        content = reply.content
        current.up.count(site, content)
        try:
            self._check(site, content)
        except Refused as refused:
            current.fail(name, str(refused), refused.kind)
            return False
        arrays = record_in(content, self._keys[0], ArrayRecord) or ArrayRecord()
        self._inbox.put(site, arrays, metrics_of(content), facts_of(content, self._keys[1]))
        arrays.clear()  # whoever still holds the message must not hold its arrays
        return True

    def take_saved(self, site: int) -> bool:
        """Whether a reply from before the server's death answers what would be asked now; else it is dropped."""
        current = self._round
        try:
            name = self._expected[site].site
            content = self._inbox.get(site, self._keys[:2])
            self._check(site, content)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the files: the site is asked anew
            log.info("round %d: the saved reply of site %d is not used: %r", current.number, site, error)
            self._inbox.drop(site)
            return False
        current.up.count(site, content)
        log.info("round %d: site %s has answered before", current.number, name)
        return True

    def take_evaluation(self, site: int, reply: Message) -> MetricRecord | None:
        """A reply to an evaluation message; its figures if it is good."""
        expected, current = self._expected[site], self._round
        if reply.has_error():
            current.fail(expected.site, error_line(reply))
            return None
        current.up.count(site, reply.content)
        try:
            facts = facts_of(reply.content, self._keys[1])
            check_facts(facts, expected)
            check_start(facts, expected)
            measured = metrics_of(reply.content)
        except Refused as refused:
            current.fail(expected.site, str(refused), refused.kind)
            return None
        self.figures[site] = RecordDict({"metrics": measured})
        return measured

    def refuse_outliers(self, history: Sequence[Mapping[str, float]], bound: float) -> None:
        """Hold the good replies against each other, when all are in."""
        current = self._round
        for site, reason in outliers(current.norms, history, bound).items():
            current.fail(self._expected[site].site, reason, "norm")
            del current.results[site], current.norms[site], self.figures[site]
            self._inbox.drop(site)

    def _check(self, site: int, content: RecordDict) -> None:
        """Let a reply in, or raise Refused. Its figures are kept, its tensors are not."""
        result, norms = check_reply(content, self._expected[site], self._keys)
        self._round.results[site], self._round.norms[site] = result, norms
        self.figures[site] = RecordDict({"metrics": metrics_of(content)})
