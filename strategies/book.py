"""Turns each round of the Strategy into an evaluation, a line of metrics and a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

from fomoe_flwr.checkpoint import checkpoint_path, save_checkpoint
from fomoe_flwr.compose import Composed
from fomoe_flwr.data import TokenCorpus, validation_batches
from fomoe_flwr.evaluation import FINAL_DRAWS, Judged, as_json, describe_text, evaluate_model, text_of
from fomoe_flwr.files import write_atomically
from fomoe_flwr.model.transformer import build
from fomoe_flwr.placement import full_residents
from fomoe_flwr.plan.clock import Measured, virtual_round
from fomoe_flwr.plan.sites import plan_sites
from fomoe_flwr.report.evaluation import FILE
from fomoe_flwr.telemetry import Telemetry
from fomoe_flwr.training import evaluate, resolve_device, threads_for_a_while
from strategies.fomoe import FoMoE, RoundObserver
from strategies.health import RoutingHealth, probe_batch
from strategies.round import Round


class RoundBook(RoundObserver):
    """Turns each round of the strategy into an evaluation, a line of metrics and a checkpoint."""

    def __init__(
        self, composed: Composed, run: str, corpus: TokenCorpus | None, telemetry: Telemetry, tokens: int
    ) -> None:
        self._composed, self._run, self._corpus, self._telemetry = composed, run, corpus, telemetry
        self._tokens = tokens  # trained so far, by all sites together
        self._health = RoutingHealth(composed.config, probe_batch(corpus, composed.config.train.seq_len))
        self._collected_s = 0.0

    def asked(self, current: Round) -> None:
        self._telemetry.begin_round(current.number, len(current.asked))

    def answered(self, current: Round) -> None:
        self._telemetry.site_answered()

    def collected(self, strategy: FoMoE) -> None:
        started = time.perf_counter()
        self._health.collected(strategy)
        self._collected_s = time.perf_counter() - started

    def finished(self, strategy: FoMoE) -> None:
        current = strategy.round
        if current.committed:
            self._tokens += sum(result.tokens for result in current.results.values())
        started = time.perf_counter()
        val_loss = self._evaluate(strategy)
        evaluated = time.perf_counter()
        routing = self._health.finished(strategy)
        looked = time.perf_counter()
        seconds = {
            "round": looked - current.began,
            "train": max((result.seconds for result in current.results.values()), default=0.0),
            "wire": current.wire_s,
            "aggregate": current.aggregate_s,
            "evaluate": evaluated - started,
            "routing": self._collected_s + looked - evaluated,
            "checkpoint": 0.0,
        }
        bytes_per_token = self._corpus.bytes_per_token(val=True) if self._corpus else None
        line = metrics_line(current, self._tokens, val_loss, bytes_per_token, seconds)
        line["routing"] = routing
        if strategy.simulated and current.results:
            line["virtual"] = self._virtual(current)
        if current.number:
            line["experts"] = strategy.ledger.summary(current.number)
            table = json.dumps(strategy.ledger.table(current.number))
            write_atomically(self._composed.run_dir / "experts.json", lambda path: path.write_text(table))
        if current.number and self._is_checkpoint_round(current.number):
            self._save(strategy, line)
            seconds["checkpoint"] = time.perf_counter() - looked
            seconds["round"] += seconds["checkpoint"]
        self._telemetry.end_round(line)

    def conclude(self, strategy: FoMoE) -> None:
        """The figures that `fomoe eval` prints, of the model as the last round left it, into `evaluation.json`."""
        config, current, corpus = self._composed.config, strategy.round, self._corpus
        train = config.train
        if corpus is None or not train.final_eval_batches or not current.number:
            return
        documents = corpus.val_documents
        placement = {name: current.placement.residents(i) for i, name in enumerate(strategy.site_names)}
        judged = Judged(config.model, config.strategy.routing, strategy.parameters(), placement)
        text = text_of(corpus, documents, train.seq_len, train.batch_size, train.final_eval_batches)
        with threads_for_a_while(train.threads):
            device = resolve_device(train.device)
            evaluation = evaluate_model(judged, text, train.dtype, device, FINAL_DRAWS)
        content = {
            "checkpoint": str(checkpoint_path(self._composed.run_dir, current.number)),
            "round": current.number,
            "text": describe_text(config.data, "validation", corpus, documents),
            **as_json(evaluation),
        }
        as_text = json.dumps(content, indent=1)
        write_atomically(self._composed.run_dir / FILE, lambda path: path.write_text(as_text))
        self._telemetry.end_run(content)

    def _virtual(self, current: Round) -> dict[str, Any]:
        """What the round would have taken with the federation's own devices and links."""
        measured = {
            site: Measured(result.seconds, current.down.by_site.get(site, 0), current.up.by_site.get(site, 0))
            for site, result in current.results.items()
        }
        return virtual_round(plan_sites(self._composed.config), measured)

    def _is_checkpoint_round(self, number: int) -> bool:
        every, last = self._composed.config.checkpoint.every, self._composed.config.train.rounds
        return number == last or (every > 0 and number % every == 0)

    def _evaluate(self, strategy: FoMoE) -> float | None:
        """Loss of the whole model, all experts, on the validation documents: what a user would deploy."""
        config, number = self._composed.config, strategy.round.number
        train = config.train
        if self._corpus is None:
            losses = strategy.round.evaluations
            return sum(losses.values()) / len(losses) if losses else None
        if number % train.eval_every and number != train.rounds:
            return None
        device = resolve_device(train.device)
        everything = full_residents(config.model.num_layers, config.model.num_experts)
        module = build(config.model, everything, config.strategy.routing, strategy.parameters(), device)
        batches = validation_batches(self._corpus, None, train.seq_len, train.batch_size, train.eval_batches)
        with threads_for_a_while(train.threads):
            return evaluate(module, batches, train.dtype, device)[0]

    def _save(self, strategy: FoMoE, line: dict[str, Any]) -> None:
        config, number = self._composed.config, strategy.round.number
        assert strategy.outer is not None
        placement = strategy.round.placement
        facts: dict[str, Any] = {
            "run": self._run,
            "tokens": self._tokens,
            "memory": strategy.memory(),
            "metrics": line,  # for a run that is killed before it has written the line
            "config": dataclasses.asdict(config),
            "overrides": list(self._composed.overrides),
            "placement": {name: placement.residents(site) for site, name in enumerate(strategy.site_names)},
            # Every random choice is drawn anew from the seed and a counter, so this is the generator's whole state.
            "rng": {"seed": config.seed, "round": number},
        }
        save_checkpoint(
            self._composed.run_dir,
            number,
            strategy.state,
            strategy.outer.state_tensors(),
            facts,
            config.checkpoint.keep,
        )


