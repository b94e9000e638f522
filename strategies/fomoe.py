"""FoMoE as a Flower Strategy: who gets which tensors, and how what comes back becomes the next model.

`diloco`, `local_adamw`, `fedavg` and `ddp` are this Strategy with other settings, so that a comparison shares every
line. The round loop is `start`, with Flower's own signature; its steps are Flower's methods, so the Strategy
also works in a ServerApp that is not ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import FomoeError, RunError
from fomoe_flwr.model.names import expert_name, expert_of, is_moment
from fomoe_flwr.outer import OrderedFold, OuterOptimizer, RunningMean, with_moments
from fomoe_flwr.placement import Placement, draw_for_round, draw_placement
from fomoe_flwr.task import make_task
from strategies.directory import SiteDirectory
from strategies.exchange import error_line, exchange
from strategies.packing import Shards
from strategies.round import Round, metrics_of, number, read_reply

log = logging.getLogger("fomoe")

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
SiteReply = tuple[int, Message]


class RoundObserver:
    """Is told how a round goes. This one does nothing, so that the loop need not ask whether anybody looks."""

    def asked(self, current: Round) -> None:
        """The sites of a round have their messages."""

    def answered(self, current: Round) -> None:
        """One more good reply is in."""

    def finished(self, strategy: FoMoE) -> None:
        """`strategy.round` is over and the model updated; round 0 is the start."""


class FoMoE(Strategy):
    """Partial-replica federated training of a Mixture-of-Experts model.

    Args:
        config: the run's configuration; `compose([...]).config` makes one.
        run: identity of the run; sites keep their state under it.
        run_dir: the server's run directory; simulated sites keep their state in it.
        observer: is told how each round goes.
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

        self.config, self.run, self.run_dir, self.site_names = config, run, run_dir, site_names
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

        self.state: dict[str, Tensor] = {}  # the global model by name, fp32
        self.outer: OuterOptimizer | None = None
        self.round = Round(0)
        self.first_round = 1
        self.counted: dict[str, int] = {}  # the last round of each site whose reply became part of the model
        self.timeout = settings.timeout_s
        self._directory = SiteDirectory(site_names)

    # ----- the model

    def load(
        self,
        state: dict[str, Tensor],
        outer: dict[str, Tensor] | None = None,
        rounds_done: int = 0,
        counted: dict[str, int] | None = None,
    ) -> None:
        """Take over a global model, fresh or from a checkpoint, and go on after `rounds_done`.

        Args:
            counted: the last round of each site whose reply is part of the model; its own state after that
                round is where the site goes on.
        """
        if self.config.strategy.outer == "local_adamw":
            state = with_moments(state)
        # In one order whatever the source: bundles of a resumed run are the same bytes.
        self.state = dict(sorted(state.items()))
        self.outer = OuterOptimizer(self.state, self.config.strategy, self.config.model, self.config.train)
        self.outer.load_state_tensors(outer or {})
        self.first_round = rounds_done + 1
        self.counted = dict(counted or {})

    def parameters(self) -> dict[str, Tensor]:
        """The global model without LocalAdamW's moments."""
        return {name: tensor for name, tensor in self.state.items() if not is_moment(name)}

    def arrays(self) -> ArrayRecord:
        """The global model as a Flower ArrayRecord, one Array a name."""
        return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in self.parameters().items()})

    def placement(self, round_: int) -> Placement:
        """Which site holds what in a round (counted from 1)."""
        config, strategy = self.config, self.config.strategy
        draw = draw_for_round(strategy.placement, strategy.reshuffle_every, max(round_, 1))
        return draw_placement(
            len(self.site_names),
            config.model.num_experts,
            config.overlap,
            config.model.num_layers,
            config.seed,
            draw,
        )

    # ----- Flower's methods

    def summary(self) -> None:
        """Log the settings as a tree, as Flower's strategies do."""
        config, settings = self.config, self.config.strategy
        held = config.model.num_experts * config.overlap // len(self.site_names)
        for line in (
            f"├──> Sites: {len(self.site_names)}, of which {self.min_available_nodes} must be connected",
            f"├──> Experts: {held} of {config.model.num_experts} a layer at each site, each on {config.overlap} "
            f"sites ({settings.placement} placement)",
            f"├──> Routing: {settings.routing} | inner: {settings.inner} | outer: {settings.outer}",
            f"├──> Local steps: {config.train.local_steps} | wire: {settings.wire_dtype}",
            "├──> Sampling:",
            f"│\t├──Fraction: train ({self.fraction_train:.2f}) | evaluate ({self.fraction_evaluate:.2f})",
            f"│\t└──Minimum nodes: train ({self.min_train_nodes}) | evaluate ({self.min_evaluate_nodes})",
            "└──> Keys in records:",
            f"\t├── Weighted by: '{self.weighted_by_key}'",
            f"\t├── ArrayRecord key: '{self.arrayrecord_key}'",
            f"\t└── ConfigRecord key: '{self.configrecord_key}'",
        ):
            log.info("\t%s", line)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each sampled site: its shard in shared bundles, and its task.

        Args:
            arrays: used only if no model was loaded yet; afterwards the Strategy's own state is the model.
        """
        if not self.state:
            self.load(wire.named_from_flower(arrays))
        sites = self._sample(grid, self.fraction_train, self.min_train_nodes, server_round)
        self.round = Round(server_round)  # its clock starts when there are sites to ask
        messages, self.round.names = self._messages(sites, MessageType.TRAIN, config)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, apply the outer optimizer, and return the new model and the aggregated metrics.

        Raises:
            RunError: fewer good replies than strategy.min_replies, or a reply of a node that was not asked.
        """
        metrics = self._aggregate_train(server_round, self._with_sites(replies))
        return self.arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each site that shall evaluate its shard; none if fraction_evaluate is 0."""
        if self.fraction_evaluate == 0:
            return []
        sites = self._sample(grid, self.fraction_evaluate, self.min_evaluate_nodes, server_round)
        return self._messages(sites, MessageType.EVALUATE, config)[0]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted mean of what the sites measured with their residents only."""
        return self._aggregate_evaluate(self._with_sites(replies))

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
            timeout: seconds to wait for the replies of a round, and for sites to connect.

        Raises:
            RunError: too few sites connected or answered. Unlike Flower's own `start`, a run whose clients all
                fail is not reported as a success.
        """
        if not self.state:
            if initial_arrays is None:
                raise RunError("no model: give initial_arrays or call load()")
            self.load(wire.named_from_flower(initial_arrays))
        self.timeout = timeout
        log.info("Starting %s strategy:", type(self).__name__)
        self.summary()
        result, nothing = Result(), ArrayRecord()
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if self.first_round == 1:
            self.round = Round(0)
            self._after_round(result, evaluate_fn)
        for current in range(self.first_round, num_rounds + 1):
            messages = self.configure_train(current, nothing, train_config, grid)
            self.observer.asked(self.round)
            metrics = self._aggregate_train(current, self._exchange(grid, messages))
            result.train_metrics_clientapp[current] = metrics
            if messages := self.configure_evaluate(current, nothing, evaluate_config, grid):
                evaluated = self._aggregate_evaluate(self._exchange(grid, messages))
                if evaluated is not None:
                    result.evaluate_metrics_clientapp[current] = evaluated
            self._after_round(result, evaluate_fn)
        result.arrays = self.arrays()
        return result

    # ----- the steps of a round

    def _sample(self, grid: Grid, fraction: float, minimum: int, round_: int) -> list[int]:
        """Sites to ask, ascending; drawn from the seed and the round."""
        connected = list(self._directory.connected(grid, self.min_available_nodes, self.timeout))
        count = min(len(connected), max(int(len(connected) * fraction), minimum))
        rng = np.random.default_rng([self.config.seed, round_])
        return sorted(rng.choice(connected, count, replace=False).tolist())

    def _messages(
        self, sites: list[int], message_type: str, config: ConfigRecord
    ) -> tuple[list[Message], dict[int, frozenset[str]]]:
        """The messages to these sites, counted, and the names that each site is sent."""
        started = time.perf_counter()
        placement = self.placement(self.round.number)
        residents = [placement.residents(site) for site in range(len(self.site_names))]
        train = message_type == MessageType.TRAIN
        state = self.state if train else self.parameters()
        shards = Shards(state, residents, sites, wire.WIRE_DTYPES[self.config.strategy.wire_dtype])
        messages = []
        for site in sites:
            task = make_task(
                self.config,
                self.run,
                self.run_dir,
                self.round.number,
                site,
                residents[site],
                self.counted.get(self.site_names[site], 0),
                self.timeout,
            )
            # A ConfigRecord of its own for each message: Flower fails when one is shared.
            record = ConfigRecord({**config, "server-round": self.round.number, "task": task.to_json()})
            content = RecordDict(
                {self.arrayrecord_key: ArrayRecord(shards.arrays(site)), self.configrecord_key: record}
            )
            self.round.down.count(site, content)
            node = self._directory.node_of_site[site]
            # A message must not outlive its round, or a straggler works through stale ones before it catches up.
            messages.append(
                Message(content, node, message_type, ttl=self.timeout, group_id=str(self.round.number))
            )
        self.round.wire_s += time.perf_counter() - started
        return messages, {site: shards.names[site] for site in sites}

    def _exchange(self, grid: Grid, messages: list[Message]) -> Iterable[SiteReply]:
        site_of_node = {node: site for site, node in self._directory.node_of_site.items()}
        sites = [site_of_node[message.metadata.dst_node_id] for message in messages]
        for index, reply in exchange(grid, messages, self.timeout):
            yield sites[index], reply

    def _with_sites(self, replies: Iterable[Message]) -> Iterable[SiteReply]:
        """For replies that a loop of somebody else's collected."""
        site_of_node = {node: site for site, node in self._directory.node_of_site.items()}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in site_of_node:
                raise RunError(f"a reply came from node {node}, which is no site of this federation")
            yield site_of_node[node], reply

    def _aggregate_train(self, server_round: int, replies: Iterable[SiteReply]) -> MetricRecord:
        current, settings = self.round, self.config.strategy
        if server_round != current.number:
            raise RunError(f"aggregate_train of round {server_round}: configured was round {current.number}")
        shapes = {name: tensor.shape for name, tensor in self.state.items()}
        keys = (self.arrayrecord_key, self.configrecord_key, self.weighted_by_key)
        mean = RunningMean()
        fold = OrderedFold(list(current.names), lambda site, blobs: self._fold(mean, site, blobs))
        figures: dict[int, RecordDict] = {}
        for site, reply in replies:
            arrived = time.perf_counter()
            try:
                current.results[site], blobs = read_reply(
                    current, site, self.site_names[site], reply, shapes, keys
                )
            except FomoeError as error:
                self._fail(site, str(error))
                fold.drop(site)
                continue
            figures[site] = _figures(reply.content)
            checked = time.perf_counter()
            fold.add(site, blobs)
            current.wire_s += checked - arrived
            current.aggregate_s += time.perf_counter() - checked
            self.observer.answered(current)
        started = time.perf_counter()
        fold.close()
        for site in current.names:
            if site not in figures and self.site_names[site] not in current.failures:
                self._fail(site, f"no reply within {self.timeout:g} s")
        if len(figures) < settings.min_replies:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(current.failures.items())[:2])
            raise RunError(
                f"round {server_round}: {len(figures)} of {len(current.names)} sites gave a good reply, "
                f"strategy.min_replies={settings.min_replies}; {reasons}"
            )
        assert self.outer is not None
        self.outer.step(
            mean.finish(), (server_round - 1) * self.config.train.local_steps, self.config.warmup_steps
        )
        self.counted |= {self.site_names[site]: server_round for site in figures}
        current.aggregate_s += time.perf_counter() - started
        return self.train_metrics_aggr_fn([figures[site] for site in sorted(figures)], self.weighted_by_key)

    def _fold(self, mean: RunningMean, site: int, blobs: list[bytes]) -> None:
        """Add one reply to the mean; a name weighs the tokens of its site, or those its expert really got."""
        result, train = self.round.results[site], self.config.train
        nominal = (
            train.local_steps * train.batch_size * train.seq_len
        )  # so that an ordinary weight is exactly 1

        def weight(name: str) -> float:
            expert = expert_of(name)
            if expert is None or self.config.strategy.expert_weighting == "tokens":
                return result.tokens / nominal
            return result.expert_tokens.get(expert_name(*expert, "up_proj"), 0) / nominal

        mean.add(wire.from_blobs(blobs), weight)

    def _aggregate_evaluate(self, replies: Iterable[SiteReply]) -> MetricRecord | None:
        figures: dict[int, RecordDict] = {}
        for site, reply in replies:
            if reply.has_error():
                self._fail(site, error_line(reply))
                continue
            self.round.up.count(site, reply.content)
            figures[site] = _figures(reply.content)
            self.round.evaluations[self.site_names[site]] = number(metrics_of(reply.content), "val_loss")
        if not figures:
            return None
        return self.evaluate_metrics_aggr_fn(
            [figures[site] for site in sorted(figures)], self.weighted_by_key
        )

    def _after_round(self, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        if evaluate_fn is not None and (metrics := evaluate_fn(self.round.number, self.arrays())) is not None:
            result.evaluate_metrics_serverapp[self.round.number] = metrics
        self.observer.finished(self)

    def _fail(self, site: int, reason: str) -> None:
        self.round.failures[self.site_names[site]] = reason
        log.warning("round %d: site %s: %s", self.round.number, self.site_names[site], reason)


def _figures(content: RecordDict) -> RecordDict:
    """A reply without its arrays, which must not stay in memory."""
    return RecordDict({"metrics": metrics_of(content)})
