"""The table of tensors: names, shapes, counts, learning rates and FLOPs follow from it, and nothing has a default."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig, StrategyConfig, TrainConfig
from fomoe_flwr.model import spec
from fomoe_flwr.model.base import named_views
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import (
    depth_multiplier,
    expert_name,
    expert_of,
    expert_parameters,
    gate_name,
    is_moment,
    logit_multiplier,
    moment_name,
    parameter_counts,
    parameter_shapes,
    parameters,
    slots,
    table,
    token_flops,
)
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server.outer import OuterOptimizer
from tests.model.helpers import FULL, SHARED, SMALL, SOME

models = pytest.mark.parametrize("model", [SMALL, SHARED], ids=["plain", "shared experts"])
routings = pytest.mark.parametrize("routing", ["skip", "partitioned"])
shards = pytest.mark.parametrize("residents", [FULL, SOME], ids=["everything", "some"])


def on_meta(model: ModelConfig, residents: list[list[int]], routing: str) -> Transformer:
    """The module without memory."""
    with torch.device("meta"):
        return Transformer(model, residents, routing)


# -- the table -----------------------------------------------------------------------------------------------


@models
@routings
@shards
def test_every_parameter_of_a_built_model_is_in_the_table(
    model: ModelConfig, routing: str, residents: list[list[int]]
) -> None:
    """As a row of its own, or slot by slot; names and shapes are those of the module's views, no name twice."""
    module = on_meta(model, residents, routing)
    listed = list(slots(model, residents, routing))
    assert {path for _, _, path in listed} == {path for path, _ in module.named_parameters()}
    assert len({name for name, _, _ in listed}) == len(listed)
    views = named_views(module)
    assert len(views) == len(listed)
    assert {view.name: tuple(view.of(view.parameter).shape) for view in views} == {
        name: param.shape for name, param, _ in listed
    }
    assert sum(param.numel for _, param, _ in listed) == sum(p.numel() for p in module.parameters())


