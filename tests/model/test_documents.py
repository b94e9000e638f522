"""Attention within documents: two documents in one sequence are what each is alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fomoe_flwr.config import RECOMPUTE, ModelConfig
from fomoe_flwr.evaluation import evaluate
from fomoe_flwr.model.base import LanguageModel
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.documents import added, allowed, documents_of, mask_of
from fomoe_flwr.placement import full_residents
from tests.model.helpers import SMALL, randomized
from tests.model.stock_models import CONFIGS, stock

END, FIRST, LENGTH = 28, 7, 19  # the first document has so many tokens with its end token
MODELS = {"sigma": SMALL, **dict.fromkeys(CONFIGS)}


def model_of(name: str, **changes: object) -> ModelConfig:
    # A balance loss is of a batch, not of a document.
    model = SMALL if name == "sigma" else stock(name, vocab_size=257)
    return dataclasses.replace(model, document_end=END, load_balance=0.0, **changes)  # type: ignore[arg-type]


def module_of(model: ModelConfig) -> LanguageModel:
    held = full_residents(model.num_layers, model.num_experts)
    return build(model, held, "skip", randomized(initial_state(model, held, "skip", 0)), "cpu").train()


def two_documents(seed: int = 0) -> Tensor:
    tokens_BS = torch.randint(END, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens_BS[:, FIRST - 1] = END
    return tokens_BS


def logits_of(module: LanguageModel, tokens_BS: Tensor) -> Tensor:
    hidden_BSD, _ = module.hidden(tokens_BS)
    return module.logits(hidden_BSD)


def gradients(module: LanguageModel, *pieces: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of the sum of products of logits and given numbers."""
    module.zero_grad(set_to_none=True)
    for tokens_BS, weights_BSV in pieces:
        (logits_of(module, tokens_BS) * weights_BSV).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_an_end_token_belongs_to_the_document_that_it_ends() -> None:
    tokens_BS = torch.tensor([[1, END, 2, 3, END, END, 4]])
    assert documents_of(tokens_BS, END).tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert mask_of(tokens_BS, None, 16, torch.float32) is None


def test_who_may_look_at_whom_one_by_one() -> None:
    document_BS = documents_of(two_documents(), END)
    for window in (None, 1, 4):
        found = allowed(document_BS, window)
        for batch, row in enumerate(document_BS.tolist()):
            for query, own in enumerate(row):
                for key, other in enumerate(row):
                    near = key <= query and (window is None or query - key < window)
                    assert bool(found[batch, 0, query, key]) == (near and own == other)
    assert added(allowed(document_BS), torch.float32).unique().tolist() == [-torch.inf, 0.0]


@pytest.mark.parametrize("name", MODELS)
def test_two_documents_are_what_each_is_alone(name: str) -> None:
    """Logits and gradients. Positions of the second go on from the first: RoPE sees differences alone."""
    module, tokens_BS = module_of(model_of(name)), two_documents()
    together = logits_of(module, tokens_BS)
    alone = [logits_of(module, tokens_BS[:, :FIRST]), logits_of(module, tokens_BS[:, FIRST:])]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1))
    whole = gradients(module, (tokens_BS, weights))
    parts = gradients(
        module, (tokens_BS[:, :FIRST], weights[:, :FIRST]), (tokens_BS[:, FIRST:], weights[:, FIRST:])
    )
    for parameter, gradient in whole.items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(gradient / scale, parts[parameter] / scale, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_another_first_document_changes_nothing_in_the_second(name: str) -> None:
    one, other = two_documents(), two_documents(seed=1)
    other[:, FIRST:] = one[:, FIRST:]
    for masked in (True, False):
        model = model_of(name)
        module = module_of(model if masked else dataclasses.replace(model, document_end=None))
        first, second = (logits_of(module, tokens_BS)[:, FIRST:] for tokens_BS in (one, other))
        # Experts of other rows are computed in other places of a product.
        close = bool(((first - second).abs() < 1e-5).all())
        assert close == masked


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_of_one_document_is_as_without_a_mask(name: str) -> None:
    tokens_BS = torch.randint(END, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    model = model_of(name)
    masked, plain = (
        logits_of(module_of(config), tokens_BS)
        for config in (model, dataclasses.replace(model, document_end=None))
    )
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sigma", "olmoe"])
def test_the_loss_of_an_evaluation_keeps_to_documents_too(name: str, dtype: str) -> None:
    """Of a sequence of two documents it is the mean over the tokens of each alone, and of the first of the second,
    which follows from the end token of the first."""
    module, tokens_BT = module_of(model_of(name)).eval(), two_documents()
    loss, count = evaluate(module, [tokens_BT], dtype, "cpu")
    parts = [
        evaluate(module, [part], dtype, "cpu") for part in (tokens_BT[:, : FIRST + 1], tokens_BT[:, FIRST:])
    ]
    assert count == sum(tokens for _, tokens in parts)
    expected = sum(part * tokens for part, tokens in parts) / count
    assert loss == pytest.approx(expected, rel=1e-5 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["sigma", "gpt_oss"])
def test_what_is_computed_again_has_the_same_mask(name: str, recompute: str) -> None:
    tokens_BS = two_documents()
    weights = torch.randn(1, generator=torch.Generator().manual_seed(1))
    module = module_of(model_of(name))
    plain = gradients(module, (tokens_BS, weights))
    module.recompute(recompute)
    again = gradients(module, (tokens_BS, weights))
    for parameter, gradient in plain.items():
        assert torch.equal(gradient, again[parameter])
