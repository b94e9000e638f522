"""A model judged: against the paper's equations as plain loops, and on models whose figures are known beforehand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_flwr.config import DataConfig, ModelConfig
from fomoe_flwr.data import LabelledBatch, prepare
from fomoe_flwr.eval_command import compared
from fomoe_flwr.evaluation import (
    Judged,
    Text,
    evaluate,
    evaluate_model,
    evaluate_residents,
    evaluate_text,
    necessity,
    random_routing,
    survey,
    text_of,
    token_losses,
)
from fomoe_flwr.model.base import Losses, read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import expert_name, gate_name
from fomoe_flwr.placement import full_residents
from tests.model.helpers import SMALL, plain_logits, plain_loss, randomized

EVERYTHING = full_residents(SMALL.num_layers, SMALL.num_experts)
PLACEMENT = {"a": [[0, 2, 5], [1, 2, 3]], "b": [[1, 3, 4], [0, 4, 5]]}


def text(
    tokens: Sequence[Tensor], domains: Sequence[Tensor] | None = None, token_bytes: Sequence[int] | int = 1
) -> Text:
    """Batches of sequences; so many bytes has each token, or all."""
    labels = domains or [torch.zeros_like(tokens_BT) for tokens_BT in tokens]
    batches = [LabelledBatch(*pair) for pair in zip(tokens, labels, strict=True)]
    bytes_V = np.broadcast_to(np.array(token_bytes, dtype=np.int32), 64)
    return Text(lambda: batches, ["one", "two"], bytes_V)


def some_tokens(*shapes: tuple[int, int], vocab_size: int = SMALL.vocab_size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, shape, generator=generator) for shape in shapes]


def judged(model: ModelConfig = SMALL, routing: str = "skip", seed: int = 0) -> Judged:
    everything = full_residents(model.num_layers, model.num_experts)
    state = randomized(initial_state(model, everything, routing, seed))
    return Judged(model, routing, state, PLACEMENT)


def whole(subject: Judged) -> Transformer:
    return subject.module(subject.everything, "cpu")


# ----- loss


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_loss_is_that_of_the_papers_equations_with_all_experts_and_with_residents(routing: str) -> None:
    subject, (tokens_BT,) = judged(routing=routing), some_tokens((2, 7))

    def plain(residents: Sequence[Sequence[int]]) -> float:
        losses = [
            plain_loss(
                plain_logits(subject.state, sequence[:-1], SMALL, residents, routing), sequence[1:]
            ).item()
            for sequence in tokens_BT.tolist()
        ]
        return sum(losses) / len(losses)

    assert evaluate_text(whole(subject), text([tokens_BT]), "fp32")["loss"] == pytest.approx(
        plain(EVERYTHING), rel=1e-5
    )
    figures = evaluate_residents(subject, text([tokens_BT]), "fp32", "cpu")
    assert list(figures) == ["a", "b"]
    for site, residents in PLACEMENT.items():
        assert figures[site]["loss"] == pytest.approx(plain(residents), rel=1e-5)
        assert figures[site]["tokens"] == 12
    assert figures["a"]["loss"] != figures["b"]["loss"]


def test_every_token_weighs_the_same_however_it_is_batched() -> None:
    module, batches = whole(judged()), some_tokens((3, 9), (1, 4))
    losses_P = torch.cat([token_losses(module, tokens_BT) for tokens_BT in batches])
    figures = evaluate_text(module, text(batches), "fp32")
    assert figures["tokens"] == 3 * 8 + 3 == len(losses_P)
    assert figures["loss"] == pytest.approx(losses_P.double().mean().item(), rel=1e-12)


def test_units() -> None:
    """A model that knows nothing is as unsure as between all tokens."""
    subject = judged()
    blank = {
        name: torch.zeros_like(value) if "embed" in name or name == "model.norm.weight" else value
        for name, value in subject.state.items()
    }
    module = whole(Judged(SMALL, "skip", blank, {}))
    figures = evaluate_text(module, text(some_tokens((4, 9)), token_bytes=3), "fp32")
    assert figures["loss"] == pytest.approx(math.log(29), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(29, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(29) / 3, rel=1e-6)


@pytest.mark.parametrize("num_batches", [None, 1])
def test_bits_per_byte_are_of_the_bytes_that_are_predicted(tmp_path: Path, num_batches: int | None) -> None:
    """A model that knows nothing pays log2(264) bits a token, also for end tokens, which are no bytes of text.

    Five documents of 7 bytes and an end token are 40 tokens. The first is given, so 39 are predicted, 34 of them
    bytes. One batch has the windows from tokens 0 and 18, which predict 6 tokens each: the second one an end token.
    """
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{i} bytes"}}\n' for i in range(5)))
    config = DataConfig(
        source="jsonl", path=str(tmp_path / "x.jsonl"), val_fraction=1.0, cache_dir=str(tmp_path / "cache")
    )
    corpus, model = prepare(config), dataclasses.replace(SMALL, vocab_size=264)
    blank = {name: torch.zeros_like(value) for name, value in judged(model).state.items()}
    module = whole(Judged(model, "skip", blank, {}))
    figures = evaluate_text(module, text_of(corpus, corpus.val_documents, 6, 2, num_batches), "fp32")
    tokens, num_bytes = (39, 34) if num_batches is None else (12, 11)
    assert figures["tokens"] == tokens
    for found in (figures, figures["by_domain"]["x"]):
        assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(264) / num_bytes, rel=1e-6)


def test_domains_share_the_tokens_out() -> None:
    """A predicted token belongs to its own document's domain, not to that of the one before it."""
    module, (tokens_BT,) = whole(judged()), some_tokens((2, 6))
    domain_BT = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    figures = evaluate_text(module, text([tokens_BT], [domain_BT], list(range(64))), "fp32")
    losses_BP, of_two_BP = token_losses(module, tokens_BT).view(2, 5), domain_BT[:, 1:] == 1
    one, two = figures["by_domain"]["one"], figures["by_domain"]["two"]
    assert (one["tokens"], two["tokens"]) == (2, 8)
    assert one["loss"] == pytest.approx(losses_BP[~of_two_BP].mean().item(), rel=1e-6)
    assert two["loss"] == pytest.approx(losses_BP[of_two_BP].mean().item(), rel=1e-6)
    for domain, here in ((one, ~of_two_BP), (two, of_two_BP)):
        num_bytes = int(tokens_BT[:, 1:][here].sum())
        bits = domain["loss"] * domain["tokens"] / math.log(2)
        assert domain["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-12)
    assert figures["loss"] == pytest.approx((2 * one["loss"] + 8 * two["loss"]) / 10, rel=1e-12)


def test_a_domain_without_a_token_is_left_out() -> None:
    assert list(evaluate_text(whole(judged()), text(some_tokens((1, 5))), "fp32")["by_domain"]) == ["one"]


def test_logits_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (tokens_BT,) = whole(judged()), some_tokens((2, 9))
    at_once = token_losses(module, tokens_BT)
    monkeypatch.setattr("fomoe_flwr.evaluation._LOGITS_AT_ONCE", 3 * SMALL.vocab_size)
    torch.testing.assert_close(token_losses(module, tokens_BT), at_once)


def test_sites_that_hold_everything_see_what_a_user_does_and_one_without_experts_nothing() -> None:
    subject = judged()
    held = {"full": EVERYTHING, "also full": EVERYTHING, "none": [[], []]}
    subject = Judged(SMALL, "skip", subject.state, held)
    batches = text(some_tokens((2, 9)))
    figures = evaluate_residents(subject, batches, "fp32", "cpu")
    assert figures["none"] is None
    assert figures["full"] == figures["also full"] == evaluate_text(whole(subject), batches, "fp32")


# ----- random routing


def seen(module: Transformer, tokens_BT: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer, what its router saw, chose and how it weighted it."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    handles = [
        moe.gate.register_forward_hook(
            lambda _, inputs, routing: found.append((inputs[0], routing.chosen_TK, routing.weights_TK))
        )
        for moe in module.moe_layers
    ]
    with torch.no_grad():
        module(tokens_BT)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("router", ["linear", "orthogonal", "grap"])
def test_drawn_experts_differ_are_equally_likely_and_weigh_what_the_router_gives_them(router: str) -> None:
    model = ModelConfig(
        vocab_size=29,
        d_model=16,
        num_layers=2,
        num_heads=2,
        num_experts=8,
        d_expert=8,
        top_k=3,
        router=router,
    )
    module, (tokens_BT,) = whole(judged(model)).eval(), some_tokens((40, 51))
    with random_routing(module, seed=3):
        layers = seen(module, tokens_BT)
    for moe, (x_TD, chosen_TK, weights_TK) in zip(module.moe_layers, layers, strict=True):
        assert (chosen_TK.sort().values.diff() > 0).all()
        load_E = chosen_TK.flatten().bincount(minlength=8) / len(chosen_TK)  # 2000 tokens
        assert load_E == pytest.approx(np.full(8, 3 / 8), abs=4 * math.sqrt(3 / 8 * 5 / 8 / 2000))
        assert torch.equal(weights_TK, moe.gate.scores(x_TD).gather(1, chosen_TK))
    assert not torch.equal(layers[0][1], layers[1][1])  # each layer has draws of its own


def test_one_layer_alone_and_nothing_afterwards() -> None:
    module, (tokens_BT,) = whole(judged()).eval(), some_tokens((3, 9))
    learned = seen(module, tokens_BT)
    with random_routing(module, seed=0):
        everywhere = seen(module, tokens_BT)
    with random_routing(module, seed=0, layers=[1]):
        second = seen(module, tokens_BT)
    assert torch.equal(second[0][1], learned[0][1])
    assert torch.equal(second[1][1], everywhere[1][1])  # the same draws, whatever the other layers do
    assert not torch.equal(second[1][1], learned[1][1])
    again = seen(module, tokens_BT)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again, learned, strict=True))


