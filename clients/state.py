"""What a site keeps between rounds, on its own disk: AdamW's moments by name and its place in the data.

One file a round, because the server may come back to an earlier one: `round_00003.safetensors` is the state
after round 3. A file is either whole or not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fomoe_flwr.errors import CheckpointError
from fomoe_flwr.files import write_atomically
from fomoe_flwr.training import Moments

_PATTERN = re.compile(r"round_(\d{5,})\.safetensors")


@dataclass
class SiteState:
    """State of a site after `round`; round 0 is before the first."""

    round: int = 0
    position: int = 0  # sequences of its stream that it has consumed
    moments: Mapping[str, Moments] = field(default_factory=dict)


def _files(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("round_*.safetensors"):
        if match := _PATTERN.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def load_state(folder: Path, before_round: int) -> SiteState:
    """The newest state older than `before_round`. A newer one belongs to a future that did not happen.

    Raises:
        CheckpointError: that file is damaged.
    """
    rounds = [round_ for round_ in _files(folder) if round_ < before_round]
    if not rounds:
        return SiteState()
    path = _files(folder)[rounds[-1]]
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["state"])
            moments = {
                name: Moments(
                    file.get_tensor(f"exp_avg/{name}"), file.get_tensor(f"exp_avg_sq/{name}"), step, born
                )
                for name, (step, born) in facts["steps"].items()
            }
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"site state {path} is damaged ({error}); remove it to go on without it"
        ) from error
    return SiteState(rounds[-1], int(facts["position"]), moments)


def save_state(folder: Path, state: SiteState, checkpoint_every: int, keep: int) -> None:
    """Write the state after a round, and drop those that the server cannot come back to.

    Kept are this round's and those of the last `keep` rounds with a checkpoint.
    """
    tensors = {}
    for name, moment in state.moments.items():
        tensors[f"exp_avg/{name}"] = moment.exp_avg.contiguous()
        tensors[f"exp_avg_sq/{name}"] = moment.exp_avg_sq.contiguous()
    steps = {name: (moment.step, moment.born) for name, moment in state.moments.items()}
    facts = json.dumps({"position": state.position, "steps": steps})
    write_atomically(
        folder / f"round_{state.round:05d}.safetensors",
        lambda path: save_file(tensors, path, {"state": facts}),
    )
    files = _files(folder)
    for round_ in [r for r in files if r > state.round]:
        files.pop(round_).unlink()
    resumable = [r for r in files if checkpoint_every and r % checkpoint_every == 0][-keep:]
    for round_, path in files.items():
        if round_ != state.round and round_ not in resumable:
            path.unlink()
