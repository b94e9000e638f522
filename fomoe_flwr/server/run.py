"""A run around its rounds: what is checked before the first, recorded after each, and judged after the last."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fomoe_flwr.checkpoint import (
    Checkpoint,
    Facts,
    Origin,
    checkpoint_path,
    list_checkpoints,
    resume_from,
    save_checkpoint,
)
from fomoe_flwr.compose import Composed
from fomoe_flwr.config import RunConfig
from fomoe_flwr.data import (
    TokenCorpus,
    bytes_per_target,
    check_vocabulary,
    load_tokenizer,
    prepare,
    validation_batches,
    validation_documents,
)
from fomoe_flwr.data.corpus import name_some
from fomoe_flwr.data.statistics import FREE_PASSES, domain_statistics, repetition, site_statistics
from fomoe_flwr.data.tokenizer import keep_tokenizer
from fomoe_flwr.deploy.channel import locked
from fomoe_flwr.engine.device import cpu_threads, resolve_device
from fomoe_flwr.errors import CheckpointError, ConfigError, RunError, WorkerError
from fomoe_flwr.evaluation import (
    FILE,
    FINAL_DRAWS,
    Judged,
    describe_text,
    evaluate,
    evaluate_model,
    text_of,
)
from fomoe_flwr.files import write_atomically
from fomoe_flwr.hf_files import read_state
from fomoe_flwr.init_from import open_model
from fomoe_flwr.inputs import UNKNOWN, Inputs, run_inputs
from fomoe_flwr.messages import AHEAD, deals
from fomoe_flwr.model.build import build, initial_standins, initial_tensors
from fomoe_flwr.overrides import spelled
from fomoe_flwr.placement import Placement, full_residents
from fomoe_flwr.plan.advice import groups_note
from fomoe_flwr.plan.planner import clock_note, plan_for_run
from fomoe_flwr.plan.record import Plan, load_plan
from fomoe_flwr.plan.system import BYTES_A_GIB, Measured, plan_sites, virtual_round
from fomoe_flwr.records import NAME as PLACEMENTS
from fomoe_flwr.records import append_placement, cut_placements
from fomoe_flwr.server.health import RoutingHealth, probe_batch
from fomoe_flwr.server.replies import Inbox
from fomoe_flwr.server.resume import (
    bring_history,
    check_inputs,
    check_resumable,
    in_saved_order,
    say_of_the_schedule,
    with_other_text,
)
from fomoe_flwr.server.rounds import Round, RoundObserver, Server
from fomoe_flwr.server.state import ServerState
from fomoe_flwr.telemetry import Telemetry
from fomoe_flwr.units import in_bytes

log = logging.getLogger("fomoe")

CORPUS = "corpus.json"  # in the run directory: documents, bytes and tokens by domain and by site


@dataclass(frozen=True)
class Run:
    """A run that is about to start: what the Strategy is made from."""

    name: str  # its identity; sites keep their state under it
    plan: Plan
    recorder: RunRecorder
    checkpoint: Checkpoint | None
    weights: Iterator[tuple[str, Tensor]] | None  # of another run, with which this one begins
    plan_changed: bool  # what was asked of the planner is not what the checkpoint's plan was made for
    inputs: Inputs
    inputs_changed: bool  # as this command asked for, against the checkpoint's

    def load_into(self, server: Server, config: RunConfig) -> int:
        """Give the server its model, fresh or from the checkpoint; returns the rounds that are done."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            server.load(self.weights or first_state(config))
            return 0
        log.info("resuming run %s after round %d", self.name, checkpoint.round)
        memory = checkpoint.manifest["memory"]
        if self.plan_changed:
            memory = {**memory, "plan": None}
        if self.inputs_changed:
            memory = {**memory, "corpus": "", "own_corpora": {}}
        elif others := with_other_text(checkpoint, config):
            log.warning(
                "%s: data_path of %s is another, as was asked; losses before and after differ by it",
                spelled("resume", config.resume), name_some(sorted(others)),
            )  # fmt: skip
            own = {site: text for site, text in memory.get("own_corpora", {}).items() if site not in others}
            memory = {**memory, "own_corpora": own}
        try:
            server.load(checkpoint.parameters, checkpoint.outer, checkpoint.round, memory, checkpoint.public)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: not that of a run of this version ({error!r:.200})"
            ) from error
        # The server has copied them. A file that is still mapped would keep its room on the disk after its removal.
        checkpoint.parameters.clear()
        checkpoint.outer.clear()
        checkpoint.public.clear()
        return checkpoint.round