def test_the_hooks_are_gone_after_an_error_too() -> None:
    module, (tokens_BT,) = whole(judged()).eval(), some_tokens((3, 9))
    learned = seen(module, tokens_BT)
    with pytest.raises(KeyError), random_routing(module, seed=0):
        raise KeyError
    assert torch.equal(seen(module, tokens_BT)[0][1], learned[0][1])


# ----- necessity


def test_necessity_is_zero_where_all_experts_are_alike_and_no_router_prefers_any() -> None:
    subject = judged()
    state = dict(subject.state)
    for layer in range(SMALL.num_layers):
        state[gate_name(layer)] = torch.zeros_like(state[gate_name(layer)])
        for expert in range(SMALL.num_experts):
            for part in ("up_proj", "down_proj"):
                state[expert_name(layer, expert, part)] = state[expert_name(layer, 0, part)]
    module = whole(Judged(SMALL, "skip", state, {}))
    needed = necessity(module, text(some_tokens((4, 9))), "fp32")
    # To the last digits of fp32: a matrix product may round a row otherwise when other rows stand beside it.
    assert needed["necessity"] == pytest.approx(0, abs=1e-6)
    assert needed["necessity_by_layer"] == pytest.approx([0, 0], abs=1e-6)


def test_necessity_is_zero_where_every_expert_is_always_chosen() -> None:
    model = ModelConfig(**{**vars(SMALL), "top_k": SMALL.num_experts})
    needed = necessity(whole(judged(model)), text(some_tokens((4, 9))), "fp32")
    assert needed["necessity"] == pytest.approx(0, abs=1e-6)


