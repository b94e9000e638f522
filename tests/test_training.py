"""The local loop: AdamW over named slices against PyTorch's own over the stacks, newborn experts, and the counters.

Letters: B sequences, T tokens of a sequence, E experts, D d_model, H d_expert.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig, TrainConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.sigma_moe import Losses, Transformer, build, initial_state, named_views, read_shard
from fomoe_flwr.model.spec import expert_name
from fomoe_flwr.placement import full_residents
from fomoe_flwr.training import (
    LocalAdamW,
    Moments,
    evaluate,
    resolve_device,
    train_adamw,
    train_gradient,
    use_cpu,
    warmup,
)

# Learning-rate multipliers: 3/2 for what reads d_model, 4 for what reads d_expert, 1 for embedding and norms.
MODEL = ModelConfig(
    vocab_size=29,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    d_expert=8,
    top_k=2,
    base_d_model=24,
    base_num_layers=2,
    base_d_expert=32,
    init_std=0.5,
)
TRAIN = TrainConfig(
    lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, expert_warmup_steps=5, grad_clip=0
)
FULL = full_residents(MODEL.num_layers, MODEL.num_experts)
SOME = [[0, 2], [1, 3]]
WARMUP = 4
NEWBORN = expert_name(0, 2, "up_proj")

routings = pytest.mark.parametrize("routing", ["skip", "partitioned"])


def site(residents: Sequence[Sequence[int]] = SOME, routing: str = "skip") -> Transformer:
    return build(MODEL, residents, routing, initial_state(MODEL, residents, routing, seed=0), "cpu")


def optimizer_of(module: Transformer, train: TrainConfig = TRAIN, **state: object) -> LocalAdamW:
    arguments = {"first_step": 0, "moments": {}, "warmup_steps": WARMUP} | state
    return LocalAdamW(module, MODEL, train, **arguments)


def set_gradients(module: Transformer, step: int) -> None:
    """Gradients that depend on the parameter and the step, without a forward pass."""
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def multiplier_of(path: str) -> float:
    if path.endswith(("down_EDH", "down_proj.weight")):
        return 32 / 8
    return 1.0 if "norm" in path or "embed" in path else 24 / 16


def batches(count: int, seed: int = 0, sequences: int = 2, length: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(MODEL.vocab_size, (sequences, length), generator=generator) for _ in range(count)]


# -- the optimizer -------------------------------------------------------------------------------------------


@routings
def test_named_slices_are_stepped_as_pytorch_steps_the_stacks(routing: str) -> None:
    module, reference = site(routing=routing), site(routing=routing)
    optimizer = optimizer_of(module)
    groups = [{"params": [p], "multiplier": multiplier_of(path)} for path, p in reference.named_parameters()]
    expected = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(6):
        set_gradients(module, step)
        set_gradients(reference, step)
        optimizer.step()
        for group in expected.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / WARMUP) * group["multiplier"]
        expected.step()
        wanted = read_shard(reference)
        for name, value in read_shard(module).items():
            torch.testing.assert_close(value, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_of_a_single_weight_by_hand() -> None:
    # AdamW's first step is lr·g/|g| = lr, whatever the gradient's size; weight decay takes lr·0.1·w before.
    module = site()
    optimizer = optimizer_of(module, warmup_steps=0)
    set_gradients(module, 0)
    weight = module.model.norm.weight
    weight.grad = torch.full_like(weight, -123.0)
    optimizer.step()  # the norm's weights are 1
    torch.testing.assert_close(weight.data, torch.full_like(weight, 1 - 0.01 * 0.1 + 0.01))


def test_slices_share_the_modules_memory() -> None:
    """An expert is a parameter of its own and yet the stack that the model computes with."""
    module = site()
    before = module.moe_layers[0].experts.up_EHD.detach().clone()
    optimizer = optimizer_of(module)
    set_gradients(module, 0)
    optimizer.step()
    assert (module.moe_layers[0].experts.up_EHD != before).all()


def test_an_expert_without_gradient_stays() -> None:
    module = site()
    optimizer = optimizer_of(module)
    before = {name: value.clone() for name, value in read_shard(module).items()}
    module.model.norm.weight.grad = torch.ones(MODEL.d_model)
    optimizer.step()
    changed = {name for name, value in read_shard(module).items() if not value.equal(before[name])}
    assert changed == {"model.norm.weight"}
    assert set(optimizer.moments()) == {"model.norm.weight"}


@routings
def test_moments_have_the_names_of_the_shard(routing: str) -> None:
    module = site(routing=routing)
    optimizer = optimizer_of(module)
    set_gradients(module, 0)
    optimizer.step()
    shard, moments = read_shard(module), optimizer.moments()
    assert moments.keys() == shard.keys()
    for name, state in moments.items():
        assert state.exp_avg.shape == state.exp_avg_sq.shape == shard[name].shape
        assert (state.step, state.born) == (1, 0)


@routings
def test_saved_moments_go_on_bit_for_bit(routing: str) -> None:
    straight, interrupted = site(routing=routing), site(routing=routing)
    optimizer = optimizer_of(straight)
    first_half = optimizer_of(interrupted)
    for step in range(3):
        for module, stepper in ((straight, optimizer), (interrupted, first_half)):
            set_gradients(module, step)
            stepper.step()

    saved = {
        name: Moments(m.exp_avg.clone(), m.exp_avg_sq.clone(), m.step, m.born)
        for name, m in first_half.moments().items()
    }
    resumed = build(MODEL, SOME, routing, {n: v.clone() for n, v in read_shard(interrupted).items()}, "cpu")
    second_half = optimizer_of(resumed, first_step=3, moments=saved)
    for step in range(3, 6):
        for module, stepper in ((straight, optimizer), (resumed, second_half)):
            set_gradients(module, step)
            stepper.step()

    expected = read_shard(straight)
    assert all(value.equal(expected[name]) for name, value in read_shard(resumed).items())
    wanted = optimizer.moments()
    for name, state in second_half.moments().items():
        assert state.exp_avg.equal(wanted[name].exp_avg)
        assert state.exp_avg_sq.equal(wanted[name].exp_avg_sq)
        assert (state.step, state.born) == (wanted[name].step, wanted[name].born)


def test_given_moments_are_copied() -> None:
    """What a site keeps on disk or in memory is not the optimizer's to write to."""
    module = site()
    shape = read_shard(module)[NEWBORN].shape
    given = Moments(torch.zeros(shape), torch.zeros(shape), 3, 0)
    optimizer = optimizer_of(module, moments={NEWBORN: given})
    set_gradients(module, 0)
    optimizer.step()
    assert not given.exp_avg.any()
    assert not given.exp_avg_sq.any()
    assert optimizer.moments()[NEWBORN].step == 4


