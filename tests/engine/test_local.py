"""The engine's four verbs, load, train, update and state, against the loop written out; and the device under it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fomoe_flwr.engine import Engine, EngineState, Moments, Report
from fomoe_flwr.engine.device import resolve_device, use_cpu
from fomoe_flwr.errors import ConfigError, WireError
from fomoe_flwr.evaluation import evaluate
from fomoe_flwr.messages import Task
from fomoe_flwr.model.base import named_views, read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import expert_name, moment_name, parameters, state_bytes
from fomoe_flwr.server.outer import with_moments
from tests.engine.helpers import (
    FULL,
    MODEL,
    SOME,
    WARMUP,
    batches,
    decay_of,
    is_hidden,
    multiplier_of,
    task_of,
)
from tests.model.stock_models import CONFIGS, stock

routings = pytest.mark.parametrize("routing", ["skip", "partitioned"])

Named = dict[str, Tensor]


def shard_of(task: Task, seed: int = 0) -> Named:
    return initial_state(task.model, task.residents, task.strategy.routing, seed)


def copied(named: Any) -> Named:
    return {name: value.clone() for name, value in named.items()}


def loaded(task: Task, state: EngineState | None = None, shard: Named | None = None) -> Engine:
    engine = Engine(task.model, task.residents, task.strategy.routing, "cpu")
    engine.load(task, shard_of(task) if shard is None else shard, state or EngineState())
    return engine


def assert_close(got: Named, wanted: Named, **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bits(got: Named, wanted: Named) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name, value in got.items() if not value.equal(wanted[name])] == []


# -- a round of steps ----------------------------------------------------------------------------------------


def plain_round(module: Transformer, tokens: Sequence[Tensor], grad_clip: float) -> list[float]:
    """The loop written out with PyTorch's AdamW over the stacks; the cross-entropies."""
    groups = [
        {"params": [p], "multiplier": multiplier_of(path), "weight_decay": decay_of(path)}
        for path, p in module.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step, tokens_BT in enumerate(tokens):
        optimizer.zero_grad()
        loss = module(tokens_BT)
        (loss.cross_entropy + loss.balance).backward()
        if grad_clip:
            nn.utils.clip_grad_norm_(module.parameters(), grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / WARMUP) * group["multiplier"]
        optimizer.step()
        losses.append(loss.cross_entropy.item())
    return losses


@routings
@pytest.mark.parametrize("grad_clip", [0.0, 0.3], ids=["not clipped", "clipped"])
def test_a_round_is_the_plain_loop(routing: str, grad_clip: float) -> None:
    """The update is what was sent minus what came out; the figures are those of the loop."""
    task = task_of(train={"grad_clip": grad_clip}, strategy={"routing": routing})
    sent, tokens = shard_of(task), batches(4)
    reference = build(MODEL, SOME, routing, sent, "cpu")
    engine = loaded(task, shard=copied(sent))
    assert_same_bits(engine.loaded(), sent)
    report = engine.train(tokens)
    losses = plain_round(reference, tokens, grad_clip)
    wanted = {name: sent[name] - value for name, value in read_shard(reference).items()}
    assert_close(engine.update(), wanted, rtol=1e-3, atol=1e-4)
    assert report.tokens == 4 * 2 * 8  # predictions: one less than the tokens of each sequence
    metrics = report.metrics
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert metrics["first_loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)
    assert metrics["last_loss"] == pytest.approx(sum(losses[1:]) / 3, rel=1e-5)
    assert metrics["seconds"] > 0
    assert metrics["new_experts"] == 0  # at the start of a run nothing is new
    # fp32 parameters, gradients and both moments, and the shard as it was sent.
    assert metrics["memory_bytes"] == 5 * 4 * sum(value.numel() for value in sent.values())


@routings
@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_is_computed_again_changes_no_bit(routing: str, what: str) -> None:
    """Nor is anything counted twice; and less is kept for the backward pass."""
    found = []
    for recompute in ("none", what):
        task = task_of(train={"recompute": recompute}, strategy={"routing": routing})
        engine, kept = loaded(task), [0]

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            report = engine.train(batches(3))
        found.append((kept[0], report.load_LE, report.metrics["train_loss"], copied(engine.update())))
    (plain, *whole), (less, *again) = found
    assert less < plain
    assert again[:2] == whole[:2]
    assert_same_bits(again[2], whole[2])


def two_rounds(task: Task, engine: Engine | None = None) -> tuple[Engine, Report, Named]:
    """Of six sequences a step; the second update."""
    engine = engine or Engine(task.model, task.residents, task.strategy.routing, "cpu")
    generator, state = torch.Generator().manual_seed(5), EngineState()
    for number in (1, 2):
        text = [torch.randint(task.model.vocab_size, (6, 9), generator=generator) for _ in range(3)]
        following = dataclasses.replace(task, round=number, first_step=3 * (number - 1))
        engine.load(following, shard_of(task, number), state)
        report = engine.train(text)
        update, state = copied(engine.update()), engine.state()
    return engine, report, update


def in_bf16(weights: str, **changes: Any) -> Task:
    train = {"dtype": "bf16", "batch_size": 6, "weights": weights} | changes.pop("train", {})
    return task_of(train=train, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": {"routing": "partitioned"}},
        {"train": {"micro_batches": 3, "grad_clip": 0.1}},
        {"train": {"optimizer": "muon", "moments": "bf16"}},
        {"train": {"recompute": "full"}},
        {"model": {"standins": 8, "num_shared_experts": 1}},
    ],
    ids=str,
)
def test_weights_that_are_rounded_once_a_step_give_the_bits_of_those_rounded_in_each_product(
    changes: dict[str, Any],
) -> None:
    """And so do gradients, which a product in bf16 gives in bf16, and pieces add up in fp32."""
    _, wanted, wanted_update = two_rounds(in_bf16("fp32", **changes))
    engine, got, update = two_rounds(in_bf16("bf16", **changes))
    assert got.metrics["train_loss"] == wanted.metrics["train_loss"]
    assert_same_bits(update, wanted_update)
    assert all(value.dtype == torch.float32 for value in update.values())
    rounded = {v.name for v in named_views(engine.module) if v.parameter.dtype == torch.bfloat16}
    assert rounded == {name for name in update if is_hidden(name)}


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_models_have_rounded_weights_too(family: str) -> None:
    model = stock(family)
    found = []
    for weights in ("fp32", "bf16"):
        task = in_bf16(weights, residents=[[0, 2, 5]] * model.num_layers)
        found.append(two_rounds(dataclasses.replace(task, model=model))[2])
    assert_same_bits(found[1], found[0])


def test_a_clipped_gradient_in_bf16_is_rounded_once_more() -> None:
    clipped = {"train": {"grad_clip": 0.1}}
    wanted, got = (two_rounds(in_bf16(weights, **clipped))[2] for weights in ("fp32", "bf16"))
    off = sum(float((got[name] - value).square().sum()) for name, value in wanted.items())
    assert off**0.5 <= 0.05 * sum(float(value.square().sum()) for value in wanted.values()) ** 0.5


def test_an_engine_changes_to_rounded_weights_and_back() -> None:
    """A run may go on with another type, and a model to evaluate with has exact weights."""
    exact, rounded = in_bf16("fp32"), in_bf16("bf16")
    engine = two_rounds(rounded)[0]
    for task in (exact, rounded, rounded):
        assert_same_bits(two_rounds(task, engine)[2], two_rounds(task)[2])
    engine.load(exact, shard_of(exact), EngineState())
    assert {(p.dtype, p.grad_dtype) for p in engine.module.parameters()} == {(torch.float32, torch.float32)}
    engine.load(rounded, shard_of(rounded), EngineState())
    text = batches(2)
    assert evaluate(engine.evaluator(shard_of(exact)), text, "fp32", "cpu") == evaluate(
        loaded(task_of()).evaluator(shard_of(exact)), text, "fp32", "cpu"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(("weights", "pieces"), [("fp32", 1), ("bf16", 1), ("bf16", 2)])
def test_a_site_holds_the_bytes_that_plans_count(
    optimizer: str, moments: str, weights: str, pieces: int
) -> None:
    task = in_bf16(weights, train={"optimizer": optimizer, "moments": moments, "micro_batches": pieces})
    table = parameters(MODEL, task.residents, "skip")
    state = sum(param.numel * state_bytes(param, task.train) for param in table.values())
    sent = sum(value.nbytes for value in shard_of(task).values())
    assert two_rounds(task)[1].metrics["memory_bytes"] == state + sent


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_a_batch_in_pieces_has_the_mean_of_their_gradients(pieces: int) -> None:
    """Of uneven ones by their tokens. Without the balance of each piece it is the whole batch's."""
    model = {"load_balance": 0.0}
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(MODEL.vocab_size, (5, 9), generator=generator) for _ in range(2)]
    found = []
    for micro_batches in (1, pieces):
        task = task_of(model=model, train={"micro_batches": micro_batches, "batch_size": 5})
        engine = loaded(task)
        report = engine.train(tokens)
        found.append((report, copied(engine.update())))
    (whole, update), (cut, own) = found
    assert cut.tokens == whole.tokens
    assert cut.load_LE == whole.load_LE
    assert cut.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)
    assert_close(own, update, rtol=1e-3, atol=1e-5)


