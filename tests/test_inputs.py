"""The identity of a run's inputs: what differs is found, what is unknown is not held against anybody."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.inputs import KEYS, Inputs, differences, inputs_of, run_inputs
from tests.server.federation import config_of

parts = st.sampled_from(["", "a", "b"])
inputs = st.builds(Inputs, *[parts] * len(KEYS))


@given(inputs, inputs)
def test_only_what_both_know_and_is_not_equal_differs(before: Inputs, now: Inputs) -> None:
    found = {difference.part for difference in differences(before, now)}
    unequal = {part for part in KEYS if {getattr(before, part), getattr(now, part)} == {"a", "b"}}
    assert found <= unequal
    # What is left out follows from what is said.
    assert bool(found) == bool(unequal)
    assert found == {difference.part for difference in differences(now, before)}


@given(inputs)
def test_they_come_back_as_they_were(one: Inputs) -> None:
    assert inputs_of(dataclasses.asdict(one)) == one
    assert inputs_of({}) == Inputs()
    assert differences(one, one) == differences(one, Inputs()) == []


@pytest.mark.parametrize(
    "values",
    [None, [], "a", {"corpus": 1}, {"corpus": "a" * 81}, {"corpus": "a\nb"}, {"city": "a"}, {1: "a"}],
)
def test_what_is_not_inputs_is_refused(values: object) -> None:
    with pytest.raises((TypeError, ValueError), match="inputs") as error:
        inputs_of(values)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.d_model=64", "model"),
        ("data.val_fraction=0.5", "val_fraction"),
        ("data.partition=domain", "partition"),
        ("data.mix={web: 1}", "partition"),
        ("train.seq_len=64", "seq_len"),
    ],
)
def test_every_key_that_they_stand_for_changes_them(override: str, part: str) -> None:
    before, now = (run_inputs(config_of(*given), "t", None, []) for given in ((), (override,)))
    assert [difference.part for difference in differences(before, now)] == [part]
    free = config_of("model.experts_impl=loop", "train.lr=0.5", "train.batch_size=4")
    assert run_inputs(free, "t", None, []) == before


def test_a_digest_of_tokens_of_an_earlier_version_says_nothing_of_the_text() -> None:
    before = Inputs(corpus="0123", split="s", tokenizer="t")
    assert differences(before, Inputs(corpus="text:4567", split="s", tokenizer="t")) == []
    # The text does not depend on the tokenizer, so that both are said.
    found = differences(Inputs(corpus="text:0123", tokenizer="t"), Inputs(corpus="text:4567", tokenizer="u"))
    assert [difference.part for difference in found] == ["tokenizer", "corpus"]