# -- warm-up and newborn experts -----------------------------------------------------------------------------


def test_warmup_is_linear_and_then_constant() -> None:
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == warmup(1000, 0) == 1.0
    assert warmup(0, 1) == 1.0


def with_a_newborn(module: Transformer) -> LocalAdamW:
    """A site at global step 100 that has had all its names for 60 steps, but one expert's tensor just came."""
    moments = {
        name: Moments(torch.zeros_like(value), torch.full_like(value, 1e-4), 60, 0)
        for name, value in read_shard(module).items()
        if name != NEWBORN
    }
    return optimizer_of(module, first_step=100, moments=moments, newborn=100)


def test_a_newborn_expert_warms_up_and_counts_by_itself() -> None:
    module = site()
    optimizer = with_a_newborn(module)
    rates = []
    for step in range(7):
        rates.append((optimizer.learning_rate(0), optimizer.learning_rate(100)))
        set_gradients(module, step)
        optimizer.step()
    assert [old for old, _ in rates] == [pytest.approx(0.01)] * 7  # the global warm-up is long over
    assert [new for _, new in rates] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])
    moments = optimizer.moments()
    assert (moments[NEWBORN].step, moments[NEWBORN].born) == (7, 100)
    assert {(m.step, m.born) for name, m in moments.items() if name != NEWBORN} == {(67, 0)}


