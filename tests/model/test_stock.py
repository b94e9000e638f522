"""A stock class with residents is the library's own class, from which the ghosts' outputs have been taken away.

The reference is always a model that transformers itself has loaded from a checkpoint on disk.

Letters: B sequences, S positions, T tokens, V vocabulary, K experts a token, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.export import stock_json
from fomoe_flwr.hf_files import on_disk
from fomoe_flwr.model.base import named_views
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.families import FAMILIES, family_of
from fomoe_flwr.model.spec import expert_layers, is_standin, parameters, standin_name
from fomoe_flwr.model.stock import is_key
from fomoe_flwr.placement import full_residents
from fomoe_flwr.wire import write_tensors
from tests.model.helpers import poisoned_memory
from tests.model.stock_models import CONFIGS, stock

transformers = pytest.importorskip("transformers")

families = pytest.mark.parametrize("family", CONFIGS)
TOKENS_BT = torch.randint(0, 300, (2, 19), generator=torch.Generator().manual_seed(0))
State = dict[str, Tensor]
# In fp32, and grouped_mm has no fp64, the order of sums alone makes a relative difference of 2e-6.
PRECISION = {"loop": (torch.float64, 1e-12), "grouped": (torch.float32, 5e-6)}
implementations = pytest.mark.parametrize("impl", PRECISION)


@contextmanager
def no_fp32(model: ModelConfig) -> Iterator[None]:
    """With the expert loop: stock classes that ask for fp32, in norms, softmax and router, get fp64 there too."""
    with pytest.MonkeyPatch.context() as patch:
        if model.experts_impl == "loop":
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(Tensor, "float", Tensor.double)
        yield


def everything(model: ModelConfig) -> list[list[int]]:
    return full_residents(model.num_layers, model.num_experts)


def half(model: ModelConfig) -> list[list[int]]:
    """Other experts in each layer."""
    return [[0, 2, 5, 7], [1, 2, 3, 6]][: model.num_layers]


def random_state(model: ModelConfig) -> State:
    """With gains, biases and sinks that are not 1 or 0, so that one nobody applies shows."""
    state = initial_state(model, everything(model), "skip", 0)
    generator = torch.Generator().manual_seed(1)
    for value in state.values():
        if value.ndim == 1:
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return state


def reference(model: ModelConfig, state: State, folder: Path) -> Any:
    """transformers' own model of this state, read from files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stock_json(model, torch.float32)))
    write_tensors(folder / "model.safetensors", {name: make(state) for name, make in on_disk(model).items()})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert type(loaded).__module__.startswith("transformers.")
    return loaded


