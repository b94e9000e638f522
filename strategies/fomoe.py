"""FoMoE as a Flower Strategy: who gets which tensors, and how what comes back becomes the next model.

`diloco`, `local_adamw`, `fedavg` and `ddp` are this Strategy with other settings, so that a comparison shares every
line. The round loop is `start`, with Flower's own signature; its steps are Flower's methods, so the Strategy
also works in a ServerApp that is not ours.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import RunError
from fomoe_flwr.load import Shares, averaged
from fomoe_flwr.model.names import is_moment
from fomoe_flwr.outer import OuterOptimizer, with_moments
from fomoe_flwr.placement import Placement, adopt, draw_for_round, draw_placement, from_residents, moves
from fomoe_flwr.plan.record import Plan
from fomoe_flwr.task import make_task
from strategies.check import Expected, number
from strategies.commit import commit, starved_experts, updated_experts
from strategies.deadline import Deadline
from strategies.directory import SiteDirectory
from strategies.exchange import exchange
from strategies.inbox import Inbox
from strategies.ledger import ExpertLedger
from strategies.packing import Shards
from strategies.planning import LivingPlan
from strategies.reception import Reception
from strategies.round import Round

log = logging.getLogger("fomoe")

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
SiteReply = tuple[int, Message]

NORMS_KEPT = 32  # of earlier replies, to hold new ones against


class RoundObserver:
    """Is told how a round goes. This one does nothing, so that the loop need not ask whether anybody looks."""

    def asked(self, current: Round) -> None:
        """The sites of a round have their messages."""

    def answered(self, current: Round) -> None:
        """One more good reply is in."""

    def collected(self, strategy: FoMoE) -> None:
        """All good replies are in and can be read (`strategy.reply`); the model is still the one that was sent."""

    def finished(self, strategy: FoMoE) -> None:
        """`strategy.round` is over and the model updated; round 0 is the start."""


class FoMoE(Strategy):
    """Partial-replica federated training of a Mixture-of-Experts model.

    Args:
        config: the run's configuration; `compose([...]).config` makes one.
        run: identity of the run; sites keep their state under it.
        run_dir: the server's run directory; simulated sites keep their state in it.
        observer: is told how each round goes.
        plan: who takes how many steps and, with strategy.placement=planned, who holds what; None: it is made here.
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
        self._living = LivingPlan(config, plan)
        self.fraction_train = given(fraction_train, settings.fraction_train)
        self.fraction_evaluate = given(fraction_evaluate, settings.fraction_evaluate)
        self.min_train_nodes = int(given(min_train_nodes, settings.min_train_nodes))
        self.min_evaluate_nodes = int(given(min_evaluate_nodes, settings.min_evaluate_nodes))
        self.min_available_nodes = int(given(min_available_nodes, settings.min_available_nodes))
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key, self.configrecord_key = arrayrecord_key, configrecord_key
        self._keys = (arrayrecord_key, configrecord_key, weighted_by_key)
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or aggregate_metricrecords
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or aggregate_metricrecords

        self.state: dict[str, Tensor] = {}  # the global model by name, fp32
        self.outer: OuterOptimizer | None = None
        self.round = Round(0, self.placement(0))
        self.first_round = 1
        # What the server remembers besides the model; a checkpoint keeps it.
        self.counted: dict[str, int] = {}  # the last round of each site whose reply became part of the model
        self.last_losses: dict[str, float] = {}  # of each site's last steps in that round
        self.ledger = ExpertLedger(config.model.num_layers, config.model.num_experts)
        self.global_load: Shares | None = None  # of the routers of all sites together
        self._norms: deque[dict[str, float]] = deque(maxlen=NORMS_KEPT)

        self._before: Placement | None = None  # that of the round before

        self._directory = SiteDirectory(site_names)
        self._deadline = Deadline(settings, settings.timeout_s)
        self._temporary = None if run_dir else tempfile.TemporaryDirectory(prefix="fomoe-inbox-")
        self._inbox = Inbox(Path(self._temporary.name if self._temporary else run_dir) / "inbox")
        self._reception = Reception(self.round, {}, self._inbox, self._keys)
        self._asked_at = 0.0
        self._gathered = False  # whether the sites to begin with have been there
        self._discarded = 0  # rounds in a row

    # ----- the model

    def load(
        self,
        state: dict[str, Tensor],
        outer: dict[str, Tensor] | None = None,
        rounds_done: int = 0,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over a global model, fresh or from a checkpoint, and go on after `rounds_done`.

        Args:
            memory: what `memory()` gave when the checkpoint was made.
        """
        if self.config.strategy.outer == "local_adamw":
            state = with_moments(state)
        # In one order whatever the source: bundles of a resumed run are the same bytes.
        self.state = dict(sorted(state.items()))
        self.outer = OuterOptimizer(self.state, self.config.strategy, self.config.model, self.config.train)
        self.outer.load_state_tensors(outer or {})
        self.first_round = rounds_done + 1
        if memory is not None:
            self.counted = dict(memory["counted"])
            self.last_losses = dict(memory.get("last_losses", {}))
            self._norms.extend(memory["norms"])
            self.ledger.load(memory["experts"])
            self.global_load = memory.get("load")
            self._discarded = int(memory["discarded"])
            if memory["plan"] is not None:
                self._living.load(memory["plan"], memory["placement"])
            self._before = from_residents(memory["placement"], self.config.model.num_experts)

    def memory(self) -> dict[str, Any]:
        """What the server must remember besides the model to go on as if nothing had happened; JSON values."""
        return {
            "counted": self.counted,
            "last_losses": self.last_losses,
            "norms": list(self._norms),
            "experts": self.ledger.table(self.round.number),
            "load": self.global_load,
            "discarded": self._discarded,
            "plan": self._living.memory() if self.config.strategy.placement == "planned" else None,
            "placement": [self.round.placement.residents(site) for site in range(len(self.site_names))],
        }

    def reply(self, site: int, names: Collection[str]) -> dict[str, Tensor]:
        """Those of the tensors that a site's good reply of this round has, read-only; until the round is over."""
        return self._inbox.tensors(site, names)

    @property
    def simulated(self) -> bool:
        """Whether the sites are a simulation's, with links and devices that are not their own."""
        return self._directory.simulated

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._living.plan

    def parameters(self) -> dict[str, Tensor]:
        """The global model without LocalAdamW's moments."""
        return {name: tensor for name, tensor in self.state.items() if not is_moment(name)}

    def arrays(self) -> ArrayRecord:
        """The global model as a Flower ArrayRecord, one Array a name."""
        return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in self.parameters().items()})

    def placement(self, round_: int) -> Placement:
        """Which site holds what in a round (counted from 1), if all are there."""
        config, strategy = self.config, self.config.strategy
        if strategy.placement == "planned":
            return self._living.placement
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
        held = _span(site.experts_per_layer for site in self.plan.sites)
        steps = _span(site.local_steps for site in self.plan.sites)
        for line in (
            f"├──> Sites: {len(self.site_names)}, of which {self.min_available_nodes} must be connected to begin; "
            f"a round needs {self._needed()} good replies",
            f"├──> Experts: {held} of {config.model.num_experts} a layer at each site "
            f"({settings.placement} placement)",
            f"├──> Routing: {settings.routing} | inner: {settings.inner} | outer: {settings.outer}",
            f"├──> Local steps: {steps} | wire: {settings.wire_dtype}",
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
        alive = self._connected(grid)
        placement = self.placement(server_round)
        orphans = self.ledger.look(placement, alive)
        if orphans and self.config.strategy.placement == "random":
            placement = adopt(placement, alive)
            log.info("round %d: they are given to other sites while theirs are away", server_round)
        if self.config.strategy.placement == "planned":
            self._living.follow(server_round, alive, at_once=bool(orphans))
            placement = self.placement(server_round)
            alive = [site for site in alive if self.plan.sites[site].experts_per_layer]
        self._before = self.round.placement if self.round.number else self._before
        # The round's clock starts when there are sites to ask.
        self.round = Round(server_round, placement, deadline_s=self._deadline.seconds())
        self.round.asked = self._sample(alive, self.fraction_train, self.min_train_nodes, server_round)
        saved = self._inbox.begin(server_round)
        messages = self._messages(self.round.asked, MessageType.TRAIN, config)
        here = {site for site in saved if self._reception.take_saved(site)}
        site_of_node = self._site_of_node()
        self._asked_at = time.perf_counter()
        return [message for message in messages if site_of_node[message.metadata.dst_node_id] not in here]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, apply the outer optimizer, and return the new model and the aggregated metrics.

        Below the quorum the model stays as it was.

        Raises:
            RunError: a reply of a node that is no site.
        """
        metrics = self._aggregate_train(server_round, self._with_sites(replies))
        return self.arrays(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each site that shall evaluate its shard; none if fraction_evaluate is 0."""
        if self.fraction_evaluate == 0:
            return []
        alive = self._connected(grid)
        sites = self._sample(alive, self.fraction_evaluate, self.min_evaluate_nodes, server_round)
        return self._messages(sites, MessageType.EVALUATE, config)

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
            timeout: longest wait in seconds for the replies of a round.

        Raises:
            RunError: too few sites connected, or too many rounds in a row were discarded. Unlike Flower's own
                `start`, a run whose clients all fail is not reported as a success.
        """
        if not self.state:
            if initial_arrays is None:
                raise RunError("no model: give initial_arrays or call load()")
            self.load(wire.named_from_flower(initial_arrays))
        self._deadline = Deadline(self.config.strategy, timeout)
        log.info("Starting %s strategy:", type(self).__name__)
        self.summary()
        result, nothing = Result(), ArrayRecord()
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if self.first_round == 1:
            self.round = Round(0, self.placement(0))
            self._after_round(result, evaluate_fn)
        for current in range(self.first_round, num_rounds + 1):
            messages = self.configure_train(current, nothing, train_config, grid)
            self.observer.asked(self.round)
            metrics = self._aggregate_train(current, self._exchange(grid, messages))
            if metrics is not None:
                result.train_metrics_clientapp[current] = metrics
            if messages := self.configure_evaluate(current, nothing, evaluate_config, grid):
                evaluated = self._aggregate_evaluate(self._exchange(grid, messages))
                if evaluated is not None:
                    result.evaluate_metrics_clientapp[current] = evaluated
            self._after_round(result, evaluate_fn)
            # A run of which nothing was committed is no success either.
            self._check_progress(min(self.config.strategy.max_discarded, num_rounds - self.first_round + 1))
        self._inbox.clear()
        result.arrays = self.arrays()
        return result

    # ----- the steps of a round

    def _needed(self) -> int:
        """Good replies without which a round is discarded: a share of the sites asked when all are there."""
        asked = self._sample_size(len(self.site_names), self.fraction_train, self.min_train_nodes)
        return max(1, math.ceil(self.config.strategy.quorum * asked))

    def _connected(self, grid: Grid) -> list[int]:
        """The sites that are there. To begin with all of them are waited for, later a quorum."""
        minimum = self._needed() if self._gathered else self.min_available_nodes
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
        """The messages to these sites, counted; and a reception for what they answer."""
        started = time.perf_counter()
        current, settings = self.round, self.config.strategy
        residents = [current.placement.residents(site) for site in range(len(self.site_names))]
        state = self.state if message_type == MessageType.TRAIN else self.parameters()
        dtype = wire.WIRE_DTYPES[settings.wire_dtype]
        moved = None
        if settings.moves == "residual" and message_type == MessageType.TRAIN:
            moved = self._moved()
        shards = Shards(state, residents, sites, dtype, moved, settings.move_ratio)
        if message_type == MessageType.TRAIN:
            current.moves = shards.moves
        shapes = {name: tensor.shape for name, tensor in state.items()}
        messages, expected = [], {}
        for site in sites:
            name = self.site_names[site]
            expected[site] = Expected(
                run=self.run,
                round=current.number,
                site=name,
                digests=shards.digests[site],
                shapes=shapes,
                dtype=dtype,
                tokens=self.plan.sites[site].tokens,
                load_shape=(self.config.model.num_layers, self.config.model.num_experts),
                pace=self.config.train.local_steps / self.plan.sites[site].local_steps,
                top_k=self.config.model.top_k,
            )
            task = make_task(
                self.config,
                self.run,
                self.run_dir,
                current.number,
                site,
                residents[site],
                self.counted.get(name, 0),
                self.plan.sites[site].local_steps,
                self.global_load,
                self._living.model(site),
            )
            # A ConfigRecord of its own for each message: Flower fails when one is shared.
            record = ConfigRecord({**config, "server-round": current.number, "task": task.to_json()})
            content = RecordDict(
                {self.arrayrecord_key: ArrayRecord(shards.arrays(site)), self.configrecord_key: record}
            )
            current.down.count(site, content)
            node = self._directory.node_of_site[site]
            # A message must not outlive its round, or a straggler works through stale ones before it catches up.
            messages.append(
                Message(content, node, message_type, ttl=current.deadline_s, group_id=str(current.number))
            )
        self._reception = Reception(current, expected, self._inbox, self._keys)
        current.wire_s += time.perf_counter() - started
        return messages

    def _moved(self) -> list[list[list[int]]]:
        """The experts of each site that it did not hold in the round before; nothing has moved in round 1."""
        now = self.round.placement
        moved: list[list[list[int]]] = [[[] for _ in now.residents(site)] for site in range(now.num_sites)]
        if self._before is not None:
            for site, layer, expert in moves(self._before, now):
                moved[site][layer].append(expert)
        return moved

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

    def _aggregate_train(self, server_round: int, replies: Iterable[SiteReply]) -> MetricRecord | None:
        """Collect, decide, then commit or discard: a round is never half applied."""
        current, settings, reception = self.round, self.config.strategy, self._reception
        if server_round != current.number:
            raise RunError(f"aggregate_train of round {server_round}: configured was round {current.number}")
        last_good = 0.0
        for site, reply in replies:
            arrived = time.perf_counter()
            if reception.take(site, reply):
                last_good = arrived - self._asked_at
                self.observer.answered(current)
            elif reply.has_error():
                self._directory.lost(site)
            current.wire_s += time.perf_counter() - arrived
        started = time.perf_counter()
        for site in current.asked:
            if site not in current.results and self.site_names[site] not in current.failures:
                current.fail(self.site_names[site], f"no reply within {current.deadline_s:.3g} s")
                self._directory.lost(site)
        reception.refuse_outliers(list(self._norms), settings.norm_bound)
        current.committed = len(current.results) >= self._needed()
        looked = time.perf_counter()
        self.observer.collected(self)
        started += time.perf_counter() - looked  # looking is not aggregation
        if current.committed:
            self._commit()
            self._deadline.took(last_good)
        else:
            log.warning("round %d is discarded: %s", server_round, self._below_quorum())
        self._discarded = 0 if current.committed else self._discarded + 1
        self._inbox.close()
        current.aggregate_s += time.perf_counter() - started
        return self._mean_metrics(self.train_metrics_aggr_fn) if current.committed else None

    def _mean_metrics(self, aggregate: MetricsAggregation) -> MetricRecord:
        figures = self._reception.figures
        return aggregate([figures[site] for site in sorted(figures)], self.weighted_by_key)

    def _commit(self) -> None:
        assert self.outer is not None
        current = self.round
        updated = updated_experts(current, self.config.strategy.expert_quorum * self.fraction_train)
        current.held_back = self.ledger.updated_LE.size - len(updated)
        starved, least = starved_experts(current, self.config)
        self.ledger.starve(current.number, starved & updated, least)
        updated -= starved
        steps = [site.local_steps for site in self.plan.sites]
        commit(current, self.outer, self._inbox, self.config, updated, steps)
        for site, result in current.results.items():
            self.counted[self.site_names[site]] = current.number
            if result.last_loss is not None:
                self.last_losses[result.site] = result.last_loss
            held_LE = current.placement.holds_LEM[:, :, site]
            self.ledger.record(current.number, updated, result.load_LE * held_LE)
            self._norms.append(current.norms[site])
        load_LE = np.sum([result.load_LE for result in current.results.values()], axis=0)
        self.global_load = averaged(self.global_load, load_LE)
        if self.config.strategy.placement == "planned":
            self._living.heard(current.results.values())

    def _below_quorum(self) -> str:
        reasons = [f"{name}: {reason}" for name, reason in list(self.round.failures.items())[:2]]
        return "; ".join(
            [
                f"{len(self.round.results)} of {len(self.site_names)} sites gave a good reply, "
                f"{self._needed()} needed (strategy.quorum={self.config.strategy.quorum:g})",
                *reasons,
            ]
        )

    def _check_progress(self, most: int) -> None:
        if self._discarded >= most:
            raise RunError(
                f"round {self.round.number}: nothing was committed in the last {self._discarded} rounds "
                f"(strategy.max_discarded={self.config.strategy.max_discarded}); {self._below_quorum()}"
            )

    def _aggregate_evaluate(self, replies: Iterable[SiteReply]) -> MetricRecord | None:
        for site, reply in replies:
            if (measured := self._reception.take_evaluation(site, reply)) is not None:
                self.round.evaluations[self.site_names[site]] = number(measured, "val_loss")
        return self._mean_metrics(self.evaluate_metrics_aggr_fn) if self._reception.figures else None

    def _after_round(self, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        if evaluate_fn is not None and (metrics := evaluate_fn(self.round.number, self.arrays())) is not None:
            result.evaluate_metrics_serverapp[self.round.number] = metrics
        self.observer.finished(self)


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
