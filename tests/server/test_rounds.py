"""The server's half of a round: who is sent what, what comes in, commit or discard, and how long to wait."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fomoe_flwr import mapped, wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.checkpoint import read_checkpoint, save_checkpoint
from fomoe_flwr.codecs import CASTS, Part
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import RunError
from fomoe_flwr.messages import Reply, Task
from fomoe_flwr.model.spec import (
    MOMENTS,
    expert_name,
    expert_of,
    moment_name,
    parameter_shapes,
    standin_name,
)
from fomoe_flwr.model.standins import Fit
from fomoe_flwr.placement import Placement, draw_placement
from fomoe_flwr.server import outer as outer_module
from fomoe_flwr.server import rounds as rounds_module
from fomoe_flwr.server.health import RoutingHealth
from fomoe_flwr.server.outer import with_moments
from fomoe_flwr.server.replies import Inbox, refusing
from fomoe_flwr.server.rounds import (
    Round,
    RoundObserver,
    Server,
    missing,
)
from fomoe_flwr.server.shards import group_names, shared_bundles
from fomoe_flwr.server.state import ServerState
from fomoe_flwr.site.work import resting_of
from tests.server.federation import Answer, answer_to, config_of, constant, play, server_of

LAYERS = 2
FP32 = CASTS["fp32"]
Bundles = dict[int, dict[str, bytes]]


@pytest.fixture
def config() -> RunConfig:
    return config_of(
        "federation.num_sites=4",
        "strategy.overlap=2",
        "strategy.up=fp32",
        "strategy.down=fp32",
        "strategy.outer=average",
        "strategy.norm_bound=10",
    )


# -- shards --------------------------------------------------------------------------------------------------


def state_of(num_experts: int) -> dict[str, Tensor]:
    """A dense tensor and two for each expert, in the order of a model, every value its own."""
    names = ["model.norm.weight"] + [
        expert_name(layer, expert, part)
        for layer in range(LAYERS)
        for expert in range(num_experts)
        for part in ("up_proj", "down_proj")
    ]
    return {name: torch.full((4,), float(index)) for index, name in enumerate(names)}


def residents_of(num_sites: int, num_experts: int, overlap: int) -> list[list[list[int]]]:
    placement = draw_placement(num_sites, num_experts, overlap, LAYERS, seed=0)
    return [placement.residents(site) for site in range(num_sites)]


def belongs(name: str, residents: list[list[int]]) -> bool:
    """Whether a name is in the shard of a site with these residents."""
    expert = expert_of(name)
    return expert is None or expert[1] in residents[expert[0]]


@pytest.mark.parametrize("overlap", [1, 2, 3, 4])
@pytest.mark.parametrize("moments", [False, True], ids=["parameters", "with moments"])
@pytest.mark.parametrize("codec", list(CASTS))
def test_each_site_gets_exactly_its_shard_once(overlap: int, moments: bool, codec: str) -> None:
    """Values as they are on the wire, with their digests; moments in the same bundles as their parameters."""
    state, residents = state_of(8), residents_of(4, 8, overlap)
    if moments:
        state = with_moments(state)
    bundles, digests = shared_bundles(state, residents, range(99), range(4), CASTS[codec])
    for site in range(4):
        named = wire.from_blobs(bundles[site].values())  # refuses a name that comes twice
        assert named.keys() == {
            name for name in state if belongs(name.removeprefix("exp_avg."), residents[site])
        }
        for name, value in named.items():
            assert value.equal(CASTS[codec].round_trip(state[name]))
            assert digests[site][name] == CASTS[codec].digest(state[name])
        assert digests[site].keys() == named.keys()
        if moments:
            parameters = [name for name in named if not name.startswith(MOMENTS)]
            assert {moment_name(m, name) for m in MOMENTS for name in parameters} <= named.keys()


@pytest.mark.parametrize(("overlap", "expert_bundles"), [(1, 1), (2, 1), (3, 3), (4, 1)])
def test_bundles_are_few_and_shared_and_do_not_grow_in_number_with_the_experts(
    overlap: int, expert_bundles: int
) -> None:
    """O_e / gcd(M, O_e) sets of holders have a given site among them: here M = 4. Equal bundles are one object."""
    for num_experts in (8, 32):
        state = state_of(num_experts)
        bundles, _ = shared_bundles(state, residents_of(4, num_experts, overlap), range(99), range(4), FP32)
        assert [len(bundles[site]) for site in range(4)] == [1 + expert_bundles] * 4
        by_key: dict[str, list[bytes]] = {}
        for site in range(4):
            for key, blob in bundles[site].items():
                by_key.setdefault(key, []).append(blob)
        assert all(blob is blobs[0] for blobs in by_key.values() for blob in blobs)
        assert len(by_key.pop("dense")) == 4
        assert {len(blobs) for blobs in by_key.values()} == {overlap}


def test_only_the_sites_asked_get_something() -> None:
    state, residents = state_of(8), residents_of(4, 8, 2)
    everybody, some = (
        shared_bundles(state, residents, range(99), sites, FP32) for sites in (range(4), [1, 3])
    )
    for of_everybody, of_some in zip(everybody, some, strict=True):
        assert of_some == {site: of_everybody[site] for site in (1, 3)}


def test_an_expert_that_nobody_holds_goes_to_nobody() -> None:
    groups = group_names(list(state_of(3)), [[[0], [1]], [[0], [0]]], [0, 1])
    sent = [name for names in groups.values() for name in names]
    assert not [name for name in sent if "experts.2." in name]
    assert expert_name(0, 0, "up_proj") in groups[0, 1]


# -- out -----------------------------------------------------------------------------------------------------


def test_a_site_is_asked_for_its_own_part(config: RunConfig, tmp_path: Path) -> None:
    server = server_of(config, tmp_path)
    assert play(server, 1, answering=[0, 1, 2])
    assert server.begin(2, [0, 1, 3], 60.0) == [0, 1, 3]
    out = server.outgoing([0, 3], training=True)
    assert out.keys() == {0, 3}
    for site, counted in ((0, 1), (3, 0)):  # site 3 has not answered yet
        task = Task.from_json(out[site].task)
        assert (task.run, task.round, task.counted_round) == ("run", 2, counted)
        assert task.site == config.federation.sites[site]
        assert task.residents == server.round.placement.residents(site)
        named = wire.from_blobs(out[site].bundles.values())
        assert named.keys() == {name for name in server.state.tensors if belongs(name, task.residents)}


def test_moments_travel_for_training_only(tmp_path: Path) -> None:
    config = config_of("strategy.outer=local_adamw", "federation.num_sites=2")
    server = server_of(config, tmp_path)
    server.begin(1, [0, 1], 60.0)
    for training in (True, False):
        out = server.outgoing([0], training)
        names = wire.from_blobs(out[0].bundles.values()).keys()
        assert any(name.startswith(MOMENTS) for name in names) == training


def test_there_is_no_round_without_a_model(config: RunConfig, tmp_path: Path) -> None:
    server = Server(config, "run", "", tmp_path)
    assert not server.loaded
    with pytest.raises(RunError, match="no model"):
        server.begin(1, [0], 60.0)


# -- in ------------------------------------------------------------------------------------------------------


def test_a_good_reply_is_in_the_model_and_a_bad_one_leaves_no_trace(
    config: RunConfig, tmp_path: Path
) -> None:
    """Sites 0 and 2 have descended by 1; the others' replies are wrong in one way each."""
    server = server_of(config, tmp_path)
    before = {name: value.clone() for name, value in server.state.tensors.items()}
    out = server.outgoing(server.begin(1, range(4), 60.0), training=True)
    answers = {site: answer_to(out[site], constant(1.0)) for site in (0, 2)}
    answers[1] = answer_to(out[1], constant(float("nan")))
    answers[3] = answer_to(out[3], constant(1.0), site="site-0")
    assert [site for site, answer in answers.items() if server.take(site, *answer)] == [0, 2]
    assert server.round.refused == {"site-1": "not_finite", "site-3": "site"}
    assert server.round.failures.keys() == {"site-1", "site-3"}
    for site, (header, blobs) in answers.items():  # what is refused has crossed the wire too
        assert server.round.up.by_site[site] == len(header) + sum(map(len, blobs.values()))
    assert server.close(2, 0.5, RoundObserver())
    norm = "model.norm.weight"
    torch.testing.assert_close(server.state.tensors[norm], before[norm] - 1)
    assert server.state.counted == {"site-0": 1, "site-2": 1}
    assert server.state.last_losses == {"site-0": 0.5, "site-2": 0.5}
    assert len(server.state.sizes[""].norms) == 2