def test_necessity_is_about_zero_before_training() -> None:
    model = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_experts=8, d_expert=16)
    needed = necessity(whole(judged(model)), text(some_tokens((32, 33), vocab_size=64)), "fp32")
    assert all(
        abs(value) < 0.02 * needed["learned_loss"]
        for value in (needed["necessity"], *needed["necessity_by_layer"])
    )


PLANTED = ModelConfig(
    vocab_size=4, d_model=8, num_layers=1, num_heads=1, num_experts=4, d_expert=8, top_k=1,
    base_d_model=8, base_num_layers=1, base_d_expert=8,
)  # fmt: skip


def planted_state(rows_CD: Tensor) -> dict[str, Tensor]:
    """Token t is followed by token t + 1 (mod 4), and expert t says so of whatever it is given.

    Token t is a Walsh function w_t: mean 0, variance 1, orthogonal to the others, so a layer norm leaves it alone.
    """
    sign = torch.tensor([[1.0, 1], [1, -1]])
    walsh_VD = torch.kron(sign, torch.kron(sign, sign))[1:5]
    state = initial_state(PLANTED, [[0, 1, 2, 3]], "skip", 0)
    state["model.embed_tokens.weight"] = walsh_VD
    state["model.layers.0.self_attn.o_proj.weight"].zero_()
    state["model.layers.0.post_feedforward_layernorm.weight"].fill_(3.0)
    state[gate_name(0)] = rows_CD
    for expert in range(4):
        up_HD, down_DH = torch.zeros(8, 8), torch.zeros(8, 8)
        up_HD[0] = walsh_VD.sum(0)  # as large for every token
        down_DH[:, 0] = walsh_VD[(expert + 1) % 4]
        state[expert_name(0, expert, "up_proj")], state[expert_name(0, expert, "down_proj")] = up_HD, down_DH
    return state