def test_routers_balance_each_piece_by_itself() -> None:
    tokens = batches(1)[0]
    task = task_of(
        model={"load_balance": 1.0}, train={"micro_batches": len(tokens)}, strategy={"inner": "gradient"}
    )
    engine = loaded(task)
    engine.train([tokens])
    module = build(MODEL, SOME, "skip", shard_of(task), "cpu")
    module.config = task.model
    for row_BT in tokens.split(1):
        losses = module(row_BT)
        ((losses.cross_entropy + losses.balance) / len(tokens)).backward()
    wanted = {view.name: view.of(view.parameter.grad) for view in named_views(module)}  # type: ignore[arg-type]
    assert_close(engine.update(), wanted, rtol=1e-4, atol=1e-6)


@routings
def test_rounds_give_the_same_bits_again_and_in_a_warm_engine(routing: str) -> None:
    """An engine that has trained before, and one from a saved state, go on as one that did neither."""
    first, second = (
        task_of(round=number, first_step=3 * (number - 1), strategy={"routing": routing}) for number in (1, 2)
    )
    warm, fresh = loaded(first), loaded(first)
    for engine in (warm, fresh):
        engine.train(batches(3))
    assert_same_bits(warm.update(), fresh.update())
    saved = EngineState(
        {
            name: Moments(m.exp_avg.clone(), m.exp_avg_sq.clone(), m.step, m.reset_at)
            for name, m in fresh.state().moments.items()
        }
    )
    assert saved.moments.keys() == shard_of(first).keys()
    assert {(m.step, m.reset_at) for m in saved.moments.values()} == {(3, 0)}
    warm.load(second, shard_of(second, seed=1), warm.state())
    cold = loaded(second, saved, shard_of(second, seed=1))
    reports = [engine.train(batches(3, seed=1)) for engine in (warm, cold)]
    assert reports[0].load_LE == reports[1].load_LE
    assert {m.step for m in warm.state().moments.values()} == {6}
    assert_same_bits(warm.update(), cold.update())
    for name, moments in warm.state().moments.items():
        assert moments.exp_avg.equal(cold.state().moments[name].exp_avg)
        assert moments.exp_avg_sq.equal(cold.state().moments[name].exp_avg_sq)


