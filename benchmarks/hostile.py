"""What one of four sites does to everybody's model by lying within the rules: `python -m benchmarks.hostile`

One site changes its replies, digests and all, so that nothing about them is refused. `--before FOLDER` also plays the
attacks on the code in another working tree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from benchmarks.harness import write_result
from clients.app import app
from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.bundles import as_array, blobs_of
from fomoe_flwr.codecs import Part
from fomoe_flwr.compose import compose
from fomoe_flwr.messages import Reply
from fomoe_flwr.model.spec import is_moment
from strategies import launch
from strategies.local_grid import LocalGrid

SETTINGS = (
    "model=tiny", "model.d_model=64", "model.num_layers=2", "model.num_experts=8", "model.d_expert=64",
    "federation.num_sites=4", "train.rounds=8", "train.local_steps=12", "train.batch_size=4", "train.seq_len=64",
    "train.eval_batches=16", "train.final_eval_batches=0", "runtime=local", "wandb.mode=disabled",
    "checkpoint.every=0", "train.device=cpu", "strategy.max_discarded=8",
)  # fmt: skip
LIAR = "site-3"
ALLOWED = 9.0  # times its own size: below strategy.norm_bound, by which a whole reply is refused
Update = dict[str, Tensor]


def honest(update: Update) -> Update:
    return update


def one_tensor(update: Update) -> Update:
    """All the size that is allowed, in one small tensor."""
    own = {name: value for name, value in update.items() if not is_moment(name)}
    total = sum(float(value.float().square().sum()) for value in own.values()) ** 0.5
    spread = ALLOWED * total / own[NORM].numel() ** 0.5
    return update | {name: value * 0 for name, value in own.items()} | {NORM: own[NORM] * 0 + spread}


def sign_flip(update: Update) -> Update:
    return {name: value if is_moment(name) else value * -5 for name, value in update.items()}


def moments(update: Update) -> Update:
    """First moments that point the wrong way, beside second ones that make any step of them."""
    factors = {"exp_avg": -ALLOWED, "exp_avg_sq": 0.0}
    return {name: value * factors.get(name.partition(".")[0], 1.0) for name, value in update.items()}


NORM = "model.norm.weight"
ATTACKS: dict[str, Callable[[Update], Update]] = {
    "honest": honest, "one tensor": one_tensor, "sign flip x 5": sign_flip, "moments": moments,
}  # fmt: skip


def play(attack: str, overrides: list[str]) -> dict[str, Any]:
    """A run with this attack from the first round on; its last line of metrics, and who was refused or scaled down."""

    launch.report = lambda *_, **__: None  # pictures take longer than the run

    class HostileGrid(LocalGrid):
        def _answer(self, message: Message, context: Context) -> Message:
            reply = super()._answer(message, context)
            if reply.has_error() or "arrays" not in reply.content:
                return reply
            said = Reply.from_json(str(reply.content["config"]["reply"]))
            if said.site != LIAR:
                return reply
            update = ATTACKS[attack](dict(wire.from_blobs(blobs_of(reply.content["arrays"]).values())))
            parts = {name: Part(value, value.dtype) for name, value in update.items()}
            blobs = wire.encode_bundles("all", parts)
            header = dataclasses.replace(said, bundle_digests=bundle_digests(blobs)).to_json()
            arrays = ArrayRecord({key: as_array(blob) for key, blob in blobs.items()})
            return Message(
                RecordDict({"arrays": arrays, "config": ConfigRecord({"reply": header})}), reply_to=message
            )

    with tempfile.TemporaryDirectory(prefix="fomoe-hostile-") as folder:
        composed = compose([*SETTINGS, *overrides, f"hydra.run.dir={folder}/run"])
        grid = HostileGrid(app, len(composed.config.federation.sites), workers=2)
        ended = ""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                launch.run_server(grid, composed)
        except Exception as error:  # noqa: BLE001 - a ruined run may end in any way, and that is the result
            ended = f"{type(error).__name__}: {error}"
        finally:
            grid.close()
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    refused = sorted({site for line in lines for site in line["failures"]})
    clipped = sorted({site for line in lines for site in line.get("clipped", {})})
    return {
        "val_loss": lines[-1]["val_loss"], "round": lines[-1]["round"], "refused": refused, "clipped": clipped,
        "ended": ended,
    }  # fmt: skip


def played(tree: Path, attack: str, *overrides: str) -> str:
    """The attack on the code of a working tree, in a process of its own, as a cell of a table."""
    command = [sys.executable, str(Path(__file__).resolve()), "--play", attack, *overrides]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print(tree.name, attack, *overrides, result, file=sys.stderr, flush=True)
    notes = [f"ended in round {result['round']}"] if result["ended"] else []
    if wronged := [site for site in result["refused"] if site != LIAR]:
        notes.append(f"honest refused: {len(wronged)}")
    if result["refused"] and LIAR in result["refused"]:
        notes.append("liar refused")
    if wronged := [site for site in result["clipped"] if site != LIAR]:
        notes.append(f"honest scaled: {len(wronged)}")
    return f"{result['val_loss']:.3f}" + (f" ({', '.join(notes)})" if notes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="a working tree of an earlier commit")
    parser.add_argument("--play", choices=ATTACKS)
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    if chosen.play:
        print(json.dumps(play(chosen.play, chosen.overrides)))
        return
    here = Path(__file__).resolve().parent.parent
    columns: dict[str, tuple[Path, tuple[str, ...]]] = {}
    if chosen.before:
        columns["before"] = (chosen.before.resolve(), ())
    columns |= {f"mean={mean}": (here, (f"strategy.mean={mean}",)) for mean in ("mean", "median", "trimmed")}
    rows = []
    for holders, outer in ((4, "nesterov"), (4, "local_adamw"), (2, "nesterov")):
        for attack in ATTACKS:
            if attack == "moments" and outer == "nesterov":
                continue
            settings = (f"strategy.overlap={holders}", f"strategy.outer={outer}")
            cells = [played(tree, attack, *settings, *own) for tree, own in columns.values()]
            rows.append(f"| {holders} | {outer} | {attack} | {' | '.join(cells)} |")
    write_result(
        "hostile",
        "One of four sites lies within the rules (a small model, 8 rounds)",
        "Validation loss after the last round, all experts, nats a token. An expert with two holders has no robust "
        "mean; what is dense has four.\n\n"
        f"| holders of an expert | outer | attack | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}\n"
        + "\n".join(rows),
        "larger models, more seeds, several liars, liars who know the others' updates.",
    )


if __name__ == "__main__":
    main()
