"""The server's half of a round, without Flower: who is asked for what, what comes in, and commit or discard."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.codecs import decode, down_codec, down_differences, up_codec
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import RunError
from fomoe_flwr.hf_files import whole_routers
from fomoe_flwr.inputs import OWN_TEXT, UNKNOWN, Inputs
from fomoe_flwr.load import averaged
from fomoe_flwr.mapped import fill, in_pieces, mapped_tensors
from fomoe_flwr.messages import STATE_LOST, Reply, deals, has_own_text, make_task
from fomoe_flwr.model.spec import (
    MOMENTS,
    Residents,
    expert_layers,
    expert_of,
    is_moment,
    is_standin,
    moment_name,
    parameter_shapes,
    place_of,
)
from fomoe_flwr.model.standins import take_over
from fomoe_flwr.placement import Placement, from_residents, full_residents, numbered
from fomoe_flwr.plan.record import Plan
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.server.outer import (
    Contribution,
    OuterOptimizer,
    commit,
    outer_buffers,
    starved_experts,
    updated_experts,
    with_moments,
)
from fomoe_flwr.server.replies import (
    Expected,
    Inbox,
    Norms,
    Refused,
    check_blobs,
    check_evaluation,
    check_header,
    check_load,
    outliers,
    refusing,
)
from fomoe_flwr.server.shards import Held, Public, bundles_by_holder, experts_of, shared_bundles
from fomoe_flwr.server.state import ExpertLedger, ServerState, Sizes
from fomoe_flwr.turns import resting, takes_turns, turn_name
from fomoe_flwr.untrusted import one_line

log = logging.getLogger("fomoe")


@dataclass
class Round:
    """A round while it runs, and its figures afterwards. Sites are indices into the federation's list."""

    number: int
    placement: Placement
    steps_M: tuple[int, ...]
    site_names: Sequence[str]
    simulated: bool = False  # the sites are a simulation's, with links and devices that are not their own
    began: float = field(default_factory=time.perf_counter)
    asked_at: float = 0.0
    deadline_s: float = 0.0
    # Where parts of the model take turns: the tensors that are not due, who is held by one site alone, and until when
    # holders are what they are (`Policy.holders_until`).
    resting: frozenset[str] = frozenset()
    sole_LE: NDArray[np.bool_] | None = None
    until_LE: NDArray[np.int64] | None = None
    asked: list[int] = field(default_factory=list)  # in folding order
    down: wire.Traffic = field(default_factory=wire.Traffic)
    up: wire.Traffic = field(default_factory=wire.Traffic)
    replies: dict[int, Reply] = field(default_factory=dict)  # those that are part of the model
    # Their routers' choices, layers x experts.
    loads: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    norms: dict[int, Norms] = field(default_factory=dict)
    by_name: dict[int, dict[str, float]] = field(default_factory=dict)  # norm of each tensor
    clipped: dict[str, int] = field(default_factory=dict)  # site's name -> tensors that were scaled down
    failures: dict[str, str] = field(default_factory=dict)  # site's name -> reason
    refused: dict[str, str] = field(default_factory=dict)  # site's name -> kind of bad reply
    committed: bool = True  # False: below the quorum, discarded whole
    held_back: int = 0  # experts whose holders were below their quorum
    evaluations: dict[int, Reply] = field(default_factory=dict)  # loss with the site's residents only
    wire_s: float = 0.0  # encoding, pushing, checking
    aggregate_s: float = 0.0  # folding and the outer step

    def residents_by_name(self) -> dict[str, list[list[int]]]:
        """The experts that each site holds in this round, by site's name and layer."""
        return {name: self.placement.residents(site) for site, name in enumerate(self.site_names)}

    def fail(self, site: int, reason: str, kind: str | None = None) -> None:
        """A site's reply is not part of the model; `kind` if it was a bad one that was refused."""
        name, reason = self.site_names[site], one_line(reason)
        self.failures[name] = reason
        if kind is not None:
            self.refused[name] = kind
        log.warning("round %d: site %s: %s", self.number, name, reason)


class RoundObserver:
    """Is told how a round goes. This one does nothing, so that the loop need not ask whether anybody looks."""

    def asked(self, current: Round) -> None:
        """The sites of a round have their messages."""

    def answered(self, current: Round) -> None:
        """One more good reply is in."""

    def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
        """All good replies are in and can be read from the inbox; the model is still the one that was sent."""

    def finished(self, current: Round, state: ServerState, memory: Mapping[str, Any]) -> None:
        """The round is over and the model updated; round 0 is the start. `memory` is for a checkpoint."""