def test_what_was_sent_is_not_written_to_and_a_state_is_taken_over() -> None:
    task = task_of()
    sent, before = shard_of(task), shard_of(task)
    engine = loaded(task, shard=sent)
    engine.train(batches(2))
    state = engine.state()
    moments = state.moments
    loaded(task_of(round=2, first_step=2), state)
    assert not moments
    assert_same_bits(sent, before)


@pytest.mark.parametrize(
    ("kept", "round_", "new"),
    [(True, 2, 2), (True, 1, 0), (False, 2, 0)],
    ids=["", "first round", "not kept"],
)
def test_experts_without_moments_are_new_where_moments_are_kept(kept: bool, round_: int, new: int) -> None:
    """Moments that are missing at the start, or dropped on purpose, are no reason for a warm-up."""
    task = task_of(strategy={"keep_moments": kept}, round=round_, first_step=100)
    shard = shard_of(task)
    newcomers = {expert_name(0, 2, "up_proj"), expert_name(0, 2, "down_proj")}
    moments = {
        name: Moments(torch.zeros_like(value), torch.ones_like(value), 60, 0)
        for name, value in shard.items()
        if name not in newcomers
    }
    engine = loaded(task, EngineState(moments), shard)
    assert engine.train(batches(2)).metrics["new_experts"] == new
    state = engine.state().moments
    assert state.keys() == (shard.keys() if kept else set())
    assert all(state[name].reset_at == (100 if new else 0) for name in newcomers & state.keys())


