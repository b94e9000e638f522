"""Several devices hold, train and give back what one does: each way of sharing, over a round with ghosts.

The other devices are processes on this machine's CPU, connected by gloo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_flwr.engine import Engine, EngineState, Report
from fomoe_flwr.engine.optimizer import local
from fomoe_flwr.engine.several import Member, shares
from fomoe_flwr.engine.team import end_team, team_of
from fomoe_flwr.errors import ConfigError, WireError
from fomoe_flwr.evaluation import evaluate
from fomoe_flwr.messages import Task
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.model.spec import expert_name, parameter_shapes
from fomoe_flwr.server.outer import with_moments
from fomoe_flwr.site.state import SiteState, load_state, save_state
from tests.engine.helpers import MODEL, task_of
from tests.model.stock_models import stock

Named = Mapping[str, Tensor]

# Layers need not hold equally many, and of two experts four devices cannot all have one.
RESIDENTS = [[0, 2, 3], [1, 3]]
WAYS = {
    2: [("ddp", 1), ("fsdp", 1), ("ep", 1), ("ep", 2)],
    4: [("ddp", 1), ("fsdp", 1), ("ep", 1), ("ep", 2), ("ep", 4)],
}
ALL_WAYS = [(devices, *way) for devices, ways in WAYS.items() for way in ways]
ways = pytest.mark.parametrize(("devices", "parallel", "domain"), ALL_WAYS)
SEQUENCES = 8
# By which another order of sums may change an update of a few steps: its last bits are those of the parameters, from
# whose difference it is made. Gradients have more.
ROUNDED = 1e-5


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    end_team()


def member(task: Task, devices: int, parallel: str, domain: int = 1) -> Member:
    return Member(
        task.model, task.residents, task.strategy.routing, parallel, str(domain), team=team_of(devices, "cpu")
    )


def single(task: Task, exchanges: bool = False) -> Engine:
    """One device.

    Args:
        exchanges: outputs are weighed after they have come back, as where tokens travel; else hidden numbers are.
    """
    engine = Engine(task.model, task.residents, task.strategy.routing, "cpu")
    if exchanges:
        for moe in engine.module.moe_layers:
            moe.reach.exchange = lambda experts, x_PD, offsets_E: experts(x_PD, offsets_E)
    return engine


def shared_task(**changes: Any) -> Task:
    # With the usual eps of 1e-8, AdamW's first steps divide a gradient by itself even where it is all but zero, and
    # sums in another order make an update that differs by 4e-6, also on one device.
    train = {"batch_size": SEQUENCES, "grad_clip": 0.5, "eps": 1e-5} | changes.pop("train", {})
    return task_of(train=train, **({"residents": RESIDENTS} | changes))


def shard_of(task: Task) -> dict[str, Tensor]:
    return initial_state(task.model, task.residents, task.strategy.routing, 0)


def tokens(vocab_size: int = MODEL.vocab_size, steps: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (SEQUENCES, 9), generator=generator) for _ in range(steps)]


def round_of(
    engine: Engine, task: Task, state: EngineState, text: Sequence[Tensor], shard: Named | None = None
) -> tuple[Report, dict[str, Tensor], EngineState]:
    engine.load(task, dict(shard_of(task) if shard is None else shard), state)
    report = engine.train(text)
    update = {name: value.clone() for name, value in engine.update().items()}
    return report, update, engine.state()


def difference(got: Named, wanted: Named) -> float:
    """‖got - wanted‖ / ‖wanted‖ over all tensors."""
    assert got.keys() == wanted.keys()
    squares = [(got[name].double() - wanted[name].double()).square().sum() for name in wanted]
    whole = [wanted[name].double().square().sum() for name in wanted]
    return float(torch.stack(squares).sum().sqrt() / torch.stack(whole).sum().sqrt())


def assert_equal_rounds(
    task: Task, engine: Member, text: Sequence[Tensor], limit: float = 1e-6, same_loads: bool = True
) -> None:
    """Two rounds on one device and on several: loss, load, update and state."""
    following = dataclasses.replace(task, round=2, counted_round=1, first_step=len(text))
    exchanges = engine.domains is not None and engine.domains.size < engine.devices
    alone, one, several = single(task, exchanges), EngineState(), EngineState()
    for step in (task, following):
        wanted, wanted_update, one = round_of(alone, step, one, text)
        got, got_update, several = round_of(engine, step, several, text)
        assert got.metrics["train_loss"] == pytest.approx(wanted.metrics["train_loss"], rel=limit)
        assert got.tokens == wanted.tokens
        if same_loads:
            assert got.load_LE == wanted.load_LE
            assert got.metrics["flops"] == wanted.metrics["flops"]
        assert difference(got_update, wanted_update) <= limit
        assert {name: (own.step, own.reset_at) for name, own in several.moments.items()} == {
            name: (own.step, own.reset_at) for name, own in one.moments.items()
        }
        for part in ("exp_avg", "exp_avg_sq"):
            # The square doubles the rounding of a gradient.
            assert difference(moments_of(several, part), moments_of(one, part)) <= 4 * limit
        assert torch.tensor(several.bias).allclose(torch.tensor(one.bias), atol=1e-5)
        assert several.load == one.load
        # What moments become must not be shared with the other engine's.
        one, several = copied(one), several


def moments_of(state: EngineState, part: str) -> dict[str, Tensor]:
    """Muon's matrices have no second one."""
    found = {name: getattr(own, part) for name, own in state.moments.items()}
    return {name: value for name, value in found.items() if value is not None}


