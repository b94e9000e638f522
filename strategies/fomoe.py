"""FoMoE as a Flower Strategy: a round, readable from top to bottom in `start`.

What is done to the model is `fomoe_flwr.server.rounds.Server`; here it meets Flower's nodes, messages and records.
`diloco`, `local_adamw`, `fedavg` and `ddp` are this Strategy with other settings, so that a comparison shares every
line. The steps of a round are Flower's methods, so the Strategy also works in a ServerApp that is not ours.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fomoe_flwr.bundles import blobs_of, header_bytes, header_in, record_in
from fomoe_flwr.config import RunConfig
from fomoe_flwr.deploy.flower import REGISTERED
from fomoe_flwr.errors import RunError, StoreError, WireError
from fomoe_flwr.inputs import UNKNOWN, Inputs
from fomoe_flwr.messages import Reply
from fomoe_flwr.plan.record import Plan
from fomoe_flwr.server.deadline import Deadline
from fomoe_flwr.server.replies import Refused, refusing
from fomoe_flwr.server.rounds import Round, RoundObserver, Server, missing
from fomoe_flwr.store.at_server import StoredMessages
from fomoe_flwr.store.messages import STORED
from fomoe_flwr.store.objects import Store
from fomoe_flwr.turns import turns_in_words
from strategies.nodes import SiteDirectory, error_line, exchange
from strategies.packing import named_from_flower, one_array_a_name, pack

log = logging.getLogger("fomoe")

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
SiteReply = tuple[int, Message]


class Content(NamedTuple):
    """What is in a site's reply."""

    header: str
    blobs: dict[str, bytes]  # those in the message itself
    stored: str  # what it says of those in the object store; empty if there are none


CHECKERS = 2  # threads that check replies while others are still pulled
WAITING = 4  # replies in memory that wait to be checked