def test_what_is_not_in_the_table_is_an_error_and_not_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = "model.layers.0.mlp.experts.0.gate_proj.weight"
    for known in (parameter_shapes, parameters):
        with pytest.raises(KeyError):
            known(SMALL, FULL, "skip")[stranger]
    state = initial_state(SMALL, FULL, "skip", 0) | {stranger: torch.zeros(8, 16)}
    with pytest.raises(KeyError, match="gate_proj"):
        OuterOptimizer(state, StrategyConfig(inner="gradient", outer="adamw"), SMALL, TrainConfig())

    grown = on_meta(SMALL, SOME, "skip")
    grown.model.register_parameter("stranger", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(KeyError, match=r"model\.stranger"):
        named_views(grown)

    rows = table(SMALL, "skip")
    monkeypatch.setattr(spec, "table", lambda *_: [row for row in rows if "o_proj" not in row.name])
    with pytest.raises(KeyError, match=r"o_proj"):
        build(SMALL, FULL, "skip", initial_state(SMALL, FULL, "skip", 0), "cpu")


def test_a_new_row_is_counted_trained_and_drawn_without_further_ado(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of the table is all that names, shapes, counts, FLOPs, learning rate and first state come from."""
    before, flops = parameter_counts(SMALL), token_flops(SMALL, 8)
    new = spec.Param(
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        (8, 16),
        "expert",
        init_std=0.25,
        lr=1.5,
        decay=0.5,
        flops=768,
        path="model.layers.{layer}.mlp.experts.gate_EHD",
        stacked=True,
    )
    rows = table(SMALL, "skip")
    monkeypatch.setattr(spec, "table", lambda *_: [*rows, new])
    name = expert_name(1, 3, "gate_proj")
    assert parameter_shapes(SMALL, SOME, "skip")[name] == (8, 16)
    assert expert_name(1, 0, "gate_proj") not in parameter_shapes(SMALL, SOME, "skip")  # a ghost
    assert parameters(SMALL, SOME, "skip")[name].lr == 1.5
    assert initial_state(SMALL, FULL, "skip", 0)[name].std().item() == pytest.approx(0.25, rel=0.2)
    assert parameter_counts(SMALL) == before._replace(experts=before.experts + 2 * 6 * 8 * 16)
    assert expert_parameters(SMALL) == 3 * 8 * 16
    assert token_flops(SMALL, 8) == flops._replace(experts=flops.experts + 2 * 3 * 768)  # layers x top_k


# -- names ---------------------------------------------------------------------------------------------------


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


# -- FLOPs ---------------------------------------------------------------------------------------------------


def test_the_flops_of_a_token_by_hand() -> None:
    """A matrix costs 6 a parameter. Widths 16 and 8, 29 words, 2 layers, 3 of 6 experts, 2 shared ones."""
    flops = token_flops(SHARED, seq_len=32)
    unembedding, attention_matrices, shared = 29 * 16, 4 * 16 * 16, 2 * (2 * 8) * 16
    scores_and_values = 6 * 32 * 16  # 2 products x 2 FLOPs x 3 passes, half of them masked away
    assert (
        flops.dense == 6 * (unembedding + 2 * (attention_matrices + shared)) + 2 * scores_and_values == 27360
    )
    assert flops.experts == 6 * 2 * 3 * (2 * 8 * 16) == 9216
    assert flops.router == 6 * 2 * 6 * 16 == 1152
    assert token_flops(dataclasses.replace(SMALL, router="grap"), 32).router == 0


# -- CompleteP -----------------------------------------------------------------------------------------------


def test_multipliers_of_completep() -> None:
    """Table 1 of arXiv 2505.01618 with alpha = 1, worked out for SMALL (base 24 wide, 3 deep, 4 of experts 32 wide).

    lr·weight decay is the same for all that decays: λ·m_N in that table, and λ of the embedding. Norms do not decay.
    """
    assert depth_multiplier(SMALL) == 3 / 2
    assert logit_multiplier(SMALL) == 24 / 16
    width, chosen, shared = 24 / 16, (4 * 32) / (3 * 8), 32 / (2 * 8)
    expected = {"embed_tokens": 1.0, "norm": 1.0, "down_proj": chosen, "gate": width, "up_proj": width}
    expected |= {f"{p}_proj": width for p in "qkvo"}
    for name, param in parameters(SHARED, FULL, "partitioned").items():
        kind = "norm" if name.endswith("norm.weight") else name.removesuffix(".weight").rpartition(".")[2]
        wanted = shared if "shared_experts.down_proj" in name else expected[kind]
        assert param.lr == pytest.approx(wanted), name
        assert param.decay == pytest.approx(0.0 if kind == "norm" else 1 / wanted), name
    router = parameters(SMALL, FULL, "skip")[gate_name(0)]
    assert (router.lr, router.decay) == (width, 1 / width)


@routings
def test_the_sum_over_the_chosen_experts_starts_alike_whatever_their_number(routing: str) -> None:
    """Variance 1/(k·d_expert), relative to the base's k; what one expert's own weights start with is as ever."""
    down, up = (expert_name(0, 1, part) for part in ("down_proj", "up_proj"))
    for top_k in (1, 4, 6):
        rows = parameters(dataclasses.replace(SMALL, top_k=top_k), FULL, routing)
        assert rows[down].init_std == pytest.approx((8 * top_k / 4) ** -0.5)
        assert rows[up].init_std == 16**-0.5


def test_the_base_model_has_multipliers_of_one() -> None:
    model = compose(["model=proxy"]).config.model  # the paper's tuned proxy is our base
    assert depth_multiplier(model) == logit_multiplier(model) == 1
    rows = parameters(model, full_residents(4, 8), "skip").values()
    assert {param.lr for param in rows} == {1.0}
    assert {param.decay for param in rows} == {0.0, 1.0}
