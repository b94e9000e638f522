"""What server and site tell each other: it arrives to the last bit, names nobody else, and any text is endured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from fomoe_flwr.config import (
    DataConfig,
    FederationConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
)
from fomoe_flwr.data import TokenCorpus, deal_documents, prepare
from fomoe_flwr.errors import ConfigError, DataError, WireError
from fomoe_flwr.inputs import Inputs
from fomoe_flwr.messages import Deal, Reply, Task, deals, make_task
from fomoe_flwr.schedule import LrSchedule

names = st.text(min_size=1, max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**53)
rates = st.none() | st.floats(0.001, 1e9)

# As long as those of a run.
INPUTS = Inputs(*["0123456789abcdef"] * 7)

inputs = st.builds(
    Inputs,
    tokenizer=st.text("0123456789abcdef", max_size=16),
    partition=st.sampled_from(["", "own", "iid 01ab"]),
)
site_configs = st.builds(
    SiteConfig,
    name=st.from_regex(r"\w[\w.-]{0,11}", fullmatch=True),
    memory_gib=rates,
    up_mbps=rates,
    batch_size=st.none() | counts,
    domain=st.none() | names,
)
tasks = st.builds(
    Task,
    run=st.from_regex(r"[\w-]{1,64}", fullmatch=True),
    run_dir=st.text(max_size=12),
    round=counts,
    counted_round=counts,
    site=site_configs,
    deal=st.builds(Deal, counts, counts, st.lists(st.tuples(names, counts), max_size=3).map(tuple)),
    inputs=inputs,
    residents=st.lists(st.lists(counts, max_size=4), max_size=3),
    first_step=counts,
    lr_stride=finite,
    model=st.builds(
        ModelConfig, name=names, d_model=counts, rope_theta=finite, locality_target=st.none() | finite
    ),
    train=st.builds(TrainConfig, lr=finite, batch_size=counts, compile=st.booleans()),
    strategy=st.builds(StrategyConfig, overlap=st.none() | counts, outer_lr=finite),
    data=st.builds(DataConfig, path=st.none() | names),
    schedule=st.builds(LrSchedule, counts, st.sampled_from(["constant", "cosine"]), counts, counts, finite),
    checkpoint_every=counts,
    keep=counts,
    seed=counts,
    global_load=st.none() | st.lists(st.lists(finite, max_size=3), max_size=3),
    asked=counts,
    holders=st.lists(st.lists(counts, max_size=4), max_size=3),
)
replies = st.builds(
    Reply,
    run=names,
    round=counts,
    site=names,
    num_examples=counts,
    metrics=st.dictionaries(names, finite | counts, max_size=5),
    start_digests=st.binary(max_size=40),
    load_LE=st.lists(st.lists(counts, max_size=3), max_size=3),
    bundle_digests=st.dictionaries(names, names, max_size=3),
    inputs=inputs,
)


def federation(count: int, domains: int = 0, **sections: Any) -> RunConfig:
    """So many sites, with names as long as each other's; so many of them name one of the domains in turn."""
    sites = [
        SiteConfig(name=f"hospital-{index:05d}", domain=f"domain-{index % domains}" if domains else None)
        for index in range(count)
    ]
    return RunConfig(federation=FederationConfig(sites=sites), **sections)


def task_of(config: RunConfig, site: int, **changes: Any) -> Task:
    sites = config.federation.sites
    values: dict[str, Any] = {
        "run": "run",
        "run_dir": "/run",
        "round_": 3,
        "counted_round": 2,
        "deal": deals(config.data, sites)[site],
        "inputs": INPUTS,
        "residents": [[0, 1]],
        "local_steps": config.train.local_steps,
    }
    return make_task(config, site, **(values | changes))


# -- round trips ---------------------------------------------------------------------------------------------


@given(tasks)
def test_a_task_comes_back_as_it_was(task: Task) -> None:
    assert Task.from_json(task.to_json()) == task


@given(replies)
def test_a_reply_comes_back_as_it_was(reply: Reply) -> None:
    assert Reply.from_json(reply.to_json()) == reply


