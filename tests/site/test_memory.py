"""What a worker remembers changes nothing but the time: warm and cold rounds are the same, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.config import RunConfig
from fomoe_flwr.engine import local
from fomoe_flwr.messages import Reply
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import is_moment
from fomoe_flwr.site.identity import NodeSettings
from fomoe_flwr.site.memory import Memory
from fomoe_flwr.site.work import perform
from tests.clients.helpers import (
    as_sent,
    bundled,
    bundles_of,
    shard_of,
    site_task,
    state_files,
    without_seconds,
)
from tests.conftest import Compose


class Answer(NamedTuple):
    bundles: dict[str, bytes]
    reply: Reply


def nothing(phase: str) -> None:
    pass


def settings(folder: Path) -> NodeSettings:
    return NodeSettings("site-1", None, None, str(folder), None, None)


def work(
    config: RunConfig, folder: Path, memory: Memory, round_: int, kind: str = "train", beat=nothing, **task
) -> Answer:
    wanted = site_task(config, round_, **task)
    blobs = bundles_of(config, wanted, kind == "evaluate")
    bundles, reply = perform(kind, wanted.to_json(), blobs, settings(folder), memory, beat)
    assert not blobs
    return Answer(bundles, without_seconds(reply))


SETTINGS = [
    (),
    ("strategy.outer=local_adamw", "strategy.up=fp32", "strategy.down=fp32"),
    ("strategy.placement=random", "strategy.overlap=2", "strategy.routing=partitioned"),
    ("strategy.placement=random", "strategy.overlap=2", "strategy.reshuffle_every=2", "train.expert_warmup_steps=5"),
    ("strategy.keep_moments=false",),
    ("strategy=ddp",),
    ("strategy.delay=1", "strategy.placement=random", "strategy.overlap=2", "strategy.reshuffle_every=2"),
    ("strategy.delay=1", "strategy.up=topk", "strategy.down=fp32"),
    ("strategy.fragments=2", "strategy.up=int4"),
    ("strategy.fragments=2", "strategy.placement=random", "strategy.overlap=1", "strategy.reshuffle_every=3",
     "strategy.sole_every=2"),
    ("model.locality=bias", "model.locality_target=0.8", "model.balance=global", "strategy.overlap=2"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda overrides: " ".join(overrides) or "default")
def test_warm_rounds_equal_cold_ones(small: Compose, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = small("federation.num_sites=4", *overrides).config
    memory = Memory()
    for round_ in range(1, 5):
        warm = work(config, tmp_path / "warm", memory, round_)
        cold = work(config, tmp_path / "cold", Memory(), round_)
        assert warm == cold
        assert state_files(tmp_path / "warm") == state_files(tmp_path / "cold")
        # An evaluation in between uses the same model and leaves the moments alone.
        assert work(config, tmp_path / "warm", memory, round_, "evaluate") == work(
            config, tmp_path / "cold", Memory(), round_, "evaluate"
        )


def test_the_same_residents_keep_the_model_and_the_moments_without_a_copy(
    small: Compose, tmp_path: Path
) -> None:
    """torch.compile's work hangs on the module, and a copy of the moments is twice the model."""
    config, memory = small("strategy.overlap=2").config, Memory()
    work(config, tmp_path, memory, 1)
    engine, stream = memory._engine, memory._stream
    moments = memory._state.engine.moments["model.norm.weight"]
    work(config, tmp_path, memory, 2)
    assert memory._engine is engine
    assert memory._stream is stream
    again = memory._state.engine.moments["model.norm.weight"]
    assert again.exp_avg.data_ptr() == moments.exp_avg.data_ptr()
    assert again.exp_avg_sq.data_ptr() == moments.exp_avg_sq.data_ptr()
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_a_state_that_the_server_did_not_take_is_not_gone_on_from(small: Compose, tmp_path: Path) -> None:
    """Round 2 was lost on the way: round 3 begins after round 1, warm and cold alike."""
    config, memory = small().config, Memory()
    for round_ in (1, 2):
        work(config, tmp_path / "warm", memory, round_)
    warm = work(config, tmp_path / "warm", memory, 3, counted_round=1)
    work(config, tmp_path / "cold", Memory(), 1)
    assert warm == work(config, tmp_path / "cold", Memory(), 3, counted_round=1)
    assert state_files(tmp_path / "warm") == state_files(tmp_path / "cold")
    assert [Path(name).name for name in state_files(tmp_path / "warm")] == [
        "round_00001.safetensors",
        "round_00003.safetensors",
    ]


