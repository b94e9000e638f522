"""Which tensors a round synchronises: each in its turn, all in the end, and about as many bytes in each round."""

from __future__ import annotations

import math
import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.config import ModelConfig, StrategyConfig
from fomoe_flwr.model.spec import expert_of, parameter_shapes
from fomoe_flwr.placement import full_residents
from fomoe_flwr.turns import count_layers, resting, takes_turns, turn_name
from tests.model.configs import LITE, config_of

Experts = set[tuple[int, int]]

EVER = 10**6  # rounds of a run whose end is far away


def model_of(layers: int, vocab_size: int = 264) -> ModelConfig:
    return ModelConfig(
        d_model=32, num_layers=layers, num_heads=2, num_experts=4, d_expert=16, vocab_size=vocab_size
    )


def shapes_of(model: ModelConfig, routing: str = "skip") -> dict[str, tuple[int, ...]]:
    return parameter_shapes(model, full_residents(model.num_layers, model.num_experts), routing)


def due(
    model: ModelConfig, strategy: StrategyConfig, round_: int, last_round: int = EVER, **experts: Experts
) -> set[str]:
    names = shapes_of(model, strategy.routing).keys()
    return names - resting(names, model, strategy, round_, last_round, **experts)


LAYERS_AND_FRAGMENTS = st.integers(1, 9).flatmap(
    lambda layers: st.tuples(st.just(layers), st.integers(1, layers))
)


@given(LAYERS_AND_FRAGMENTS, st.integers(1, 50), st.sampled_from(["skip", "partitioned"]))
def test_every_tensor_is_due_once_in_as_many_rounds_as_there_are_fragments(
    sizes: tuple[int, int], first: int, routing: str
) -> None:
    layers, fragments = sizes
    model, strategy = model_of(layers), StrategyConfig(fragments=fragments, routing=routing)
    times = Counter(name for r in range(first, first + fragments) for name in due(model, strategy, r))
    assert times == dict.fromkeys(shapes_of(model, routing), 1)
    for round_ in range(first, first + fragments):
        assert due(model, strategy, round_) == due(model, strategy, round_ + fragments)


@given(LAYERS_AND_FRAGMENTS, st.integers(1, 3))
def test_fragments_are_of_whole_layers_and_their_dense_parts_nearly_equal(
    sizes: tuple[int, int], vocabulary: int
) -> None:
    layers, fragments = sizes
    model = model_of(layers, 1000 * vocabulary)
    shapes, strategy = shapes_of(model), StrategyConfig(fragments=fragments)
    numbers, of_layer, rest = Counter[int](), Counter[int](), list[int]()
    for round_ in range(1, fragments + 1):
        for name in due(model, strategy, round_):
            match = re.match(r"model\.layers\.(\d+)\.", name)
            if match is not None:
                assert int(match[1]) % fragments == round_ - 1
            if expert_of(name) is not None:
                continue
            numbers[round_] += math.prod(shapes[name])
            if match is not None:
                of_layer[int(match[1])] += math.prod(shapes[name])
            else:
                rest.append(math.prod(shapes[name]))
    assert len(rest) == 3
    assert max(numbers.values()) - min(numbers.values()) <= max(*rest, *of_layer.values())


@given(LAYERS_AND_FRAGMENTS, st.integers(1, 4), st.integers(1, 20))
def test_in_the_last_round_all_is_due(sizes: tuple[int, int], every: int, last_round: int) -> None:
    layers, fragments = sizes
    model, strategy = model_of(layers), StrategyConfig(fragments=fragments, sole_every=every)
    sole = {(layer, expert) for layer in range(layers) for expert in range(4)}
    for round_ in (last_round, last_round + 1):
        found = due(model, strategy, round_, sole=sole, last_round=last_round)
        assert found == shapes_of(model).keys()
        assert turn_name(strategy, round_, last_round) == ""


@given(LAYERS_AND_FRAGMENTS, st.integers(1, 4), st.sets(st.integers(0, 3)))
def test_an_expert_of_one_site_is_due_in_every_nth_turn_of_its_fragment(
    sizes: tuple[int, int], every: int, alone: set[int]
) -> None:
    layers, fragments = sizes
    model, strategy = model_of(layers), StrategyConfig(fragments=fragments, sole_every=every)
    sole = {(0, expert) for expert in alone}
    times, turns = Counter[str](), dict[str, set[str]]()
    for round_ in range(1, every * fragments + 1):
        found = due(model, strategy, round_, sole=sole)
        times.update(found)
        # Rounds of one name synchronise the same.
        assert turns.setdefault(turn_name(strategy, round_, EVER), found) == found
    assert len(turns) <= 2 * fragments
    for name in shapes_of(model):
        assert times[name] == (1 if expert_of(name) in sole else every)
    # Not before it has gone through all of them.
    early = {name for name in due(model, strategy, 1, sole=sole) if expert_of(name) in sole}
    assert bool(early) == (every == 1 and bool(sole))


def test_an_expert_that_moves_is_due_whosever_turn_it_is() -> None:
    model, strategy = model_of(4), StrategyConfig(fragments=4, sole_every=3)
    moving, sole = {(2, 1), (0, 3)}, {(2, 1), (0, 0), (0, 3)}
    found = {
        expert for name in due(model, strategy, 1, sole=sole, moving=moving) if (expert := expert_of(name))
    }
    assert found == {(2, 1), (0, 1), (0, 2), (0, 3)}


def test_without_fragments_nothing_rests() -> None:
    model, strategy = model_of(2), StrategyConfig()
    assert not takes_turns(strategy)
    for round_ in range(1, 5):
        assert due(model, strategy, round_, sole={(0, 0)}) == shapes_of(model).keys()
        assert turn_name(strategy, round_, EVER) == ""


def test_a_dense_layer_of_an_open_model_takes_its_turn() -> None:
    """DeepSeek-V2-Lite: 27 layers, of which the first has no experts."""
    model, strategy = config_of(LITE).model, StrategyConfig(fragments=9)
    assert count_layers(model, "skip") == 27
    found = {
        int(match[1]) for name in due(model, strategy, 1) if (match := re.search(r"layers\.(\d+)", name))
    }
    assert found == {0, 9, 18}
    # Its embedding and its head are as large as some layers, and lie apart.
    turns = {name: {r for r in range(1, 10) if name in due(model, strategy, r)} for name in LARGE}
    assert all(len(rounds) == 1 for rounds in turns.values())
    assert turns[LARGE[0]] != turns[LARGE[1]]


LARGE = ("lm_head.weight", "model.embed_tokens.weight")
