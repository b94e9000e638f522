"""HybridEP's stream model: when to send tokens to experts, and when to send experts to tokens.

Expert parallelism sends tokens (all-to-all); HybridEP gathers some experts' weights as well (all-gather), hidden
behind the compute before the expert layer. The question is the share of the all-to-all that is worth keeping.

Source: HybridEP, arXiv 2510.19470, its stream-based model; `ours` marks what is derived here instead. The letters:

    D       bytes of tokens that a worker dispatches in one layer and direction
    P_E     bytes of the weights a worker starts with: one expert in the paper, so n experts count n times
    B       bandwidth of a worker, bytes/s
    G       workers
    Lat_PE  compute before the expert layer (attention, dense), s
    p       share of the all-to-all that is kept: 0, 1/(G−1), …, 1; p = 1 is plain expert parallelism
    S       workers in a domain, inside which experts are gathered: p = (G−S)/(G−1)

Expert compute is taken to be hidden, and a message to cost nothing beyond its bytes. Memory has no say here: a
planner must hold the answer against what a worker can store. `backward=True` asks about forward and backward
together, in which the other kink can be the best one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.errors import ConfigError


@dataclass(frozen=True)
class ExchangeCase:
    """One expert layer on workers with equal links.

    Raises:
        ConfigError: a size that no cluster has.
    """

    dispatch_bytes: float  # D
    expert_bytes: float  # P_E
    bandwidth_bytes_per_s: float  # B
    workers: int  # G
    pre_expert_s: float  # Lat_PE, forward only

    def __post_init__(self) -> None:
        check_positive(expert_bytes=self.expert_bytes, bandwidth_bytes_per_s=self.bandwidth_bytes_per_s)
        check_not_negative(dispatch_bytes=self.dispatch_bytes, pre_expert_s=self.pre_expert_s)
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}: at least one")


# -- time of a layer -----------------------------------------------------------------------------------------


def all_to_all_s(case: ExchangeCase, token_share: float) -> float:
    """Lat_A2A = D·(G−1)·p / (G·B): tokens to their experts, or back, in seconds (HybridEP, stream-based model).

    Raises:
        ConfigError: a share outside [0, 1].
    """
    check_share(token_share=token_share)
    others = case.workers - 1
    return case.dispatch_bytes * others * token_share / (case.workers * case.bandwidth_bytes_per_s)


def all_gather_s(case: ExchangeCase, token_share: float) -> float:
    """Lat_AG = P_E·(G−1)·(1−p) / B: experts to a worker, in seconds (HybridEP, stream-based model).

    Raises:
        ConfigError: a share outside [0, 1].
    """
    check_share(token_share=token_share)
    return case.expert_bytes * (case.workers - 1) * (1 - token_share) / case.bandwidth_bytes_per_s


def forward_s(pre_expert_s: float, gather_s: float, exchange_s: float) -> float:
    """Lat = max(Lat_PE, Lat_AG) + 2·Lat_A2A, in seconds (HybridEP, stream-based model).

    The all-gather runs beside the compute before the layer; tokens go out and come back.
    """
    return max(pre_expert_s, gather_s) + 2 * exchange_s


def forward_backward_s(pre_expert_s: float, gather_s: float, exchange_s: float) -> float:
    """Lat = max(Lat_PE, Lat_AG) + max(2·Lat_PE, Lat_AG) + 4·Lat_A2A, in seconds (ours).

    Backward, the experts' gradients are reduce-scattered: as many bytes as the all-gather, hidden behind a compute
    twice as long. Gradients of tokens make both ways again.
    """
    return forward_s(pre_expert_s, gather_s, exchange_s) + forward_s(2 * pre_expert_s, gather_s, exchange_s)


def latency_s(case: ExchangeCase, token_share: float, backward: bool = False) -> float:
    """Lat(p), in seconds: `forward_s`, or `forward_backward_s`, of a case.

    Raises:
        ConfigError: a share outside [0, 1].
    """
    total_s = forward_backward_s if backward else forward_s
    return total_s(case.pre_expert_s, all_gather_s(case, token_share), all_to_all_s(case, token_share))


# -- the best share ------------------------------------------------------------------------------------------


def gathers_every_expert(case: ExchangeCase) -> bool:
    """2·D ≥ G·P_E: an expert costs no more than the tokens it saves, hidden or not (HybridEP, stream-based model).

    The same with backward, where both sides double.
    """
    return 2 * case.dispatch_bytes >= case.workers * case.expert_bytes


def gather_window_s(case: ExchangeCase, backward: bool = False) -> float:
    """How long the all-gather may take before one more expert costs more than it saves, for 2·D < G·P_E.

    Lat_PE forward (HybridEP, stream-based model). With backward (ours), between Lat_PE and 2·Lat_PE only the
    forward all-gather shows, so one more expert costs P_E once and saves 4·D/G: worth it if and only if
    G·P_E ≤ 4·D, and then the window is 2·Lat_PE.
    """
    worth_showing_once = case.workers * case.expert_bytes <= 4 * case.dispatch_bytes
    return 2 * case.pre_expert_s if backward and worth_showing_once else case.pre_expert_s


def best_share(case: ExchangeCase, backward: bool = False) -> float:
    """p* = 0 if 2·D ≥ G·P_E, else max(0, 1 − B·window / (P_E·(G−1))) (HybridEP, stream-based model; clamp ours).

    Lat(p) is convex and piecewise linear, so its least value lies at a kink or an end. A worker alone exchanges
    nothing: its share is 1 by definition.
    """
    if case.workers == 1:
        return 1.0
    if gathers_every_expert(case):
        return 0.0
    hidden_bytes = case.bandwidth_bytes_per_s * gather_window_s(case, backward)
    return max(0.0, 1 - hidden_bytes / (case.expert_bytes * (case.workers - 1)))


def best_whole_share(case: ExchangeCase, backward: bool = False) -> float:
    """The best p among 0, 1/(G−1), …, 1: by convexity a neighbour of p*·(G−1) (ours).

    Of two that are equally fast the larger, with fewer experts to hold.
    """
    if case.workers == 1:
        return 1.0
    others = case.workers - 1
    below = math.floor(best_share(case, backward) * others)
    neighbours = [min(below + 1, others) / others, below / others]
    return min(neighbours, key=lambda token_share: latency_s(case, token_share, backward))


# -- the best domain -----------------------------------------------------------------------------------------


def share_of_domain(workers: int, domain_size: float) -> float:
    """p = (G−S) / (G−1): the share of tokens that leave a domain of S, of those that leave a worker (ours).

    Raises:
        ConfigError: a domain smaller than one worker or larger than all.
    """
    _check_domain(workers, domain_size)
    return 1.0 if workers == 1 else (workers - domain_size) / (workers - 1)


def domain_of_share(workers: int, token_share: float) -> float:
    """S = G − p·(G−1), the inverse of `share_of_domain` (ours).

    Raises:
        ConfigError: a share outside [0, 1].
    """
    check_share(token_share=token_share)
    return workers - token_share * (workers - 1)


def best_domain_size(case: ExchangeCase, backward: bool = False) -> float:
    """S* = G if 2·D ≥ G·P_E, else min(G, 1 + B·window/P_E) (ours); need not be whole.

    The second does not depend on G: a domain of fixed size gains less and less as G grows.
    """
    if gathers_every_expert(case):
        return float(case.workers)
    hidden_experts = case.bandwidth_bytes_per_s * gather_window_s(case, backward) / case.expert_bytes
    return min(float(case.workers), 1 + hidden_experts)


def best_whole_domain_size(case: ExchangeCase, backward: bool = False) -> int:
    """The best S among 1, 2, …, G, whether or not it divides G (ours)."""
    return round(domain_of_share(case.workers, best_whole_share(case, backward)))


# -- between sites -------------------------------------------------------------------------------------------


def exchanged_step_bytes(
    *, num_layers: int, step_tokens: float, top_k: int, d_model: int, activation_bytes: float
) -> float:
    """D̂ = 4·L·n·k·d·b_a, the tokens' bytes in one step if all were exchanged (ours).

    Four times: out and back, forward and backward.

    Args:
        step_tokens: n, tokens of a site in a step.
        activation_bytes: b_a, of one number.

    Raises:
        ConfigError: a size that is not above zero.
    """
    check_positive(num_layers=num_layers, step_tokens=step_tokens, top_k=top_k, d_model=d_model)
    check_positive(activation_bytes=activation_bytes)
    return 4 * num_layers * step_tokens * top_k * d_model * activation_bytes


def replication_threshold(
    *,
    expert_sync_bytes: float,
    exchanged_layer_bytes: float,
    local_steps: int,
    exchange_bytes_per_s: float,
    server_bytes_per_s: float,
) -> float:
    """q* = P_e·b_w·a_e·B_x / (4·K·n·k·d·b_a·B_wan): hold an expert here if q ≥ q*, else exchange its tokens (ours).

    q is the share of this site's assignments that go to the expert. Holding it costs one synchronisation a round,
    exchanging its tokens K steps' worth. At K = 1 on one link, with q = 1/G, it is HybridEP's 2·D ≥ G·P_E. Above 1
    holding the expert never pays.

    Args:
        expert_sync_bytes: P_e·b_w·a_e, the expert's weights there and back (a_e = 2 with a server between).
        exchanged_layer_bytes: 4·n·k·d·b_a, `exchanged_step_bytes` of one layer.
        local_steps: K, steps between synchronisations.
        exchange_bytes_per_s: B_x, of the link that tokens would take.
        server_bytes_per_s: B_wan, of the link to the server.

    Raises:
        ConfigError: a value that is not above zero.
    """
    check_positive(
        expert_sync_bytes=expert_sync_bytes,
        exchanged_layer_bytes=exchanged_layer_bytes,
        local_steps=local_steps,
        exchange_bytes_per_s=exchange_bytes_per_s,
        server_bytes_per_s=server_bytes_per_s,
    )
    sync_s = expert_sync_bytes / server_bytes_per_s
    exchange_s = local_steps * exchanged_layer_bytes / exchange_bytes_per_s
    return sync_s / exchange_s


def exchange_bandwidth_threshold(
    *, hit_rate: float, exchanged_step_bytes: float, local_steps: int, sync_s: float, dense_step_s: float
) -> float:
    """B_x* = m·K·D̂ / (sync + K·dense), bytes/s above which exchanging tokens beats skipping them (ours).

    A round is worth the assignments it computes: m in sync + K·(dense + m·expert) seconds when the rest is skipped,
    all of them in sync + K·(dense + expert + (1−m)·D̂/B_x) when it is exchanged. Expert compute and (1−m) drop out.

    Args:
        hit_rate: m, share of assignments whose expert is resident.
        exchanged_step_bytes: D̂, from the function of that name.
        local_steps: K.
        sync_s: synchronisation of the site's shard, once a round.
        dense_step_s: compute of a step outside the experts.

    Raises:
        ConfigError: a value out of its range, or a round that takes no time but for the experts.
    """
    check_share(hit_rate=hit_rate)
    check_positive(exchanged_step_bytes=exchanged_step_bytes, local_steps=local_steps)
    check_not_negative(sync_s=sync_s, dense_step_s=dense_step_s)
    fixed_s = sync_s + local_steps * dense_step_s
    if fixed_s == 0:
        raise ConfigError("sync_s=0, dense_step_s=0: one of them must be above 0")
    return hit_rate * local_steps * exchanged_step_bytes / fixed_s


def break_even_hit_rate(*, shard_sync_s: float, replica_sync_s: float, dense_round_s: float) -> float:
    """m_be = (sync(R) + dense) / (sync(E) + dense): with fewer hits a full replica learns faster (ours).

    A round is worth the assignments it computes, as in `exchange_bandwidth_threshold`, so expert compute drops out.

    Args:
        shard_sync_s: sync(R), of the site's shard, once a round.
        replica_sync_s: sync(E), of the whole model.
        dense_round_s: compute of a round (all its steps) outside the experts.

    Raises:
        ConfigError: a negative time, or a replica's round that takes no time but for the experts.
    """
    check_not_negative(shard_sync_s=shard_sync_s, replica_sync_s=replica_sync_s, dense_round_s=dense_round_s)
    if replica_sync_s + dense_round_s == 0:
        raise ConfigError("replica_sync_s=0, dense_round_s=0: one of them must be above 0")
    return (shard_sync_s + dense_round_s) / (replica_sync_s + dense_round_s)


# -- what cannot be ------------------------------------------------------------------------------------------


def check_positive(**values: float) -> None:
    """Raise ConfigError for the first value that is not a finite number above zero."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):  # nan fails too
            raise ConfigError(f"{name}={value:g}: must be a finite number above 0")


def check_not_negative(**values: float) -> None:
    """Raise ConfigError for the first value that is not a finite number of at least zero."""
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value:g}: must be a finite number, at least 0")


def check_share(**values: float) -> None:
    """Raise ConfigError for the first value that is not a share."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value:g}: a share, between 0 and 1")


def _check_domain(workers: int, domain_size: float) -> None:
    if not 1 <= domain_size <= workers:
        raise ConfigError(f"domain_size={domain_size:g}: between 1 and the number of workers, {workers}")