class FoMoE(Strategy):
    """Partial-replica federated training of a Mixture-of-Experts model.

    Args:
        config: the run's configuration; `compose([...]).config` makes one.
        run: identity of the run; sites keep their state under it.
        run_dir: the server's run directory; simulated sites keep their state in it.
        observer: is told how each round goes.
        plan: who takes how many steps and, with strategy.placement=planned, who holds what; None: it is made here.
        inputs: text, tokenizer and the rest that each site must have.
        weighted_by_key, arrayrecord_key, configrecord_key, train_metrics_aggr_fn, evaluate_metrics_aggr_fn,
            fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes: as in
            Flower's FedAvg; None takes the configuration's value.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        run: str = "run",
        run_dir: str = "",
        observer: RoundObserver | None = None,
        plan: Plan | None = None,
        inputs: Inputs = UNKNOWN,
        fraction_train: float | None = None,
        fraction_evaluate: float | None = None,
        min_train_nodes: int | None = None,
        min_evaluate_nodes: int | None = None,
        min_available_nodes: int | None = None,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsAggregation | None = None,
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
    ) -> None:
        settings, site_names = config.strategy, [site.name for site in config.federation.sites]

        def given(argument: float | None, default: float | None) -> float:
            return argument if argument is not None else default if default is not None else len(site_names)

        self.config, self.site_names = config, site_names
        self.observer = observer or RoundObserver()
        self.fraction_train = given(fraction_train, settings.fraction_train)
        self.fraction_evaluate = given(fraction_evaluate, settings.fraction_evaluate)
        self.min_train_nodes = int(given(min_train_nodes, settings.min_train_nodes))
        self.min_evaluate_nodes = int(given(min_evaluate_nodes, settings.min_evaluate_nodes))
        self.min_available_nodes = int(given(min_available_nodes, settings.min_available_nodes))
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key, self.configrecord_key = arrayrecord_key, configrecord_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or aggregate_metricrecords
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or aggregate_metricrecords

        self._temporary = None if run_dir else tempfile.TemporaryDirectory(prefix="fomoe-inbox-")
        inbox = Path(self._temporary.name if self._temporary else run_dir) / "inbox"
        self.server = Server(config, run, run_dir, inbox, plan, header_bytes, inputs)
        self.first_round = 1
        self._directory = SiteDirectory(site_names, os.environ.get(REGISTERED) == "1", config.data)
        # Where bundles travel, if not in Flower's messages.
        self._store = StoredMessages(Store(config.store, run)) if config.store != "flower" else None
        self._deadline = Deadline(settings, settings.timeout_s)
        self._gathered = False  # whether the sites to begin with have been there

    # ----- the model

    def load(
        self,
        state: Mapping[str, Tensor],
        outer: Mapping[str, Tensor] | None = None,
        rounds_done: int = 0,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over a global model, fresh or from a checkpoint (`Server.load`), and go on after `rounds_done`."""
        self.server.load(state, outer, rounds_done, memory)
        self.first_round = rounds_done + 1

    @property
    def round(self) -> Round:
        """The current round, or the last one."""
        return self.server.round

    def arrays(self) -> ArrayRecord:
        """The global model as a Flower ArrayRecord, one Array a name."""
        return one_array_a_name(self.server.state.parameters())

    # ----- a round

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds up to `num_rounds`, from round 1 or from where `load` says the run was.

        Args:
            initial_arrays: the model by name; may be None after `load`.
            timeout: longest wait in seconds for the replies of a round.

        Raises:
            RunError: too few sites connected, or too many rounds in a row were discarded. Unlike Flower's own
                `start`, a run whose clients all fail is not reported as a success.
        """
        if not self.server.loaded:
            if initial_arrays is None:
                raise RunError("no model: give initial_arrays or call load()")
            self.load(named_from_flower(initial_arrays))
        self._deadline = Deadline(self.config.strategy, timeout)
        self.server.last_round = num_rounds
        log.info("Starting %s strategy:", type(self).__name__)
        self.summary()
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        with self._store or nullcontext():
            return self._rounds(grid, num_rounds, train_config, evaluate_config, evaluate_fn)

    def _rounds(
        self,
        grid: Grid,
        num_rounds: int,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        result, nothing = Result(), ArrayRecord()
        if self.first_round == 1:
            if self.server.surveys:
                self._survey(grid)
            self._after_round(result, evaluate_fn)
        for current in range(self.first_round, num_rounds + 1):
            messages = self.configure_train(current, nothing, train_config, grid)
            self.observer.asked(self.round)
            metrics = self._finish_training(self._exchange(grid, messages))
            if metrics is not None:
                result.train_metrics_clientapp[current] = metrics
            if messages := self.configure_evaluate(current, nothing, evaluate_config, grid):
                evaluated = self._finish_evaluation(self._exchange(grid, messages))
                if evaluated is not None:
                    result.evaluate_metrics_clientapp[current] = evaluated
            self._after_round(result, evaluate_fn)
            # A run of which nothing was committed is no success either.
            self._check_progress(min(self.config.strategy.max_discarded, num_rounds - self.first_round + 1))
        self.server.inbox.clear()
        # A model that lies in files is too large for a record; its last checkpoint is on the disk.
        if self.config.checkpoint.state == "memory":
            result.arrays = self.arrays()
        return result

    def _survey(self, grid: Grid) -> None:
        """Ask the sites what their text asks for, by the routers that a checkpoint brings, so that round 1 can place
        experts by it, and for stand-ins of what they hold. A site that does not answer is taken to ask for all experts
        alike.
        """
        current = self.round
        sites = [site for site in self._connected(grid) if current.steps_M[site]]
        current.deadline_s, current.asked_at = self._deadline.seconds(), time.perf_counter()
        self._finish_evaluation(
            self._exchange(grid, self._messages(sites, MessageType.EVALUATE, ConfigRecord()))
        )
        self.server.surveyed()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each sampled site: its shard in shared bundles, and its task.

        Args:
            arrays: used only if no model was loaded yet; afterwards the Strategy's own state is the model.
        """
        if not self.server.loaded:
            self.load(named_from_flower(arrays))
        taking_part = self.server.begin(server_round, self._connected(grid), self._deadline.seconds())
        self.round.simulated = self._directory.simulated
        self.round.asked = self._sample(taking_part, self.fraction_train, self.min_train_nodes, server_round)
        messages = self._messages(self.round.asked, MessageType.TRAIN, config)
        answered = self.server.take_saved()
        site_of_node = self._site_of_node()
        self.round.asked_at = time.perf_counter()
        return [m for m in messages if site_of_node[m.metadata.dst_node_id] not in answered]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, average them, apply the outer optimizer; returns the new model and the mean metrics.

        Below the quorum the model stays as it was.

        Raises:
            RunError: a reply of a node that is no site.
        """
        if server_round != self.round.number:
            raise RunError(
                f"aggregate_train of round {server_round}: configured was round {self.round.number}"
            )
        metrics = self._finish_training(self._with_sites(replies))
        return self.arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each site that shall evaluate its shard; none if fraction_evaluate is 0."""
        if self.fraction_evaluate == 0:
            return []
        # A site without a part in the round holds no shard that it could evaluate.
        alive = [site for site in self._connected(grid) if self.round.steps_M[site]]
        sites = self._sample(alive, self.fraction_evaluate, self.min_evaluate_nodes, server_round)
        return self._messages(sites, MessageType.EVALUATE, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted mean of what the sites measured with their residents only."""
        return self._finish_evaluation(self._with_sites(replies))

    def summary(self) -> None:
        """Log the settings as a tree, as Flower's strategies do."""
        config, settings = self.config, self.config.strategy
        placement, steps_M = self.server.policy.intended(1)
        held = _span((placement.holds_LEM.sum(axis=(0, 1)) // config.model.num_layers).tolist())
        for line in (
            f"├──> Sites: {len(self.site_names)}, of which {self.min_available_nodes} must be connected to begin; "
            f"a round needs {self._needed()} good replies",
            f"├──> Experts: {held} of {config.model.num_experts} a layer at each site "
            f"({settings.placement} placement)",
            f"├──> Routing: {settings.routing} | inner: {settings.inner} | outer: {settings.outer}",
            f"├──> Local steps: {_span(steps_M)} | wire: {settings.up} up, {settings.down} down "
            f"through {self.config.store}{turns_in_words(settings)}",
            "├──> Sampling:",
            f"│\t├──Fraction: train ({self.fraction_train:.2f}) | evaluate ({self.fraction_evaluate:.2f})",
            f"│\t└──Minimum nodes: train ({self.min_train_nodes}) | evaluate ({self.min_evaluate_nodes})",
            "└──> Keys in records:",
            f"\t├── Weighted by: '{self.weighted_by_key}'",
            f"\t├── ArrayRecord key: '{self.arrayrecord_key}'",
            f"\t└── ConfigRecord key: '{self.configrecord_key}'",
        ):
            log.info("\t%s", line)

    # ----- who is asked

    def _needed(self) -> int:
        """Good replies without which a round is discarded: a share of the sites asked when all are there."""
        asked = self._sample_size(len(self.site_names), self.fraction_train, self.min_train_nodes)
        return max(1, math.ceil(self.config.strategy.quorum * asked))

    def _connected(self, grid: Grid) -> list[int]:
        """The sites that are there. To begin with all of them are waited for, later a quorum."""
        minimum = self._needed() if self._gathered else self.min_available_nodes
        self._directory.keys = self.server.state.keys
        connected = list(self._directory.connected(grid, minimum, self.config.strategy.connect_s))
        self._gathered = True
        return connected

    @staticmethod
    def _sample_size(sites: int, fraction: float, minimum: int) -> int:
        return min(sites, max(int(sites * fraction), minimum))

    def _sample(self, connected: list[int], fraction: float, minimum: int, round_: int) -> list[int]:
        """Sites to ask, ascending; drawn from the seed and the round."""
        count = self._sample_size(len(connected), fraction, minimum)
        rng = np.random.default_rng([self.config.seed, round_])
        return sorted(rng.choice(connected, count, replace=False).tolist())

    def _messages(self, sites: list[int], message_type: str, config: ConfigRecord) -> list[Message]:
        started, current = time.perf_counter(), self.round
        outgoing = self.server.outgoing(sites, training=message_type == MessageType.TRAIN)
        stored = None
        if self._store is not None:
            stored = self._store.put(
                {site: out.bundles for site, out in outgoing.items()},
                {site: self.server.longest_reply(site) for site in outgoing},
                current.number,
                current.deadline_s,
                afresh=self.server.state.discarded > 0,
            )
        messages = pack(
            outgoing,
            self._directory.node_of_site,
            message_type,
            config,
            (self.arrayrecord_key, self.configrecord_key),
            current.number,
            current.deadline_s,
            current.down,
            stored,
        )
        current.wire_s += time.perf_counter() - started
        return messages

    # ----- what comes back

    def _site_of_node(self) -> dict[int, int]:
        return {node: site for site, node in self._directory.node_of_site.items()}

    def _exchange(self, grid: Grid, messages: list[Message]) -> Iterable[SiteReply]:
        site_of_node = self._site_of_node()
        sites = [site_of_node[message.metadata.dst_node_id] for message in messages]
        for index, reply in exchange(grid, messages, self.round.deadline_s):
            yield sites[index], reply

    def _with_sites(self, replies: Iterable[Message]) -> Iterable[SiteReply]:
        """For replies that a loop of somebody else's collected."""
        site_of_node = self._site_of_node()
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in site_of_node:
                raise RunError(f"a reply came from node {node}, which is no site of this federation")
            yield site_of_node[node], reply

    def _finish_training(self, replies: Iterable[SiteReply]) -> MetricRecord | None:
        """Collect, decide, then commit or discard: a round is never half applied."""
        current = self.round
        seconds = self._collect(replies)
        for site in missing(current):
            current.fail(site, f"no reply within {current.deadline_s:.3g} s")
            self._directory.lost(site)
        expert_share = self.config.strategy.expert_quorum * self.fraction_train
        if not self.server.close(self._needed(), expert_share, self.observer):
            log.warning("round %d is discarded: %s", current.number, self._below_quorum())
            return None
        self._deadline.took(seconds)
        return self._mean_metrics(self.train_metrics_aggr_fn, current.replies)

    def _collect(self, replies: Iterable[SiteReply]) -> list[float]:
        """Have each reply checked as it comes, beside the pulling; returns seconds to each good one.

        Leaving waits for the checks that are under way.
        """
        current, taken_s = self.round, list[float]()

        def check(site: int, content: Content, arrived: float) -> tuple[bool, float, float]:
            started = time.perf_counter()
            blobs = self._bundles(site, content)
            if content.stored:
                # A round lasts until the last good reply is here, wherever it was.
                arrived = time.perf_counter()
            good = blobs is not None and self.server.take(site, content.header, blobs)
            return good, arrived, time.perf_counter() - started

        with ThreadPoolExecutor(CHECKERS, thread_name_prefix="check") as pool:
            checks: set[Future[tuple[bool, float, float]]] = set()

            def account(timeout: float | None, when: str) -> None:
                """Take note of the checks that are done; what one raised is raised here."""
                nonlocal checks
                done, checks = wait(checks, timeout, when)
                for good, arrived, seconds in (each.result() for each in done):
                    current.wire_s += seconds
                    if good:
                        taken_s.append(arrived - current.asked_at)
                        self.observer.answered(current)

            for site, reply in replies:
                arrived = time.perf_counter()
                if (content := self._unpack(site, reply)) is not None:
                    checks.add(pool.submit(check, site, content, arrived))
                    del content
                account(None if len(checks) > WAITING else 0.0, FIRST_COMPLETED)
            account(None, ALL_COMPLETED)
        return taken_s

    def _unpack(self, site: int, reply: Message) -> Content | None:
        """What is in a training reply; None if there is nothing to check."""
        if not self.server.expect_once(site):
            return None
        if reply.has_error():
            self.round.fail(site, error_line(reply))
            self._directory.lost(site)
            return None
        return self._content(site, reply)

    def _content(self, site: int, reply: Message, may_lack_arrays: bool = False) -> Content | None:
        """What is in a reply, which has no bundles any longer; None if it is no such thing."""
        try:
            with refusing():
                header = header_in(reply.content, self.configrecord_key, "reply")
                arrays = record_in(reply.content, self.arrayrecord_key, ArrayRecord)
                stored = header_in(reply.content, self.configrecord_key, STORED) if self._store else ""
                if arrays is None:
                    if stored or may_lack_arrays:
                        return Content(header, {}, stored)
                    raise WireError(f"the reply has no ArrayRecord {self.arrayrecord_key!r}")
                blobs = blobs_of(arrays)
        except Refused as refused:
            self.round.fail(site, str(refused), refused.kind)
            return None
        arrays.clear()  # whoever still holds the message must not hold its arrays
        return Content(header, blobs, "")

    def _bundles(self, site: int, content: Content) -> dict[str, bytes] | None:
        """Those of a reply, wherever they are; None if they cannot be had."""
        if self._store is None or not content.stored:
            return content.blobs
        current = self.round
        seconds = current.deadline_s - (time.perf_counter() - current.asked_at)
        try:
            with refusing():
                reply = self._store.announced(site, content.stored)
            return self._store.fetch(site, reply, self.server.inbox.folder, seconds)
        except (Refused, StoreError) as error:
            self.server.lose(site, str(error), error.kind if isinstance(error, Refused) else None)
            return None

    def _finish_evaluation(self, replies: Iterable[SiteReply]) -> MetricRecord | None:
        for site, reply in replies:
            if not self.server.expect_once(site):
                continue
            if reply.has_error():
                self.round.fail(site, error_line(reply))
            # Stand-ins travel before round 1 alone.
            elif (content := self._content(site, reply, may_lack_arrays=True)) is not None and (
                blobs := self._bundles(site, content)
            ) is not None:
                self.server.take_evaluation(site, content.header, blobs)
        evaluations = self.round.evaluations
        return self._mean_metrics(self.evaluate_metrics_aggr_fn, evaluations) if evaluations else None

    def _mean_metrics(self, aggregate: MetricsAggregation, replies: Mapping[int, Reply]) -> MetricRecord:
        records = [
            # The weight last, so that no site can report its own.
            RecordDict({"metrics": MetricRecord({**reply.metrics, self.weighted_by_key: reply.num_examples})})
            for _, reply in sorted(replies.items())
        ]
        return aggregate(records, self.weighted_by_key)

    def _below_quorum(self) -> str:
        reasons = [f"{name}: {reason}" for name, reason in list(self.round.failures.items())[:2]]
        return "; ".join(
            [
                f"{len(self.round.replies)} of {len(self.site_names)} sites gave a good reply, "
                f"{self._needed()} needed (strategy.quorum={self.config.strategy.quorum:g})",
                *reasons,
            ]
        )

    def _check_progress(self, most: int) -> None:
        if (discarded := self.server.state.discarded) >= most:
            raise RunError(
                f"round {self.round.number}: nothing was committed in the last {discarded} rounds "
                f"(strategy.max_discarded={self.config.strategy.max_discarded}); {self._below_quorum()}"
            )

    def _after_round(self, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        if evaluate_fn is not None and (metrics := evaluate_fn(self.round.number, self.arrays())) is not None:
            result.evaluate_metrics_serverapp[self.round.number] = metrics
        self.observer.finished(self.round, self.server.state, self.server.memory())


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
