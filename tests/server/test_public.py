"""The public model: whatever happens, all sites hold the same bits, and those of a run that sends everything whole."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.checkpoint import read_checkpoint, save_checkpoint
from fomoe_flwr.codecs import CASTS, down_differences, grouped, nbytes, received
from fomoe_flwr.codecs.blocks import Int
from fomoe_flwr.codecs.public import Differences
from fomoe_flwr.codecs.topk import TopK
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import DtypeError, NotFiniteError, RunError, WireError
from fomoe_flwr.messages import Task
from fomoe_flwr.model.spec import expert_of, parameter_shapes
from fomoe_flwr.server.rounds import Outgoing, RoundObserver, Server
from fomoe_flwr.server.shards import Public
from fomoe_flwr.site.work import resting_of
from tests.server.federation import answer_to, config_of, server_of

SITES = range(4)

# -- one tensor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lossy", [Int(8), Int(4), TopK(density=0.25)], ids=str)
def test_the_public_tensor_comes_to_what_bf16_would_have_sent(lossy: Int | TopK) -> None:
    """What a message loses is in the next: with a model that stays, nothing is left in the end."""
    codec = Differences(lossy)
    generator = torch.Generator().manual_seed(0)
    model = torch.randn(70, 90, generator=generator)
    public = torch.zeros(70, 90, dtype=torch.bfloat16)
    errors = []
    for _ in range(12):
        parts = codec.encode(model, public)
        assert nbytes(codec, [model.shape]) == sum(part.nbytes for part in parts.values())
        public = codec.decode(parts, public)
        errors.append(float((public.float() - model.bfloat16().float()).norm()))
    assert public.dtype == torch.bfloat16
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * float(model.norm())


def test_what_has_few_dimensions_travels_whole_in_two_bytes() -> None:
    codec, norm = Differences(Int(4)), torch.randn(50)
    parts = codec.encode(norm, torch.zeros(50, dtype=torch.bfloat16))
    assert nbytes(codec, [(50,)]) == 100
    assert codec.decode(parts, None).equal(norm.bfloat16())


def test_parts_that_no_encoder_makes_are_refused_by_name() -> None:
    codec, public = Differences(Int(8)), {"a": torch.zeros(8, 8, dtype=torch.bfloat16)}
    parts = {f"a:{suffix}": part for suffix, part in codec.encode(torch.ones(8, 8), public["a"]).items()}
    with pytest.raises(WireError, match=r"^a: came as a difference to what is not here$"):
        received(codec, parts, {})
    with pytest.raises(WireError, match=r"^a: "):
        received(codec, dict(list(parts.items())[1:]), public)
    with pytest.raises(WireError, match=r"^a: "):
        received(codec, parts | {"a": public["a"]}, public)
    with pytest.raises(DtypeError, match=r"^a: "):
        received(codec, {"a": torch.ones(8, 8)}, public)
    bad = codec.encode(torch.full((8, 8), float("nan")), public["a"])
    with pytest.raises(NotFiniteError, match=r"^a: "):
        received(codec, {f"a:{suffix}": part for suffix, part in bad.items()}, public)


def test_a_model_that_is_not_finite_is_the_servers_own_fault() -> None:
    public = Public(Differences(Int(8)), *({"a": torch.zeros(8, 8, dtype=torch.bfloat16)} for _ in range(2)))
    with pytest.raises(RunError, match="the server's own model is not finite"):
        public.move("a", torch.full((8, 8), float("inf")))


# -- a federation --------------------------------------------------------------------------------------------


def drawn(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """Updates that depend on the site, the round and what the site was sent."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task.name} {task.round}".encode()))
    update = {
        name: 0.01 * torch.randn(tensor.shape, generator=generator) + 0.1 * tensor.float()
        for name, tensor in sorted(shard.items())
    }
    return {name: tensor for name, tensor in update.items() if name not in resting_of(task)}