def planted_losses() -> Tensor:
    """By hand, the loss of token t + 1 after token t if expert e answers: losses_TE."""
    losses_TE = torch.empty(4, 4)
    for token in range(4):
        for expert in range(4):
            # w_t of the token and 3 w_(e+1) of the expert; the last norm divides by their root mean square.
            logits_V = torch.zeros(4)
            logits_V[token] += 8.0
            logits_V[(expert + 1) % 4] += 8.0 * 3
            rms = math.sqrt(16 if (expert + 1) % 4 == token else 10)
            target = torch.tensor((token + 1) % 4)
            losses_TE[token, expert] = F.cross_entropy(logits_V / rms, target)
    return losses_TE


def planted_text() -> Text:
    return text([(torch.arange(33)[None] + torch.arange(64)[:, None]) % 4])


@pytest.mark.parametrize("shift", [0, 1])
def test_necessity_of_a_planted_router_is_what_it_is_by_hand(shift: int) -> None:
    """Token t goes to the expert that knows it, or to its neighbour, which is worse than chance."""
    walsh_VD = planted_state(torch.zeros(4, 8))["model.embed_tokens.weight"]
    module = whole(Judged(PLANTED, "skip", planted_state(walsh_VD.roll(shift, 0) / 4), {}))
    needed = necessity(module, planted_text(), "fp32")
    losses_TE, tokens = planted_losses(), torch.arange(4)
    learned = losses_TE[tokens, (tokens + shift) % 4].mean().item()
    by_hand = losses_TE.mean().item() - learned
    assert by_hand > 5 if shift == 0 else by_hand < -1
    assert needed["learned_loss"] == pytest.approx(learned, rel=1e-4, abs=1e-6)
    noise = losses_TE.std().item() / math.sqrt(3 * needed["tokens"])  # 3 draws of 2048 tokens
    assert needed["necessity"] == pytest.approx(by_hand, abs=4 * noise)
    assert needed["necessity_by_layer"] == pytest.approx(
        [needed["necessity"]]
    )  # one layer: random in it alone is random in all
    assert needed["necessity"] == pytest.approx(sum(needed["necessity_by_draw"]) / 3)
    assert len(set(needed["necessity_by_draw"])) == 3


def test_necessity_of_a_router_made_random_is_zero() -> None:
    """The planted model, whose learned router is worth more than 5 nats, and other draws in its place."""
    walsh_VD = planted_state(torch.zeros(4, 8))["model.embed_tokens.weight"]
    module = whole(Judged(PLANTED, "skip", planted_state(walsh_VD / 4), {}))
    with random_routing(module, seed=100):
        needed = necessity(module, planted_text(), "fp32")
    noise = planted_losses().std().item() * math.sqrt((1 + 1 / 3) / needed["tokens"])
    assert needed["necessity"] == pytest.approx(0, abs=4 * noise)