def copied(state: EngineState) -> EngineState:
    moments = {
        name: dataclasses.replace(
            own,
            exp_avg=own.exp_avg.clone(),
            exp_avg_sq=None if own.exp_avg_sq is None else own.exp_avg_sq.clone(),
        )
        for name, own in state.moments.items()
    }
    return EngineState(moments, state.bias, state.load)


# -- equal to one device -----------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_several_devices_equal_one(devices: int, parallel: str, domain: int, routing: str) -> None:
    task = shared_task(strategy={"routing": routing})
    assert_equal_rounds(task, member(task, devices, parallel, domain), tokens())


@pytest.mark.parametrize(("parallel", "domain"), WAYS[2])
@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_several_devices_equal_one_with_olmoe(parallel: str, domain: int, routing: str) -> None:
    model = stock("olmoe")
    half = [list(range(layer % 2, model.num_experts, 2)) for layer in range(model.num_layers)]
    task = shared_task(residents=half, strategy={"routing": routing})
    task = dataclasses.replace(task, model=model)
    assert_equal_rounds(task, member(task, 2, parallel, domain), tokens(model.vocab_size), ROUNDED)


@pytest.mark.parametrize(("parallel", "domain"), WAYS[2])
def test_moments_in_bf16_differ_by_their_rounding(parallel: str, domain: int) -> None:
    task = shared_task(train={"moments": "bf16"})
    assert_equal_rounds(task, member(task, 2, parallel, domain), tokens(), limit=1e-3, same_loads=False)


@ways
@pytest.mark.parametrize("family", ["", "olmoe"])
def test_muon_orthogonalises_whole_matrices(devices: int, parallel: str, domain: int, family: str) -> None:
    """With fsdp, rows of one matrix are on several devices.

    Muon's steps are in bf16, so the last bit of a gradient may become one in 256 of a step, and a router that wavers
    may choose otherwise. One that orthogonalised each device's rows alone would be off by half.
    """
    task = shared_task(train={"optimizer": "muon"})
    if family:
        task = dataclasses.replace(task, model=stock(family), residents=[[0, 2, 5], [1, 3]])
    engine = member(task, devices, parallel, domain)
    assert_equal_rounds(task, engine, tokens(task.model.vocab_size), limit=0.01, same_loads=False)


@pytest.mark.parametrize("parallel", ["fsdp", "ep"])
@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"micro_batches": 4}},
        {"train": {"recompute": "full"}},
        {"model": {"locality": "loss", "locality_coefficient": 0.5}},
        {"model": {"locality": "bias", "locality_target": 0.8}},
        {"model": {"balance": "global"}, "global_load": [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]},
        {"model": {"standins": 4}},
        {"model": {"num_shared_experts": 1}},
        {"model": {"experts_impl": "loop"}},
        {"strategy": {"routing": "skip_renormalised"}},
        {"residents": [[0, 1, 2, 3], [0, 1, 2, 3]]},
        {"residents": [[2], [3]]},
    ],
    ids=str,
)
def test_every_choice_works_on_several_devices(changes: dict[str, Any], parallel: str) -> None:
    task = shared_task(**changes)
    assert_equal_rounds(task, member(task, 2, parallel), tokens(), ROUNDED)


@ways
@pytest.mark.parametrize("routing", ["skip", "partitioned"])
@pytest.mark.parametrize("family", ["", "olmoe"])
def test_gradients_equal(devices: int, parallel: str, domain: int, routing: str, family: str) -> None:
    strategy = {"inner": "gradient", "outer": "adamw", "routing": routing}
    task = shared_task(strategy=strategy)
    if family:
        task = dataclasses.replace(task, model=stock(family), residents=[[0, 2, 5], [1, 3]])
    text = tokens(task.model.vocab_size)
    wanted, wanted_update, _ = round_of(single(task), task, EngineState(), text)
    got, got_update, _ = round_of(member(task, devices, parallel, domain), task, EngineState(), text)
    assert got.metrics["train_loss"] == pytest.approx(wanted.metrics["train_loss"], rel=1e-6)
    assert difference(got_update, wanted_update) <= 1e-6