def test_local_adamws_moments_come_and_go_with_the_shard() -> None:
    task = task_of(strategy={"outer": "local_adamw"}, first_step=7)
    parameters = shard_of(task)
    generator = torch.Generator().manual_seed(0)
    shard = dict(parameters)
    for name, value in parameters.items():
        shard[moment_name("exp_avg", name)] = torch.randn(value.shape, generator=generator)
        shard[moment_name("exp_avg_sq", name)] = torch.rand(value.shape, generator=generator)
    sent = copied(shard)
    engine = loaded(task, EngineState(), shard)
    assert_same_bits(engine.loaded(), sent)
    engine.train(batches(2))

    own = {
        name: Moments(sent[moment_name("exp_avg", name)], sent[moment_name("exp_avg_sq", name)], 7, 0)
        for name in parameters
    }
    kept = loaded(
        task_of(first_step=7), EngineState(own), parameters
    )  # the same as moments of the site's own
    kept.train(batches(2))
    wanted = kept.update()
    for name, moments in kept.state().moments.items():
        assert moments.step == 9
        wanted |= {
            moment_name("exp_avg", name): moments.exp_avg,
            moment_name("exp_avg_sq", name): moments.exp_avg_sq,
        }
    assert_same_bits(engine.update(), wanted)
    assert engine.state().moments == {}  # they are the federation's


@routings
def test_the_mean_gradient_is_that_of_the_mean_loss_and_no_step_is_taken(routing: str) -> None:
    task = task_of(strategy={"routing": routing, "inner": "gradient"})
    sent, tokens = shard_of(task), batches(3)
    reference = build(MODEL, SOME, routing, sent, "cpu")
    engine = loaded(task, shard=copied(sent))
    report = engine.train(tokens)
    losses = [reference(tokens_BT) for tokens_BT in tokens]
    torch.stack([loss.cross_entropy + loss.balance for loss in losses]).mean().backward()
    wanted = {view.name: view.of(view.parameter.grad) for view in named_views(reference)}
    assert_close(engine.update(), wanted, rtol=1e-4, atol=1e-6)
    assert report.metrics["train_loss"] == pytest.approx(
        sum(loss.cross_entropy.item() for loss in losses) / 3, rel=1e-5
    )
    assert_same_bits(engine.loaded(), sent)
    assert engine.state() == EngineState()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_repeated_batch_is_learnt(dtype: str) -> None:
    task = task_of(residents=FULL, train={"dtype": dtype})
    engine = loaded(task)
    (tokens_BT,) = batches(1)
    before, _ = evaluate(engine.module, [tokens_BT], dtype, "cpu")
    trained: Named = {}

    def thirty_times() -> Any:
        yield from [tokens_BT] * 30
        trained.update(copied(read_shard(engine.module)))

    engine.train(thirty_times())
    assert {value.dtype for value in trained.values()} == {torch.float32}
    after, _ = evaluate(build(MODEL, FULL, "skip", trained, "cpu"), [tokens_BT], dtype, "cpu")
    assert after < before / 2


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_round() -> None:
    """What was learnt is worthless and must not be sent."""
    task = task_of()
    shard = shard_of(task)
    shard["model.norm.weight"].fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"nan after 2 steps"):
        loaded(task, shard=shard).train(batches(2))


@pytest.mark.parametrize(
    "wrong", ["model.norm.weight", "exp_avg.model.norm.weight", "exp_avg_sq.model.norm.weight"]
)
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "of another shape"])
def test_a_shard_that_is_not_the_tasks_is_refused(wrong: str, missing: bool) -> None:
    task = task_of(strategy={"outer": "local_adamw"})
    shard = with_moments(shard_of(task))
    shard[wrong] = torch.zeros(1)  # which would broadcast
    if missing:
        del shard[wrong]
    with pytest.raises(WireError, match=wrong):
        loaded(task, shard=shard)


# -- figures -------------------------------------------------------------------------------------------------


def test_every_tenth_step_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fomoe.site"):
        loaded(task_of(first_step=100)).train(batches(21))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines] == ["110", "120"]
    assert all(word in lines[0] for word in ("loss", "lr", "ms/step", "tokens/s"))