@contextmanager
def open_run(composed: Composed) -> Iterator[Run]:
    """Check what can be checked before a site is asked, and open the run's records; they are closed at the end.

    Raises:
        FomoeError: nothing can be trained, or the run cannot go on.
    """
    config, run_dir = composed.config, composed.run_dir
    origin, checkpoint = resume_from(config.resume) if config.resume else (None, None)
    begun, weights = None, None
    if checkpoint is not None:
        begun = checkpoint.manifest.get("init_from")
        if missing := sorted(Facts.__annotations__.keys() - checkpoint.manifest):
            raise CheckpointError(f"checkpoint {checkpoint.path}: manifest.json lacks {', '.join(missing)}")
        check_resumable(checkpoint, config)
        config.federation.sites = in_saved_order(checkpoint, config)
        say_of_the_schedule(checkpoint, config)
        if run_dir.resolve().is_relative_to((checkpoint.path.parent.parent / "sites").resolve()):
            raise ConfigError(
                f"hydra.run.dir={run_dir}: lies in what the sites of the resumed run keep; choose another"
            )
    elif config.init_from is not None:
        begun, weights = open_model(config, composed.asked)
    if origin is None or origin.resolve() != run_dir.resolve():
        check_unused(composed)
        keep_aside(run_dir)
    name = checkpoint.manifest["run"] if checkpoint else uuid.uuid4().hex[:12]
    corpus = open_validation(config)
    inputs = inputs_of_run(config, corpus)
    changed = checkpoint is not None and check_inputs(checkpoint, config, inputs, composed.asked)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
    write_atomically(run_dir / "config.yaml", lambda path: path.write_text(text))
    if checkpoint is not None and origin is not None and origin.resolve() != run_dir.resolve():
        bring_history(origin, run_dir, checkpoint)
    keep_tokenizer(config.data.tokenizer, run_dir)
    log.info("run directory: %s", run_dir)

    before, plan = load_plan(run_dir), plan_for_run(run_dir, config)
    warn_of_memory(plan, config)
    if note := groups_note(config):
        log.warning("%s", note)
    # How much there is of a stream nobody knows.
    if corpus is not None and not config.data.stream:
        describe_corpus(corpus, plan, config, run_dir)
    last = checkpoint.manifest["metrics"] if checkpoint else None
    telemetry = Telemetry(config, run_dir, name, last)
    tokens = checkpoint.manifest["tokens"] if checkpoint else 0
    # Losses on other text, or of other tokens, cannot be compared.
    best = None if changed else (last or {}).get("best")
    recorder = RunRecorder(composed, name, corpus, telemetry, tokens, best, inputs, plan, begun)
    failed = True
    try:
        yield Run(name, plan, recorder, checkpoint, weights, plan != before, inputs, changed)
        failed = False
    finally:
        telemetry.close(failed)


def first_state(config: RunConfig) -> Iterator[tuple[str, Tensor]]:
    """The parameters at step 0, fp32, one after the other: at random, or those of a checkpoint of Hugging Face.

    Raises:
        ConfigError: model.path cannot be read, or is not what its config.json describes.
    """
    model, routing = config.model, config.strategy.routing
    if model.init == "random":
        everything = full_residents(model.num_layers, model.num_experts)
        return initial_tensors(model, everything, routing, config.seed)
    assert model.path is not None
    log.info("weights of %s", model.path)
    tensors = read_state(Path(model.path), model, routing, f"model.path={model.path}")
    exact = ((name, tensor.to(torch.float32, copy=True).contiguous()) for name, tensor in tensors)
    return itertools.chain(exact, initial_standins(model, routing, config.seed))