def test_the_same_figures_every_time_whatever_the_global_generator() -> None:
    subject, batches = judged(), text(some_tokens((4, 17)))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        results.append(evaluate_model(subject, batches, "fp32", "cpu"))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    sampled = evaluate_model(subject, batches, "fp32", "cpu", sample=text(some_tokens((2, 9))))
    assert sampled["all_experts"] == results[0]["all_experts"]
    assert sampled["routing"]["tokens"] == 16


def test_share_of_a_reference() -> None:
    ours = {"necessity": 0.2}
    for there, share in ((0.8, pytest.approx(0.25)), (0.0, None), (-0.1, None), (math.inf, 0.0)):
        figures = compared(ours, {"necessity": there, "necessity_by_layer": [there]})
        assert figures["necessity_share"] == share
        assert figures["reference_necessity"] == (None if there == math.inf else there)


def test_programs_find_null_instead_of_infinity() -> None:
    content = evaluate_model(judged(), text(some_tokens((2, 9)), token_bytes=0), "fp32", "cpu", draws=2)
    assert len(content["routing"]["necessity_by_layer"]) == SMALL.num_layers
    assert len(content["routing"]["necessity_by_draw"]) == 2
    assert content["all_experts"]["bits_per_byte"] is None
    assert set(content["residents"]) == {"a", "b"}
    assert content["all_experts"]["by_domain"]["one"]["tokens"] == 16


# -- the loss after a round ----------------------------------------------------------------------------------


def whole_model() -> Transformer:
    everything = full_residents(SMALL.num_layers, SMALL.num_experts)
    return build(SMALL, everything, "skip", initial_state(SMALL, everything, "skip", 0), "cpu")


def random_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(SMALL.vocab_size, (2, 9), generator=generator) for _ in range(count)]


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess() -> None:
    module = whole_model()
    with torch.no_grad():
        module.model.norm.weight.zero_()  # all logits are 0
    loss, tokens = evaluate(module, random_batches(3), "fp32", "cpu")
    assert loss == pytest.approx(math.log(SMALL.vocab_size), rel=1e-6)
    assert tokens == 3 * 2 * 8
    assert evaluate(module, [], "fp32", "cpu") == (0.0, 0)  # no division by zero


class Known(nn.Module):
    """Its cross-entropy is the first token of the batch."""

    def forward(self, tokens_BT: Tensor) -> Losses:
        return Losses(tokens_BT[0, 0].float(), torch.tensor(100.0))


def test_batches_count_by_their_tokens_and_the_balance_loss_does_not_count() -> None:
    # 2 sequences of 4 predictions with loss 1, and 1 of 2 with loss 6: (8·1 + 2·6) / 10.
    unequal = [torch.full((2, 5), 1), torch.full((1, 3), 6)]
    assert evaluate(Known(), unequal, "fp32", "cpu") == (pytest.approx(2.0), 10)


def test_evaluation_leaves_no_trace() -> None:
    module = whole_model()
    before = {name: value.clone() for name, value in read_shard(module).items()}
    evaluate(module, random_batches(2), "fp32", "cpu")
    assert all(value.equal(before[name]) for name, value in read_shard(module).items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(moe.gate.load_C.any() for moe in module.moe_layers)


def test_a_survey_counts_what_the_routers_choose_in_training() -> None:
    """The same text with half of the experts; and the loss is that of `evaluate`."""
    module, batches = judged().module(PLACEMENT["a"], "cpu"), some_tokens((2, 9), (3, 9))
    loss, tokens, load_LE, _ = survey(module, batches, len(batches), "fp32", "cpu")
    assert (loss, tokens) == evaluate(module, batches, "fp32", "cpu")
    module.train()
    for tokens_BT in batches:
        module(tokens_BT)
    assert load_LE == [moe.gate.load_C.tolist() for moe in module.moe_layers]
    assert sum(load_LE[0]) == tokens * SMALL.top_k
    assert any(load_LE[0][ghost] for ghost in (1, 3, 4))