def test_a_newborn_steps_as_a_fresh_adamw_and_the_others_as_without_it() -> None:
    module, all_old = site(), site()
    optimizer = with_a_newborn(module)
    old = {
        name: Moments(torch.zeros_like(v), torch.full_like(v, 1e-4), 60, 0)
        for name, v in read_shard(all_old).items()
    }
    reference = optimizer_of(all_old, first_step=100, moments=old)
    fresh = nn.Parameter(read_shard(module)[NEWBORN].clone())
    expected = torch.optim.AdamW([fresh], lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    slot = SOME[0].index(2)
    for step in range(6):
        set_gradients(module, step)
        set_gradients(all_old, step)
        stack = module.moe_layers[0].experts.up_EHD
        assert stack.grad is not None
        fresh.grad = stack.grad[slot].clone()
        expected.param_groups[0]["lr"] = 0.01 * min(1.0, (step + 1) / 5) * 24 / 16
        expected.step()
        optimizer.step()
        reference.step()
    stepped, untouched = read_shard(module), read_shard(all_old)
    torch.testing.assert_close(stepped[NEWBORN], fresh.data)
    assert not stepped[NEWBORN].equal(untouched[NEWBORN])
    assert all(stepped[name].equal(untouched[name]) for name in stepped if name != NEWBORN)


def test_a_newborn_goes_on_warming_up_in_the_next_round() -> None:
    """`born` is part of what is kept: the second half of a warm-up is the second half."""
    module = site()
    optimizer = with_a_newborn(module)
    for step in range(3):
        set_gradients(module, step)
        optimizer.step()
    resumed = optimizer_of(module, first_step=103, moments=optimizer.moments(), newborn=103)
    assert resumed.born[NEWBORN] == 100
    assert resumed.learning_rate(resumed.born[NEWBORN]) == pytest.approx(0.008)


def test_a_newborn_in_the_global_warmup_takes_the_smaller_rate() -> None:
    optimizer = optimizer_of(site(), first_step=10, warmup_steps=100, newborn=10)
    assert optimizer.learning_rate(10) == pytest.approx(0.01 * 11 / 100)  # its own would be 1/5
    optimizer.step_number = 99
    assert optimizer.learning_rate(98) == pytest.approx(0.01 * 2 / 5)  # the global one is over


def test_at_the_start_of_a_run_nothing_is_newborn() -> None:
    optimizer = optimizer_of(site())
    assert set(optimizer.born.values()) == {0}
    assert optimizer.learning_rate(0) == pytest.approx(0.01 / WARMUP)


# -- a round of steps ----------------------------------------------------------------------------------------


def plain_round(module: Transformer, tokens: Sequence[Tensor], train: TrainConfig) -> list[float]:
    """The loop written out with PyTorch's AdamW over the stacks; the cross-entropies."""
    groups = [{"params": [p], "multiplier": multiplier_of(path)} for path, p in module.named_parameters()]
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay
    )
    losses = []
    for step, tokens_BT in enumerate(tokens):
        optimizer.zero_grad()
        loss = module(tokens_BT)
        (loss.cross_entropy + loss.balance).backward()
        if train.grad_clip:
            nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * min(1.0, (step + 1) / WARMUP) * group["multiplier"]
        optimizer.step()
        losses.append(loss.cross_entropy.item())
    return losses


