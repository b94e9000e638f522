"""What is kept for the backward pass, by formula, against the tensors that are alive after a forward pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_flwr.config import RECOMPUTE, ModelConfig
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.plan.activations import Held, Piece, held, kept
from tests.model.stock_models import CONFIGS, stock
from tests.plan.measured import Alive

ROWS, POSITIONS = 2, 50
# The losses and what scales them.
SCALARS = 24

SIGMA = ModelConfig(
    vocab_size=101, d_model=64, num_layers=2, num_heads=4, num_experts=8, d_expert=48, top_k=3
)
VARIANTS = {
    "plain": SIGMA,
    "shared": dataclasses.replace(SIGMA, num_shared_experts=2),
    "orthogonal": dataclasses.replace(SIGMA, router="orthogonal"),
    "grap": dataclasses.replace(SIGMA, router="grap"),
    "stand-ins": dataclasses.replace(SIGMA, standins=8),
    "locality": dataclasses.replace(SIGMA, locality="bias", locality_target=0.7),
}


def alive(model: ModelConfig, residents: int, routing: str, dtype: str, recompute: str) -> tuple[int, Held]:
    """Bytes that are there after a forward pass and were not before it; and how the routers chose."""
    everyone = [list(range(residents))] * model.num_layers
    module = build(model, everyone, routing, initial_state(model, everyone, routing, 0), "cpu").train()
    module.recompute(recompute)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.vocab_size, (ROWS, POSITIONS + 1), generator=generator)
    with Alive([*module.parameters(), *module.buffers(), tokens_BT]) as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            losses = module(tokens_BT)
        found = memory.now
    assert losses.cross_entropy.requires_grad
    # Routers do not choose evenly; by formula it is the mean of the layers.
    shares = [
        float(layer.gate.load_C[:residents].sum() / layer.gate.load_C.sum()) for layer in module.moe_layers
    ]
    return found, held(model, routing, residents, sum(shares) / len(shares))


def check(
    model: ModelConfig, residents: int, routing: str, dtype: str, recompute: str, gpu: bool = False
) -> None:
    found, site = alive(model, residents, routing, dtype, recompute)
    formula = kept(model, routing, Piece(ROWS, POSITIONS, dtype == "bf16", recompute, gpu), site).total
    # On a GPU each layer adds its ghosts up in one row more, which is dropped.
    row = gpu * model.num_layers * model.d_model * 4
    assert found - SCALARS - row <= formula <= found


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("residents", "routing"), [(8, "skip"), (4, "skip"), (5, "partitioned"), (2, "partitioned")]
)
def test_sigma_moe_to_the_byte(residents: int, routing: str, dtype: str, recompute: str) -> None:
    check(SIGMA, residents, routing, dtype, recompute)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_router_and_shared_experts_add(variant: str, dtype: str) -> None:
    check(VARIANTS[variant], 4, "skip", dtype, "none")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_stock_architectures_to_the_byte(family: str, dtype: str, recompute: str) -> None:
    model = stock(family)
    check(model, 8, "skip", dtype, recompute)
    check(model, 4, "skip", dtype, recompute)
    check(model, 4, "partitioned", dtype, recompute)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_renormalised_weights_are_kept_before_and_after(dtype: str) -> None:
    for model in (SIGMA, stock("olmoe"), stock("mixtral")):
        check(model, 4, "skip_renormalised", dtype, "none")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["sigma", *CONFIGS])
def test_a_mask_of_documents(family: str, dtype: str, recompute: str) -> None:
    model = SIGMA if family == "sigma" else stock(family)
    check(dataclasses.replace(model, document_end=3), 8, "skip", dtype, recompute)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("family", ["sigma", "olmoe", "qwen3_moe", "mixtral"])
def test_what_a_gpu_does_otherwise(monkeypatch: pytest.MonkeyPatch, family: str, recompute: str) -> None:
    """Here on a CPU, made to do it: rows of ghosts are there, and autocast has layer norms work in fp32."""
    norm = F.layer_norm

    def wide(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return norm(x.float(), *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("fomoe_flwr.model.moe._padded", lambda x_TD: True)
    monkeypatch.setattr(F, "layer_norm", wide)
    model = SIGMA if family == "sigma" else stock(family)
    for residents in (8, 4):
        check(model, residents, "skip", "bf16", recompute, gpu=True)


def test_a_piece_twice_as_large_keeps_twice_as_much_but_for_what_is_there_once() -> None:
    site = held(SIGMA, "skip", 8, 1.0)
    one, two, four = (
        kept(SIGMA, "skip", Piece(rows, 64, True, "none", False), site).total for rows in (1, 2, 4)
    )
    assert four - two == 2 * (two - one)
    assert two < 2 * one