def test_a_broken_off_round_leaves_nothing_behind(small: Compose, tmp_path: Path) -> None:
    """Moments are changed in place: half a round must be forgotten whole."""
    config, memory = small().config, Memory()
    work(config, tmp_path / "warm", memory, 1)
    beats = 0

    def stop_in_the_middle(phase: str) -> None:
        nonlocal beats
        beats += 1
        if beats == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        work(config, tmp_path / "warm", memory, 2, beat=stop_in_the_middle)
    assert memory == Memory()
    assert len(state_files(tmp_path / "warm")) == 1
    work(config, tmp_path / "cold", Memory(), 1)
    warm, cold = (work(config, tmp_path / name, m, 2) for name, m in (("warm", memory), ("cold", Memory())))
    assert warm == cold


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_message_that_fails_empties_the_memory(small: Compose, tmp_path: Path, kind: str) -> None:
    config, memory = small().config, Memory()
    work(config, tmp_path, memory, 1)
    task = site_task(config, 2)
    blobs = bundles_of(config, task)
    blobs["more"] = bundled({"model.other": torch.zeros(1)}, config)["all"]
    with pytest.raises(Exception, match=r"unexpected model.other"):
        perform(kind, task.to_json(), blobs, settings(tmp_path), memory, nothing)
    assert memory == Memory()


def test_two_runs_at_one_site_do_not_mix(small: Compose, tmp_path: Path) -> None:
    configs = {"a": small().config, "b": small("strategy.keep_moments=true", "seed=7").config}
    memory = Memory()
    alone = {
        run: [work(configs[run], tmp_path / run, Memory(), r, run=run) for r in (1, 2, 3)] for run in configs
    }
    both = [
        (run, work(configs[run], tmp_path / "both", memory, r, run=run)) for r in (1, 2, 3) for run in configs
    ]
    for run in configs:
        assert [answer for name, answer in both if name == run] == alone[run]


@pytest.mark.parametrize("overrides", SETTINGS[:3], ids=lambda overrides: " ".join(overrides) or "default")
def test_the_answer_attests_what_the_model_really_held(
    small: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """bf16 that was widened to fp32 gives the same bits when it is narrowed again, denormal numbers too."""
    config = small("federation.num_sites=4", *overrides).config
    task = site_task(config, 1)
    shard = shard_of(config, task)
    shard["model.norm.weight"][:4] = torch.tensor([1e-40, -3e-39, 0.0, -0.0])
    expected = as_sent(shard, config)
    _, reply = perform("train", task.to_json(), bundled(shard, config), settings(tmp_path), Memory(), nothing)
    assert reply.start_digests == expected
    parameters = {name: value for name, value in shard.items() if not is_moment(name)}
    _, reply = perform(
        "evaluate", task.to_json(), bundled(parameters, config), settings(tmp_path), Memory(), nothing
    )
    assert (reply.run, reply.round, reply.site) == ("run", 1, "site-1")
    assert reply.start_digests == as_sent(parameters, config)


def test_the_attestation_is_of_the_model_and_not_of_the_message(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("strategy.up=fp32", "strategy.down=fp32").config
    real = local.load_shard

    def load_wrongly(module: Transformer, shard: Mapping[str, Tensor]) -> None:
        real(module, shard)
        module.model.norm.weight.data[0] += 1

    monkeypatch.setattr(local, "load_shard", load_wrongly)
    bundles, reply = work(config, tmp_path, Memory(), 1)
    assert reply.start_digests != as_sent(shard_of(config, site_task(config, 1)), config)
    assert reply.bundle_digests == bundle_digests(bundles)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: os.truncate(file, 100)], ids=["gone", "truncated"]
)
def test_a_site_that_has_lost_its_state_works_on_and_says_so(small: Compose, tmp_path: Path, damage) -> None:
    """As one that begins without moments, but further on in its data."""
    config = small().config
    work(config, tmp_path, Memory(), 1)
    assert "state_lost" not in work(config, tmp_path, Memory(), 2).reply.metrics
    (file,) = tmp_path.rglob("round_00002.safetensors")
    damage(file)
    assert work(config, tmp_path, Memory(), 3).reply.metrics["state_lost"] == 1.0
    assert "state_lost" not in work(config, tmp_path, Memory(), 4).reply.metrics