class Outgoing(NamedTuple):
    """What one site is sent."""

    task: str  # the Task as JSON
    bundles: dict[str, bytes]  # by key; the same objects for all sites that need them


class Server:
    """The global model and a round on it.

    Args:
        run: identity of the run; sites keep their state under it.
        run_dir: the server's run directory; simulated sites keep their state in it.
        inbox: folder for the replies of the round in progress.
        plan: for a planned placement, if it has been made.
        header_bytes: length on the wire of a reply's header.
        inputs: what the run goes by, as far as the server knows it.
    """

    def __init__(
        self,
        config: RunConfig,
        run: str,
        run_dir: str,
        inbox: Path,
        plan: Plan | None = None,
        header_bytes: Callable[[str], int] = len,
        inputs: Inputs = UNKNOWN,
    ) -> None:
        sites = config.federation.sites
        self.config, self.run, self.run_dir = config, run, run_dir
        self.site_names = [site.name for site in sites]
        self.policy = POLICIES[config.strategy.placement](config, plan)
        self.round = Round(0, *self.policy.intended(0), self.site_names)
        self.last_round = config.train.rounds  # in which all tensors are due
        self._up, self._down = up_codec(config.strategy), down_codec(config.strategy)
        self._differences = down_differences(config.strategy)
        self.inbox, self._header_bytes = Inbox(inbox, self._up), header_bytes
        self._folder = inbox.parent  # for the model, where that lies in files
        self._saved: list[int] = []  # sites whose replies of this round are on the disk from before a crash
        self._state: ServerState | None = None
        self._deals, self._inputs = deals(config.data, sites), inputs
        self._expected: dict[int, Expected] = {}
        self._answered: set[int] = set()
        self._fitted: dict[int, dict[str, Tensor]] = {}  # stand-ins by site, before round 1
        self._clipped: set[int] = set()  # sites of which this process has said that they were scaled down
        self._lock = threading.Lock()

    @property
    def state(self) -> ServerState:
        """What the rounds change.

        Raises:
            RunError: no model was loaded.
        """
        if self._state is None:
            raise RunError("no model: give initial_arrays or call load()")
        return self._state

    @property
    def loaded(self) -> bool:
        return self._state is not None

    def load(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        outer: Mapping[str, Tensor] | None = None,
        rounds_done: int = 0,
        memory: Mapping[str, Any] | None = None,
        public: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take over a global model, fresh or from a checkpoint, and go on after `rounds_done`.

        Args:
            tensors: by name, which are copied; or as pairs one after the other, so that they need not be in memory
                together, which are the server's own from then on.
            outer: the outer optimizer's tensors.
            memory: what `memory()` gave when the checkpoint was made.
            public: the public model of then; None: it begins as this model, and no site holds it.

        Raises:
            ConfigError, OSError: there is no room for the files of `checkpoint.state=files`.
            LookupError, ValueError: with it, these are not the tensors of this model.
        """
        config, room = self.config, dict[str, Tensor]()
        if config.checkpoint.state == "files":
            state, room = self._in_files(tensors.items() if isinstance(tensors, Mapping) else tensors)
        else:
            if isinstance(tensors, Mapping):
                pieces = in_pieces(tensors.items(), lambda item: item[1].nbytes)
                tensors = ((name, tensor.clone()) for name, tensor in pieces)
            state = dict(tensors)
            if config.strategy.outer == "local_adamw":
                state = with_moments(state)
        # In one order whatever the source: bundles of a resumed run are the same bytes.
        state = dict(sorted(state.items()))
        optimizer = OuterOptimizer(state, config.strategy, config.model, config.train, room)
        optimizer.load_state_tensors(outer or {})
        experts = ExpertLedger(expert_layers(config.model), config.model.num_experts)
        differs = self._differences is not None
        held = Held() if differs or takes_turns(config.strategy) else None
        self._state = ServerState(state, optimizer, experts, rounds_done, held, self._public(state, public))
        if memory is not None:
            if differs and not public:
                memory = {**memory, "public": {}}
            self._state.remember(memory)
            if memory["plan"] is not None:
                self.policy.remember(memory["plan"], memory["placement"])
            placement = from_residents(memory["placement"], config.model.num_experts)
            self.round = Round(rounds_done, placement, self.policy.intended(0).steps_M, self.site_names)

    def _in_files(self, named: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model, and room for the outer optimizer's buffers, in a mapped file."""
        model, strategy = self.config.model, self.config.strategy
        everything = full_residents(model.num_layers, model.num_experts)
        shapes = parameter_shapes(model, everything, strategy.routing)
        moments = MOMENTS if strategy.outer == "local_adamw" else ()
        both = shapes | {moment_name(m, name): shape for m in moments for name, shape in shapes.items()}
        buffers = {f"{b}/{name}": shape for b in outer_buffers(strategy) for name, shape in shapes.items()}
        tensors = mapped_tensors(self._folder, both | buffers)
        state, room = ({name: tensors[name] for name in names} for names in (both, buffers))
        filled = fill(state, named)
        if lacking := [name for name in state if name not in filled and not is_moment(name)]:
            raise KeyError(f"{lacking[0]} is missing ({len(lacking)} such names)")
        return state, room

    def _public(self, state: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None) -> Public | None:
        """The public model, where there is one."""
        if self._differences is None:
            return None
        shapes = {name: tensor.shape for name, tensor in state.items()}

        def room() -> dict[str, Tensor]:
            if self.config.checkpoint.state == "files":
                return mapped_tensors(self._folder, shapes, torch.bfloat16)
            return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}

        tensors = room()
        filled = fill(tensors, (saved or state).items())
        if lacking := tensors.keys() - filled:
            raise KeyError(f"{min(lacking)} is missing in the public model ({len(lacking)} such names)")
        return Public(self._differences, tensors, room())

    def memory(self) -> dict[str, Any]:
        """What the server must remember besides the tensors to go on as if nothing had happened; JSON values."""
        residents = [self.round.placement.residents(site) for site in range(len(self.site_names))]
        return self.state.memory() | {"plan": self.policy.memory(), "placement": residents}

    # ----- out

    def begin(self, number: int, alive: Sequence[int], deadline_s: float) -> list[int]:
        """Open a round for the sites that are connected; returns those of them that take part in it.

        Replies of this round that are on the disk from before the server's death wait to be taken
        (`take_saved`).
        """
        state = self.state
        state.experts.look(self.policy.intended(number).placement, alive)
        placement, steps_M = self.policy.for_round(number, alive)
        # The round's clock starts when there are sites to ask.
        self.round = Round(number, placement, steps_M, self.site_names, deadline_s=deadline_s)
        self._take_turns()
        self._saved = self.inbox.begin(number)
        return [site for site in alive if steps_M[site]]

    def _take_turns(self) -> None:
        """Which tensors rest in this round, and what sites must know to say the same."""
        current, strategy = self.round, self.config.strategy
        if not takes_turns(strategy):
            return
        layers = expert_layers(self.config.model)
        current.sole_LE = current.placement.holds_LEM.sum(axis=2) == 1
        current.until_LE = self.policy.holders_until(current.number, current.placement)
        sole, moving = (
            numbered(which_LE, layers) for which_LE in (current.sole_LE, current.until_LE == current.number)
        )
        current.resting = resting(
            self.state.tensors, self.config.model, strategy, current.number, self.last_round, sole, moving
        )

    def outgoing(self, sites: Sequence[int], training: bool) -> dict[int, Outgoing]:
        """Task and shard of these sites; their answers are expected from here on.

        Args:
            sites: of those that take part in the round.
            training: False: they shall evaluate their shard, and need no moments; before round 1, on their own text,
                with all rows of the routers, which a partitioned one lacks.
        """
        current, config, state = self.round, self.config, self.state
        tensors = state.tensors if training else state.parameters()
        if not current.number and config.strategy.routing == "partitioned":
            tensors = whole_routers(tensors, config.model)
            config = dataclasses.replace(
                config, strategy=dataclasses.replace(config.strategy, routing="skip")
            )
        residents = [current.placement.residents(site) for site in range(len(self.site_names))]
        layers = expert_layers(self.config.model)
        if training and state.held is not None:
            names = {site: self.site_names[site] for site in sites}
            bundles, digests = bundles_by_holder(
                tensors, residents, layers, names, state.held, self._down, state.public
            )
        else:
            bundles, digests = shared_bundles(tensors, residents, layers, sites, self._down)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        due = {name: expert_of(name) for name in tensors if name not in current.resting}
        holders_LE = current.placement.holds_LEM[:, :, list(sites)].sum(axis=2)
        self._expected, self._answered, out = {}, set(), {}
        for site in sites:
            steps = current.steps_M[site]
            inputs = self._inputs_of(site)
            batches = steps if training or not current.number else max(config.train.eval_batches, 1)
            task = make_task(
                config,
                site,
                run=self.run,
                run_dir=self.run_dir,
                round_=current.number,
                counted_round=state.counted.get(self.site_names[site], 0),
                deal=self._deals[site],
                inputs=inputs,
                residents=residents[site],
                local_steps=steps,
                global_load=state.global_load,
                model=self.policy.model(site),
                asked=len(sites),
                holders=[holders_LE[layer, own].tolist() for layer, own in enumerate(residents[site])],
                sole=_those_of(residents[site], current.sole_LE),
                until=_of_each(residents[site], current.until_LE),
                last_round=self.last_round,
            )
            self._expected[site] = Expected(
                run=self.run,
                round=current.number,
                site=self.site_names[site],
                digests=digests[site],
                shapes=shapes,
                # Stand-ins before round 1 are values, not updates.
                codec=self._up if training else self._down,
                tokens=batches * task.train.batch_size * task.train.seq_len,
                top_k=config.model.top_k,
                load_shape=(config.model.num_layers, config.model.num_experts),
                step_scale=config.train.local_steps / steps,
                inputs=inputs,
                asked=_held(due, residents[site], layers)
                if training and takes_turns(config.strategy)
                else None,
            )
            out[site] = Outgoing(task.to_json(), bundles[site])
        return out

    def _inputs_of(self, site: int) -> Inputs:
        """What a site must find. A server that reads no text goes by what most sites with a part of it said."""
        own, state = self.config.federation.sites[site], self.state
        if has_own_text(self.config.data, own):
            corpus = state.own_corpora.get(own.name, "")
        else:
            corpus = self._inputs.corpus or state.corpus
        return dataclasses.replace(self._inputs, corpus=corpus)

    # ----- in

    def expect_once(self, site: int) -> bool:
        """Whether this is a site's first answer to its message; a second one is refused."""
        current, name = self.round, self.site_names[site]
        if site not in self._answered:
            self._answered.add(site)
            return True
        current.refused.setdefault(name, "duplicate")
        log.warning("round %d: site %s: answered twice, the second is refused", current.number, name)
        return False

    def take(self, site: int, header: str, blobs: Mapping[str, bytes]) -> bool:
        """A reply to a training message has come; whether it is good. May be called from several threads."""
        try:
            with refusing():
                self._count(site, header, blobs)
                self._check(site, header, blobs)
        except Refused as refused:
            with self._lock:
                self.round.fail(site, str(refused), refused.kind)
            return False
        self.inbox.put(site, header, blobs)
        return True

    def longest_reply(self, site: int) -> int:
        """Bytes of a site's reply at most, where its bundles are in one file."""
        return self._expected[site].longest_reply

    def lose(self, site: int, reason: str, kind: str | None = None) -> None:
        """A reply whose bundles cannot be had; `kind` if it is the reply's fault. From several threads."""
        with self._lock:
            self.round.fail(site, reason, kind)

    def take_saved(self) -> list[int]:
        """The sites whose reply from before the server's death answers what is asked now; others' are dropped."""
        taken = []
        for site in self._saved:
            try:
                header, blobs = self.inbox.get(site)
                self._check(site, header, blobs)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the files: the site is asked anew
                log.info(
                    "round %d: the saved reply of site %d is not used: %r", self.round.number, site, error
                )
                self.inbox.drop(site)
                continue
            self._count(site, header, blobs)
            log.info("round %d: site %s has answered before", self.round.number, self.site_names[site])
            taken.append(site)
        self._answered |= set(taken)
        return taken

    def _count(self, site: int, header: str, blobs: Mapping[str, bytes]) -> None:
        """Add a reply's bytes to the round's traffic, whether it is good or not."""
        longest = self._expected[site].longest_header
        classes = [wire.byte_classes(blob, longest) for blob in blobs.values()]
        with self._lock:
            self.round.up.count(site, classes, self._header_bytes(header))

    def _check(self, site: int, header: str, blobs: Mapping[str, bytes]) -> None:
        """Let a reply in, or raise Refused. Its figures are kept, its tensors are not."""
        expected = self._expected[site]
        reply = check_header(header, expected)
        load_LE = check_load(reply, expected)
        checked = check_blobs(blobs, reply, expected)
        with self._lock:
            self.round.replies[site], self.round.loads[site] = reply, load_LE
            self.round.norms[site], self.round.by_name[site] = checked
        if STATE_LOST in reply.metrics:
            log.warning(
                "round %d: the state of site %s was missing or damaged there: it went on with fresh moments",
                self.round.number, self.site_names[site],
            )  # fmt: skip

    def take_evaluation(self, site: int, header: str, blobs: Mapping[str, bytes]) -> None:
        """A reply to an evaluation message; in round 0 its loss does not count, for the text is the site's own."""
        expected = self._expected[site]
        try:
            with refusing():
                self._count(site, header, blobs)
                reply = check_evaluation(header, expected)
                if self.round.number:
                    self.round.evaluations[site] = reply
                    return
                load_LE = check_load(reply, expected)
                if blobs or reply.bundle_digests:
                    checked = check_blobs(blobs, reply, expected)
                    fitted = decode(self._down, wire.from_blobs(blobs.values()), expected.shapes)
                    if other := [name for name in fitted if not is_standin(name)]:
                        raise Refused("unknown_name", f"{other[0]}: before round 1 there are stand-ins alone")
                    self._fitted[site] = fitted
                    # Of a stand-in in the mean, so that sites with few experts and with many can be compared.
                    held = max(int(self.round.placement.holds_LEM[:, :, site].sum()), 1)
                    total = math.hypot(*checked.by_name.values())
                    self.round.norms[site] = {"stand-ins": total / math.sqrt(held)}
                self.round.loads[site] = load_LE
        except Refused as refused:
            self.round.fail(site, str(refused), refused.kind)

    @property
    def surveys(self) -> bool:
        """Whether the sites shall look at their text before round 1, with a shard of what a checkpoint brought."""
        return self.policy.surveys or (self.config.model.standins > 0 and self.config.trained_before)

    def surveyed(self) -> None:
        """All answers are in: round 1 goes by them."""
        current, loads, model = self.round, self.round.loads, self.config.model
        for site, reason in outliers(current.norms, [], self.config.strategy.norm_bound).items():
            current.fail(site, reason, "norm")
            del loads[site], self._fitted[site]
        if self.policy.surveys:
            self.policy.surveyed({self.site_names[site]: load_LE for site, load_LE in sorted(loads.items())})
            log.info(
                "%d of %d sites said which experts their text asks for", len(loads), len(self.site_names)
            )
        if model.standins:
            holds_LEM = current.placement.holds_LEM
            taken = take_over(self.state.tensors, self._fitted, holds_LEM, expert_layers(model))
            log.info(
                "%d of %d experts have a stand-in that a holder fitted; the others begin with none",
                taken,
                holds_LEM[..., 0].size,
            )
            if self.state.public is not None:
                # Nobody holds it yet.
                self.state.public.begin(self.state.tensors)
        self._fitted.clear()

    # ----- decide

    def close(self, needed: int, expert_share: float, observer: RoundObserver) -> bool:
        """All answers are in, or time is up: commit the round, or discard it whole. Returns which.

        Args:
            needed: good replies.
            expert_share: of an expert's holders that must have answered well for it to be updated.
        """
        try:
            return self._decide(needed, expert_share, observer)
        except Exception:
            # What these replies did once they would do again in every resumed run: their sites are asked anew.
            self.inbox.clear()
            raise

    def _decide(self, needed: int, expert_share: float, observer: RoundObserver) -> bool:
        current, state = self.round, self.state
        found = outliers(current.norms, list(self._sizes().norms), self.config.strategy.norm_bound)
        for site, reason in found.items():
            current.fail(site, reason, "norm")
            del current.replies[site], current.loads[site], current.norms[site], current.by_name[site]
            self.inbox.drop(site)
        current.committed = len(current.replies) >= needed
        observer.collected(current, state, self.inbox)
        started = time.perf_counter()
        if current.committed:
            self._commit(expert_share)
        else:
            if state.public is not None:
                state.public.stay()
            if state.held is not None:
                silent = self._expected.keys() - current.replies
                state.held.discard(self.site_names[site] for site in silent)
        state.discarded = 0 if current.committed else state.discarded + 1
        state.round = current.number
        self.inbox.close()
        current.aggregate_s += time.perf_counter() - started
        return current.committed

    def _sizes(self) -> Sizes:
        """Of earlier rounds that had the turn of this one."""
        return self.state.sizes[turn_name(self.config.strategy, self.round.number, self.last_round)]

    def _commit(self, expert_share: float) -> None:
        current, state = self.round, self.state
        if state.public is not None:
            # Before the outer step: it is what this round's replies started from.
            state.public.commit()
        if state.held is not None:
            state.held.commit(
                {
                    reply.site: current.placement.residents(site)
                    for site, reply in sorted(current.replies.items())
                },
                current.resting,
            )
        model = self.config.model
        at_rest = {place for name in current.resting if (place := place_of(model, name)) is not None}
        updated = updated_experts(current.placement, current.replies, expert_share) - at_rest
        current.held_back = state.experts.updated_LE.size - len(at_rest) - len(updated)
        contributions = {
            site: Contribution(
                reply.num_examples,
                current.steps_M[site],
                current.loads[site],
                current.placement.holds_LEM[:, :, site],
                current.by_name[site],
            )
            for site, reply in current.replies.items()
        }
        starved, least = starved_experts(current.placement, contributions, self.config)
        state.experts.starve(current.number, starved & updated, least)
        updated -= starved
        factors = commit(
            current.number,
            state.outer,
            self.inbox,
            self.config,
            contributions,
            updated,
            self._sizes().usual,
            current.resting,
            current.sole_LE if self.config.strategy.sole_every > 1 else None,
        )
        for site, own in sorted(factors.items()):
            name, factor = min(own.items(), key=lambda item: item[1])
            current.clipped[self.site_names[site]] = len(own)
            # A site with little or other text may be scaled in many rounds, and be honest.
            level = logging.DEBUG if site in self._clipped else logging.WARNING
            self._clipped.add(site)
            log.log(
                level,
                "round %d: site %s: %d tensor(s) far larger than at their other holders, scaled down to the median, "
                "%s by %.2g (strategy.clip=%g); in later rounds see `clipped` in metrics.jsonl",
                current.number,
                self.site_names[site],
                len(own),
                name,
                factor,
                self.config.strategy.clip,
            )
        # In the order of the sites, so that what is remembered does not depend on the network.
        common: Counter[str] = Counter()
        for site, reply in sorted(current.replies.items()):
            state.counted[reply.site] = current.number
            if reply.inputs.partition == OWN_TEXT:
                corpus = reply.inputs.corpus
                if state.own_corpora.get(reply.site, corpus) != corpus:
                    log.warning("round %d: site %s: its own text is another now", current.number, reply.site)
                state.own_corpora[reply.site] = corpus
            else:
                common[reply.inputs.corpus] += 1
            if "last_loss" in reply.metrics:
                state.last_losses[reply.site] = reply.metrics["last_loss"]
            held_LE = current.placement.holds_LEM[:, :, site]
            state.experts.record(current.number, updated, current.loads[site] * held_LE)
            self._sizes().norms.append(current.norms[site])
        if common and not state.corpus:
            state.corpus = common.most_common(1)[0][0]
        load_LE = np.sum(list(current.loads.values()), axis=0)
        state.global_load = averaged(state.global_load, load_LE)
        self.policy.heard({reply.site: current.loads[site] for site, reply in current.replies.items()})


def _held(
    experts: Mapping[str, tuple[int, int] | None], residents: Residents, layers: Sequence[int]
) -> frozenset[str]:
    """Those of the tensors that a site with these residents holds.

    Args:
        experts: `expert_of` each tensor.
        layers: numbers of the layers with experts.
    """
    own = experts_of(residents, layers)
    return frozenset(name for name, expert in experts.items() if expert is None or expert in own)


def _of_each(residents: Residents, values_LE: NDArray[np.int64] | None) -> list[list[int]]:
    """The value of each resident, one list a layer; no lists where there are no values."""
    if values_LE is None:
        return []
    return [values_LE[row, list(own)].tolist() for row, own in enumerate(residents)]


def _those_of(residents: Residents, which_LE: NDArray[np.bool_] | None) -> list[list[int]]:
    """Those of the residents, one list a layer; no lists where nothing is said."""
    if which_LE is None:
        return []
    return [[expert for expert in own if which_LE[row, expert]] for row, own in enumerate(residents)]


def missing(current: Round) -> Collection[int]:
    """The sites of a round that have neither answered nor failed."""
    return [
        site
        for site in current.asked
        if site not in current.replies and current.site_names[site] not in current.failures
    ]