def test_a_round_below_its_quorum_is_discarded_whole(config: RunConfig, tmp_path: Path) -> None:
    server = server_of(config, tmp_path)
    before = {name: value.clone() for name, value in server.state.tensors.items()}
    for number in (1, 2):
        assert not play(server, number, constant(1.0), answering=[0], needed=2)
        assert (server.state.discarded, server.state.round) == (number, number)
    assert all(value.equal(before[name]) for name, value in server.state.tensors.items())
    assert (server.state.counted, list(server.state.sizes[""].norms)) == ({}, [])
    assert play(server, 3, constant(1.0))
    assert server.state.discarded == 0


def test_an_outlier_is_found_when_all_are_in(config: RunConfig, tmp_path: Path) -> None:
    server = server_of(config, tmp_path)
    before = server.state.tensors["model.norm.weight"].clone()
    assert play(
        server, 1, lambda task, shard: constant(1e4 if task.name == "site-2" else 1.0)(task, shard), needed=3
    )
    assert server.round.refused == {"site-2": "norm"}
    torch.testing.assert_close(server.state.tensors["model.norm.weight"], before - 1)


def test_an_expert_of_which_too_few_holders_answered_is_held_back(config: RunConfig, tmp_path: Path) -> None:
    server = server_of(config, tmp_path)
    before = {name: value.clone() for name, value in server.state.tensors.items()}
    assert play(server, 1, constant(1.0), answering=[0])
    holds_LEM = server.round.placement.holds_LEM
    for name, value in server.state.tensors.items():
        expert = expert_of(name)
        assert value.equal(before[name]) == (expert is not None and not holds_LEM[(*expert, 0)]), name
    assert server.round.held_back == 2 * 8 - holds_LEM[:, :, 0].sum()
    assert (server.state.experts.updated_LE == holds_LEM[:, :, 0]).all()