class RunRecorder(RoundObserver):
    """Turns each round into an evaluation, a line of metrics and a checkpoint.

    Args:
        best: round and val_loss of the best checkpoint so far, which is kept beside the newest ones.
        plan: what the first round's times are held against.
        begun: the checkpoint with whose model the run began.
    """

    def __init__(
        self,
        composed: Composed,
        run: str,
        corpus: TokenCorpus | None,
        telemetry: Telemetry,
        tokens: int,
        best: dict[str, Any] | None = None,
        inputs: Inputs = UNKNOWN,
        plan: Plan | None = None,
        begun: Origin | None = None,
    ) -> None:
        self._composed, self._run, self._corpus, self._telemetry = composed, run, corpus, telemetry
        self._tokens = tokens  # trained so far, by all sites together
        self._health = RoutingHealth(composed.config, probe_batch(corpus, composed.config.train.seq_len))
        self._collected_s = 0.0
        self._placement: Placement | None = None  # the last one that this process recorded
        self._best, self._plan, self._begun = best, plan, begun
        self._inputs = dataclasses.asdict(inputs)
        self._repeating: set[str] = set()  # sites of which it is said that they read their text too often
        # Twice the loss of guessing every token with equal probability; nan is above it, too.
        self._worst_loss = 2 * math.log(composed.config.model.vocab_size)

    def asked(self, current: Round) -> None:
        self._telemetry.begin_round(current.number, len(current.asked))

    def answered(self, current: Round) -> None:
        self._telemetry.site_answered()

    def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
        started = time.perf_counter()
        self._health.collected(current, state, inbox)
        self._collected_s = time.perf_counter() - started

    def finished(self, current: Round, state: ServerState, memory: Mapping[str, Any]) -> None:
        if current.number:
            self._record_placement(current)
        if current.committed:
            self._tokens += sum(reply.num_examples for reply in current.replies.values())
        started = time.perf_counter()
        val_loss = self._evaluate(current, state)
        evaluated = time.perf_counter()
        routing = self._health.finished(current, state)
        looked = time.perf_counter()
        seconds = {
            "round": looked - current.began,
            "train": max(
                (reply.metrics.get("seconds", 0.0) for reply in current.replies.values()), default=0.0
            ),
            "wire": current.wire_s,
            "aggregate": current.aggregate_s,
            "evaluate": evaluated - started,
            "routing": self._collected_s + looked - evaluated,
            "checkpoint": 0.0,
        }
        line = metrics_line(current, self._tokens, val_loss, self._bytes_per_token, seconds)
        line["routing"] = routing
        line["inputs"] = self._inputs
        if current.simulated and current.replies:
            line["virtual"] = self._virtual(current)
        if current.number:
            line["experts"] = state.experts.summary(current.number)
            table = json.dumps(state.experts.table(current.number))
            write_atomically(self._composed.run_dir / "experts.json", lambda path: path.write_text(table))
        # By the server's own text only: what a site says of its loss must not end the run.
        own_loss = None if self._corpus is None else val_loss
        ruined = current.number > 0 and own_loss is not None and not own_loss <= self._worst_loss
        if current.number and self._is_checkpoint_round(current.number) and not ruined:
            if own_loss is not None and (self._best is None or own_loss < self._best["val_loss"]):
                self._best = {"round": current.number, "val_loss": own_loss}
            line["best"] = self._best
            self._save(current, state, memory, line)
            seconds["checkpoint"] = time.perf_counter() - looked
            seconds["round"] += seconds["checkpoint"]
        self._telemetry.end_round(line)
        self._warn_of_repetition(current)
        if current.number == 1 and self._plan is not None:
            self._compare_clock(current, self._plan)
        if ruined:
            raise RunError(
                f"round {current.number}: the validation loss is {own_loss:.4g}, far above that of guessing; the model "
                "is not saved, and resume= goes on from the last checkpoint before it"
            )

    def _warn_of_repetition(self, current: Round) -> None:
        passes = {
            reply.site: reply.metrics["passes"]
            for _, reply in sorted(current.replies.items())
            if reply.metrics.get("passes", 0.0) > FREE_PASSES and reply.site not in self._repeating
        }
        if passes:
            self._repeating |= set(passes)
            log.warning("round %d: %s", current.number, repetition(passes, "have read"))

    def _compare_clock(self, current: Round, plan: Plan) -> None:
        """Say so if the plan's times are far from those of this round."""
        config, run_dir = self._composed.config, self._composed.run_dir
        compute_s = {}
        for index, reply in current.replies.items():
            site = config.federation.sites[index]
            # Simulated sites all run on this device, which counts as speed 1.
            compute_s[site.name] = reply.metrics.get("seconds", 0.0) / (
                site.speed if current.simulated else 1.0
            )
        if note := clock_note(config, plan, compute_s, run_dir):
            log.warning("round %d: %s", current.number, note)

    def _record_placement(self, current: Round) -> None:
        run_dir = self._composed.run_dir
        if self._placement is None:
            # What is recorded of rounds that are played again goes when the first of them is over.
            cut_placements(run_dir, current.number - 1)
        if self._placement is None or (current.placement.holds_LEM != self._placement.holds_LEM).any():
            append_placement(run_dir, current.number, current.residents_by_name())
            self._placement = current.placement

    def conclude(self, current: Round, state: ServerState) -> None:
        """The figures that `fomoe eval` prints, of the model as the last round left it, into `evaluation.json`."""
        config, corpus = self._composed.config, self._corpus
        train = config.train
        if corpus is None or not train.final_eval_batches or not current.number:
            return
        documents = corpus.val_documents
        residents = current.residents_by_name()
        judged = Judged(config.model, config.strategy.routing, state.parameters(), residents)
        text = text_of(corpus, documents, train.seq_len, train.batch_size, train.final_eval_batches)
        with cpu_threads(train.threads):
            device = resolve_device(train.device)
            figures = evaluate_model(judged, text, train.dtype, device, FINAL_DRAWS)
        content = {
            "checkpoint": str(checkpoint_path(self._composed.run_dir, current.number)),
            "round": current.number,
            "text": describe_text(config.data, "validation", corpus, documents),
            **figures,
        }
        as_text = json.dumps(content, indent=1)
        write_atomically(self._composed.run_dir / FILE, lambda path: path.write_text(as_text))
        self._telemetry.end_run(content)

    def _virtual(self, current: Round) -> dict[str, Any]:
        """What the round would have taken with the federation's own devices and links."""
        measured = {
            site: Measured(
                reply.metrics.get("seconds", 0.0),
                current.down.by_site.get(site, 0),
                current.up.by_site.get(site, 0),
                reply.metrics.get(AHEAD) == 1.0,
            )
            for site, reply in current.replies.items()
        }
        return virtual_round(plan_sites(self._composed.config), measured)

    def _is_checkpoint_round(self, number: int) -> bool:
        every, last = self._composed.config.checkpoint.every, self._composed.config.train.rounds
        return number == last or (every > 0 and number % every == 0)

    @cached_property
    def _bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text for each token that the validation of a round predicts."""
        train, corpus = self._composed.config.train, self._corpus
        if corpus is None:
            return None
        return bytes_per_target(
            corpus, validation_batches(corpus, None, train.seq_len, train.batch_size, train.eval_batches)
        )

    def _evaluate(self, current: Round, state: ServerState) -> float | None:
        """Loss of the whole model, all experts, on the validation documents: what a user would deploy."""
        config, number = self._composed.config, current.number
        train = config.train
        if self._corpus is None:
            replies = [reply for _, reply in sorted(current.evaluations.items())]
            tokens = sum(reply.num_examples for reply in replies)
            lost = sum(reply.num_examples * reply.metrics["val_loss"] for reply in replies)
            return lost / tokens if tokens else None
        if number % train.eval_every and number != train.rounds:
            return None
        device = resolve_device(train.device)
        everything = full_residents(config.model.num_layers, config.model.num_experts)
        module = build(config.model, everything, config.strategy.routing, state.parameters(), device)
        batches = validation_batches(self._corpus, None, train.seq_len, train.batch_size, train.eval_batches)
        with cpu_threads(train.threads):
            return evaluate(module, batches, train.dtype, device)[0]

    def _save(
        self, current: Round, state: ServerState, memory: Mapping[str, Any], line: dict[str, Any]
    ) -> None:
        config, number = self._composed.config, current.number
        facts: dict[str, Any] = {
            "run": self._run,
            "tokens": self._tokens,
            "memory": memory,
            "metrics": line,  # for a run that is killed before it has written the line
            "config": dataclasses.asdict(config),
            "inputs": self._inputs,
            "overrides": list(self._composed.overrides),
            "placement": current.residents_by_name(),
            # Every random choice is drawn anew from the seed and a counter, so this is the generator's whole state.
            "rng": {"seed": config.seed, "round": number},
        }
        if self._begun is not None:
            facts["init_from"] = self._begun
        save_checkpoint(
            self._composed.run_dir,
            number,
            state.tensors,
            state.outer.state_tensors(),
            facts,
            config.checkpoint.keep,
            None if self._best is None else self._best["round"],
            None if state.public is None else state.public.tensors,
        )


def _speed(metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    """FLOP/s of a site's steps, and what share that is of its device's peak; as far as it says."""
    if seconds <= 0 or "flops" not in metrics:
        return {}
    found = {"flops_per_second": metrics["flops"] / seconds}
    if metrics.get("peak_flops", 0.0) > 0:
        found["mfu"] = found["flops_per_second"] / metrics["peak_flops"]
    return found


def metrics_line(
    current: Round,
    tokens: int,
    val_loss: float | None,
    bytes_per_token: float | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """A round as its line in `metrics.jsonl`. Means over sites are weighted by tokens."""
    replies = [(site, current.replies[site]) for site in sorted(current.replies)]

    def mean(key: str) -> float | None:
        known = [(reply.metrics[key], reply.num_examples) for _, reply in replies if key in reply.metrics]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    val_bpb = None
    if val_loss is not None and bytes_per_token:
        val_bpb = val_loss / math.log(2) / bytes_per_token
    sites = []
    for site, reply in replies:
        seconds_trained = reply.metrics.get("seconds", 0.0)
        evaluation = current.evaluations[site].metrics if site in current.evaluations else {}
        sites.append(
            {
                # First, so that no site can report what is counted here.
                **reply.metrics,
                **evaluation,
                "site": reply.site,
                "tokens": reply.num_examples,
                "bytes_down": current.down.by_site.get(site, 0),
                "bytes_up": current.up.by_site.get(site, 0),
                "tokens_per_second": reply.num_examples / seconds_trained if seconds_trained > 0 else 0.0,
                **_speed(reply.metrics, seconds_trained),
            }
        )
    return {
        "round": current.number,
        "tokens": tokens,
        "train_loss": mean("train_loss"),
        "val_loss": val_loss,
        "val_bpb": val_bpb,
        "bytes_down": current.down.total,
        "bytes_up": current.up.total,
        "bytes_by_class": {
            name: getattr(current.down, name) + getattr(current.up, name)
            for name in ("dense", "expert", "other")
        },
        "resident_share": mean("resident_share"),
        "seconds": seconds,
        "sites": sites,
        "committed": current.committed,
        "experts_held_back": current.held_back,
        "clipped": current.clipped,
        "deadline_s": current.deadline_s,
        "failures": current.failures,
        "refused": current.refused,
    }


# ----- before the first round


def warn_of_memory(plan: Plan, config: RunConfig) -> None:
    """Say which sites are given more than they say they have; a planned placement never does."""
    for site, planned in zip(config.federation.sites, plan.sites, strict=True):
        if site.memory_gib is not None and planned.memory_bytes > site.memory_gib * BYTES_A_GIB:
            log.warning(
                "site %s: %d experts a layer need %.3g GiB, it has memory_gib=%g; fomoe plan says what fits",
                site.name,
                planned.experts_per_layer,
                planned.memory_bytes / BYTES_A_GIB,
                site.memory_gib,
            )


def describe_corpus(corpus: TokenCorpus, plan: Plan, config: RunConfig, run_dir: Path) -> None:
    """Write how much text there is into `corpus.json`, and say which sites will read theirs too often.

    Raises:
        ConfigError: a site asks for a domain that the corpus does not have.
    """
    domains = domain_statistics(corpus)
    sites = site_statistics(corpus, config.federation.sites, config.data, config.seed)
    text = json.dumps({"domains": domains, "sites": sites}, indent=1)
    write_atomically(run_dir / CORPUS, lambda path: path.write_text(text))
    training, validation = domains[0]["train"], domains[0]["validation"]
    log.info(
        "corpus: %s in %d domains for training, %s (%.1f %%) for validation; see %s",
        in_bytes(training["bytes"]),
        len(corpus.domains),
        in_bytes(validation["bytes"]),
        100 * validation["bytes"] / max(training["bytes"] + validation["bytes"], 1),
        CORPUS,
    )
    passes = {
        planned.site: planned.tokens * config.train.rounds / sites[planned.site]["tokens"]
        for planned in plan.sites
        if sites.get(planned.site, {}).get("tokens")
    }
    if often := {site: number for site, number in passes.items() if number > FREE_PASSES}:
        log.warning("%s", repetition(often, "will read"))


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep other processes from working in the run directory.

    Raises:
        ConfigError: one is there already.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir / "run.lock", 0.0))
        except WorkerError as error:
            raise ConfigError(f"hydra.run.dir={run_dir}: another process is at work in it") from error
        yield


def check_unused(composed: Composed) -> None:
    """Refuse to begin a run where another one lives: its metrics and checkpoints would be lost.

    One that has no checkpoint cannot be resumed, so a new one may take its place.

    Raises:
        ConfigError: naming both ways out.
    """
    run_dir = composed.run_dir
    if list_checkpoints(run_dir):
        raise ConfigError(
            f"hydra.run.dir={run_dir}: holds a run already; go on with it by {spelled('resume', run_dir)}, or choose "
            "another"
        )


def keep_aside(run_dir: Path) -> None:
    """Rename what a run left that ended before its first checkpoint, so that a new one does not go on in it."""
    for name in ("metrics.jsonl", PLACEMENTS):
        if (run_dir / name).exists():
            log.info("%s is of a run without a checkpoint: kept as %s.before", run_dir / name, name)
            (run_dir / name).replace(run_dir / f"{name}.before")


def inputs_of_run(config: RunConfig, corpus: TokenCorpus | None) -> Inputs:
    """What the run goes by, as far as the server knows it."""
    tokenizer = corpus.tokenizer if corpus else load_tokenizer(config.data.tokenizer).fingerprint
    dealt = [dataclasses.asdict(deal) for deal in deals(config.data, config.federation.sites)]
    return run_inputs(config, tokenizer, corpus, dealt)


def open_validation(config: RunConfig, whole: bool = False) -> TokenCorpus | None:
    """The corpus for the server's evaluation; None where it is switched off.

    Args:
        whole: whether all of it is tokenised, for simulated sites, which share the cache of this machine.

    Raises:
        ConfigError, DataError: before anything starts.
    """
    check_vocabulary(load_tokenizer(config.data.tokenizer), config.model.vocab_size)
    if not config.train.eval_batches:
        return None
    return prepare(config.data, None if whole else validation_documents)