def resident_load(report: Report, residents: list[list[int]]) -> int:
    return sum(
        load_E[expert]
        for load_E, experts in zip(report.load_LE, residents, strict=True)
        for expert in experts
    )


def test_the_report_counts_every_assignment_of_the_routers() -> None:
    """Of each round from zero, and none of an evaluation."""
    engine = loaded(task_of())
    chosen: list[list[int]] = [[] for _ in engine.module.moe_layers]
    evaluate(engine.module, batches(1), "fp32", "cpu")
    for layer, moe in enumerate(engine.module.moe_layers):
        moe.gate.register_forward_hook(
            lambda _module, _inputs, routing, seen=chosen[layer]: seen.extend(
                routing.chosen_TK.flatten().tolist()
            )
        )
    for number in (1, 2):
        for seen in chosen:
            seen.clear()
        engine.load(task_of(round=number), shard_of(task_of()), EngineState())
        report = engine.train(batches(3))
        assert report.load_LE == [
            [seen.count(expert) for expert in range(MODEL.num_experts)] for seen in chosen
        ]
        assigned = report.tokens * MODEL.top_k * MODEL.num_layers
        assert sum(map(len, chosen)) == assigned
        assert report.metrics["resident_share"] == pytest.approx(resident_load(report, SOME) / assigned)
        assert 0 < report.metrics["resident_share"] < 1


def test_half_of_every_tokens_experts_resident_is_a_share_of_one_half() -> None:
    """Routers rigged so that a token wants experts 0 and 1, or 2 and 3, by the sign of a feature; 0 and 2 are here."""
    task = task_of(residents=[[0, 2], [0, 2]], train={"lr": 0.0})
    shard = shard_of(task)
    for layer in range(MODEL.num_layers):
        gate_ED = shard[f"model.layers.{layer}.mlp.gate.weight"].zero_()
        gate_ED[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    report = loaded(task, shard=shard).train(batches(2))
    assert report.metrics["resident_share"] == 0.5
    assert resident_load(report, task.residents) == report.tokens * MODEL.num_layers


@pytest.mark.parametrize(
    ("residents", "routing"), [(FULL, "skip"), (FULL, "partitioned"), (SOME, "partitioned")]
)
def test_without_ghosts_every_assignment_is_resident(residents: list[list[int]], routing: str) -> None:
    report = loaded(task_of(residents=residents, strategy={"routing": routing})).train(batches(2))
    assert report.metrics["resident_share"] == 1.0
    assert resident_load(report, residents) == report.tokens * MODEL.top_k * MODEL.num_layers
    assert sum(map(sum, report.load_LE)) == resident_load(report, residents)


def test_what_a_router_remembers_goes_through_the_state() -> None:
    """The bias towards residents, and the site's own load where the federation's is balanced."""
    task = task_of(model={"locality": "bias", "locality_target": 0.8, "balance": "global"})
    engine = loaded(task)
    report = engine.train(batches(3))
    state = engine.state()
    assert any(bias for bias, _ in state.bias)
    assert state.load == [[count / sum(load_E) for count in load_E] for load_E in report.load_LE]
    second = dataclasses.replace(task, round=2, global_load=[[0.25] * 4] * 2)
    again = loaded(second, EngineState(bias=state.bias, load=state.load))
    assert again.module.biases() == state.bias
    offsets = [moe.gate.offset_C.tolist() for moe in again.module.moe_layers]
    assert offsets == [pytest.approx([0.25 - share for share in own_E]) for own_E in state.load]
    assert loaded(task).module.biases() == [[0.0, 0.0]] * 2  # nothing is left of another site's


# -- the device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "asked", "resolved"),
    [
        (True, "auto", "cuda"),
        (True, "cuda:1", "cuda:1"),
        (True, "cpu", "cpu"),
        (False, "auto", "cpu"),
        (False, "cpu", "cpu"),
    ],
)
def test_auto_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, there: bool, asked: str, resolved: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * there)
    assert resolve_device(asked) == resolved


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.device=cuda:1.*auto.*cpu"):
        resolve_device("cuda:1")


def test_zero_threads_leave_pytorchs_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    use_cpu(0)
    use_cpu(2)
    assert calls == [2]