def test_a_second_answer_is_refused_and_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    server = server_of(config, tmp_path)
    server.outgoing(server.begin(1, range(4), 60.0), training=True)
    assert server.expect_once(1)
    assert not server.expect_once(1)
    assert server.round.refused == {"site-1": "duplicate"}
    assert "site-1" not in server.round.failures  # its first answer counts


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"run": "another"}, "run"),
        ({"num_examples": 0}, "weight"),
        ({"num_examples": -5}, "weight"),
        ({"metrics": {}}, "loss"),
        ({"metrics": {"val_loss": 1e30}}, "loss"),
        ({"metrics": {"val_loss": -1.0}}, "loss"),
    ],
)
def test_an_evaluation_is_held_against_what_was_asked(
    config: RunConfig, tmp_path: Path, changed: dict[str, object], refused: str
) -> None:
    server = server_of(config, tmp_path)
    server.begin(1, range(4), 60.0)
    out = server.outgoing([0, 1], training=False)
    server.take_evaluation(0, answer_to(out[0], metrics={"val_loss": 2.0})[0], {})
    server.take_evaluation(1, answer_to(out[1], **changed)[0], {})
    assert {site: reply.metrics for site, reply in server.round.evaluations.items()} == {0: {"val_loss": 2.0}}
    assert server.round.refused == {"site-1": refused}


