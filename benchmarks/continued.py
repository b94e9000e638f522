"""A checkpoint goes on in a federation of which no site can hold it: `python -m benchmarks.continued`.

A small model is trained here on one text, exported, and continued on another by two sites, whose texts are alike or of
a domain each: with all experts at both sites, and with half of them each, by three routings and three placements. What
counts is the share of the full replica's improvement, in validation loss with all experts on the new text, at equal
tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import spread, write_result
from clients.app import app as client_app
from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.data import TokenStream, deal_documents, prepare, read_documents
from fomoe_flwr.eval_command import load
from fomoe_flwr.evaluation import Judged, Residents, Survey, evaluate_text, survey, text_of
from fomoe_flwr.export import export
from fomoe_flwr.model.spec import expert_layers
from fomoe_flwr.model.standins import take_over
from fomoe_flwr.placement import Placement
from fomoe_flwr.policies import POLICIES, Policy
from fomoe_flwr.server.run import first_state, open_run
from strategies.fomoe import FoMoE
from strategies.launch import federate
from strategies.local_grid import LocalGrid

NEW = ("pydoc_data", "tkinter")  # English prose, and a library with names of its own
TABLES = "encodings"  # numbers, mostly; in neither text
PIECE = 8000  # characters of a document of the new text
COMMON = (
    "runtime=local", "wandb.mode=disabled", "train.final_eval_batches=0", "train.seq_len=128", "data=text",
    "data.tokenizer=bytes",
)  # fmt: skip
SITES = (
    "federation.num_sites=null",
    "federation.sites=[{name: prose, domain: pydoc_data}, {name: code, domain: tkinter}]",
)
ROUTINGS: dict[str, tuple[str, ...]] = {
    "`skip`": ("strategy.routing=skip",),
    "`skip_renormalised`": ("strategy.routing=skip_renormalised",),
    "`partitioned`": ("strategy.routing=partitioned",),
    "`skip`, stand-ins of rank 8": ("strategy.routing=skip", "model.standins=8"),
}
PLACEMENTS = {
    "drawn once": ("strategy.placement=fixed",),
    "by demand": ("strategy.placement=affine",),
    # An expert that is new to a site would warm up for longer than it stays.
    "drawn each round": ("strategy.placement=random", "train.expert_warmup_steps=0"),
}
PARTITIONS = {"iid": "alike", "domain": "a domain each"}
EVAL_BATCHES = 32
STEPS = ("train.rounds=6", "train.local_steps=8", "train.warmup_steps=8")
# Without ghosts the routings are one.
FULL = ("strategy.overlap=2", "strategy.routing=skip", "strategy.placement=fixed")
HALF = "strategy.overlap=1"
# For the learning rate.
TRIED = {
    "full": FULL,
    "half, stand-ins": (HALF, *ROUTINGS["`skip`, stand-ins of rank 8"], *PLACEMENTS["drawn each round"]),
}


def texts(folder: Path) -> None:
    """The standard library as two folders: what the checkpoint is trained on, and what it goes on with."""
    counts: Counter[str] = Counter()
    for document in read_documents(compose(["data=stdlib"]).config.data):
        if document.domain == TABLES:
            continue
        new = document.domain in NEW
        step = PIECE if new else max(len(document.text), 1)
        for start in range(0, len(document.text), step):
            file = folder / ("new" if new else "open") / document.domain / f"{counts[document.domain]}.txt"
            counts[document.domain] += 1
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(document.text[start : start + step])


def run(folder: Path, *overrides: str) -> tuple[RunConfig, FoMoE]:
    """A whole run in this process; its Strategy still has the model."""
    composed = compose([*COMMON, *overrides, f"hydra.run.dir={folder}"])
    config = composed.config
    grid = LocalGrid(client_app, len(config.federation.sites), workers=2)
    try:
        with open_run(composed) as opened:
            return config, federate(grid, composed, opened)
    finally:
        grid.close()


def open_checkpoint(work: Path, model: str, steps: int) -> Path:
    """A folder as one gets it from Hugging Face: trained at one site, with all experts and a decayed learning rate."""
    folder = work / f"exported_{model}"
    if not folder.exists():
        if not (run_dir := work / f"open_{model}").exists():
            run(
                run_dir, f"model={model}", f"data.path={work / 'text' / 'open'}", "federation.num_sites=1",
                "strategy.overlap=1", "strategy.outer=average", "strategy.up=fp32", "strategy.down=fp32",
                "train.rounds=10",
                f"train.local_steps={steps // 10}", "train.schedule=cosine", "train.eval_batches=32",
                "checkpoint.every=10",
            )  # fmt: skip
        export(load(str(run_dir), "open checkpoint"), folder, torch.bfloat16)
    return folder


def by_domain(config: RunConfig, state: dict[str, Tensor], residents: Residents | None) -> dict[str, float]:
    """Validation loss on the new text, whole (under "") and by domain."""
    judged = Judged(config.model, config.strategy.routing, state, {})
    corpus = prepare(config.data)
    text = text_of(corpus, corpus.val_documents, config.train.seq_len, config.train.batch_size, EVAL_BATCHES)
    figures = evaluate_text(judged.module(residents or judged.everything, "cpu"), text, "fp32")
    return {"": figures["loss"]} | {name: own["loss"] for name, own in figures["by_domain"].items()}


def continued(work: Path, model: str, name: str, seed: int, *overrides: str) -> dict[str, Any]:
    """One variant: losses before and after, and what the ghosts cost at the sites. Kept, so that a script goes on."""
    kept = work / "figures" / f"{model} {name} {seed}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    with tempfile.TemporaryDirectory(prefix="fomoe-continued-") as folder:
        config, strategy = run(
            Path(folder) / "run", "model=hf", f"model.path={work / f'exported_{model}'}", *SITES,
            f"data.path={work / 'text' / 'new'}", "data.val_fraction=0.1",
            "checkpoint.every=0", "train.eval_batches=0", f"seed={seed}", *overrides,
        )  # fmt: skip
        lines = [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    before, after = dict(first_state(config)), dict(strategy.server.state.parameters())
    everything = by_domain(config, before, None)
    if config.model.standins:
        fits = {
            site: own.standins for site, own in enumerate(surveys(config, before, strategy.server.policy))
        }
        placement = strategy.server.policy.intended(0).placement
        take_over(before, fits, placement.holds_LEM, expert_layers(config.model))
    costs = []
    for number, site in enumerate(config.federation.sites):
        # The experts that were drawn first, whatever the placement makes of them.
        held = POLICIES[config.strategy.placement](config).intended(1).placement.residents(number)
        costs.append(by_domain(config, before, held)[site.domain or ""] - everything[site.domain or ""])
    figures = {
        "before": everything[""],
        "after": by_domain(config, after, None)[""],
        "ghosts_cost": statistics.mean(costs),
        "resident_share": [line["resident_share"] for line in lines[1:]],
    }
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(figures))
    print(model, name, seed, figures, flush=True)
    return figures


def surveys(config: RunConfig, state: dict[str, Tensor], policy: Policy, whole: bool = False) -> list[Survey]:
    """What each site says of the text of its first round: with its experts of round 0, or with all of them."""
    judged = Judged(config.model, "skip", state, {})
    corpus, train = prepare(config.data), config.train
    dealt = deal_documents(corpus, config.federation.sites, config.data, config.seed, train.seq_len)
    said = []
    for site, own in enumerate(dealt):
        residents = judged.everything if whole else policy.intended(0).placement.residents(site)
        stream = TokenStream(corpus, own, train.seq_len, config.seed)
        batches = [
            stream.batch(step * train.batch_size, train.batch_size) for step in range(train.local_steps)
        ]
        said.append(survey(judged.module(residents, "cpu"), batches, len(batches), "fp32", "cpu"))
    return said


def survey_worth(work: Path, model: str, seed: int) -> tuple[float, float, float]:
    """Share of the whole model's choices that are resident: drawn, by the survey, and by the whole model's own choices.

    The whole model's are what the survey would hear if a site could hold it.
    """
    config = compose(
        [*COMMON, "model=hf", f"model.path={work / f'exported_{model}'}", *SITES, f"seed={seed}",
         f"data.path={work / 'text' / 'new'}", "data.partition=domain", "data.val_fraction=0.1", *STEPS,
         "strategy.overlap=1", "strategy.placement=affine", "strategy.routing=skip"]
    ).config  # fmt: skip
    state, policy = dict(first_state(config)), POLICIES["affine"](config)
    drawn = policy.for_round(0, [0, 1]).placement
    half, truth = (
        [np.array(own.load_LE) for own in surveys(config, state, policy, whole)] for whole in (False, True)
    )

    def share(loads: list[NDArray[np.int64]]) -> float:
        policy = POLICIES["affine"](config)
        named = dict(zip((site.name for site in config.federation.sites), loads, strict=True))
        policy.surveyed(named)
        return resident(policy.for_round(1, [0, 1]).placement)

    def resident(placement: Placement) -> float:
        held = [truth[site][placement.holds_LEM[:, :, site]].sum() for site in range(2)]
        return float(sum(held) / sum(load.sum() for load in truth))

    return resident(drawn), share(half), share(truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="olmoe_tiny", choices=["olmoe_tiny", "qwen3_moe_tiny"])
    parser.add_argument("--steps", type=int, default=1000, help="of the checkpoint's own training")
    parser.add_argument("--lr", default="0.0003", help="of what is compared")
    parser.add_argument("--lrs", nargs="*", default=[], help="to try, at the first seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="folder in which what is done is kept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    work, model = chosen.work.resolve(), chosen.model
    if not (work / "text").exists():
        texts(work / "text")
    open_checkpoint(work, model, chosen.steps)

    def variant(name: str, partition: str, seed: int, value: str, *overrides: str) -> dict[str, Any]:
        settings = (*STEPS, f"data.partition={partition}", f"train.lr={value}", *overrides)
        return continued(work, model, f"{name} {partition} lr={value}", seed, *settings)

    tried = []
    for value in chosen.lrs:
        for name, overrides in TRIED.items():
            for partition, text in PARTITIONS.items():
                one = variant(name, partition, chosen.seeds[0], value, *overrides)
                tried.append(
                    f"| {value} | {name} | {text} | {one['after']:.3f} | {one['before'] - one['after']:.3f} |"
                )

    rows = []
    for partition, text in PARTITIONS.items():
        full = {seed: variant("full", partition, seed, chosen.lr, *FULL) for seed in chosen.seeds}
        gains = {seed: one["before"] - one["after"] for seed, one in full.items()}
        after = spread([one["after"] for one in full.values()])
        rows.append(f"| {text} | all experts at both | | 0 | 1 | {after} | 100 % |")
        for routing, how in ROUTINGS.items():
            for placed, overrides in PLACEMENTS.items():
                settings = (HALF, *how, *overrides)
                ran = {
                    seed: variant(
                        f"{routing} {placed}".replace("`", ""), partition, seed, chosen.lr, *settings
                    )
                    for seed in chosen.seeds
                }
                shares = [100 * (one["before"] - one["after"]) / gains[seed] for seed, one in ran.items()]
                rows.append(
                    f"| {text} | {routing} | {placed} | {spread([one['ghosts_cost'] for one in ran.values()])} | "
                    f"{statistics.median([one['resident_share'][0] for one in ran.values()]):.2f} | "
                    f"{spread([one['after'] for one in ran.values()])} | {spread(shares, '.0f')} % |"
                )
    worth = [survey_worth(work, model, seed) for seed in chosen.seeds]
    drawn, surveyed, known = (statistics.median(values) for values in zip(*worth, strict=True))
    before = next(iter(full.values()))["before"]
    lrs = (
        "\n| train.lr | | text of the sites | loss after | improvement |\n|---|---|---|---|---|\n"
        + "\n".join(tried)
        if tried
        else ""
    )
    write_result(
        f"continued_{model}",
        f"A checkpoint goes on at two sites with half of the experts each ({model})",
        f"The checkpoint: {chosen.steps} steps of 8 x 128 bytes of Python's standard library at one site. Then two "
        f"sites with prose (pydoc_data) and code (tkinter), mixed or one each: {' '.join(STEPS)} train.lr={chosen.lr}, "
        f"outer Nesterov. Loss: validation on both with all experts, before {before:.3f}. Median and range of "
        f"{len(chosen.seeds)} seed(s); learning rates: one.\n\n"
        "| text of the sites | routing | placement | nats that ghosts cost at a site before training | resident "
        "choices in round 1 | loss after | share of the full replica's improvement |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nOf the whole model's choices on the sites' text (a domain each), so many are resident: "
        f"{drawn:.3f} drawn, {surveyed:.3f} by the survey of sites that hold half of the model, {known:.3f} if they "
        f"could ask with all of it.\n{lrs}",
        "real open checkpoints, larger models, longer runs, more sites, other shares than a half.",
    )


if __name__ == "__main__":
    main()