@pytest.mark.parametrize(("parallel", "domain"), WAYS[2])
def test_moments_that_travel(parallel: str, domain: int) -> None:
    task = shared_task(strategy={"outer": "local_adamw"})
    shard = with_moments(shard_of(task))
    alone, engine = single(task), member(task, 2, parallel, domain)
    for _ in range(2):
        _, wanted, _ = round_of(alone, task, EngineState(), tokens(), shard)
        _, got, state = round_of(engine, task, EngineState(), tokens(), shard)
        assert state.moments == {}
        assert difference(got, wanted) <= ROUNDED
        shard = {name: value + 0.1 * wanted[name].abs() for name, value in shard.items()}


@pytest.mark.parametrize(("parallel", "domain"), WAYS[2])
def test_bf16_differs_by_its_rounding(parallel: str, domain: int) -> None:
    task = shared_task(train={"dtype": "bf16"})
    wanted, _, _ = round_of(single(task), task, EngineState(), tokens())
    got, update, _ = round_of(member(task, 2, parallel, domain), task, EngineState(), tokens())
    assert got.metrics["train_loss"] == pytest.approx(wanted.metrics["train_loss"], rel=5e-3)
    assert all(value.dtype == torch.float32 for value in update.values())


def test_ddp_compiles() -> None:
    task = shared_task(train={"compile": True})
    wanted, wanted_update, _ = round_of(single(shared_task()), shared_task(), EngineState(), tokens())
    got, got_update, _ = round_of(member(task, 2, "ddp"), task, EngineState(), tokens())
    assert got.metrics["train_loss"] == pytest.approx(wanted.metrics["train_loss"], rel=1e-5)
    assert difference(got_update, wanted_update) <= 1e-5


# -- what is where ----------------------------------------------------------------------------------------------


@ways
def test_what_was_loaded_is_what_was_sent(devices: int, parallel: str, domain: int) -> None:
    task = shared_task()
    engine = member(task, devices, parallel, domain)
    engine.load(task, shard_of(task), EngineState())
    loaded = engine.loaded()
    assert loaded.keys() == shard_of(task).keys()
    assert all(value.equal(loaded[name]) for name, value in shard_of(task).items())


@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_holds_its_share_of_the_bytes(devices: int) -> None:
    task = shared_task(residents=[[0, 1, 2, 3]] * 2)
    alone, _, one = round_of(single(task), task, EngineState(), tokens(steps=1))
    whole = {name: value.nbytes for name, value in shard_of(task).items()}
    experts = sum(size for name, size in whole.items() if ".experts." in name)
    for parallel, expected in (
        ("fsdp", sum(whole.values()) / devices),
        ("ep", sum(whole.values()) - experts + experts / devices),
    ):
        engine = member(task, devices, parallel)
        report, _, _ = round_of(engine, task, EngineState(), tokens(steps=1))
        held = sum(local(parameter).nbytes for parameter in engine.module.parameters())
        # 29 rows of the embedding over 2 or 4 devices are not quite equal.
        assert expected <= held <= 1.03 * expected
        # Parameters, gradients and moments of the largest share, and the shard as it was sent.
        state = 4 * held + sum(whole.values())
        assert report.metrics["memory_bytes"] == pytest.approx(state, rel=0.01)
        assert alone.metrics["memory_bytes"] == 5 * sum(whole.values())
    assert len(one.moments) == len(whole)