def test_before_round_1_stand_ins_alone_are_taken_over(config: RunConfig, tmp_path: Path) -> None:
    """Those of the holders; a site that sends another tensor is refused whole."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, standins=8))
    server = server_of(config, tmp_path)
    assert not server.surveys  # at random there is nothing to fit
    before = {name: value.clone() for name, value in server.state.tensors.items()}
    out = server.outgoing([0, 1], training=False)
    names = [standin_name(layer, part) for layer in range(2) for part in Fit._fields]
    for site, others in ((0, {}), (1, {"model.norm.weight": torch.ones(config.model.d_model)})):
        own = {name: torch.full_like(before[name], site + 1.0) for name in names}
        blobs, _ = wire.encode_update(own | others, FP32, {})
        header, _ = answer_to(out[site], metrics={"val_loss": 2.0}, bundle_digests=bundle_digests(blobs))
        server.take_evaluation(site, header, blobs)
    server.surveyed()
    assert server.round.refused == {"site-1": "unknown_name"}
    held_LE = server.round.placement.holds_LEM[:, :, 0]
    for name, value in server.state.tensors.items():
        if name in names:
            own_E = held_LE[int(name.split(".")[2])].astype(bool)
            assert (value[own_E] == 1).all()
            assert value[~own_E].equal(before[name][~own_E])
        else:
            assert value.equal(before[name]), name


@pytest.mark.parametrize(
    ("wrong", "kind"), [(1e38, "norm"), (1e3, "norm"), (math.nan, "not_finite"), (None, "digest")]
)
def test_stand_ins_that_the_others_find_out_of_the_ordinary_are_not_taken_over(
    config: RunConfig, tmp_path: Path, wrong: float | None, kind: str
) -> None:
    """One holder's would be in the place of its experts at all sites. None: the bundles that it names are not there."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, standins=8))
    server = server_of(config, tmp_path)
    out = server.outgoing(range(4), training=False)
    for site in range(4):
        value = wrong if site == 0 and wrong is not None else 1.0
        own = {
            standin_name(layer, part): torch.full_like(server.state.tensors[standin_name(layer, part)], value)
            for layer in range(2)
            for part in Fit._fields
        }
        blobs, _ = wire.encode_update(own, FP32, {})
        header, _ = answer_to(out[site], metrics={"val_loss": 2.0}, bundle_digests=bundle_digests(blobs))
        server.take_evaluation(site, header, {} if site == 0 and wrong is None else blobs)
    server.surveyed()
    assert server.round.refused == {"site-0": kind}
    assert server.round.loads.keys() == {1, 2, 3}
    for layer in range(2):
        # Of experts with two holders the other's.
        assert (server.state.tensors[standin_name(layer, "bias")] == 1).all()


# -- after a crash, and observers ----------------------------------------------------------------------------


def test_replies_from_before_a_crash_count_where_they_answer_what_is_asked(
    config: RunConfig, tmp_path: Path
) -> None:
    """A damaged one is dropped; the model is that of a round that was never stopped."""
    straight = server_of(config, tmp_path / "straight")
    play(straight, 1, constant(1.0))
    crashed = server_of(config, tmp_path / "crashed")
    out = crashed.outgoing(crashed.begin(1, range(4), 60.0), training=True)
    for site in (0, 1, 2):
        assert crashed.take(site, *answer_to(out[site], constant(1.0)))
    path = next((tmp_path / "crashed/inbox/round_00001/1").glob("bundle-*"))
    path.write_bytes(path.read_bytes()[:-1])

    again = server_of(config, tmp_path / "crashed")
    out = again.outgoing(again.begin(1, range(4), 60.0), training=True)
    assert again.take_saved() == [0, 2]
    assert again.round.up.by_site.keys() == {0, 2}
    assert not again.expect_once(0)
    for site in (1, 3):
        assert again.expect_once(site)
        assert again.take(site, *answer_to(out[site], constant(1.0)))
    again.close(4, 0.5, RoundObserver())
    assert all(value.equal(straight.state.tensors[name]) for name, value in again.state.tensors.items())


