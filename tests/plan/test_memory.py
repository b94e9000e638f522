"""The peak of a step by formula, against what is alive while an engine takes one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fomoe_flwr.cli import main
from fomoe_flwr.compose import compose
from fomoe_flwr.config import RECOMPUTE, RunConfig
from fomoe_flwr.engine import Engine, EngineState
from fomoe_flwr.engine.local import Engine as LocalEngine
from fomoe_flwr.inputs import UNKNOWN
from fomoe_flwr.messages import Deal, make_task
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.placement import full_residents
from fomoe_flwr.plan.memory import memory, state_a_parameter, state_bytes, state_of
from fomoe_flwr.plan.show import parts_of
from fomoe_flwr.plan.system import plan_sites
from tests.plan.measured import Alive

ALONE = ("federation.num_sites=1", "strategy.overlap=1", "train.device=cpu", "train.batch_size=4")
# Activations, gradients of experts, and logits are most of it.
SIZES = {
    "tokens": ("model=tiny", "train.seq_len=128"),
    "experts": (
        "model=tiny", "model.num_experts=32", "model.top_k=4", "model.vocab_size=2000", "train.seq_len=32",
    ),
    "vocabulary": ("model=tiny", "model.d_model=64", "model.vocab_size=20000", "train.seq_len=128"),
    "stock": ("model=olmoe_tiny", "train.seq_len=64"),
}  # fmt: skip


def loaded(config: RunConfig) -> LocalEngine:
    """An engine with all experts at the beginning of round 1, its shard as strategy.down sends it."""
    model, routing = config.model, config.strategy.routing
    residents = full_residents(model.num_layers, model.num_experts)
    task = make_task(
        config, 0, run="run", run_dir="", round_=1, counted_round=0, deal=Deal(0, 1), inputs=UNKNOWN,
        residents=residents, local_steps=1,
    )  # fmt: skip
    engine = Engine(model, residents, routing, "cpu")
    shard = initial_state(model, residents, routing, 0)
    if config.strategy.down == "bf16":
        shard = {name: tensor.bfloat16() for name, tensor in shard.items()}
    engine.load(task, shard, EngineState())
    return engine


def tokens(config: RunConfig) -> torch.Tensor:
    size = (config.train.batch_size, config.train.seq_len + 1)
    return torch.randint(config.model.vocab_size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_the_peak_of_a_step(size: str, dtype: str, recompute: str, micro_batches: int) -> None:
    """Never less than what is there, and at the most a tenth more.

    It is a bound: the largest of what is there in passing is taken to be there at the larger end of the backward pass,
    when it may be in another layer's.
    """
    config = compose(
        [
            *ALONE, *SIZES[size], f"train.dtype={dtype}", f"train.recompute={recompute}",
            f"train.micro_batches={micro_batches}",
        ]
    ).config  # fmt: skip
    engine, tokens_BT = loaded(config), tokens(config)
    state = state_of(config, float(config.model.num_experts), "cpu")
    assert engine._optimizer is not None
    before = [*engine.module.parameters(), *engine.module.buffers(), tokens_BT]
    before += [
        part for runs in engine._optimizer._runs for run in runs for part in (run.exp_avg, run.exp_avg_sq)
    ]
    with Alive(before) as seen:
        engine.train([tokens_BT])
    measured = seen.peak + state.weights + state.moments + state.shard
    planned = memory(config, plan_sites(config)[0], float(config.model.num_experts)).total
    assert 0.998 <= planned / measured <= 1.1


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("strategy.down=fp32",),
        ("strategy.routing=partitioned",),
        ("model=olmoe_tiny",),
        ("train.optimizer=muon",),
        ("train.moments=bf16",),
        ("train.weights=bf16", "train.dtype=bf16"),
        ("train.weights=bf16", "train.dtype=bf16", "train.micro_batches=2", "train.optimizer=muon"),
    ],
    ids=" ".join,
)
def test_state_is_what_an_engine_holds_to_the_byte(overrides: tuple[str, ...]) -> None:
    config = compose([*ALONE, "model=tiny", "train.seq_len=16", *overrides]).config
    engine = loaded(config)
    report = engine.train([tokens(config)])
    everyone = float(config.model.num_experts)
    assert report.metrics["memory_bytes"] == state_bytes(config, everyone, "cpu")
    assert report.metrics["activations_counted"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "each"),
    [
        ((), (4, 4, 8, 2)),
        (("strategy.down=fp32",), (4, 4, 8, 4)),
        (("strategy.outer=local_adamw",), (4, 4, 8, 6)),
        (("strategy=ddp",), (4, 4, 0, 2)),
        (("strategy.delay=1",), (4, 4, 8, 4)),
        (("strategy.fragments=2",), (4, 4, 8, 8)),
        # The shard lies in the host's memory.
        (("train.device=cuda",), (4, 4, 8, 0)),
        (("plan.bytes_per_parameter=12",), (12, 0, 0, 0)),
        (("plan.bytes_per_parameter=12", "strategy.delay=1"), (14, 0, 0, 0)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bytes_of_a_parameter(overrides: tuple[str, ...], each: tuple[int, ...]) -> None:
    config = compose(["federation.num_sites=4", *overrides]).config
    assert state_a_parameter(config, config.train.device) == each


def test_bytes_that_are_given_take_the_place_of_the_state_alone() -> None:
    ours, given = (
        compose(["federation.num_sites=2", "train.device=cuda", "train.micro_batches=2", *more]).config
        for more in ((), ("plan.bytes_per_parameter=16",))
    )
    one, other = (memory(config, plan_sites(config)[0], 16.0) for config in (ours, given))
    assert one.total == other.total
    assert one.activations == other.activations


def test_many_cases_at_once_are_as_one_by_one() -> None:
    config = compose(["federation.num_sites=2", "strategy.routing=partitioned", "train.dtype=bf16"]).config
    site = plan_sites(config)[0]
    counts_R = np.arange(1.0, 17.0)
    together = memory(config, site, counts_R).total
    assert together.tolist() == [memory(config, site, float(count)).total for count in counts_R]
    assert (np.diff(together) > 0).all()


@pytest.mark.parametrize(
    "key", ["train.micro_batches=2", "train.recompute=selective", "train.recompute=full"]
)
def test_what_is_there_to_save_memory_saves_some(key: str) -> None:
    plain, less = (
        compose(["federation.num_sites=2", "train.seq_len=2048", *more]).config for more in ((), (key,))
    )
    needed = [memory(config, plan_sites(config)[0], 16.0).total for config in (plain, less)]
    assert needed[1] < needed[0]


def test_the_plan_shows_the_parts_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "federation=hetero", "strategy.placement=planned", "plan.tflops=0.05"]
    main([*arguments, "--json"])
    content = json.loads(capsys.readouterr().out)
    for site in content["sites"]:
        parts = site["memory_parts_bytes"]
        assert math.isclose(sum(parts.values()), site["memory_bytes"])
        assert site["memory_bytes"] <= site["memory_available_bytes"]
        assert parts["attention"] > 0
    main(arguments)
    assert "memory at the peak of a step" in capsys.readouterr().out


def test_parts_have_a_name_each() -> None:
    config = compose(["federation.num_sites=2"]).config
    found = memory(config, plan_sites(config)[0], 8.0)
    assert math.isclose(sum(parts_of(found).values()), found.total)


def test_half_of_the_experts_of_olmoe_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/sites.md has the command, and what it says."""
    text = (Path(__file__).parents[2] / "docs" / "sites.md").read_text(encoding="utf-8")
    start = text.index("fomoe plan model=hf")
    command = text[start : text.index("\n```", start)].replace("\\\n", " ").split()
    main([*command[1:], "--json"])
    site = json.loads(capsys.readouterr().out)["sites"][0]
    assert site["experts_per_layer"] == 32
    parts = site["memory_parts_bytes"]
    state = sum(parts[name] for name in ("weights", "gradients", "moments", "shard"))
    assert f"{state / 1e9:.1f} GB of weights, gradients and moments" in text
    assert f"{site['memory_bytes'] / 1e9:.1f} GB in all" in text
    assert site["memory_bytes"] < 48e9
