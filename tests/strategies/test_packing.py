"""A round's bundles: each site gets its shard and nothing else, and equal bundles are one object."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fomoe_flwr import residual
from fomoe_flwr.model.spec import MOMENTS, expert_of, moment_name
from fomoe_flwr.outer import with_moments
from fomoe_flwr.placement import draw_placement, full_residents
from fomoe_flwr.wire import decode, encode, from_blobs, tensor_digest
from strategies.packing import Shards, group_names

LAYERS = 2


def state_of(num_experts: int) -> dict[str, Tensor]:
    """A dense tensor and two for each expert, in the order of a model, every value its own."""
    names = ["model.norm.weight"]
    for layer in range(LAYERS):
        for expert in range(num_experts):
            names += [
                f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for part in ("up", "down")
            ]
    return {name: torch.full((4,), float(index)) for index, name in enumerate(names)}


def residents_of(num_sites: int, num_experts: int, overlap: int) -> list[list[list[int]]]:
    placement = draw_placement(num_sites, num_experts, overlap, LAYERS, seed=0)
    return [placement.residents(site) for site in range(num_sites)]


def shards_of(
    num_sites: int = 4, num_experts: int = 8, overlap: int = 2, sites: list[int] | None = None
) -> tuple[Shards, dict[str, Tensor], list[list[list[int]]]]:
    state, residents = state_of(num_experts), residents_of(num_sites, num_experts, overlap)
    chosen = list(range(num_sites)) if sites is None else sites
    return Shards(state, residents, chosen, torch.float32), state, residents


def names_in(shards: Shards, site: int) -> list[str]:
    return [name for array in shards.arrays(site).values() for name in decode(array.data)]


def belongs(name: str, residents: list[list[int]]) -> bool:
    """Whether a name is in the shard of a site with these residents."""
    expert = expert_of(name)
    return expert is None or expert[1] in residents[expert[0]]


@pytest.mark.parametrize("overlap", [1, 2, 3, 4])
def test_each_site_gets_exactly_its_shard_once(overlap: int) -> None:
    shards, state, residents = shards_of(overlap=overlap)
    for site in range(4):
        names = names_in(shards, site)
        assert len(names) == len(set(names))
        assert set(names) == {name for name in state if belongs(name, residents[site])}
        assert shards.digests[site] == {name: tensor_digest(state[name], torch.float32) for name in names}


def test_values_are_those_of_the_state() -> None:
    shards, state, _ = shards_of()
    for site in range(4):
        for array in shards.arrays(site).values():
            for name, value in decode(array.data).items():
                assert value.equal(state[name])


def test_the_dense_bundle_is_one_object_for_all() -> None:
    shards, _, _ = shards_of()
    dense = [shards.arrays(site)["dense"] for site in range(4)]
    assert all(array is dense[0] for array in dense)


def test_sites_with_the_same_experts_share_the_object() -> None:
    """Flower's store is addressed by content, but an object that is the same is not even hashed twice."""
    shards, _, _ = shards_of(overlap=2)
    by_key: dict[str, set[int]] = {}
    for site in range(4):
        for key, array in shards.arrays(site).items():
            by_key.setdefault(key, set()).add(id(array))
    assert all(len(objects) == 1 for objects in by_key.values())
    holders = {key: sum(key in shards.arrays(site) for site in range(4)) for key in by_key}
    assert holders.pop("dense") == 4
    assert set(holders.values()) == {2}


@pytest.mark.parametrize(("overlap", "expert_bundles"), [(1, 1), (2, 1), (3, 3), (4, 1)])
def test_the_number_of_bundles_does_not_grow_with_the_number_of_experts(
    overlap: int, expert_bundles: int
) -> None:
    """O_e / gcd(M, O_e) sets of holders have a given site among them: here M = 4."""
    for num_experts in (8, 32, 64):
        shards, _, _ = shards_of(num_experts=num_experts, overlap=overlap)
        assert [len(shards.arrays(site)) for site in range(4)] == [1 + expert_bundles] * 4