def test_rows_are_shared_as_pytorch_does() -> None:
    for rows in range(1, 20):
        for devices in range(1, 7):
            chunks = [len(chunk) for chunk in torch.arange(rows).chunk(devices)]
            ends = [sum(chunks[: rank + 1]) for rank in range(devices)]
            assert shares(rows, devices) == ends


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "ep"])
@pytest.mark.parametrize(
    ("train", "limit"), [({}, 1e-6), ({"optimizer": "muon"}, 0.01), ({"moments": "bf16"}, 0.01)], ids=str
)
def test_a_state_moves_between_numbers_of_devices(
    parallel: str, train: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    """From 4 to 2 to 1 and back: bit for bit what was saved, and the rounds after it as on one device."""
    task = shared_task(train=train)
    _, _, kept = round_of(member(task, 4, parallel), task, EngineState(), tokens())
    wanted = copied(kept)
    alone = copied(kept)
    save_state(tmp_path, SiteState(1, engine=kept), 0, 1, 1)
    later = dataclasses.replace(task, round=2, counted_round=1, first_step=4)
    for devices in (2, 1, 4):
        engine = member(task, devices, parallel) if devices > 1 else single(task)
        engine.load(later, shard_of(task), load_state(tmp_path, 1, 0).engine)
        found = engine.state().moments
        assert found.keys() == wanted.moments.keys()
        state = EngineState(found)
        for part in ("exp_avg", "exp_avg_sq"):
            kept_part = moments_of(wanted, part)
            assert moments_of(state, part).keys() == kept_part.keys()
            assert all(value.equal(kept_part[name]) for name, value in moments_of(state, part).items())
        for name, own in found.items():
            assert (own.step, own.reset_at) == (wanted.moments[name].step, wanted.moments[name].reset_at)
        _, expected, _ = round_of(single(task), later, copied(alone), tokens(seed=1))
        _, update, _ = round_of(engine, later, load_state(tmp_path, 1, 0).engine, tokens(seed=1))
        assert difference(update, expected) <= limit


@pytest.mark.parametrize("parallel", ["fsdp", "ep"])
def test_an_expert_that_is_new_to_the_site_warms_up(parallel: str) -> None:
    task = shared_task()
    _, _, state = round_of(single(task), task, EngineState(), tokens())
    # The second of three, so that its neighbours are older on both sides.
    newcomer = expert_name(0, 2, "up_proj")
    del state.moments[newcomer]
    later = dataclasses.replace(task, round=2, counted_round=1, first_step=4)
    _, wanted, one = round_of(single(task), later, copied(state), tokens(seed=1))
    engine = member(task, 2, parallel)
    _, got, several = round_of(engine, later, copied(state), tokens(seed=1))
    assert engine.new_tensors == 1
    assert difference(got, wanted) <= 1e-6
    assert several.moments[newcomer].reset_at == one.moments[newcomer].reset_at == 4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "ep"])
def test_a_model_to_evaluate_with(parallel: str) -> None:
    task = shared_task()
    wanted = evaluate(single(task).evaluator(shard_of(task)), tokens(), "fp32", "cpu")
    module = member(task, 2, parallel).evaluator(shard_of(task))
    assert evaluate(module, tokens(), "fp32", "cpu") == wanted


# -- what cannot be ----------------------------------------------------------------------------------------------


def refusal(task: Task, parallel: str) -> str:
    engine = member(task, 2, parallel)
    with pytest.raises(ConfigError) as error:
        engine.load(task, shard_of(task), EngineState())
    # Nobody was told to begin, so that the next load finds the others where they were.
    assert_equal_rounds(shared_task(), member(shared_task(), 2, parallel), tokens(steps=1), ROUNDED)
    return str(error.value)


def test_a_batch_that_cannot_be_shared() -> None:
    assert refusal(shared_task(train={"batch_size": 7}), "fsdp") == (
        "site site: train.devices=2: must divide its 7 sequences a step"
    )
    assert refusal(shared_task(train={"micro_batches": 8}), "ddp") == (
        "site site: train.devices=2: must divide its 8 sequences a step, in train.micro_batches=8 pieces"
    )


@pytest.mark.parametrize("parallel", ["fsdp", "ep"])
def test_what_cannot_be_compiled(parallel: str) -> None:
    line = refusal(shared_task(train={"compile": True}), parallel)
    assert line == f"train.compile=true: not with train.parallel={parallel}; allowed is ddp"


def test_weights_that_cannot_be_rounded() -> None:
    line = refusal(shared_task(train={"dtype": "bf16", "weights": "bf16"}), "ddp")
    assert line == "site site: train.weights=bf16: on one device only, here are 2; allowed is fp32"


def test_a_shard_that_is_not_the_site_s() -> None:
    task = shared_task()
    shard = shard_of(task)
    assert shard.keys() == parameter_shapes(task.model, task.residents, "skip").keys()
    del shard[expert_name(1, 3, "down_proj")]
    with pytest.raises(WireError, match=r"^shard lacks model\.layers\.1\.mlp\.experts\.3\.down_proj"):
        member(task, 2, "fsdp").load(task, shard, EngineState())


def test_a_loss_that_is_not_finite() -> None:
    task = shared_task()
    shard = {name: value * float("nan") for name, value in shard_of(task).items()}
    engine = member(task, 2, "fsdp")
    engine.load(task, shard, EngineState())
    with pytest.raises(FloatingPointError, match="training loss is nan"):
        engine.train(tokens(steps=1))
