"""Sizes of public models, from their config.json alone, against what their makers published and arithmetic by hand."""

from __future__ import annotations

from functools import cache

import pytest

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.spec import (
    ParameterCounts,
    attention_flops,
    expert_layers,
    expert_parameters,
    parameter_counts,
    token_flops,
)
from fomoe_flwr.plan.system import split_parameters
from tests.model.configs import GPT_OSS, LITE, MIXTRAL, OLMOE, QWEN, V3, config_of

BILLION = 1e9
SEQ_LEN = 2048


@cache
def model_of(name: str) -> ModelConfig:
    return config_of(name).model


def active(model: ModelConfig) -> int:
    """Parameters that a token passes, the row that it looks up among them counted as the whole embedding."""
    chosen = model.num_layers * model.top_k * expert_parameters(model)
    return parameter_counts(model).total - parameter_counts(model).experts + chosen


def input_embedding(model: ModelConfig) -> int:
    return model.vocab_size * model.d_model


# Total and active, in billions, and whether the latter counts the input embedding.
PUBLISHED = {
    OLMOE: (6.92, 1.28, True),  # arXiv 2409.02060: 6.9 and 1.3
    LITE: (15.7, 2.4, False),  # arXiv 2405.04434, appendix B
    QWEN: (30.5, 3.3, True),  # the model's card on Hugging Face
    GPT_OSS: (20.91, 3.61, False),  # arXiv 2508.10925, table 1, which says that it leaves the embedding out
    MIXTRAL: (46.7, 12.9, True),  # mistral.ai/news/mixtral-of-experts
    V3: (671, 37, False),  # arXiv 2412.19437, abstract
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_and_active_are_what_was_published(name: str) -> None:
    model = model_of(name)
    total, passed, with_embedding = PUBLISHED[name]
    assert parameter_counts(model).total / BILLION == pytest.approx(total, rel=0.002)
    counted = active(model) - (0 if with_embedding else input_embedding(model))
    assert counted / BILLION == pytest.approx(passed, rel=0.025)


def swiglu(d: int, h: int) -> int:
    """Gate, up and down."""
    return 3 * d * h


# Embedding and unembedding, the last norm; then a layer at a time: attention, its two norms, what else is dense.
BY_HAND = {
    # The norms of queries and keys are as wide as all heads together.
    OLMOE: ParameterCounts(
        dense=2 * 50304 * 2048 + 2048 + 16 * (4 * 2048**2 + 2 * 2048 + 2 * 2048),
        router=16 * 64 * 2048,
        experts=16 * 64 * swiglu(2048, 1024),
    ),
    # 32 heads of 128 for queries, 4 for keys and values; a norm of one head's width for each of queries and keys.
    QWEN: ParameterCounts(
        dense=2 * 151936 * 2048 + 2048 + 48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128 + 2 * 2048 + 2 * 128),
        router=48 * 128 * 2048,
        experts=48 * 128 * swiglu(2048, 768),
    ),
    # Queries whole, keys and values through 512 with a norm there, the 64 of the positions beside them. The first layer
    # is dense, the others have two shared experts.
    LITE: ParameterCounts(
        dense=2 * 102400 * 2048
        + 2048
        + 27
        * (2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048 + 2 * 2048)
        + swiglu(2048, 10944)
        + 26 * swiglu(2048, 2 * 1408),
        router=26 * 64 * 2048,
        experts=26 * 64 * swiglu(2048, 1408),
    ),
    # Biases everywhere, and a sink for each of 64 heads.
    GPT_OSS: ParameterCounts(
        dense=2 * 201088 * 2880
        + 2880
        + 24 * ((2880 + 1) * (64 + 2 * 8) * 64 + (64 * 64 + 1) * 2880 + 64 + 2 * 2880),
        router=24 * 32 * (2880 + 1),
        experts=24 * 32 * (swiglu(2880, 2880) + 3 * 2880),
    ),
    MIXTRAL: ParameterCounts(
        dense=2 * 32000 * 4096 + 4096 + 32 * (2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 2 * 4096),
        router=32 * 8 * 4096,
        experts=32 * 8 * swiglu(4096, 14336),
    ),
    # Queries, too, through a narrower layer; three dense layers; a number for each expert that no gradient trains.
    V3: ParameterCounts(
        dense=2 * 129280 * 7168
        + 7168
        + 61 * (7168 * 1536 + 1536 + 1536 * 128 * 192)
        + 61 * (7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128) + 128 * 128 * 7168 + 2 * 7168)
        + 3 * swiglu(7168, 18432)
        + 58 * swiglu(7168, 2048),
        router=58 * 256 * (7168 + 1),
        experts=58 * 256 * swiglu(7168, 2048),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_class_of_parameters_is_what_arithmetic_says(name: str) -> None:
    assert parameter_counts(model_of(name)) == BY_HAND[name]


@pytest.mark.parametrize(("name", "layers"), [(QWEN, range(48)), (LITE, range(1, 27)), (V3, range(3, 61))])
def test_dense_layers_are_none_of_those_with_experts(name: str, layers: range) -> None:
    model = model_of(name)
    assert list(expert_layers(model)) == list(layers)
    assert model.num_layers == len(layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_router_row_goes_with_its_expert_in_partitioned_mode(name: str) -> None:
    model = model_of(name)
    skip, partitioned = (split_parameters(model, routing) for routing in ("skip", "partitioned"))
    rows = model.num_layers * model.num_experts
    assert skip.dense - partitioned.dense == rows * (partitioned.per_expert - skip.per_expert)
    assert skip.held(rows) == partitioned.held(rows) == parameter_counts(model).total


# Scores and values of all heads: query and key of one width, values of another, over half of the sequence.
HALF = SEQ_LEN / 2
ATTENTION = {
    OLMOE: 6 * HALF * 16 * 16 * (128 + 128),
    QWEN: 6 * HALF * 48 * 32 * (128 + 128),
    LITE: 6 * HALF * 27 * 16 * (192 + 128),
    # Every second layer looks back to 128 positions, and the first ones to fewer.
    GPT_OSS: 6 * 12 * (HALF + 128 - 128**2 / (2 * SEQ_LEN)) * 64 * (64 + 64),
    MIXTRAL: 6 * HALF * 32 * 32 * (128 + 128),
    V3: 6 * HALF * 61 * 128 * (192 + 128),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_a_token_costs_six_flops_an_active_parameter_and_its_attention(name: str) -> None:
    model = model_of(name)
    assert attention_flops(model, SEQ_LEN) == ATTENTION[name]
    matrices = sum(token_flops(model, SEQ_LEN)) - ATTENTION[name]
    # Norms, biases and sinks are no matrices.
    assert matrices == pytest.approx(6 * (active(model) - input_embedding(model)), rel=1e-3)