@routings
@pytest.mark.parametrize("grad_clip", [0.0, 0.3], ids=["not clipped", "clipped"])
def test_a_round_is_the_plain_loop(routing: str, grad_clip: float) -> None:
    train = dataclasses.replace(TRAIN, grad_clip=grad_clip)
    module, reference = site(routing=routing), site(routing=routing)
    tokens = batches(4)
    report = train_adamw(module, optimizer_of(module, train), tokens, train, "cpu")
    losses = plain_round(reference, tokens, train)
    assert report.train_loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert report.first_loss == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)
    assert report.last_loss == pytest.approx(sum(losses[1:]) / 3, rel=1e-5)
    assert report.tokens == 4 * 2 * 8  # predictions: one less than the tokens of each sequence
    assert report.seconds > 0
    wanted = read_shard(reference)
    for name, value in read_shard(module).items():
        torch.testing.assert_close(
            value, wanted[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_same_round_twice_gives_the_same_bits() -> None:
    shards = []
    for _ in range(2):
        module = site()
        train_adamw(module, optimizer_of(module), batches(3), TRAIN, "cpu")
        shards.append({name: value.clone() for name, value in read_shard(module).items()})
    assert all(shards[0][name].equal(shards[1][name]) for name in shards[0])


def test_a_repeated_batch_is_learnt() -> None:
    module = site(FULL)
    (tokens_BT,) = batches(1)
    before, _ = evaluate(module, [tokens_BT], "fp32", "cpu")
    train_adamw(module, optimizer_of(module), [tokens_BT] * 30, TRAIN, "cpu")
    after, _ = evaluate(module, [tokens_BT], "fp32", "cpu")
    assert after < before / 2


def test_bf16_learns_too_and_keeps_fp32_weights() -> None:
    train = dataclasses.replace(TRAIN, dtype="bf16")
    module = site(FULL)
    (tokens_BT,) = batches(1)
    before, _ = evaluate(module, [tokens_BT], "bf16", "cpu")
    train_adamw(module, optimizer_of(module, train), [tokens_BT] * 30, train, "cpu")
    after, _ = evaluate(module, [tokens_BT], "bf16", "cpu")
    assert after < before / 2
    assert {value.dtype for value in read_shard(module).values()} == {torch.float32}


def test_a_loss_that_is_not_finite_ends_the_round() -> None:
    """What was learnt is worthless and must not be sent."""
    module = site()
    with torch.no_grad():
        module.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="training loss is nan after 2 steps"):
        train_adamw(module, optimizer_of(module), batches(2), TRAIN, "cpu")


def test_every_tenth_step_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    module = site()
    with caplog.at_level(logging.INFO, logger="fomoe.site"):
        train_adamw(module, optimizer_of(module, first_step=100), batches(21), TRAIN, "cpu")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines] == ["110", "120"]
    assert all(word in lines[0] for word in ("loss", "lr", "ms/step", "tokens/s"))


# -- gradients for data parallel -----------------------------------------------------------------------------


@routings
def test_the_mean_gradient_is_that_of_the_mean_loss(routing: str) -> None:
    module, reference = site(routing=routing), site(routing=routing)
    tokens = batches(3)
    before = {name: value.clone() for name, value in read_shard(module).items()}
    report, gradients = train_gradient(module, tokens, TRAIN, "cpu")

    losses = [reference(tokens_BT) for tokens_BT in tokens]
    torch.stack([loss.cross_entropy + loss.balance for loss in losses]).mean().backward()
    for view in named_views(reference):
        assert view.parameter.grad is not None
        torch.testing.assert_close(gradients[view.name], view.of(view.parameter.grad), rtol=1e-4, atol=1e-6)
    assert gradients.keys() == before.keys()
    assert report.train_loss == pytest.approx(sum(loss.cross_entropy.item() for loss in losses) / 3, rel=1e-5)
    assert all(value.equal(before[name]) for name, value in read_shard(module).items())  # no step was taken


# -- counters ------------------------------------------------------------------------------------------------


def resident_load(load_LE: list[list[int]], residents: list[list[int]]) -> int:
    return sum(
        load_E[expert] for load_E, experts in zip(load_LE, residents, strict=True) for expert in experts
    )


def test_the_report_counts_every_assignment_of_the_routers() -> None:
    module = site()
    chosen: list[list[int]] = [[] for _ in module.moe_layers]
    for layer, moe in enumerate(module.moe_layers):
        moe.gate.register_forward_hook(
            lambda _module, _inputs, routing, seen=chosen[layer]: seen.extend(
                routing.chosen_TK.flatten().tolist()
            )
        )
    report = train_adamw(module, optimizer_of(module), batches(3), TRAIN, "cpu")
    assert report.load_LE == [[seen.count(expert) for expert in range(MODEL.num_experts)] for seen in chosen]
    assigned = report.tokens * MODEL.top_k * MODEL.num_layers
    assert sum(map(len, chosen)) == assigned
    assert report.resident_share == pytest.approx(resident_load(report.load_LE, SOME) / assigned)
    assert 0 < report.resident_share < 1


