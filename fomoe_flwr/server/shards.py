"""What the sites are sent: which name goes to whom, in bundles that they share, what they have already (`Held`), and
the public model (`Public`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.codecs import Part, Parts, part_name
from fomoe_flwr.codecs.cast import Cast
from fomoe_flwr.codecs.public import Differences
from fomoe_flwr.errors import NotFiniteError, RunError
from fomoe_flwr.mapped import fill, in_pieces
from fomoe_flwr.model.spec import Residents, expert_of
from fomoe_flwr.placement import holder_groups

_ALL: tuple[int, ...] = ()  # key of the dense group, which every site gets

# By site: bundles by key, and the digest of each tensor by name.
Bundles = dict[int, dict[str, bytes]]
Digests = dict[int, dict[str, bytes]]


def group_names(
    names: Sequence[str], residents_by_site: Sequence[Residents], layers: Sequence[int]
) -> dict[tuple[int, ...], list[str]]:
    """Names by the set of sites that get them. Dense names go to all, an expert that nobody holds to nobody.

    Args:
        layers: numbers of the layers with experts, as names have them.
    """
    groups = holder_groups(residents_by_site)
    holders = {(layers[row], expert): sites for (row, expert), sites in groups.items()}
    named: dict[tuple[int, ...], list[str]] = {_ALL: []}
    for name in names:
        expert = expert_of(name)
        if expert is None:
            named[_ALL].append(name)
        elif expert in holders:
            named.setdefault(holders[expert], []).append(name)
    return named


def _groups(
    names: Sequence[str],
    residents_by_site: Sequence[Residents],
    layers: Sequence[int],
    sites: Collection[int],
) -> Iterator[tuple[str, list[int], list[str]]]:
    """Key, receivers and names of each group that somebody gets."""
    for index, (holders, own) in enumerate(group_names(names, residents_by_site, layers).items()):
        receivers = [site for site in sites if holders == _ALL or site in holders]
        if receivers and own:
            yield "dense" if holders == _ALL else f"expert-{index}", receivers, own


def shared_bundles(
    tensors: Mapping[str, Tensor],
    residents_by_site: Sequence[Residents],
    layers: Sequence[int],
    sites: Sequence[int],
    codec: Cast,
) -> tuple[Bundles, Digests]:
    """The bundles of a round, encoded once each."""
    bundles: Bundles = {site: {} for site in sites}
    digests: Digests = {site: {} for site in sites}
    for key, receivers, names in _groups(list(tensors), residents_by_site, layers, sites):
        parts, _ = codec.encode({name: tensors[name] for name in names}, {})
        blobs = wire.encode_bundles(key, parts)
        known: dict[str, bytes] = {}
        for blob in blobs.values():
            known |= wire.blob_digests(blob)
        for site in receivers:
            bundles[site] |= blobs
            digests[site] |= known
    return bundles, digests


def experts_of(residents: Residents, layers: Sequence[int]) -> set[tuple[int, int]]:
    """The residents as (layer, expert) of their names."""
    return {(layers[row], expert) for row, own in enumerate(residents) for expert in own}


@dataclass
class Held:
    """Which sites have which tensors: as messages brought them, or, where they rest, as the sites' own steps left them.

    A round that is discarded leaves it as it was, like the global model: sites go on from their state of the last
    round that counts.
    """

    # By the name of each site whose reply is part of that round: the experts that it held in it.
    holders: dict[str, list[list[int]]] = field(default_factory=dict)
    # Names that were not due in that round. Of the others the model is another one since.
    resting: frozenset[str] = frozenset()

    def commit(self, holders: Mapping[str, Residents], resting: frozenset[str]) -> None:
        """The round counts; these sites attested its tensors."""
        self.holders = {site: [list(experts) for experts in own] for site, own in holders.items()}
        self.resting = resting

    def discard(self, silent: Iterable[str]) -> None:
        """The round does not count. What these sites have, which did not answer well, is not known any more."""
        for site in silent:
            self.holders.pop(site, None)

    def by(self, site: str, layers: Sequence[int]) -> set[tuple[int, int] | None]:
        """Of which experts a site has the tensors (`expert_of`), None being the dense part."""
        if site not in self.holders:
            return set()
        return {None, *experts_of(self.holders[site], layers)}


class Public:
    """The public model: what the sites were sent, bit for bit. A round that is discarded leaves it as it was.

    Args:
        tensors: bf16, after the last round that was committed.
        spare: room for as many, for those that the round in progress sends. Made once: they are needed anyway for the
            digests, and to decode them again for the commit, with all sites waiting, would cost seconds a GB.
    """

    def __init__(self, codec: Differences, tensors: dict[str, Tensor], spare: dict[str, Tensor]) -> None:
        self.tensors, self._spare = tensors, spare
        self._codec = codec
        self._moved: set[str] = set()  # names that were sent in the round in progress

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Have it be this model."""
        fill(self.tensors, state.items())

    def move(self, name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Go towards this tensor in a round: the parts that say how, and what its receivers hold then.

        Raises:
            RunError: the tensor is not finite.
        """
        parts = self._codec.encode(tensor, self.tensors[name])
        try:
            self._spare[name].copy_(self._codec.decode(parts, self.tensors[name]))
        except NotFiniteError:
            raise RunError(
                f"{name}: the server's own model is not finite; resume from an earlier checkpoint with a lower "
                "strategy.outer_lr or train.lr"
            ) from None
        self._moved.add(name)
        return parts, self._spare[name]

    def sent(self, name: str) -> Tensor:
        """A tensor as the sites have it that were sent it in this round."""
        return self._spare[name] if name in self._moved else self.tensors[name]

    def stay(self) -> None:
        """A round begins, or does not count."""
        self._moved = set()

    def commit(self) -> None:
        """The round counts."""
        for name in self._moved:
            self.tensors[name], self._spare[name] = self._spare[name], self.tensors[name]
        self._moved = set()


def bundles_by_holder(
    tensors: Mapping[str, Tensor],
    residents_by_site: Sequence[Residents],
    layers: Sequence[int],
    sites: Mapping[int, str],
    held: Held,
    codec: Cast,
    public: Public | None,
) -> tuple[Bundles, Digests]:
    """The bundles of a round by what the sites have already: those who have a tensor get it only if it was due in the
    last round that counts, for else the model's is still the one that they went on from; all others get it.

    Where there is a public model, who has a tensor gets the difference by which it moves, and others the tensor that
    comes of it. What comes of it does not depend on who has what.

    Args:
        sites: names.
        codec: of tensors that are sent whole.
    """
    bundles: Bundles = {site: {} for site in sites}
    digests: Digests = {site: {} for site in sites}
    has = {site: held.by(name, layers) for site, name in sites.items()}
    if public is not None:
        public.stay()
    for key, receivers, names in _groups(list(tensors), residents_by_site, layers, sites):
        # Behind a new placement the experts of a group may have had other holders each.
        alike: dict[tuple[tuple[int, ...], bool], list[str]] = {}
        for name in names:
            expert = expert_of(name)
            holders = tuple(site for site in receivers if expert in has[site])
            alike.setdefault((holders, name not in held.resting), []).append(name)
        for number, ((holders, moved), own) in enumerate(alike.items()):
            others = [site for site in receivers if site not in holders]
            if not (others or moved):
                continue
            whole: Parts = {}
            moves: Parts = {}
            known: dict[str, bytes] = {}
            for name in in_pieces(own, lambda name: tensors[name].nbytes):
                if public is None:
                    arrived = tensors[name]
                elif moved:
                    parts, arrived = public.move(name, tensors[name])
                    moves |= {
                        part_name(name, suffix): Part(part, part.dtype) for suffix, part in parts.items()
                    }
                else:
                    arrived = public.sent(name)
                known[name] = codec.digest(arrived)
                if others or public is None:
                    whole |= codec.encode({name: arrived}, {})[0]
            subkey = f"{key}-{number}" if number else key
            to_others = wire.encode_bundles(subkey, whole)
            to_holders = to_others
            if public is not None:
                to_holders = wire.encode_bundles(f"{subkey}-moves", moves) if holders else {}
            for site in receivers if moved else others:
                bundles[site] |= to_holders if site in holders else to_others
                digests[site] |= known
    return bundles, digests
