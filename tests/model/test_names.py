"""One name for every tensor: the shard's names are the module's views, the counts are the module's sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.sigma_moe import Transformer, build, initial_state, load_shard, named_views, read_shard
from fomoe_flwr.model.spec import (
    depth_multiplier,
    expert_name,
    expert_of,
    expert_parameters,
    gate_name,
    is_moment,
    logit_multiplier,
    lr_multiplier,
    moment_name,
    parameter_counts,
    parameter_shapes,
)
from fomoe_flwr.placement import full_residents
from tests.model.helpers import SMALL, poisoned_memory

FULL = full_residents(SMALL.num_layers, SMALL.num_experts)
SOME = [[0, 2, 5], [1, 3]]
SHARED = dataclasses.replace(SMALL, num_shared_experts=2)

models = pytest.mark.parametrize("model", [SMALL, SHARED], ids=["plain", "shared experts"])
routings = pytest.mark.parametrize("routing", ["skip", "partitioned"])
shards = pytest.mark.parametrize("residents", [FULL, SOME], ids=["everything", "some"])


def on_meta(model: ModelConfig, residents: list[list[int]], routing: str) -> Transformer:
    """The module without memory."""
    with torch.device("meta"):
        return Transformer(model, residents, routing)


# -- names ---------------------------------------------------------------------------------------------------


@models
@routings
@shards
def test_the_shards_names_and_shapes_are_the_modules_views(
    model: ModelConfig, routing: str, residents: list[list[int]]
) -> None:
    views = named_views(on_meta(model, residents, routing))
    seen = {view.name: tuple(view.of(view.parameter).shape) for view in views}
    assert len(seen) == len(views)  # no name twice
    assert seen == parameter_shapes(model, residents, routing)


@routings
def test_names_are_in_hugging_faces_form(routing: str) -> None:
    names = set(parameter_shapes(SMALL, SOME, routing))
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.5.up_proj.weight",
    } <= names
    assert ("model.layers.0.mlp.gate.weight" in names) == (routing == "skip")
    assert ("model.layers.0.mlp.experts.5.gate.weight" in names) == (routing == "partitioned")
    assert "model.layers.0.mlp.experts.1.up_proj.weight" not in names  # a ghost


def test_a_name_tells_its_layer_and_expert() -> None:
    assert expert_of(expert_name(3, 17, "up_proj")) == (3, 17)
    assert expert_of(moment_name("exp_avg", expert_name(3, 17, "gate"))) == (3, 17)
    assert expert_of(gate_name(3)) is None
    assert expert_of("model.layers.3.mlp.shared_experts.up_proj.weight") is None
    assert expert_of("model.embed_tokens.weight") is None


def test_a_moments_name_is_told_from_its_parameters() -> None:
    for moment in ("exp_avg", "exp_avg_sq"):
        assert is_moment(moment_name(moment, "model.norm.weight"))
    assert not is_moment("model.norm.weight")


# -- sizes ---------------------------------------------------------------------------------------------------


@models
@routings
def test_counts_are_those_of_the_built_model(model: ModelConfig, routing: str) -> None:
    module = on_meta(model, FULL, routing)
    counts = parameter_counts(model)
    numbers = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert sum(numbers.values()) == counts.total
    assert sum(n for name, n in numbers.items() if ".mlp.experts." in name) == counts.experts
    assert sum(n for name, n in numbers.items() if ".mlp.gate." in name) == counts.router


@pytest.mark.parametrize("size", ["tiny", "proxy", "medium"])
def test_counts_are_those_of_the_named_sizes(size: str) -> None:
    model = compose([f"model={size}"]).config.model
    module = on_meta(model, full_residents(model.num_layers, model.num_experts), "skip")
    assert sum(parameter.numel() for parameter in module.parameters()) == parameter_counts(model).total


@pytest.mark.parametrize(
    ("size", "unit", "parameters", "expert_percent"),
    [
        ("proxy", 1e6, "54", "3.9"),
        ("medium", 1e6, "153", "22"),
        ("large", 1e9, "1.8", "59"),
        ("xl", 1e9, "13.3", "65"),
        ("xxl", 1e9, "104", "66"),
    ],
)
def test_sizes_are_the_papers_table_to_every_digit_it_prints(
    size: str, unit: float, parameters: str, expert_percent: str
) -> None:
    """A share counts the experts with their router rows: both are θ_sparse in the paper's (partitioned) default."""
    counts = parameter_counts(compose([f"model={size}"]).config.model)

    def like(printed: str, value: float) -> str:
        return f"{value:.{len(printed.partition('.')[2])}f}"

    assert like(parameters, counts.total / unit) == parameters
    sparse = counts.experts + counts.router
    assert like(expert_percent, 100 * sparse / counts.total) == expert_percent


@routings
def test_a_site_allocates_its_residents_and_no_more(routing: str) -> None:
    module = on_meta(SMALL, SOME, routing)
    counts, residents = parameter_counts(SMALL), sum(map(len, SOME))
    router_rows = SMALL.num_layers * SMALL.num_experts if routing == "skip" else residents
    assert sum(parameter.numel() for parameter in module.parameters()) == (
        counts.dense + residents * expert_parameters(SMALL) + router_rows * SMALL.d_model
    )
    # Buffers: a counter and a slot for each candidate, nothing of an expert's size.
    assert sum(buffer.numel() for buffer in module.buffers()) == 2 * router_rows


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
    assert (module.moe_layers[0].experts.up_EHD[slot] == 7.0).all()


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
        expert_name(0, 0, "down_proj"): 64**-0.5,
        gate_name(0): 256**-0.5,
        "model.embed_tokens.weight": 0.02,
    }
    for name, deviation in deviations.items():
        assert state[name].std().item() == pytest.approx(deviation, rel=0.05), name
    assert (state["model.layers.0.input_layernorm.weight"] == 1).all()


# -- CompleteP -----------------------------------------------------------------------------------------------


def test_multipliers_of_completep() -> None:
    """Table 1 of arXiv 2505.01618 with alpha = 1, worked out for SMALL (base 24 wide, 3 deep, experts 32 wide)."""
    assert depth_multiplier(SMALL) == 3 / 2
    assert logit_multiplier(SMALL) == 24 / 16
    width, expert_width = 24 / 16, 32 / 8
    expected = {"embed_tokens": 1.0, "norm": 1.0, "down_proj": expert_width, "gate": width, "up_proj": width}
    expected |= {f"{p}_proj": width for p in "qkvo"}
    for name in parameter_shapes(SHARED, FULL, "partitioned"):
        kind = name.removesuffix(".weight").rpartition(".")[2]
        wanted = expected["norm"] if kind.endswith("norm") else expected[kind]
        assert lr_multiplier(SHARED, name) == wanted, name
    assert lr_multiplier(SMALL, gate_name(0)) == width


def test_the_base_model_has_multipliers_of_one() -> None:
    model = compose(["model=proxy"]).config.model  # the paper's tuned proxy is our base
    names = parameter_shapes(model, full_residents(4, 8), "skip")
    assert depth_multiplier(model) == logit_multiplier(model) == 1
    assert {lr_multiplier(model, name) for name in names} == {1.0}