def test_half_of_every_tokens_experts_resident_is_a_share_of_one_half() -> None:
    """Routers rigged so that a token wants experts 0 and 1, or 2 and 3, by the sign of a feature; 0 and 2 are here."""
    module = site([[0, 2], [0, 2]])
    with torch.no_grad():
        for moe in module.moe_layers:
            moe.gate.weight.zero_()
            moe.gate.weight[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    train = dataclasses.replace(TRAIN, lr=0.0)
    report = train_adamw(module, optimizer_of(module, train), batches(2), train, "cpu")
    assert report.resident_share == 0.5
    assert resident_load(report.load_LE, [[0, 2], [0, 2]]) == report.tokens * MODEL.num_layers


@pytest.mark.parametrize(
    ("residents", "routing"), [(FULL, "skip"), (FULL, "partitioned"), (SOME, "partitioned")]
)
def test_without_ghosts_every_assignment_is_resident(residents: list[list[int]], routing: str) -> None:
    module = site(residents, routing)
    report = train_adamw(module, optimizer_of(module), batches(2), TRAIN, "cpu")
    assert report.resident_share == 1.0
    assert resident_load(report.load_LE, residents) == report.tokens * MODEL.top_k * MODEL.num_layers
    assert sum(map(sum, report.load_LE)) == resident_load(report.load_LE, residents)


def test_each_round_counts_from_zero() -> None:
    module = site(FULL)
    optimizer = optimizer_of(module, dataclasses.replace(TRAIN, lr=0.0))
    reports = [train_adamw(module, optimizer, batches(2), TRAIN, "cpu") for _ in range(2)]
    assert reports[0].tokens == reports[1].tokens
    assert sum(map(sum, reports[0].load_LE)) == sum(map(sum, reports[1].load_LE))


# -- evaluation ----------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess() -> None:
    module = site()
    with torch.no_grad():
        module.model.norm.weight.zero_()  # all logits are 0
    loss, tokens = evaluate(module, batches(3), "fp32", "cpu")
    assert loss == pytest.approx(math.log(MODEL.vocab_size), rel=1e-6)
    assert tokens == 3 * 2 * 8


class Known(nn.Module):
    """Its cross-entropy is the first token of the batch."""

    def forward(self, tokens_BT: Tensor) -> Losses:
        return Losses(tokens_BT[0, 0].float(), torch.tensor(100.0))


def test_batches_count_by_their_tokens_and_the_balance_loss_does_not_count() -> None:
    # 2 sequences of 4 predictions with loss 1, and 1 of 2 with loss 6: (8·1 + 2·6) / 10.
    unequal = [torch.full((2, 5), 1), torch.full((1, 3), 6)]
    loss, tokens = evaluate(Known(), unequal, "fp32", "cpu")
    assert loss == pytest.approx(2.0)
    assert tokens == 10


def test_nothing_to_evaluate_is_no_division_by_zero() -> None:
    assert evaluate(site(), [], "fp32", "cpu") == (0.0, 0)


def test_evaluation_leaves_no_trace() -> None:
    module = site()
    before = {name: value.clone() for name, value in read_shard(module).items()}
    evaluate(module, batches(2), "fp32", "cpu")
    assert all(value.equal(before[name]) for name, value in read_shard(module).items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(moe.gate.load_C.any() for moe in module.moe_layers)


def test_training_after_an_evaluation_counts_again() -> None:
    module = site()
    evaluate(module, batches(1), "fp32", "cpu")
    report = train_adamw(module, optimizer_of(module), batches(1), TRAIN, "cpu")
    assert sum(map(sum, report.load_LE)) > 0


# -- the machine ---------------------------------------------------------------------------------------------


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_device("cpu") == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"train\.device=cuda:1: .*allowed are auto, cpu"):
        resolve_device("cuda:1")


def test_zero_threads_leave_pytorchs_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    use_cpu(0)
    use_cpu(2)
    assert calls == [2]