def metrics_line(
    current: Round,
    tokens: int,
    val_loss: float | None,
    bytes_per_token: float | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """A round as its line in `metrics.jsonl`. Means over sites are weighted by tokens."""
    results = [current.results[site] for site in sorted(current.results)]
    trained = sum(result.tokens for result in results)

    def mean(key: str) -> float | None:
        return sum(getattr(r, key) * r.tokens for r in results) / trained if trained else None

    val_bpb = None
    if val_loss is not None and bytes_per_token is not None:
        val_bpb = val_loss / math.log(2) / bytes_per_token
    sites = [
        {
            "site": current.results[site].site,
            "tokens": current.results[site].tokens,
            "train_loss": current.results[site].train_loss,
            "bytes_down": current.down.by_site.get(site, 0),
            "bytes_up": current.up.by_site.get(site, 0),
            "tokens_per_second": current.results[site].tokens_per_second,
            "resident_share": current.results[site].resident_share,
            "memory_bytes": current.results[site].memory_bytes,
        }
        | (
            {"val_loss": current.evaluations[name]}
            if (name := current.results[site].site) in current.evaluations
            else {}
        )
        for site in sorted(current.results)
    ]
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
        "moves": dataclasses.asdict(current.moves),
        "committed": current.committed,
        "experts_held_back": current.held_back,
        "deadline_s": current.deadline_s,
        "failures": current.failures,
        "refused": current.refused,
    }