def test_replies_to_another_model_do_not_count(config: RunConfig, tmp_path: Path) -> None:
    server = server_of(config, tmp_path)
    out = server.outgoing(server.begin(1, range(4), 60.0), training=True)
    assert server.take(0, *answer_to(out[0]))
    other = server_of(dataclasses.replace(config, seed=7), tmp_path)
    other.outgoing(other.begin(1, range(4), 60.0), training=True)
    assert other.take_saved() == []


def test_a_resumed_server_goes_on_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    config = config_of(
        "federation.num_sites=4", "strategy.overlap=2", "strategy.placement=random", "strategy.outer=nesterov"
    )

    def drifting(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 0.01 * task.round * value for name, value in shard.items()}

    straight = server_of(config, tmp_path / "a")
    for number in (1, 2):
        play(straight, number, drifting, load_LE=[[40] * 8] * 2)
    tensors = {name: value.clone() for name, value in straight.state.tensors.items()}
    outer = {name: value.clone() for name, value in straight.state.outer.state_tensors().items()}
    memory = json.loads(json.dumps(straight.memory()))
    resumed = Server(config, "run", str(tmp_path / "b"), tmp_path / "b/inbox")
    resumed.load(tensors, outer, 2, memory)
    assert resumed.memory() == straight.memory()
    for server in (straight, resumed):
        assert play(server, 3, drifting, load_LE=[[40] * 8] * 2)
    assert all(value.equal(resumed.state.tensors[name]) for name, value in straight.state.tensors.items())
    assert resumed.memory() == straight.memory()


# -- a model in mapped files ---------------------------------------------------------------------------------


def drawn(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that depend on site, round and name; second moments are not negative."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task.name} {task.round}".encode()))
    values = {name: 0.01 * torch.randn(t.shape, generator=generator) for name, t in shard.items()}
    return {name: v.square() if name.startswith("exp_avg_sq.") else v for name, v in values.items()}


def bits(path: Path) -> list[bytes]:
    return [(path / file).read_bytes() for file in ("parameters.safetensors", "outer.safetensors")]