def reference_gradients(model: ModelConfig, loaded: Any) -> State:
    """By our names: what transformers has in stacks comes apart as it does when it saves them."""
    family = family_of(model.hf)
    found = {
        name.replace(f".mlp.{family.router}.", ".mlp.gate."): parameter.grad
        for name, parameter in loaded.named_parameters()
        if ".mlp.experts." not in name
    }
    for layer in expert_layers(model):
        experts = loaded.model.layers[layer].mlp.experts
        for expert in range(model.num_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            if family.biases:
                # Columns of gate and up alternate, and matrices are the other way round.
                both, down = experts.gate_up_proj.grad[expert], experts.down_proj.grad[expert]
                found |= {
                    f"{prefix}gate_proj.weight": both[:, ::2].T,
                    f"{prefix}up_proj.weight": both[:, 1::2].T,
                    f"{prefix}down_proj.weight": down.T,
                    f"{prefix}gate_proj.bias": experts.gate_up_proj_bias.grad[expert, ::2],
                    f"{prefix}up_proj.bias": experts.gate_up_proj_bias.grad[expert, 1::2],
                    f"{prefix}down_proj.bias": experts.down_proj_bias.grad[expert],
                }
            else:
                gate, up = experts.gate_up_proj.grad[expert].chunk(2)
                down = experts.down_proj.grad[expert]
                found |= {
                    f"{prefix}{part}_proj.weight": value
                    for part, value in (("gate", gate), ("up", up), ("down", down))
                }
    return found


def without_ghosts(
    model: ModelConfig, loaded: Any, residents: list[list[int]], change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Have the blocks weigh what ghosts give by zero, and the rest by what `change` makes of weights and mask."""
    for layer, held in zip(expert_layers(model), residents, strict=True):
        experts = loaded.model.layers[layer].mlp.experts
        resident_E = torch.tensor([expert in held for expert in range(model.num_experts)])

        def masked(
            module: nn.Module, arguments: tuple[Tensor, ...], resident_E: Tensor = resident_E
        ) -> tuple[Tensor, ...]:
            x_TD, chosen_TK, weights_TK = arguments
            return x_TD, chosen_TK, change(weights_TK, resident_E[chosen_TK])

        experts.register_forward_pre_hook(masked)


def keep(weights_TK: Tensor, resident_TK: Tensor) -> Tensor:
    return weights_TK * resident_TK


def share_out(weights_TK: Tensor, resident_TK: Tensor) -> Tensor:
    """Token by token: what residents have, scaled to what all would have."""
    rows = []
    for weights_K, resident_K in zip(weights_TK, resident_TK, strict=True):
        kept_K = weights_K * resident_K
        rows.append(kept_K / kept_K.sum() * weights_K.sum() if resident_K.any() else kept_K * 0)
    return torch.stack(rows)


def loss_and_gradients(model: ModelConfig, loaded: Any) -> tuple[float, State]:
    """Of transformers' own model, in the precision that is compared."""
    loaded.to(PRECISION[model.experts_impl][0])
    with no_fp32(model):
        loss = loss_of(loaded)
        loss.backward()
    return float(loss.detach()), reference_gradients(model, loaded)


def loss_of(loaded: Any) -> Tensor:
    logits_BSV = loaded(input_ids=TOKENS_BT[:, :-1]).logits
    return F.cross_entropy(logits_BSV.flatten(0, 1), TOKENS_BT[:, 1:].flatten())


def compare(model: ModelConfig, ours: State, theirs: State) -> None:
    for name, value in ours.items():
        size = theirs[name].norm().clamp(min=1e-4)
        assert float((value - theirs[name]).norm() / size) < PRECISION[model.experts_impl][1], name


@torch.no_grad()
def compare_logits(model: ModelConfig, state: State, loaded: Any) -> None:
    theirs = loaded(input_ids=TOKENS_BT).logits
    for routing, held in (("skip", state), ("partitioned", rows_apart(model, state, everything(model)))):
        module = build(model, everything(model), routing, held, "cpu").eval()
        hidden_BSD, _ = module.hidden(TOKENS_BT)
        torch.testing.assert_close(module.logits(hidden_BSD), theirs, rtol=0, atol=1e-5)


def rows_apart(model: ModelConfig, whole: State, residents: list[list[int]]) -> State:
    """What a site with these residents holds in partitioned mode."""
    state = {}
    for name in parameters(model, residents, "partitioned"):
        row = name.split(".gate.")
        if ".experts." in name and len(row) == 2:
            prefix, _, expert = row[0].partition(".experts.")
            state[name] = whole[f"{prefix}.gate.{row[1]}"][int(expert)]
        else:
            state[name] = whole[name]
    return state


def gradients_of(
    model: ModelConfig, state: State, residents: list[list[int]], routing: str
) -> tuple[float, State]:
    names = parameters(model, residents, routing)
    module = build(model, residents, routing, {name: state[name] for name in names}, "cpu")
    module.to(PRECISION[model.experts_impl][0])
    with no_fp32(model):
        losses = module(TOKENS_BT)
        losses.cross_entropy.backward()
    return float(losses.cross_entropy.detach()), {
        view.name: view.of(view.parameter.grad)
        for view in named_views(module)
        if view.parameter.grad is not None
    }


@families
@implementations
def test_with_all_experts_it_is_the_stock_model(family: str, impl: str, tmp_path: Path) -> None:
    model = stock(family)
    model.experts_impl = impl
    state = random_state(model)
    loaded = reference(model, state, tmp_path / "hf")
    compare_logits(model, state, loaded)
    expected, theirs = loss_and_gradients(model, loaded)
    loss, gradients = gradients_of(model, state, everything(model), "skip")
    assert loss == pytest.approx(expected, rel=PRECISION[model.experts_impl][1])
    # All but DeepSeek-V3's bias, which no gradient trains.
    assert {name for name in state if "correction" not in name} == gradients.keys()
    compare(model, gradients, theirs)


@families
@pytest.mark.parametrize(("routing", "change"), [("skip", keep), ("skip_renormalised", share_out)])
@implementations
def test_with_half_of_the_experts_only_the_ghosts_outputs_are_missing(
    family: str, routing: str, change: Any, impl: str, tmp_path: Path
) -> None:
    model = stock(family)
    model.experts_impl = impl
    state, residents = random_state(model), half(model)
    loaded = reference(model, state, tmp_path / "hf")
    without_ghosts(model, loaded, residents, change)
    expected, theirs = loss_and_gradients(model, loaded)
    with poisoned_memory():
        loss, gradients = gradients_of(model, state, residents, routing)
    assert loss == pytest.approx(expected, rel=PRECISION[model.experts_impl][1])
    held = parameters(model, residents, routing)
    assert {name for name in held if "correction" not in name} == gradients.keys()
    compare(model, gradients, theirs)


@families
@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_is_computed_again_changes_no_bit(family: str, what: str) -> None:
    """Nor does a router count twice."""
    model = stock(family)
    state, residents = random_state(model), half(model)
    held = {name: state[name] for name in parameters(model, residents, "skip")}
    found = []
    for recompute in ("none", what):
        module = build(model, residents, "skip", held, "cpu").train()
        module.recompute(recompute)
        losses = module(TOKENS_BT)
        (losses.cross_entropy + losses.balance).backward()
        found.append(([moe.gate.load_C.tolist() for moe in module.moe_layers], module))
    (loads, plain), (own_loads, again) = found
    assert own_loads == loads
    for (name, parameter), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or other.grad is None or parameter.grad.equal(other.grad), name


@families
def test_with_stand_ins_these_are_what_the_ghosts_give(family: str, tmp_path: Path) -> None:
    model = stock(family)
    model.standins, model.experts_impl = 8, "loop"
    state, residents = random_state(model), half(model)
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if is_standin(name):
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    loaded = reference(model, state, tmp_path / "hf")
    added: dict[str, nn.Parameter] = {}

    def with_stand_ins(layer: int, held: list[int]) -> Callable[..., Tensor]:
        plain = loaded.model.layers[layer].mlp.experts.forward
        names = [standin_name(layer, part) for part in ("down", "up", "bias")]
        down, up, bias = own = [nn.Parameter(state[name].double()) for name in names]
        added.update(zip(names, own, strict=True))
        resident_E = torch.tensor([expert in held for expert in range(model.num_experts)])

        def forward(x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
            y_TD = plain(x_TD, chosen_TK, weights_TK * resident_E[chosen_TK])
            for expert in (~resident_E).nonzero().flatten().tolist():
                weight_T = (weights_TK * (chosen_TK == expert)).sum(1)
                y_TD = y_TD + weight_T[:, None] * (x_TD @ down[expert].T @ up[expert].T + bias[expert])
            return cast(Tensor, y_TD)

        return forward

    for layer, held in zip(expert_layers(model), residents, strict=True):
        loaded.model.layers[layer].mlp.experts.forward = with_stand_ins(layer, held)
    expected, theirs = loss_and_gradients(model, loaded)
    with poisoned_memory():
        loss, gradients = gradients_of(model, state, residents, "skip")
    assert loss == pytest.approx(expected, rel=PRECISION[model.experts_impl][1])
    assert gradients.keys() > added.keys()
    theirs |= {name: cast(Tensor, parameter.grad) for name, parameter in added.items()}
    compare(model, gradients, theirs)


@families
def test_partitioned_is_the_stock_model_with_these_experts_alone(family: str, tmp_path: Path) -> None:
    """Where the layers hold equally many, that is a smaller model of the same family, numbered anew."""
    small = {"olmoe": "num_experts", "qwen3_moe": "num_experts", "deepseek_v2": "n_routed_experts",
             "deepseek_v3": "n_routed_experts"}  # fmt: skip
    # Groups are of all experts, and a partitioned router of some has none.
    groups = {"n_group": 1, "topk_group": 1} if family.startswith("deepseek") else {}
    model, residents = stock(family), half(stock(family))
    reduced = stock(family, **{small.get(family, "num_local_experts"): 4, **groups})
    whole = random_state(model)
    state, smaller = rows_apart(model, whole, residents), {}
    for name in parameters(reduced, everything(reduced), "skip"):
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        held = residents[list(expert_layers(model)).index(layer)] if layer in expert_layers(model) else []
        if ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            expert, _, part = rest.partition(".")
            smaller[name] = whole[f"{prefix}.experts.{held[int(expert)]}.{part}"]
        else:
            smaller[name] = whole[name][held] if ".mlp.gate." in name else whole[name]
    loaded = reference(reduced, smaller, tmp_path / "hf")
    module = build(model, residents, "partitioned", state, "cpu")
    assert float(module(TOKENS_BT).cross_entropy.detach()) == pytest.approx(
        float(loss_of(loaded).detach()), rel=1e-6
    )


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss"])
def test_the_balance_loss_is_the_librarys_of_each_layer(family: str) -> None:
    model = stock(family)
    module = build(model, half(model), "skip", {
        name: value
        for name, value in random_state(model).items()
        if name in parameters(model, half(model), "skip")
    }, "cpu")  # fmt: skip
    logits: list[Tensor] = []
    for layer in module.moe_layers:
        layer.gate.register_forward_pre_hook(
            lambda gate, arguments: logits.append(gate.judge(arguments[0])[0].detach())
        )
    loss = float(module(TOKENS_BT).balance.detach())
    library = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
    theirs = [
        library.load_balancing_loss_func((logits_TE,), model.num_experts, model.top_k) for logits_TE in logits
    ]
    coefficient = module.stock.config.router_aux_loss_coef
    assert loss == pytest.approx(coefficient * float(sum(theirs)) / len(theirs), rel=1e-5)


@families
def test_the_weights_of_another_choice_are_those_the_library_would_give(family: str) -> None:
    """For its own choice ours are the stock router's; so a choice that somebody else makes is weighed alike."""
    model = stock(family)
    module = build(model, everything(model), "skip", random_state(model), "cpu").eval()
    x_TD = torch.randn(40, model.d_model, generator=torch.Generator().manual_seed(2))
    for layer in module.moe_layers:
        routing = layer.gate(x_TD)
        torch.testing.assert_close(layer.gate.weights(x_TD, routing.chosen_TK), routing.weights_TK)


@families
def test_dense_layers_have_no_experts_and_every_tensor_is_told_once(family: str) -> None:
    model = stock(family)
    for routing in ("skip", "partitioned"):
        names = [view.name for view in named_views(build(model, half(model), routing, None, "cpu"))]
        assert sorted(names) == sorted(parameters(model, half(model), routing))
    dense = set(range(3 if family in ("qwen3_moe", "deepseek_v2", "deepseek_v3") else 2)) - set(
        expert_layers(model)
    )
    for layer in dense:
        assert f"model.layers.{layer}.mlp.up_proj.weight" in names
        assert not any(name.startswith(f"model.layers.{layer}.mlp.experts") for name in names)
    assert set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("olmoe", {"attention_dropout": -1}, "attention_dropout=-1: from 0 to 1 are allowed"),
        (
            "olmoe",
            {"router_aux_loss_coef": math.nan},
            "router_aux_loss_coef=nan: from 0 to 1000000000 are allowed",
        ),
        ("olmoe", {"vocab_size": 10**15}, "vocab_size=1000000000000000: from 2 to 16777216 are allowed"),
        ("olmoe", {"pad_token_id": 300}, "pad_token_id=300: null or below vocab_size=300 is allowed"),
        ("olmoe", {"num_attention_heads": 5}, "num_attention_heads=5: must divide hidden_size=64"),
        ("qwen3_moe", {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=4"),
        ("mixtral", {"hidden_act": "tanhh"}, "hidden_act=tanhh: allowed are gelu, "),
        (
            "gpt_oss",
            {"rope_parameters": {"rope_type": "x"}},
            "rope_parameters: rope_type=x: allowed are default, ",
        ),
        ("deepseek_v3", {"n_group": 8}, "n_group=8: must divide n_routed_experts=8 into groups of 2 or more"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group=5: at most n_group=4"),
        ("deepseek_v2", {"aux_loss_alpha": "x"}, "aux_loss_alpha=x: from 0 to 1000000000 are allowed"),
    ],
)
def test_a_number_of_which_no_model_can_be_made_is_one_line(
    family: str, changes: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError) as raised:
        stock(family, **changes)
    assert str(raised.value).startswith(f"model.hf.{line}")
    assert caplog.messages == []


def test_keys_that_only_some_classes_read_are_known() -> None:
    """transformers has no defaults for them, its classes and ours read them where they are there."""
    hf = stock("qwen3_moe").hf
    assert [is_key(hf, name) for name in ("head_dim", "norm_topk_prob", "aux_loss_alpha")] == [
        True,
        True,
        False,
    ]
    assert is_key(stock("deepseek_v2").hf, "aux_loss_alpha")


def test_another_activation_is_the_stock_models(tmp_path: Path) -> None:
    model = stock("qwen3_moe", hidden_act="gelu")
    state = random_state(model)
    compare_logits(model, state, reference(model, state, tmp_path / "hf"))