# -- what a site is told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [0, 3], ids=["iid", "domain"])
def test_a_task_does_not_grow_with_the_number_of_sites(domains: int) -> None:
    """A thousand sites cost a few digits of numbers, and nobody's name is told to another site."""
    data = DataConfig(partition="domain" if domains else "iid")
    lengths = []
    for count in (4, 1000):
        config = federation(count, domains, data=data)
        dealt = deals(data, config.federation.sites)
        for site in (0, count // 2, count - 1):
            text = task_of(config, site, deal=dealt[site]).to_json()
            assert text.count("hospital-") == 1
            assert f"hospital-{site:05d}" in text
            lengths.append(len(text))
    assert max(lengths) - min(lengths) <= 2 * 3 + 2 * domains


def test_a_task_is_the_sites_own_part_of_the_configuration() -> None:
    train = TrainConfig(local_steps=20, batch_size=8)
    config = federation(3, train=train)
    config.federation.sites[1] = SiteConfig(name="small", batch_size=2)
    config.train.warmup_fraction, config.train.rounds = 0.5, 10
    task = task_of(config, 1, local_steps=5, global_load=[[1.0]])
    assert (task.name, task.train.batch_size, task.train.local_steps) == ("small", 2, 5)
    assert (task.first_step, task.lr_stride, task.schedule) == (40, 4.0, LrSchedule(100))
    assert task.global_load is None  # nobody balances the federation's
    assert config.train == dataclasses.replace(train, warmup_fraction=0.5, rounds=10)
    config.model.balance = "global"
    assert task_of(config, 1, global_load=[[1.0]]).global_load == [[1.0]]
    other = dataclasses.replace(config.model, locality_target=0.25)
    assert task_of(config, 1, model=other).model == other
    assert task_of(config, 0).train == dataclasses.replace(config.train)
    told = {"asked": 3, "holders": [[2, 1]]}
    assert (task_of(config, 0, **told).asked, task_of(config, 0, **told).holders) == (0, [])
    config.strategy.delay = 1
    assert (task_of(config, 0, **told).asked, task_of(config, 0, **told).holders) == (3, [[2, 1]])
    assert (task_of(config, 0).sole, task_of(config, 0).until) == ([], [])
    turns = task_of(config, 0, sole=[[0]], until=[[6, 0]], last_round=20)
    assert (turns.sole, turns.until, turns.train.rounds) == ([[0]], [[6, 0]], 20)


# -- the deal ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(corpus_dir: Path, cache_dir: Path) -> TokenCorpus:
    return prepare(DataConfig(source="text", path=str(corpus_dir), cache_dir=str(cache_dir)))


@pytest.mark.parametrize("partition", ["iid", "domain", "dirichlet"])
@given(
    domains=st.lists(st.sampled_from([None, None, "anatomy", "botany", "dance"]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_the_documents_of_a_site_are_those_of_a_deal_over_the_whole_federation(
    corpus: TokenCorpus, partition: str, domains: list[str | None], seed: int
) -> None:
    """A site knows its place among the others and nothing else of them, and all agree on who has what."""
    data = DataConfig(partition=partition, dirichlet_alpha=5.0)
    sites = [SiteConfig(name=f"site-{index}", domain=domain) for index, domain in enumerate(domains)]
    try:
        whole = deal_documents(corpus, sites, data, seed)
    except DataError:  # more sites than domains: one gets nothing
        reject()
    own = []
    for deal in deals(data, sites):
        told = Deal(*json.loads(json.dumps(dataclasses.astuple(deal))))
        others = [SiteConfig(domain=domain) for domain in told.domains()]
        own.append(deal_documents(corpus, others, data, seed)[told.place])
    assert sorted(itertools.chain.from_iterable(share.tolist() for share in own)) == sorted(
        corpus.train_documents.tolist()
    )
    assert all(np.array_equal(a, b) for a, b in zip(own, whole, strict=True))


def test_places_by_hand() -> None:
    sites = [SiteConfig(domain=domain) for domain in (None, "b", "a", "b", None)]
    claims = (("b", 2), ("a", 1))
    assert deals(DataConfig(partition="domain"), sites) == [
        Deal(place, 5, claims) for place in (3, 0, 2, 1, 4)
    ]
    assert Deal(0, 5, claims).domains() == ["b", "b", "a", None, None]
    assert deals(DataConfig(), sites) == [Deal(place, 5) for place in range(5)]  # no domain is asked for


# -- texts from anybody --------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
GOOD: dict[str, Any] = json.loads(
    Reply("run", 3, "site", 7, {"loss": 1.5}, b"\x01\xff", [[1, 2]], {"dense": "ab"}).to_json()
)


def refusal(text: str) -> str | None:
    """Why a reply is refused, in one line; anything but a WireError is a bug."""
    try:
        reply = Reply.from_json(text)
    except WireError as error:
        said = str(error)
    else:
        assert all(math.isfinite(value) for value in reply.metrics.values())
        return None
    assert "\n" not in said
    assert len(said) < 400
    return said


@given(st.text(max_size=30) | json_values.map(json.dumps))
def test_any_text_is_refused(text: str) -> None:
    assert refusal(text)


@given(st.sampled_from([*GOOD, "a\nkey of\nnobody's"]), json_values)
def test_a_reply_with_any_value_is_refused_or_read(key: str, value: Any) -> None:
    refusal(json.dumps(GOOD | {key: value}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": 3}, "run"),
        ({"round": "3"}, "round"),
        ({"round": True}, "round"),
        ({"round": 3.0}, "round"),
        ({"site": None}, "site"),
        ({"num_examples": math.inf}, "num_examples"),
        ({"metrics": [1.0]}, "metrics"),
        ({"metrics": {"loss": math.nan}}, "metric.*loss.*nan.*finite"),
        ({"metrics": {"loss": -math.inf}}, "metric.*loss.*finite"),
        ({"metrics": {"loss": 10**400}}, "metric.*loss.*finite"),
        ({"metrics": {"loss": True}}, "metric.*loss.*finite"),
        ({"metrics": {"loss": [[]]}}, "metric.*loss.*finite"),
        ({"metrics": {"los\ns": None}}, "metric.*finite"),
        ({"metrics": {str(index): 1.0 for index in range(65)}}, "65 metrics"),
        ({"metrics": {"x" * 65: 1.0}}, "long names"),
        ({"start_digests": "0"}, "header"),
        ({"start_digests": None}, "header"),
        ({"load_LE": {}}, "load_LE"),
        ({"bundle_digests": []}, "bundle_digests"),
        ({"a stranger\n": 1}, "header.*stranger"),
    ],
)
def test_what_is_wrong_with_a_reply_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(WireError, match=said):
        Reply.from_json(json.dumps(GOOD | change))
    assert refusal(json.dumps(GOOD | change))


@pytest.mark.parametrize("depth", [100, 900, 5000, 100_000])
@pytest.mark.parametrize("key", ["load_LE", "metrics", "site"])
def test_no_depth_is_too_much(depth: int, key: str) -> None:
    nested = "[" * depth + "]" * depth
    text = json.dumps(GOOD | {key: "?"}).replace(
        '"?"', nested if key != "metrics" else f'{{"loss":{nested}}}'
    )
    assert refusal(text) or (depth < 1000 and key == "load_LE")  # which the server looks at on its own


def test_a_key_may_be_missing_only_where_it_says_nothing() -> None:
    for key in GOOD:
        text = json.dumps({name: value for name, value in GOOD.items() if name != key})
        assert (refusal(text) is None) == (key in ("load_LE", "bundle_digests", "inputs")), key


@pytest.mark.parametrize(
    "change",
    [
        {"run": "../../etc"},
        {"run": ""},
        {"run": "a" * 65},
        {"run": 7},
        {"model": {"a_key_of_tomorrow": 1}},
        {"site": None},
        {"deal": {"place": 0}},
        {"deal": {"place": 0, "sites": 1, "claims": [1]}},
        {"a_key_of_tomorrow": 1},
        {"seed": None, "model": []},
    ],
)
def test_a_task_of_another_version_is_named_as_such(change: dict[str, Any]) -> None:
    values = json.loads(task_of(federation(2), 0).to_json())
    with pytest.raises(ConfigError, match="version"):
        Task.from_json(json.dumps(values | change))
    with pytest.raises(ConfigError, match="version"):
        Task.from_json("not a task")