@pytest.mark.parametrize(
    "keys",
    [
        ("outer=nesterov",),
        ("outer=nesterov", "outer_momentum=0.0", "mean=trimmed", "overlap=null"),
        ("outer=adamw", "up=fp32", "down=fp32", "routing=partitioned"),
        ("outer=local_adamw",),
        ("outer=average", "placement=random"),
        ("outer=nesterov", "inner=gradient"),
    ],
    ids=" ".join,
)
def test_files_have_the_bits_that_memory_has_also_after_a_resume(
    keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without holders in round 1 have no buffers yet: the sites 2 and 3 answer only in round 2."""
    monkeypatch.setattr(outer_module, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(mapped, "PIECE_BYTES", 4096)
    given = [f"strategy.{key}" for key in keys] + ["model.router=orthogonal"] * (
        "routing=partitioned" not in keys
    )
    saved: dict[str, list[list[bytes]]] = {}
    for state in ("memory", "files"):
        config = config_of("federation.num_sites=4", *given, f"checkpoint.state={state}")
        folder = tmp_path / state
        folder.mkdir()
        server, saved[state] = server_of(config, folder), []
        for number in (1, 2, 3):
            assert play(server, number, drawn, answering=[0, 1] if number == 1 else None)
            outer = server.state.outer.state_tensors()
            path = save_checkpoint(folder, number, server.state.tensors, outer, {}, keep=9)
            saved[state].append(bits(path))
            if number == 2:
                memory, checkpoint = json.loads(json.dumps(server.memory())), read_checkpoint(path)
                server = Server(config, "run", str(folder), folder / "inbox")
                server.load(checkpoint.parameters, checkpoint.outer, 2, memory)
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "inbox"]
    assert saved["memory"] == saved["files"]
    assert saved["files"][0][0] != saved["files"][1][0] != saved["files"][2][0]


def test_files_take_no_other_model(tmp_path: Path) -> None:
    config = config_of("checkpoint.state=files")
    server = Server(config, "run", str(tmp_path), tmp_path / "inbox")
    with pytest.raises(KeyError, match=r"model\..* is missing \(\d+ such names\)"):
        server.load({"model.norm.weight": torch.ones(32)})
    with pytest.raises(KeyError, match="stranger"):
        server.load({"stranger": torch.ones(32)})


# -- whose fault it is ---------------------------------------------------------------------------------------


def round_of(server: Server, number: int = 1) -> tuple[str, dict[str, bytes]]:
    """An open round, and what site 0 answers to it."""
    sites = server.begin(number, range(4), 60.0)
    return answer_to(server.outgoing(sites, training=True)[0])


def test_whatever_a_reply_makes_a_check_raise_is_a_refusal_of_that_reply(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprised(*_: object) -> None:
        raise ArithmeticError("\x1b[2J" + "x" * 10_000)

    server = server_of(config, tmp_path)
    header, blobs = round_of(server)
    for name in ("check_load", "check_evaluation"):
        monkeypatch.setattr(rounds_module, name, surprised)
    assert not server.take(0, header, blobs)
    server.take_evaluation(1, header, {})
    assert server.round.refused == {"site-0": "damaged", "site-1": "damaged"}
    for reason in server.round.failures.values():
        assert reason.startswith("ArithmeticError at test_rounds.py")
        assert reason.isprintable()
        assert len(reason) <= 500


@pytest.mark.parametrize("trouble", [MemoryError, OSError])
def test_no_memory_and_no_disk_are_the_servers_own_trouble(trouble: type[Exception]) -> None:
    with pytest.raises(trouble), refusing():
        raise trouble


def test_a_name_of_too_many_digits_is_refused_like_any_other(config: RunConfig, tmp_path: Path) -> None:
    """Python refuses to make a number of more than 4,300 digits; its bytes are counted all the same."""
    server = server_of(config, tmp_path)
    header, blobs = round_of(server)
    name = expert_name(0, 7, "gate").replace("7", "1" * 4301)
    blobs["more"] = wire.encode({name: Part(torch.ones(1), torch.float32)})
    digests = bundle_digests(blobs)
    header = dataclasses.replace(Reply.from_json(header), bundle_digests=digests).to_json()
    assert not server.take(0, header, blobs)
    assert server.round.refused == {"site-0": "damaged"}
    assert server.round.up.total > sum(map(len, blobs.values()))


def test_replies_on_which_the_server_failed_are_not_taken_up_again(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the mean is made when it fails: that ends the run, and a resumed one asks the sites anew."""

    def half(*_: object) -> None:
        raise ArithmeticError("in the middle")

    server = server_of(config, tmp_path)
    server.take(0, *round_of(server))
    with monkeypatch.context() as patched:
        patched.setattr(outer_module.RunningMean, "finish", half)
        with pytest.raises(ArithmeticError, match="in the middle"):
            server.close(1, 0.5, RoundObserver())
    again = server_of(config, tmp_path)
    round_of(again)
    assert again.take_saved() == []


class Looking(RoundObserver):
    def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
        self.replies = set(current.replies)
        self.norm = state.tensors["model.norm.weight"].clone()
        (update,) = inbox.tensors(0, {"model.norm.weight": self.norm.shape}).values()
        self.update = update.clone()


def test_an_observer_sees_the_replies_beside_the_model_that_was_sent(
    config: RunConfig, tmp_path: Path
) -> None:
    server, observer = server_of(config, tmp_path), Looking()
    before = server.state.tensors["model.norm.weight"].clone()
    play(server, 1, constant(1.0), observer=observer)
    assert observer.replies == {0, 1, 2, 3}
    assert observer.norm.equal(before)
    assert observer.update.equal(torch.ones_like(before))


def test_who_is_missing_has_neither_answered_nor_failed() -> None:
    placement = Placement(np.ones((1, 1, 3), dtype=bool))
    current = Round(1, placement, (1, 1, 1), ["a", "b", "c"], asked=[2, 0, 1])
    current.replies[0] = Reply("run", 1, "a", 1, {})
    current.fail(1, "lost")
    assert missing(current) == [2]


def test_a_site_that_has_lost_its_state_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reply counts; the site's own log is on another machine."""
    server = server_of(config_of(), tmp_path)
    with caplog.at_level("WARNING"):
        assert play(server, 1, answering=[0, 1], metrics={"train_loss": 1.0, "state_lost": 1.0})
    assert "round 1: the state of site site-1 was missing or damaged" in caplog.text


# -- parts in turn -------------------------------------------------------------------------------------------


def of_turns(*overrides: str) -> RunConfig:
    """Layer 0 is in fragment 0, with the embedding; layer 1 in fragment 1."""
    return config_of(
        "strategy.up=fp32", "strategy.down=fp32", "strategy.outer=average", "train.rounds=9",
        "strategy.fragments=2", *overrides,
    )  # fmt: skip


def due(value: float) -> Answer:
    """A number everywhere in what is due, of the shard that the site holds."""

    def answer(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = parameter_shapes(task.model, task.residents, task.strategy.routing)
        return {
            name: torch.full(shape, value) for name, shape in shapes.items() if name not in resting_of(task)
        }

    return answer


def names_sent(server: Server, number: int) -> dict[int, set[str]]:
    out = server.outgoing(server.begin(number, range(4), 60.0), training=True)
    return {site: set(wire.from_blobs(sent.bundles.values())) for site, sent in out.items()}


def test_only_what_is_due_is_stepped_and_its_experts_are_of_this_round(tmp_path: Path) -> None:
    """Momentum of what rests stays, too."""
    server = server_of(of_turns("strategy.outer=nesterov"), tmp_path)
    for number in (1, 2, 3):
        before = {name: tensor.clone() for name, tensor in server.state.tensors.items()}
        buffers = {name: tensor.clone() for name, tensor in server.state.outer.state_tensors().items()}
        assert play(server, number, due(1.0))
        changed = {name for name, tensor in server.state.tensors.items() if not tensor.equal(before[name])}
        assert changed == before.keys() - server.round.resting
        assert {name for name in changed if name.startswith("model.layers.")} == {
            name for name in before if name.startswith(f"model.layers.{(number - 1) % 2}.")
        }
        for name, tensor in server.state.outer.state_tensors().items():
            if name.removeprefix("momentum_buffer/") in server.round.resting:
                assert tensor.equal(buffers[name])
        assert server.round.held_back == 0
    assert (server.state.experts.updated_LE == [[3], [2]]).all()


def test_who_replied_is_sent_what_was_due_and_others_everything(tmp_path: Path) -> None:
    """Round 2 lacks two replies, round 3 is discarded with another one lost."""
    server = server_of(of_turns(), tmp_path)
    whole = names_sent(server, 1)
    assert server.round.resting
    for site in range(4):
        assert (
            whole[site]
            == parameter_shapes(server.config.model, server.round.placement.residents(site), "skip").keys()
        )
    assert play(server, 1, due(1.0))
    rested = server.round.resting
    sent = names_sent(server, 2)
    assert all(sent[site] == whole[site] - rested != whole[site] for site in range(4))
    assert play(server, 2, due(1.0), answering=[0, 1])
    rested = server.round.resting
    expected = [whole[0] - rested, whole[1] - rested, whole[2], whole[3]]
    assert list(names_sent(server, 3).values()) == expected
    assert not play(server, 3, due(1.0), answering=[0, 2], needed=3)
    expected[1] = whole[1]
    assert list(names_sent(server, 4).values()) == expected
    # And so after a resume.
    memory = json.loads(json.dumps(server.memory()))
    other = Server(of_turns(), "run", str(tmp_path), tmp_path / "inbox")
    other.load(server.state.tensors, None, 3, memory)
    assert list(names_sent(other, 4).values()) == expected
    assert json.loads(json.dumps(other.memory())) == memory


def test_an_expert_that_a_site_did_not_hold_comes_to_it_whosever_turn_it_was(tmp_path: Path) -> None:
    """Before it moves it is due, at all its holders."""
    server = server_of(of_turns("strategy.placement=random", "strategy.reshuffle_every=2"), tmp_path)
    for number in (1, 2):
        assert play(server, number, due(1.0))
    before, rested = server.round.placement, server.round.resting
    sent, after = names_sent(server, 3), server.round.placement
    assert before.holds_LEM.tolist() != after.holds_LEM.tolist()
    for layer, expert in np.ndindex(2, 8):
        name = expert_name(layer, expert, "up_proj")
        moves = before.holders(layer, expert) != after.holders(layer, expert)
        assert (name in rested) == (layer == 0 and not moves)
        for site in after.holders(layer, expert):
            assert (name in sent[site]) == (moves or layer == 1)


def test_an_answer_with_what_rests_is_refused(tmp_path: Path) -> None:
    server = server_of(of_turns(), tmp_path)
    assert play(server, 1, due(1.0))
    rests = sorted(server.round.resting)[0]

    def more(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        update = due(1.0)(task, shard)
        extra = {name: torch.ones(tensor.shape) for name, tensor in shard.items() if name in resting_of(task)}
        return update | (extra if task.name == "site-1" else {})

    assert play(server, 2, more)
    assert server.round.refused == {"site-1": "not_held"}
    assert "this site was not asked for it" in server.round.failures["site-1"]
    assert rests not in server.round.resting


def test_sizes_are_held_against_those_of_the_same_turn(tmp_path: Path) -> None:
    """With a single site there is nobody else: an update as large as the other fragment's is refused."""
    config = of_turns("federation.num_sites=1", "strategy.overlap=1", "strategy.clip=0")
    server = server_of(config, tmp_path)
    assert play(server, 1, due(1.0))
    assert play(server, 2, due(100.0))
    assert play(server, 3, due(2.0))
    assert not play(server, 4, due(2000.0))
    assert server.round.refused == {"site-0": "norm"}
    assert play(server, 5, due(1.0))
    assert {turn: len(sizes.norms) for turn, sizes in server.state.sizes.items() if sizes.norms} == {
        "fragment 0": 3,
        "fragment 1": 1,
    }


def test_experts_that_rest_longer_are_not_measured_by_those_that_do_not(tmp_path: Path) -> None:
    """An expert of one site has come further in its turn than the others: nothing of it is scaled down."""
    config = of_turns("strategy.fragments=1", "strategy.sole_every=4", "strategy.placement=planned")
    server = server_of(config, tmp_path)
    holds_LEM = np.ones((2, 8, 4), dtype=bool)
    holds_LEM[:, :4, 1:] = False
    server.policy._placement = Placement(holds_LEM)
    alone = {
        expert_name(layer, expert, part)
        for layer, expert in np.ndindex(2, 4)
        for part in ("up_proj", "down_proj")
    }

    def answer(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor * (4.0 if name in alone else 1.0) for name, tensor in due(1.0)(task, shard).items()
        }

    for number in range(1, 9):
        assert play(server, number, answer)
        assert (number % 4 == 0) == (not server.round.resting)
        assert server.round.clipped == {}


def test_the_last_round_is_the_one_that_the_run_ends_with(tmp_path: Path) -> None:
    server = server_of(of_turns(), tmp_path)
    server.last_round = 3
    assert play(server, 1, due(1.0))
    assert play(server, 2, due(1.0))
    out = server.outgoing(server.begin(3, range(4), 60.0), training=True)
    assert not server.round.resting
    assert {Task.from_json(sent.task).train.rounds for sent in out.values()} == {3}


def test_routers_that_rest_say_nothing_of_how_sites_agree(tmp_path: Path) -> None:
    config = of_turns()
    server = server_of(config, tmp_path)
    health = RoutingHealth(config, torch.randint(264, (2, 33), generator=torch.Generator().manual_seed(0)))

    class Looks(RoundObserver):
        def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
            health.collected(current, state, inbox)

    for number in (1, 2):
        assert play(server, number, due(1.0), observer=Looks())
        figures = health.finished(server.round, server.state)["by_layer"]
        assert [value is None for value in figures["agreement"]] == [number == 2, number == 1]
