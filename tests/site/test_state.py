"""What a site keeps between rounds, and which of it it throws away."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fomoe_flwr.engine import EngineState, Moments
from fomoe_flwr.site.delay import Sent
from fomoe_flwr.site.state import RUNS, SiteState, discard_later, forget_old_runs, load_state, save_state


def state(round_: int, value: float | None = None, last_round: int = 0) -> SiteState:
    value = float(round_) if value is None else value
    moments = {"a.weight": Moments(torch.full((2, 3), value), torch.ones(2, 3), step=7, reset_at=2)}
    return SiteState(
        round_, 10 * round_, last_round, EngineState(moments), {"a.weight": torch.full((3,), value)}
    )


def rounds(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round_")) for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    save_state(tmp_path, state(3), counted_round=2, checkpoint_every=1, keep=3)
    loaded = load_state(tmp_path, counted_round=3, position=0)
    assert (loaded.round, loaded.position) == (3, 30)
    moment = loaded.engine.moments["a.weight"]
    assert (moment.step, moment.reset_at) == (7, 2)
    assert torch.equal(moment.exp_avg, torch.full((2, 3), 3.0))
    assert torch.equal(loaded.encoder["a.weight"], torch.full((3,), 3.0))


def test_moments_come_back_one_or_two_as_they_were_kept(tmp_path: Path) -> None:
    """Muon has one; and in whatever type."""
    one = Moments(torch.tensor([1 / 3]), None, 4, 1)
    two = Moments(torch.tensor([1 / 3]).bfloat16(), torch.tensor([3e-9]).bfloat16(), 5, 0)
    kept = SiteState(1, engine=EngineState({"matrix": one, "norm": two}))
    save_state(tmp_path, kept, counted_round=0, checkpoint_every=1, keep=3)
    found = load_state(tmp_path, counted_round=1, position=0).engine.moments
    assert found["matrix"].exp_avg_sq is None
    assert found["norm"].exp_avg_sq is not None
    assert two.exp_avg_sq is not None
    for got, wanted in (
        (found["matrix"].exp_avg, one.exp_avg),
        (found["norm"].exp_avg, two.exp_avg),
        (found["norm"].exp_avg_sq, two.exp_avg_sq),
    ):
        assert (got.dtype, got.equal(wanted)) == (wanted.dtype, True)
    assert [(m.step, m.reset_at) for m in (found["matrix"], found["norm"])] == [(4, 1), (5, 0)]


def test_what_a_delayed_start_needs_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Parts are of any type, and shares of any size; without a delay there is nothing of them in the file."""
    parts = {"a:values": torch.tensor([1, 255], dtype=torch.uint8), "a:scale": torch.tensor([0.1]).bfloat16()}
    sent = Sent(parts, {"up": "int8", "density": 1 / 64, "value_bits": 2}, {"a": 1.33 / 3})
    kept = SiteState(1, public={"a": torch.tensor([1 / 3])}, sent=sent)
    save_state(tmp_path, kept, counted_round=0, checkpoint_every=1, keep=3)
    loaded = load_state(tmp_path, counted_round=1, position=0)
    assert (loaded.sent.codec, loaded.sent.shares) == (sent.codec, sent.shares)
    assert loaded.sent.parts.keys() == parts.keys()
    assert all(tensor.equal(parts[name]) for name, tensor in loaded.sent.parts.items())
    assert loaded.public["a"].equal(kept.public["a"])
    save_state(tmp_path, state(2), counted_round=1, checkpoint_every=1, keep=3)
    names = load_file(tmp_path / "round_00002.safetensors").keys()
    assert {name.partition("/")[0] for name in names} == {"exp_avg", "exp_avg_sq", "encoder"}
    assert load_state(tmp_path, counted_round=2, position=0).sent == Sent()


def test_what_rests_comes_back_bit_for_bit(tmp_path: Path) -> None:
    kept = SiteState(
        1, local={"a": torch.tensor([1 / 3])}, pending={"a": torch.tensor([1e-9]), "b": torch.ones(2)}
    )
    save_state(tmp_path, kept, counted_round=0, checkpoint_every=1, keep=3)
    loaded = load_state(tmp_path, counted_round=1, position=0)
    for ours, theirs in ((loaded.local, kept.local), (loaded.pending, kept.pending)):
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_before_the_first_round_that_counts_there_is_nothing(tmp_path: Path) -> None:
    save_state(tmp_path, state(1), counted_round=0, checkpoint_every=1, keep=3)
    assert load_state(tmp_path, counted_round=0, position=0) == SiteState()


