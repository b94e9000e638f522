"""What an encoder has not sent yet is part of a site's state: it comes back in the next round that counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients.identity import state_folder
from clients.site import Memory
from clients.state import load_state
from fomoe_flwr import wire
from fomoe_flwr.codecs import CODECS, CodecState, Part, Parts
from fomoe_flwr.codecs.cast import Cast
from tests.clients.helpers import site_task
from tests.clients.test_memory import settings, work
from tests.conftest import Compose


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass(frozen=True)
class Feedback(Cast):
    """bf16 with error feedback: what the cast loses is added to the next update.

    Of v_t = update_t + e_(t-1) the server gets bf16(v_t), and e_t = v_t - bf16(v_t) is remembered.
    Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 2.
    """

    dtype: str = "bfloat16"
    bytes_per_number: int = 2

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        values = {name: value + state[name] if name in state else value for name, value in named.items()}
        errors = {name: value - self.round_trip(value).to(value.dtype) for name, value in values.items()}
        return {name: Part(value, self._dtype()) for name, value in values.items()}, errors


class Recorder(Feedback):
    """Keeps copies of what the last update was encoded from and what was to be remembered of it."""

    before: CodecState
    update: dict[str, Tensor]
    after: CodecState

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        Recorder.before = {name: value.clone() for name, value in state.items()}
        Recorder.update = {name: value.clone() for name, value in named.items()}
        parts, errors = super().encode(named, state)
        Recorder.after = {name: value.clone() for name, value in errors.items()}
        return parts, errors


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_what_was_not_sent_comes_back_from_the_round_that_counts(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    """Round 2's reply is lost, so that round 3 goes on from round 1; a cold site has only its disk."""
    monkeypatch.setitem(CODECS, "bf16", Recorder())
    config = small("strategy.wire_dtype=bf16").config
    memory, errors = Memory(), {0: {}}
    for round_, counted in ((1, 0), (2, 1), (3, 1), (4, 3)):
        if not warm:
            memory = Memory()
        answer = work(config, tmp_path, memory, round_, counted_round=counted)
        # The helpers encode the shard before the site encodes its update: the last call is the site's.
        assert same(Recorder.before, errors[counted])
        sent = wire.from_blobs(answer.bundles.values())
        expected = {name: v + errors[counted].get(name, 0) for name, v in Recorder.update.items()}
        assert same(sent, {name: value.bfloat16() for name, value in expected.items()})
        # It is in the file of this round only if the update was encoded before the state was saved.
        folder = state_folder(site_task(config, round_), settings(tmp_path))
        assert same(load_state(folder, round_, 0).encoder, Recorder.after)
        assert any(error.any() for error in Recorder.after.values())
        errors[round_] = Recorder.after
    assert not same(errors[1], errors[2])