class Site:
    """What a site does with a message, and what is on its disk: the public tensors of its rounds."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Tensor]] = {}

    def hear(self, outgoing: Outgoing) -> dict[str, Tensor]:
        """What arrives, as `fomoe_flwr.site.work` makes it of a message."""
        task = Task.from_json(outgoing.task)
        self.kept = {round_: kept for round_, kept in self.kept.items() if round_ <= task.counted_round}
        codec = down_differences(task.strategy)
        assert codec is not None
        parts = wire.from_blobs(outgoing.bundles.values())
        before = self.kept.get(task.counted_round, {})
        arrived = received(codec, parts, before)
        names = parameter_shapes(task.model, task.residents, task.strategy.routing)
        self.kept[task.round] = {name: tensor for name, tensor in before.items() if name in names} | arrived
        return arrived


class Federation:
    """A server that may be killed, and its sites."""

    def __init__(self, config: RunConfig, folder: Path, whole: bool = False) -> None:
        self.config, self.folder, self.whole = config, folder, whole
        folder.mkdir()
        self.server, self.sites = server_of(config, folder), [Site() for _ in SITES]
        # What must not come whole: by site, what it was sent in the last round that counts; and what rested in it.
        self.held: dict[int, set[str]] = {}
        self.rested: frozenset[str] = frozenset()
        self._saved: dict[int, tuple[dict[int, set[str]], frozenset[str], str]] = {}

    @property
    def public(self) -> dict[str, Tensor]:
        assert self.server.state.public is not None
        return self.server.state.public.tensors

    def ask(self, number: int, events: Sequence[str]) -> dict[int, Outgoing]:
        """Open a round for the sites that are not away."""
        sites = self.server.begin(number, [s for s in SITES if events[s] != "away"], 60.0)
        if self.whole:
            assert self.server.state.held is not None
            self.server.state.held.holders = {}
        out = self.server.outgoing(sites, training=True)
        for site, sent in out.items():
            parts = grouped(wire.from_blobs(sent.bundles.values()))
            moved = {name for name, own in parts.items() if "" not in own}
            large = {name for name in parts if self.public[name].ndim > 1}
            held = set() if self.whole else self.held.get(site, set())
            assert moved == large & held
            assert not parts.keys() & held & self.rested
        saved = self.server.take_saved()
        return {site: sent for site, sent in out.items() if site not in saved}

    def answer(self, out: Mapping[int, Outgoing], events: Sequence[str]) -> None:
        for site, sent in out.items():
            if events[site] == "wiped":
                self.sites[site].kept = {}
                if self.held.get(site) and not self.whole:
                    with pytest.raises(WireError, match="came as a difference to what is not here"):
                        self.sites[site].hear(sent)
            elif events[site] != "unheard":
                arrived = self.sites[site].hear(sent)
                if events[site] == "refused":
                    arrived = {name: -tensor for name, tensor in arrived.items()}
                shard = self.sites[site].kept[Task.from_json(sent.task).round]
                start = wire.digests(arrived, CASTS["bf16"])
                header, blobs = answer_to(sent, drawn, shard, start_digests=start)
                # By its digests a good reply attests the bits.
                if events[site] != "lost":
                    assert self.server.take(site, header, blobs) == (events[site] == "good")

    def play(self, number: int, events: Sequence[str], needed: int) -> None:
        out = self.ask(number, events)
        self.answer(out, events)
        current = self.server.round
        if self.server.close(needed, 0.5, RoundObserver()):
            self.held, self.rested = {}, current.resting
            for site in current.replies:
                residents, names = current.placement.residents(site), self.public
                self.held[site] = {
                    name for name in names if (e := expert_of(name)) is None or e[1] in residents[e[0]]
                }
                kept = self.sites[site].kept[number]
                assert all(tensor.equal(self.public[name]) for name, tensor in kept.items())
                assert kept.keys() == self.held[site]
        else:
            self.held = {
                site: held
                for site, held in self.held.items()
                if site in current.replies or events[site] == "away"
            }

    def save(self, number: int) -> None:
        state = self.server.state
        outer, memory = state.outer.state_tensors(), json.dumps(self.server.memory())
        save_checkpoint(self.folder, number, state.tensors, outer, {}, keep=99, public=self.public)
        self._saved[number] = dict(self.held), self.rested, memory

    def resume(self, number: int) -> None:
        checkpoint = read_checkpoint(self.folder / f"checkpoints/round_{number:05d}")
        held, self.rested, text = self._saved[number]
        self.held, memory = dict(held), json.loads(text)
        self.server = Server(self.config, "run", str(self.folder), self.folder / "inbox")
        self.server.load(checkpoint.parameters, checkpoint.outer, number, memory, checkpoint.public)


def assert_same(one: Federation, other: Federation) -> None:
    for tensors, others in (
        (one.public, other.public),
        (one.server.state.tensors, other.server.state.tensors),
    ):
        assert all(tensor.equal(others[name]) for name, tensor in tensors.items())


EVENT = st.sampled_from(["good", "good", "good", "good", "away", "lost", "unheard", "refused", "wiped"])
ROUND = st.tuples(st.tuples(*[EVENT] * len(SITES)), st.sampled_from([1, 1, 3]))
TINY = ("model.d_model=16", "model.num_experts=4", "model.d_expert=8", "model.num_layers=2")


ALL_GOOD = ("good",) * len(SITES)


@settings(max_examples=10)
# Who is silent in a round that is discarded is sent everything whole, the others are not; and the same after a kill.
@example(
    "int4", 1, [(ALL_GOOD, 1), (("good", "lost", "good", "unheard"), 3), (ALL_GOOD, 1), (ALL_GOOD, 1)], 4, 2
)
@example(
    "int8", 2, [(ALL_GOOD, 1), (("good", "lost", "good", "unheard"), 3), (ALL_GOOD, 1), (ALL_GOOD, 1)], 4, 2
)
@given(
    st.sampled_from(["int8", "int4", "topk"]),
    st.sampled_from([1, 2]),
    st.lists(ROUND, min_size=4, max_size=4),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_whatever_happens_it_is_the_run_in_which_every_message_is_whole(
    down: str, fragments: int, rounds: list[tuple[tuple[str, ...], int]], killed: int, back: int
) -> None:
    """Experts change their holders every second round and when a site is away. In round `killed`, if there is one, the
    server dies with all answers in, and goes on from a checkpoint `back` rounds before."""
    config = config_of(
        f"strategy.down={down}",
        f"strategy.fragments={fragments}",
        "train.rounds=9",
        "strategy.placement=random",
        "strategy.reshuffle_every=2",
        "strategy.outer=average",
        *TINY,
    )
    start = max(killed - 1 - back, 0)
    # A disk that was lost in between cannot be lost again.
    killing = killed <= len(rounds) and not any("wiped" in events for events, _ in rounds[start:killed])
    with tempfile.TemporaryDirectory() as folder:
        whole, sparse = (Federation(config, Path(folder) / n, n == "whole") for n in ("whole", "sparse"))
        for number, (events, needed) in enumerate(rounds, 1):
            if killing and number == start + 1:
                sparse.save(start)
            if killing and number == killed:
                sparse.answer(sparse.ask(number, events), events)
                sparse.resume(start)
                for again in range(start + 1, number):
                    sparse.play(again, *rounds[again - 1])
            for federation in (whole, sparse):
                federation.play(number, events, needed)
            assert_same(whole, sparse)


@pytest.mark.parametrize("down", ["int4", "topk"])
def test_files_have_the_bits_that_memory_has_also_after_a_resume(down: str, tmp_path: Path) -> None:
    saved = {}
    for kind in ("memory", "files"):
        config = config_of(f"strategy.down={down}", f"checkpoint.state={kind}", *TINY)
        federation = Federation(config, tmp_path / kind)
        for number in (1, 2, 3):
            federation.play(number, ["good"] * 4, 1)
            federation.save(number)
            if number == 2:
                federation.resume(2)
        paths = sorted((tmp_path / kind).glob("checkpoints/*/*.safetensors"))
        assert [path.name for path in paths[:3]] == [
            "outer.safetensors",
            "parameters.safetensors",
            "public.safetensors",
        ]
        saved[kind] = [path.read_bytes() for path in paths]
    assert saved["memory"] == saved["files"]


def test_a_run_that_goes_on_with_another_down_sends_whole_what_nobody_holds(tmp_path: Path) -> None:
    """From bf16 to int4, which has no public model yet; and back, where nobody asks for it."""
    server = server_of(config_of("strategy.down=bf16"), tmp_path)
    memory = json.loads(json.dumps(server.memory()))
    tensors = {name: tensor.clone() for name, tensor in server.state.tensors.items()}
    other = Server(config_of("strategy.down=int4"), "run", "", tmp_path / "inbox")
    other.load(tensors, None, 1, memory | {"public": {"site-0": [[0], [0]]}})
    out = other.outgoing(other.begin(2, SITES, 60.0), training=True)
    for sent in out.values():
        for name, tensor in wire.from_blobs(sent.bundles.values()).items():
            assert tensor.equal(CASTS["bf16"].round_trip(tensors[name]))
    public = other.state.public
    assert public is not None
    back = Server(config_of("strategy.down=bf16"), "run", "", tmp_path / "inbox")
    back.load(tensors, None, 1, memory, public.tensors)
    assert back.state.public is None


def test_sites_evaluate_the_servers_model_and_not_the_public_one(tmp_path: Path) -> None:
    federation = Federation(config_of("strategy.down=int4"), tmp_path / "run")
    federation.play(1, ["good"] * 4, 1)
    out = federation.server.outgoing([0], training=False)
    for name, tensor in wire.from_blobs(out[0].bundles.values()).items():
        assert tensor.equal(CASTS["bf16"].round_trip(federation.server.state.tensors[name]))