def test_a_lost_disk_is_a_fresh_start_further_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_state(tmp_path / "new", counted_round=4, position=24) == SiteState(4, 24, lost=True)
    assert "no state of round 4" in caplog.text


def test_exactly_the_round_that_counts_is_loaded(tmp_path: Path) -> None:
    """Not the newest before it, whose moments and place in the data are of another time."""
    save_state(tmp_path, state(2), counted_round=0, checkpoint_every=1, keep=3)
    assert load_state(tmp_path, counted_round=3, position=18) == SiteState(3, 18, lost=True)


def test_later_states_and_half_written_ones_are_removed(tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        save_state(tmp_path, state(round_), counted_round=round_ - 1, checkpoint_every=1, keep=5)
    (tmp_path / "round_00004.safetensors.partial-123").write_bytes(b"half")
    discard_later(tmp_path, counted_round=1)
    assert rounds(tmp_path) == [1]
    discard_later(tmp_path / "nowhere", counted_round=1)


@pytest.mark.parametrize(
    ("every", "keep", "expected"),
    [(1, 3, [6, 7, 8, 9]), (3, 2, [3, 6, 8, 9]), (4, 2, [4, 8, 9]), (0, 3, [8, 9])],
)
def test_kept_are_the_last_two_and_those_the_server_can_come_back_to(
    tmp_path: Path, every: int, keep: int, expected: list[int]
) -> None:
    for round_ in range(1, 10):
        save_state(tmp_path, state(round_, last_round=9), round_ - 1, every, keep)
    assert rounds(tmp_path) == expected


def test_a_checkpoint_goes_with_the_newest_state_up_to_it(tmp_path: Path) -> None:
    """The site took part in rounds 1, 2 and 5; checkpoints are made after 3, 6, …"""
    for round_, after in ((1, 0), (2, 1), (5, 2), (7, 5)):
        save_state(tmp_path, state(round_), after, checkpoint_every=3, keep=2)
    assert rounds(tmp_path) == [2, 5, 7]


@dataclass
class Server:
    """The little that a server knows, as a model of what the site must be able to find."""

    every: int
    keep: int
    last_round: int
    round: int = 0
    after: int = 0
    values: dict[int, float] = field(default_factory=dict)  # round -> the state that counts
    checkpoints: dict[int, int] = field(default_factory=dict)  # round -> `after` at that time

    def end_round(self) -> None:
        if self.round == self.last_round or (self.every and self.round % self.every == 0):
            self.checkpoints[self.round] = self.after
            for old in sorted(self.checkpoints)[: -self.keep]:
                del self.checkpoints[old]

    def go_back(self, checkpoint: int) -> None:
        self.round, self.after = checkpoint, self.checkpoints[checkpoint]
        for later in [c for c in self.checkpoints if c > checkpoint]:
            del self.checkpoints[later]


def check(folder: Path, server: Server, after: int) -> None:
    if after:
        loaded = load_state(folder, after, position=-1)
        assert loaded.position == 10 * after
        assert loaded.engine.moments["a.weight"].exp_avg[0, 0] == server.values[after]


STEPS = st.lists(
    st.tuples(st.sampled_from(["counted", "counted", "not counted", "not asked", "back"]), st.integers(0, 9)),
    max_size=14,
)


@settings(max_examples=150)
@given(STEPS, st.integers(0, 4), st.integers(1, 3), st.integers(1, 6))
def test_whatever_the_server_comes_back_to_is_there(
    steps: list[tuple[str, int]], every: int, keep: int, last_round: int
) -> None:
    """Replies that count and that do not, rounds without this site, and resumes, also of a run that is prolonged.

    A prolonged run with `every` above 0 has its newest checkpoints at multiples of it again, which is what counts.
    """
    server, value = Server(every, keep, last_round if every == 0 else 10**6), 0.0
    folder = Path(tempfile.mkdtemp())
    try:
        for event, number in steps:
            if event == "back" and server.checkpoints:
                server.go_back(sorted(server.checkpoints)[number % len(server.checkpoints)])
            if server.round == server.last_round:
                server.last_round += last_round  # it is prolonged
            server.round += 1
            if event in ("counted", "not counted"):
                value += 1
                discard_later(folder, server.after)
                check(folder, server, server.after)
                new = state(server.round, value, server.last_round)
                save_state(folder, new, server.after, every, keep)
                if event == "counted":
                    server.after, server.values[server.round] = server.round, value
            server.end_round()
            # A run that ends once may be prolonged again and again, but only its newest end is kept.
            reachable = sorted(server.checkpoints)[-1:] if every == 0 else sorted(server.checkpoints)
            server.checkpoints = {c: server.checkpoints[c] for c in reachable}
            for checkpoint in reachable:
                check(folder, server, server.checkpoints[checkpoint])
    finally:
        shutil.rmtree(folder)


def test_a_damaged_state_is_named_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the damage is, the site takes part, and goes on from the place in the data that the server knows."""
    save_state(tmp_path, state(1), counted_round=0, checkpoint_every=1, keep=3)
    file = tmp_path / "round_00001.safetensors"
    whole = file.read_bytes()
    damages = [b"\x10garbage", b"", *(whole[:length] for length in range(0, len(whole), 29))]
    # Who reads it for us does not look at this.
    mark = whole.index(b'"format":"pt"')
    for position in {*range(0, len(whole), 7)} - {*range(mark, mark + 13)}:
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        damages.append(bytes(flipped))
    for damaged in damages:
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert load_state(tmp_path, counted_round=1, position=8) == SiteState(1, 8, lost=True)
        assert f"{file} is damaged" in caplog.text
        caplog.clear()
    file.write_bytes(whole)
    assert not load_state(tmp_path, counted_round=1, position=8).lost
    # One of an earlier version, which has no digest, is taken.
    tensors = {f"{kind}/a.weight": torch.ones(2) for kind in ("exp_avg", "exp_avg_sq")}
    facts = json.dumps({"position": 8, "steps": {"a.weight": [3, 0]}, "last_round": 5})
    save_file(tensors, file, {"state": facts})
    assert load_state(tmp_path, counted_round=1, position=0).engine.moments["a.weight"].step == 3


def test_an_earlier_state_that_is_damaged_does_not_keep_the_next_from_being_saved(tmp_path: Path) -> None:
    """A run with one checkpoint at its end reads its earlier states to find the one to keep."""
    save_state(tmp_path, state(1), counted_round=0, checkpoint_every=0, keep=3)
    (tmp_path / "round_00001.safetensors").write_bytes(b"")
    save_state(tmp_path, state(2), counted_round=0, checkpoint_every=0, keep=3)
    assert rounds(tmp_path) == [2]


def test_only_the_newest_runs_of_a_site_keep_their_states(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By their order: a clock that is wrong for all of them changes nothing. Nothing else in the folder is touched."""
    for number in range(RUNS + 3):
        for site in ("a", "b"):
            save_state(tmp_path / f"run{number}" / site, state(1), 0, checkpoint_every=1, keep=3)
            os.utime(tmp_path / f"run{number}" / site / "round_00001.safetensors", (number, number))
    (tmp_path / "a.flower" / "a").mkdir(parents=True)
    forget_old_runs(tmp_path, "a", current=tmp_path / "run0" / "a")
    left = {folder.parent.name for folder in tmp_path.glob("run*/a")}
    assert left == {"run0", *(f"run{number}" for number in range(3, RUNS + 3))}
    assert len(list(tmp_path.glob("run*/b"))) == RUNS + 3
    assert (tmp_path / "a.flower" / "a").is_dir()
    assert str(tmp_path / "run1" / "a") in caplog.text


def test_reading_it_leaves_nothing_behind(tmp_path: Path) -> None:
    """safetensors 0.8 keeps two objects for each tensor that its safe_open reads: 64 sites felt it in 300 rounds."""
    moments = {f"{index}.weight": Moments(torch.ones(2), torch.ones(2), 1, 0) for index in range(50)}
    save_state(
        tmp_path, SiteState(1, 10, 5, EngineState(moments)), counted_round=0, checkpoint_every=1, keep=3
    )

    def blocks_after(times: int) -> int:
        for _ in range(times):
            load_state(tmp_path, counted_round=1, position=0)
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after(5)
    assert blocks_after(20) - before < 20 * len(moments)
