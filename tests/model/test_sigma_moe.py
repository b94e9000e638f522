"""The decoder against the paper's equations written out as loops, and the properties one would lose unnoticed.

Letters: B sequences, S positions, T tokens, D d_model, V vocabulary, W width of a head, N heads, F W/2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.base import load_shard, named_views, read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer, rope_tables, rotate
from fomoe_flwr.model.spec import expert_name, gate_name, parameter_shapes
from fomoe_flwr.placement import full_residents
from tests.model.helpers import (
    FULL,
    SHARED,
    SMALL,
    SOME,
    plain_logits,
    plain_loss,
    poisoned_memory,
    randomized,
)

models = pytest.mark.parametrize("model", [SMALL, SHARED], ids=["plain", "shared experts"])
routings = pytest.mark.parametrize("routing", ["skip", "partitioned"])
shards = pytest.mark.parametrize("residents", [FULL, SOME], ids=["everything", "some"])


def site(
    residents: Sequence[Sequence[int]] = FULL, routing: str = "skip", model: ModelConfig = SMALL
) -> Transformer:
    shard = randomized(initial_state(model, residents, routing, seed=0))
    return build(model, residents, routing, shard, "cpu")


def random_tokens(count: int = 9, sequences: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (sequences, count), generator=generator)


def logits(module: Transformer, tokens_BS: Tensor) -> Tensor:
    return module.logits(module.hidden(tokens_BS)[0])


def gradients(module: Transformer) -> dict[str, Tensor]:
    """Every gradient by its wire name."""
    views = named_views(module)
    assert all(view.parameter.grad is not None for view in views)
    return {view.name: view.of(view.parameter.grad) for view in views}


# -- the whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", [False, True], ids=["clean", "poisoned"])
@pytest.mark.parametrize(
    ("model", "residents", "routing"),
    [(SMALL, FULL, "skip"), (SMALL, SOME, "skip"), (SMALL, SOME, "partitioned"), (SHARED, SOME, "skip")],
    ids=["full", "skip", "partitioned", "shared experts"],
)
def test_the_model_is_the_papers_equations(
    model: ModelConfig, residents: list[list[int]], routing: str, poisoned: bool
) -> None:
    """Logits, loss and the gradient of every named tensor equal those of the plain loops, in double precision.

    So Peri-LN, RoPE, causality, tied embeddings and each CompleteP multiplier are where the paper puts them.
    """
    shard = randomized(initial_state(model, residents, routing, seed=0))
    reference = {name: value.double().requires_grad_() for name, value in shard.items()}
    tokens_BT = random_tokens()
    inputs, targets = tokens_BT[0, :-1].tolist(), tokens_BT[0, 1:].tolist()
    expected_SV = plain_logits(reference, inputs, model, residents, routing)
    expected_loss = plain_loss(expected_SV, targets)
    expected_loss.backward()

    with poisoned_memory() if poisoned else contextlib.nullcontext():
        module = build(model, residents, routing, shard, "cpu")
        loss = module(tokens_BT).cross_entropy
        loss.backward()

    torch.testing.assert_close(
        logits(module, tokens_BT[:, :-1])[0].double(), expected_SV, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(module).items():
        wanted = reference[name].grad
        wanted = torch.zeros_like(reference[name]) if wanted is None else wanted  # nobody chose this expert
        torch.testing.assert_close(
            gradient.double(), wanted, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_loss_is_the_mean_over_all_sequences() -> None:
    module, tokens_BT = site(), random_tokens(sequences=3)
    each = torch.stack([module(tokens_T.unsqueeze(0)).cross_entropy for tokens_T in tokens_BT])
    torch.testing.assert_close(module(tokens_BT).cross_entropy, each.mean())


def test_both_routing_modes_are_one_function_when_everything_is_resident() -> None:
    tokens_BT = random_tokens(sequences=2)
    modules = {}
    for routing in ("skip", "partitioned"):
        modules[routing] = build(SMALL, FULL, routing, initial_state(SMALL, FULL, routing, seed=3), "cpu")
    losses = [module(tokens_BT) for module in modules.values()]
    assert losses[0].cross_entropy.equal(losses[1].cross_entropy)
    assert losses[0].balance.equal(losses[1].balance)


# -- attention -----------------------------------------------------------------------------------------------


def test_rope_turns_each_pair_of_features_by_its_positions_angle() -> None:
    # Width 4 and theta 100: the frequencies are 1 and 1/10. Pairs are (0, 2) and (1, 3).
    cos_SF, sin_SF = rope_tables(3, 4, 100.0, torch.device("cpu"))
    x_BNSW = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 1, 3, 4)
    turned_SW = rotate(x_BNSW, cos_SF, sin_SF)[0, 0]
    expected_SW = [[math.cos(p), -math.sin(p / 10), math.sin(p), math.cos(p / 10)] for p in range(3)]
    torch.testing.assert_close(turned_SW, torch.tensor(expected_SW))


def test_rope_products_depend_on_the_distance_alone() -> None:
    """The property RoPE exists for: q at i and k at j meet as those at i+s and j+s do."""
    width, seq_len = 8, 12
    tables = rope_tables(seq_len, width, 10_000.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q_W, k_W = torch.randn(2, width, generator=generator)
    q_SW = rotate(q_W.expand(1, 1, seq_len, width), *tables)[0, 0]
    k_SW = rotate(k_W.expand(1, 1, seq_len, width), *tables)[0, 0]
    products_SS = q_SW @ k_SW.T
    for distance in range(seq_len):
        diagonal = products_SS.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert products_SS[:, 0].std() > 0.1  # and they do depend on it


def test_rope_keeps_lengths() -> None:
    tables = rope_tables(50, 8, 10_000.0, torch.device("cpu"))
    x_BNSW = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x_BNSW, *tables).norm(dim=-1), x_BNSW.norm(dim=-1))


@pytest.mark.parametrize("position", [1, 4, 7])
def test_a_token_changes_no_earlier_logit(position: int) -> None:
    module = site(SOME)
    tokens_BS = random_tokens(8)
    changed_BS = tokens_BS.clone()
    changed_BS[0, position] = (changed_BS[0, position] + 1) % SMALL.vocab_size
    before_SV, after_SV = logits(module, tokens_BS)[0], logits(module, changed_BS)[0]
    # Not bit for bit: other tokens share a matrix product with these.
    torch.testing.assert_close(before_SV[:position], after_SV[:position], rtol=1e-5, atol=1e-5)
    assert (before_SV[position] - after_SV[position]).abs().max() > 1e-3


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    module, tokens_BS = site(SOME), random_tokens(8, sequences=3)
    together = logits(module, tokens_BS)
    alone = torch.cat([logits(module, tokens_S.unsqueeze(0)) for tokens_S in tokens_BS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# -- norms, multipliers, tied embedding ----------------------------------------------------------------------


def test_every_branch_is_normed_before_and_after() -> None:
    """Peri-LN: neither the scale of what a branch reads nor that of what it computes reaches the residual."""
    module, louder, tokens_BS = site(), site(), random_tokens()
    with torch.no_grad():
        for block in louder.model.layers:
            block.self_attn.o_proj.weight.mul_(100)
            block.mlp.experts.down_EDH.mul_(100)
        louder.model.embed_tokens.weight.mul_(100)
    hidden, louder_hidden = module.hidden(tokens_BS)[0], louder.hidden(tokens_BS)[0]
    torch.testing.assert_close(hidden, louder_hidden, rtol=1e-2, atol=1e-2)


def test_norms_have_no_bias() -> None:
    assert not [name for name, _ in site().named_parameters() if name.endswith("bias")]


def test_a_branch_is_multiplied_by_base_depth_over_depth() -> None:
    """CompleteP: with gains of 1 a normed branch has length sqrt(D) and adds m times that."""
    for num_layers, multiplier in ((1, 3.0), (2, 1.5), (6, 0.5)):
        model = dataclasses.replace(SMALL, num_layers=num_layers)
        residents = full_residents(num_layers, SMALL.num_experts)
        module = build(model, residents, "skip", initial_state(model, residents, "skip", 0), "cpu")
        block = module.model.layers[0]
        x_BSD = torch.randn(1, 5, SMALL.d_model, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            block.post_feedforward_layernorm.weight.zero_()  # leaves attention alone
            added = block(x_BSD, *rope_tables(5, 8, 50.0, x_BSD.device))[0] - x_BSD
        length = multiplier * SMALL.d_model**0.5
        torch.testing.assert_close(added.norm(dim=-1), torch.full((1, 5), length), rtol=1e-2, atol=0)


def test_logits_are_multiplied_by_base_width_over_width() -> None:
    hidden_TD = torch.randn(3, SMALL.d_model, generator=torch.Generator().manual_seed(0))
    module = site()
    expected_TV = 1.5 * hidden_TD @ module.model.embed_tokens.weight.T  # 24 / 16
    torch.testing.assert_close(module.logits(hidden_TD), expected_TV)


def test_the_embedding_learns_from_both_of_its_ends() -> None:
    """Tied: a token that is never read still gets a gradient, as one that could have been predicted."""
    module = site()
    module(torch.tensor([[1, 2, 3, 4]])).cross_entropy.backward()
    grad_VD = module.model.embed_tokens.weight.grad
    assert grad_VD is not None
    assert grad_VD[SMALL.vocab_size - 1].any()
    assert [name for name in dict(module.named_parameters()) if "embed_tokens" in name or "head" in name] == [
        "model.embed_tokens.weight"
    ]


def test_the_balance_loss_is_the_mean_over_layers_scaled_with_depth() -> None:
    module, tokens_BT = site(), random_tokens()
    seen: list[Tensor] = []
    for moe in [block.mlp for block in module.blocks]:
        moe.gate.register_forward_hook(
            lambda gate, _inputs, routing: seen.append(gate.losses(routing.load_C, routing.share_C)[0])
        )
    losses = module(tokens_BT)
    # load_balance 0.1 x base_num_layers 3 x the mean over layers.
    torch.testing.assert_close(losses.balance, 0.1 * 3 * (seen[0] + seen[1]) / 2)


# -- precision and compilation -------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_bf16_autocast_agrees_within_its_precision(routing: str) -> None:
    module, tokens_BT = site(SOME, routing), random_tokens(sequences=2)
    expected = module(tokens_BT).cross_entropy.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(tokens_BT).cross_entropy
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.03)
    assert all(gradient.isfinite().all() for gradient in gradients(module).values())
    assert all(view.parameter.grad.dtype == torch.float32 for view in named_views(module))


# aot_eager traces forward and backward as inductor does and runs the traces as they are: seconds, no C++ compiler.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_agrees_with_the_eager_one(backend: str) -> None:
    """With ghosts, whose number differs from batch to batch, and with a second batch of another length."""
    torch.compiler.reset()
    one_layer = dataclasses.replace(SMALL, num_layers=1)  # as good as two, in half the time
    eager, module = site(SOME, model=one_layer), site(SOME, model=one_layer)
    compiled = torch.compile(module, backend=backend)
    for count in (9, 12):
        tokens_BT = random_tokens(count, seed=count)
        expected, losses = eager(tokens_BT), compiled(tokens_BT)
        torch.testing.assert_close(losses.cross_entropy, expected.cross_entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses.balance, expected.balance, rtol=1e-4, atol=1e-5)
        (expected.cross_entropy + expected.balance).backward()
        (losses.cross_entropy + losses.balance).backward()
    for (name, gradient), wanted in zip(gradients(module).items(), gradients(eager).values(), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert [moe.gate.load_C.tolist() for moe in module.moe_layers] == [
        moe.gate.load_C.tolist() for moe in eager.moe_layers
    ]


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_in_bf16_the_whole_model_is_one_graph(routing: str) -> None:
    """Ghosts too: nothing in a step asks how many there are, so on a GPU nobody waits for the host."""
    torch.compiler.reset()
    eager, module = (site(SOME, routing, model=dataclasses.replace(SMALL, num_layers=1)) for _ in range(2))
    compiled, tokens_BT = torch.compile(module, backend="aot_eager", fullgraph=True), random_tokens(9, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16), poisoned_memory():
        expected, losses = eager(tokens_BT), compiled(tokens_BT)
        (losses.cross_entropy + losses.balance).backward()
    (expected.cross_entropy + expected.balance).backward()
    torch.testing.assert_close(losses.cross_entropy, expected.cross_entropy, rtol=1e-3, atol=1e-3)
    for (name, gradient), wanted in zip(gradients(module).items(), gradients(eager).values(), strict=True):
        # bf16 has 8 bits, and the two round at different places.
        assert (gradient - wanted).norm() <= 0.02 * wanted.norm(), name


# -- loading -------------------------------------------------------------------------------------------------


@models
@routings
@shards
def test_a_shard_comes_back_as_it_was_loaded(
    model: ModelConfig, routing: str, residents: list[list[int]]
) -> None:
    """On poisoned memory: nothing of what to_empty() left is still there."""
    shard = initial_state(model, residents, routing, seed=1)
    with poisoned_memory():
        module = build(model, residents, routing, shard, "cpu")
    back = read_shard(module)
    assert back.keys() == shard.keys()
    assert all(back[name].equal(shard[name]) for name in shard)
    assert not any(buffer.isnan().any() for buffer in module.buffers())
    assert not any(moe.gate.load_C.any() for moe in module.moe_layers)


def test_reading_copies_nothing() -> None:
    module = build(SMALL, SOME, "skip", initial_state(SMALL, SOME, "skip", 0), "cpu")
    read_shard(module)[expert_name(0, 5, "up_proj")].fill_(7.0)
    slot = SOME[0].index(5)
    assert (module.blocks[0].mlp.experts.up_EHD[slot] == 7.0).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight \(1 such names\)"),
        (
            {expert_name(0, 2, "up_proj"): None, expert_name(0, 2, "down_proj"): None},
            r"lacks .*\(2 such names\)",
        ),
        (
            {expert_name(0, 1, "up_proj"): torch.zeros(8, 16)},
            r"unexpected model\.layers\.0\.mlp\.experts\.1\.",
        ),
        ({"model.norm.weight": torch.zeros(15)}, r"model\.norm\.weight: shape \(15,\), expected \(16,\)"),
        ({expert_name(0, 2, "up_proj"): torch.zeros(1, 16)}, r"experts\.2\.up_proj\.weight: shape \(1, 16\)"),
    ],
    ids=[
        "a name missing",
        "an expert missing",
        "a ghost's tensor",
        "a wrong shape",
        "a shape that would broadcast",
    ],
)
def test_a_shard_that_does_not_fit_is_refused(change: dict[str, torch.Tensor | None], said: str) -> None:
    shard = initial_state(SMALL, SOME, "skip", 0)
    module = build(SMALL, SOME, "skip", shard, "cpu")
    wrong = {name: value for name, value in (shard | change).items() if value is not None}
    with pytest.raises(WireError, match=said) as error:
        load_shard(module, wrong)
    assert "\n" not in str(error.value)


# -- the state at step 0 -------------------------------------------------------------------------------------


@models
@routings
def test_any_shard_starts_as_its_slice_of_the_full_state(model: ModelConfig, routing: str) -> None:
    """So nobody needs to hold the whole model to draw a part of it."""
    full, part = initial_state(model, FULL, routing, 5), initial_state(model, SOME, routing, 5)
    assert part.keys() == parameter_shapes(model, SOME, routing).keys()
    assert all(part[name].equal(full[name]) for name in part)


def test_both_routing_modes_start_alike() -> None:
    skip, partitioned = (initial_state(SMALL, FULL, routing, 5) for routing in ("skip", "partitioned"))
    assert all(skip[name].equal(partitioned[name]) for name in skip.keys() & partitioned.keys())
    for layer in range(SMALL.num_layers):
        for expert in range(SMALL.num_experts):
            row_D = partitioned[expert_name(layer, expert, "gate")]
            assert skip[gate_name(layer)][expert].equal(row_D)


def test_the_state_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again = initial_state(SMALL, SOME, "skip", 5), initial_state(SMALL, SOME, "skip", 5)
    other = initial_state(SMALL, SOME, "skip", 6)
    assert all(first[name].equal(again[name]) for name in first)
    assert not any(first[name].equal(other[name]) for name in first if not name.endswith("norm.weight"))


def test_no_two_tensors_start_alike() -> None:
    state = initial_state(SMALL, FULL, "partitioned", 5)
    drawn = [value.flatten()[:16] for name, value in state.items() if not name.endswith("norm.weight")]
    assert torch.stack(drawn).unique(dim=0).shape[0] == len(drawn)


def test_hidden_weights_start_with_variance_one_over_fan_in() -> None:
    model = dataclasses.replace(SMALL, d_model=256, d_expert=64, num_experts=8, vocab_size=400, init_std=0.02)
    state = initial_state(model, [[0], [0]], "skip", 0)
    deviations = {
        "model.layers.0.self_attn.o_proj.weight": 256**-0.5,
        expert_name(0, 0, "up_proj"): 256**-0.5,
        expert_name(0, 0, "down_proj"): (64 * 3 / 4) ** -0.5,  # 3 of them chosen, 4 in the base
        gate_name(0): 256**-0.5,
        "model.embed_tokens.weight": 0.02,
    }
    for name, deviation in deviations.items():
        assert state[name].std().item() == pytest.approx(deviation, rel=0.05), name
    assert (state["model.layers.0.input_layernorm.weight"] == 1).all()