def test_moments_travel_with_their_parameters() -> None:
    state = with_moments(state_of(8))
    residents = residents_of(4, 8, 2)
    shards = Shards(state, residents, range(4), torch.float32)
    for site in range(4):
        names = shards.digests[site].keys()
        parameters = {name for name in state_of(8) if belongs(name, residents[site])}
        assert names == parameters | {moment_name(moment, name) for moment in MOMENTS for name in parameters}
        assert len(shards.arrays(site)) == 2  # in the same bundles


def test_only_the_sites_asked_get_something() -> None:
    everybody, state, residents = shards_of()
    some, _, _ = shards_of(sites=[1, 3])
    assert set(some.digests) == {1, 3}
    for site in (1, 3):
        assert some.digests[site] == everybody.digests[site]
        assert set(names_in(some, site)) == {name for name in state if belongs(name, residents[site])}


def test_an_expert_that_nobody_holds_goes_to_nobody() -> None:
    groups = group_names(list(state_of(3)), [[[0], [1]], [[0], [0]]])
    sent = [name for names in groups.values() for name in names]
    assert not [name for name in sent if "experts.2." in name]
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in groups[0, 1]


def test_a_full_replica_is_the_same_for_everybody() -> None:
    state = state_of(4)
    shards = Shards(state, [full_residents(LAYERS, 4)] * 3, range(3), torch.bfloat16)
    assert all(set(names_in(shards, site)) == set(state) for site in range(3))
    for key in shards.arrays(0):
        assert len({id(shards.arrays(site)[key]) for site in range(3)}) == 1


def test_bundles_have_the_wires_dtype() -> None:
    state = {"model.norm.weight": torch.tensor([1.0, 2.0])}
    shards = Shards(state, [[]], [0], torch.bfloat16)
    assert shards.arrays(0)["dense"].data == encode(state, torch.bfloat16)


def projections(num_experts: int) -> dict[str, Tensor]:
    """As `state_of`, with tensors large enough for residuals."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(40, 50, generator=generator) for name in state_of(num_experts)}


def test_a_moved_expert_is_a_residual_for_its_new_holder_and_whole_for_the_others() -> None:
    state = projections(4)
    residents = [[[0, 1], [2]], [[1, 2], [2, 3]]]
    moved = [[[], []], [[1], [3]]]
    shards = Shards(state, residents, [0, 1], torch.float32, moved, ratio=50)
    plain = Shards(state, residents, [0, 1], torch.float32)
    assert shards.digests[0] == plain.digests[0]  # a holder's own expert is never approximated
    at_new = from_blobs(array.data for array in shards.arrays(1).values())
    arrived = residual.unpack(at_new, {})
    for name, tensor in arrived.items():
        assert shards.digests[1][name] == tensor_digest(tensor, torch.float32)
        changed = expert_of(name) in ((0, 1), (1, 3))
        assert torch.equal(tensor, state[name]) != changed, name
    assert set(arrived) == set(plain.digests[1])
    assert shards.moves.experts == 2
    assert shards.moves.tensors == 4
    assert shards.moves.bytes_full == 4 * 2000 * 4
    assert shards.moves.bytes_sent <= shards.moves.bytes_full / 50
    assert shards.moves.bytes_shared == 4 * 2000 * 4  # two layers, two projections
    assert 0.9 < shards.moves.error < 1  # noise has nothing in common with a mean


def test_without_moves_nothing_changes() -> None:
    state, residents = projections(4), [[[0, 1], [2]], [[1, 2], [2, 3]]]
    nothing = [[[], []], [[], []]]
    moved, plain = (
        Shards(state, residents, [0, 1], torch.float32, nothing, 50),
        Shards(state, residents, [0, 1], torch.float32),
    )
    assert moved.digests == plain.digests
    assert [a.data for a in moved.arrays(0).values()] == [a.data for a in plain.arrays(0).values()]
