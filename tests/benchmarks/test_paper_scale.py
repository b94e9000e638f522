"""The scale sweep: every strategy once by hand, then what must hold everywhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper.formulas import ring_bytes
from benchmarks.paper.scale import (
    BANDWIDTHS_GBPS,
    GBPS,
    SITES,
    Scale,
    Strategy,
    best_domain,
    exchange_case,
    sweep,
    throughput,
    token_worth,
)
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.hybridep import best_whole_domain_size
from fomoe_flwr.plan.system import split_parameters

SMALL = ModelConfig(vocab_size=98, d_model=8, num_layers=2, num_heads=1, num_experts=4, d_expert=16, top_k=2)
# Parameters: expert 2·8·16 = 256, all 8 of them 2048; attention 4·64 = 256 and norms 32 a layer; embedding and its
# norms 100·8 = 800; dense 2·288 + 800 = 1376; router 2·4·8 = 64; together 3488.
# Flops of a token: attention 2·(6·256 + 6·10·8) = 4032, unembedding 6·98·8 = 4704, experts 2·2·6·256 = 6144,
# router 6·64 = 384; together 15264.
HAND = Scale(
    SMALL, seq_len=10, tokens_a_step=100, local_steps=10, overlap_share=0.5, flops_per_s=1e6, latency_s=0.5,
    server_bytes_per_s=2000, bytes_per_number=2, domain_size=2, token_share=0.5, skip_price=0.8,
)  # fmt: skip
XXL = Scale(
    ModelConfig(vocab_size=200019, d_model=4096, num_layers=512, num_heads=64, num_experts=128, top_k=32)
)
LARGE = ModelConfig(vocab_size=200019, d_model=1024, num_layers=128, num_heads=16, num_experts=32, top_k=8)

# -- by hand, 4 sites at 1000 bytes/s ------------------------------------------------------------------------

# At every step: the gradient of the dense part and the router, on a ring of 4: 1.5·1440·2 bytes, and the latency.
DENSE_RING_S = 4.320 + 0.5
# One layer: D = 100·2·8·2 = 3200 bytes, all of it sent 3200·3/(4·1000) = 2.4 s; waiting 4·0.5 s; P_E = 512 bytes;
# compute before the experts (4032 + 384)/3/2 flops = 0.0736 s forward, twice that backward.
PRE_S = 0.0736

BY_HAND = {
    # 1.5·3488·2 bytes and the latency
    Strategy.DDP: (1.5264, 10.464 + 0.5),
    Strategy.EXPERT_PARALLEL: (1.5264, 2 * (4 * 2.4 + 2) + DENSE_RING_S),
    # S = 2: p = 2/3, gathers 512·3/3 bytes
    Strategy.HYBRID_DOMAIN: (1.5264, 2 * (2 * 0.512 - 3 * PRE_S + 4 * 1.6 + 2) + DENSE_RING_S),
    Strategy.HYBRID_SHARE: (1.5264, 2 * (2 * 0.768 - 3 * PRE_S + 4 * 1.2 + 2) + DENSE_RING_S),
    # 2D = 6400 ≥ 2048 = G·P_E: every expert is gathered, no token waits
    Strategy.HYBRID_BEST: (1.5264, 2 * (2 * 1.536 - 3 * PRE_S) + DENSE_RING_S),
    # the server gives each site 2000/4 = 500 bytes/s; down and up once in 10 steps
    Strategy.DILOCO: (1.5264, 2 * (3488 * 2 / 500 + 0.5) / 10),
    # 2 of 4 experts, still k of them for a token, half the router: 1376 + 4·(256 + 8) parameters
    Strategy.PARTITIONED: (1.5264 - 0.0192, 2 * (2432 * 2 / 500 + 0.5) / 10),
    # half the experts' work, the whole router: 1376 + 64 + 4·256 parameters
    Strategy.SKIP: (1.5264 - 0.3072, 2 * (2464 * 2 / 500 + 0.5) / 10),
}


@pytest.mark.parametrize("strategy", Strategy)
def test_a_point_by_hand(strategy: Strategy) -> None:
    compute, network = BY_HAND[strategy]
    point = throughput(HAND, strategy, 4, 1000)
    assert point[:3] == (strategy, 4, 1000)
    assert point.compute_s == pytest.approx(compute, rel=1e-12)
    assert point.network_s == pytest.approx(network, rel=1e-12)
    assert point.tokens_per_s == pytest.approx(400 / (compute + network), rel=1e-12)


def test_only_skip_pays_for_skipped_assignments() -> None:
    assert token_worth(HAND) == pytest.approx(1 - 0.8 * 0.5)
    for strategy in Strategy:
        point = throughput(HAND, strategy, 4, 1000)
        worth = 0.6 if strategy is Strategy.SKIP else 1
        assert point.worth_per_s == pytest.approx(worth * point.tokens_per_s)
    free = throughput(replace(HAND, skip_price=0), Strategy.SKIP, 4, 1000)
    assert free.worth_per_s == free.tokens_per_s


def test_a_server_without_limit_leaves_a_site_its_link() -> None:
    free = replace(HAND, server_bytes_per_s=None)
    assert throughput(free, Strategy.DILOCO, 4, 1000).network_s == pytest.approx(2 * (6.976 + 0.5) / 10)
    # 4·1000 bytes/s: a server that can feed all links is as good as one without limit
    enough = replace(HAND, server_bytes_per_s=4000)
    assert throughput(enough, Strategy.DILOCO, 4, 1000) == throughput(free, Strategy.DILOCO, 4, 1000)


# -- the paper's headline ------------------------------------------------------------------------------------


def test_the_headline_of_the_paper() -> None:
    """1.42x fewer bytes than a full replica and 45.44x than DDP: large, M=4, O_e=2, gamma=1, K=32."""
    split = split_parameters(LARGE, "partitioned")
    experts = LARGE.num_layers * LARGE.num_experts
    ours = ring_bytes(split, experts, 4, 2, 1.0, 2)
    replica = ring_bytes(split, experts, 4, 4, 1.0, 2)
    assert replica / ours == pytest.approx(1.4207, abs=5e-5)
    assert round(replica / ours, 2) == 1.42
    # The paper multiplies the rounded ratio, 32 · 1.42 = 45.44; unrounded it is 45.46.
    assert 32 * round(replica / ours, 2) == pytest.approx(45.44)
    assert 32 * replica / ours == pytest.approx(45.46, abs=0.005)


# -- everywhere ----------------------------------------------------------------------------------------------


def test_the_whole_sweep_of_xxl() -> None:
    rows = sweep(XXL)
    assert len(rows) == len(Strategy) * len(BANDWIDTHS_GBPS) * len(SITES)
    points = {(row.strategy, row.num_sites, row.bytes_per_s): row for row in rows}
    assert len(points) == len(rows)
    for strategy in Strategy:
        for num_sites in SITES:
            line = [points[strategy, num_sites, gbps * GBPS].tokens_per_s for gbps in BANDWIDTHS_GBPS]
            assert all(slow <= fast for slow, fast in pairwise(line))  # equal where the server is the limit
        for gbps in BANDWIDTHS_GBPS:
            line = [points[strategy, num_sites, gbps * GBPS].tokens_per_s for num_sites in SITES]
            assert all(few < many for few, many in pairwise(line))
    for num_sites in SITES:
        for gbps in BANDWIDTHS_GBPS:
            here = {strategy: points[strategy, num_sites, gbps * GBPS].tokens_per_s for strategy in Strategy}
            assert here[Strategy.PARTITIONED] > here[Strategy.DILOCO]
            assert here[Strategy.SKIP] > here[Strategy.DILOCO]
            hybrid = (Strategy.HYBRID_DOMAIN, Strategy.HYBRID_SHARE, Strategy.EXPERT_PARALLEL)
            assert here[Strategy.HYBRID_BEST] > max(here[strategy] for strategy in hybrid)
            assert here[Strategy.DILOCO] > 0


def test_a_full_server_sets_the_speed_of_the_federation() -> None:
    """K·n·M tokens in 2·M·S/B_server seconds, whatever M: 32·262144·12.5e9 / (4·104.18e9)."""
    parameters = 35_187_412_992 + 268_435_456 + 68_719_476_736
    ceiling = 32 * 262_144 * 12.5e9 / (4 * parameters)
    assert ceiling == pytest.approx(251_637, rel=1e-5)
    point = throughput(XXL, Strategy.DILOCO, 1024, 100 * GBPS)
    assert 0.99 * ceiling < point.tokens_per_s < ceiling


def test_everything_resident_is_diloco() -> None:
    whole = replace(XXL, overlap_share=1.0)
    for strategy in (Strategy.PARTITIONED, Strategy.SKIP):
        ours, diloco = (throughput(whole, s, 16, GBPS) for s in (strategy, Strategy.DILOCO))
        assert ours[1:] == pytest.approx(diloco[1:])


@given(
    st.integers(2, 24), st.floats(1, 1e5), st.sampled_from([0.0, 1e-4, 0.5]), st.floats(1e3, 1e7),
    st.sampled_from([10.0, 1e3, 1e6]),
)  # fmt: skip
def test_no_domain_beats_the_best(
    num_sites: int, bandwidth: float, latency: float, flops_per_s: float, tokens: float
) -> None:
    scale = replace(HAND, latency_s=latency, flops_per_s=flops_per_s, tokens_a_step=tokens)
    best = throughput(scale, Strategy.HYBRID_BEST, num_sites, bandwidth).network_s
    for size in range(1, num_sites + 1):
        other = throughput(replace(scale, domain_size=size), Strategy.HYBRID_DOMAIN, num_sites, bandwidth)
        assert best <= other.network_s * (1 + 1e-12)


def test_where_tokens_are_worth_sending() -> None:
    """2·D ≥ G·P_E is n ≥ N_e·d_expert/k, 512 tokens a step for XXL with any number of sites."""
    few, enough = replace(XXL, tokens_a_step=100, latency_s=0), replace(XXL, tokens_a_step=513, latency_s=0)
    for num_sites in (8, 128):
        case = exchange_case(few, num_sites, GBPS)
        assert best_domain(few, num_sites, GBPS) == best_whole_domain_size(case, backward=True) < num_sites
        assert best_domain(enough, num_sites, GBPS) == num_sites
        # Waits of 4·512 latencies a step, 102 s, are longer than all gathers on a fast link, 22 s at most.
        assert best_domain(few, num_sites, 100 * GBPS) < num_sites
        assert best_domain(replace(few, latency_s=0.05), num_sites, 100 * GBPS) == num_sites


# -- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_len", 0),
        ("tokens_a_step", -1.0),
        ("local_steps", 0),
        ("overlap_share", 0.0),
        ("overlap_share", 1.5),
        ("flops_per_s", float("inf")),
        ("latency_s", -0.1),
        ("latency_s", float("nan")),
        ("server_bytes_per_s", 0.0),
        ("bytes_per_number", 0.0),
        ("domain_size", 0),
        ("token_share", 2.0),
        ("skip_price", -0.5),
    ],
)
def test_a_bad_field_is_refused_in_one_line(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=[^\n]+$"):
        replace(HAND, **{field: value})


@pytest.mark.parametrize(
    ("num_sites", "bandwidth", "message"),
    [
        (4, 0.0, "bytes_per_s=0: must be a finite number above 0"),
        (4, float("nan"), "bytes_per_s=nan: must be a finite number above 0"),
        (1, 1e6, "num_sites=1: a federation has at least 2"),
    ],
)
@pytest.mark.parametrize("strategy", Strategy)
def test_an_impossible_point_is_refused(
    strategy: Strategy, num_sites: int, bandwidth: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        throughput(HAND, strategy, num_sites, bandwidth)


def test_every_expert_must_be_somewhere() -> None:
    with pytest.raises(ConfigError, match=r"^overlap_share=0\.1: with 8 sites at least 1/8, [^\n]+$"):
        throughput(replace(HAND, overlap_share=0.1), Strategy.SKIP, 8, 1e6)
