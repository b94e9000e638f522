"""What a site checks before it works, and what it keeps of what its encoder has not sent yet."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.codecs import LOSSY, CodecState, Lossily, Parts, decode, up_codec
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.inputs import Inputs, short
from fomoe_flwr.server.run import inputs_of_run
from fomoe_flwr.site.identity import state_folder
from fomoe_flwr.site.memory import Memory
from fomoe_flwr.site.state import load_state
from fomoe_flwr.site.work import open_corpus, own_inputs
from strategies.local_grid import LocalGrid
from tests.clients.helpers import site_task
from tests.conftest import Compose
from tests.data.test_tokenizer import train_bpe
from tests.site.test_memory import settings, work
from tests.strategies.helpers import run


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Recorder(Lossily):
    """Keeps copies of what the last update was encoded from and what was to be remembered of it."""

    before: CodecState
    update: dict[str, Tensor]
    after: CodecState

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        Recorder.before = {name: value.clone() for name, value in state.items()}
        Recorder.update = {name: value.clone() for name, value in named.items()}
        parts, errors = super().encode(named, state)
        Recorder.after = {name: value.clone() for name, value in errors.items()}
        return parts, errors


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("up", LOSSY)
def test_what_was_not_sent_comes_back_from_the_round_that_counts(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: str, warm: bool
) -> None:
    """Round 2's reply is lost, so that round 3 goes on from round 1; a cold site has only its disk."""
    config = small(f"strategy.up={up}", "strategy.feedback=0.5").config
    codec = up_codec(config.strategy)
    assert isinstance(codec, Lossily)
    monkeypatch.setattr(
        "fomoe_flwr.site.work.up_codec", lambda strategy: Recorder(codec.lossy, codec.feedback)
    )
    memory, errors = Memory(), {0: {}}
    for round_, counted in ((1, 0), (2, 1), (3, 1), (4, 3)):
        if not warm:
            memory = Memory()
        answer = work(config, tmp_path, memory, round_, counted_round=counted)
        assert same(Recorder.before, errors[counted])
        shapes = {name: value.shape for name, value in Recorder.update.items()}
        sent = decode(codec, wire.from_blobs(answer.bundles.values()), shapes)
        for name, update in Recorder.update.items():
            wanted = update + 0.5 * errors[counted][name] if counted else update
            torch.testing.assert_close(sent[name] + Recorder.after[name], wanted)
        # It is in the file of this round only if the update was encoded before the state was saved.
        folder = state_folder(site_task(config, round_), settings(tmp_path))
        assert same(load_state(folder, round_, 0).encoder, Recorder.after)
        assert any(error.any() for error in Recorder.after.values())
        errors[round_] = Recorder.after
    assert not same(errors[1], errors[2])


# -- its inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["corpus", "tokenizer"])
def test_a_site_with_another_tokenizer_or_text_refuses_with_both(
    small: Compose, tmp_path: Path, corpus_dir: Path, changed: str
) -> None:
    """At the same path as the server's, on a machine of its own."""
    tokenizer = tmp_path / "tokenizer.json"
    train_bpe(tokenizer)
    config = small("model.vocab_size=300", f"data.tokenizer={tokenizer}").config
    corpus = open_corpus(config.data, 300)
    task = dataclasses.replace(site_task(config, 1), inputs=inputs_of_run(config, corpus))
    assert own_inputs(task, corpus, settings(tmp_path)) == task.inputs
    theirs = tmp_path / "theirs"
    shutil.copytree(corpus_dir, theirs)
    if changed == "corpus":
        (theirs / "dance" / "0.txt").write_text("another text\n")
    else:
        tokenizer.write_text(tokenizer.read_text() + "\n")
    other = open_corpus(dataclasses.replace(config.data, path=str(theirs)), 300)
    with pytest.raises(ConfigError, match="site site-1: not what the run goes by") as error:
        own_inputs(task, other, settings(tmp_path))
    ours = getattr(task.inputs, changed)
    assert f"{short(getattr(other, 'digest' if changed == 'corpus' else changed))}, before {ours}" in str(
        error.value
    )


def test_text_of_its_own_may_change_where_an_operator_gave_it(
    small: Compose, tmp_path: Path, corpus_dir: Path
) -> None:
    """In a simulation nobody but the run's own command could have asked for it."""
    config: RunConfig = small("data.partition=own").config
    config.federation.sites[1].data_path = str(corpus_dir)
    corpus = open_corpus(dataclasses.replace(config.data, partition="own"), 264)
    task = dataclasses.replace(
        site_task(config, 1), inputs=Inputs(corpus="text:before", split="the server's")
    )
    operated = dataclasses.replace(settings(tmp_path), partition=None)
    found = own_inputs(task, corpus, operated)
    assert (found.corpus, found.partition) == (short(corpus.digest), "own")
    with pytest.raises(ConfigError, match="before text:before"):
        own_inputs(task, corpus, dataclasses.replace(operated, partition=1))


def test_without_text_at_the_server_the_sites_say_what_the_common_corpus_is(
    small: Compose, tmp_path: Path, corpus_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A site whose text grew goes on, and the server's log says so."""
    own = tmp_path / "own"
    shutil.copytree(corpus_dir, own)
    composed = small("train.eval_batches=0", "train.rounds=1", "federation.num_sites=2", "strategy.overlap=1")
    grid = partial(LocalGrid, node_configs={1: {"data-path": str(own)}})
    run(composed, grid_type=grid)  # type: ignore[arg-type]
    checkpoint = read_checkpoint(checkpoint_path(composed.run_dir, 1))
    assert checkpoint.manifest["memory"]["corpus"] == short(open_corpus(composed.config.data, 264).digest)
    assert checkpoint.manifest["memory"]["own_corpora"].keys() == {"site-1"}
    (own / "dance" / "0.txt").write_text("another text\n")
    open_corpus.cache_clear()
    resumed = dataclasses.replace(composed)
    resumed.config.resume, resumed.config.train.rounds = str(composed.run_dir), 2
    with caplog.at_level("WARNING", logger="fomoe"):
        run(resumed, grid_type=grid)  # type: ignore[arg-type]
    assert "round 2: site site-1: its own text is another now" in caplog.messages
