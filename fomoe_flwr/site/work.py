"""One message at one site, without Flower: bundles and a task in, bundles and a reply out."""

from __future__ import annotations

import functools
import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.codecs import decode, down_codec, down_differences, received, up_codec
from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import (
    MixedStream,
    Stream,
    StreamedText,
    TokenCorpus,
    TokenStream,
    check_vocabulary,
    deal_documents,
    load_tokenizer,
    prepare,
    validation_batches,
    validation_documents,
)
from fomoe_flwr.data.shards import Choose
from fomoe_flwr.data.statistics import warn_of_own_text
from fomoe_flwr.deploy.channel import Answer
from fomoe_flwr.engine import EngineState
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.errors import ConfigError, WireError
from fomoe_flwr.evaluation import evaluate, survey
from fomoe_flwr.files import expanded
from fomoe_flwr.inputs import OWN_TEXT, Inputs, differences, short
from fomoe_flwr.messages import AHEAD, OWN, STATE_LOST, Deal, Reply, Task
from fomoe_flwr.model.base import read_shard
from fomoe_flwr.model.spec import expert_layers, parameters
from fomoe_flwr.site import delay
from fomoe_flwr.site.devices import devices_of
from fomoe_flwr.site.identity import NodeSettings, data_of, own_task, state_folder, state_root
from fomoe_flwr.site.memory import Memory, Trained
from fomoe_flwr.site.state import SiteState, discard_later, forget_old_runs, load_state, save_state
from fomoe_flwr.store.at_site import fetch_shard, forget, send_reply
from fomoe_flwr.store.links import Patience
from fomoe_flwr.store.messages import StoredShard
from fomoe_flwr.turns import resting, takes_turns

log = logging.getLogger("fomoe.site")

# A sign that the work goes on. It is called with the name of the phase wherever a round may be broken off, and raises
# if it shall be.
Beat = Callable[[str], None]
# Opening the corpus. The first time it is read and tokenised, which may take any time.
DATA = "data"
WORK = "work"
# Waiting for bytes to or from an object store.
TRANSFER = "transfer"

MOST_SAID = 32  # parts of a mixture, in a reply

# Kept open in a process: simulated sites may each have text of their own.
CORPORA = 64


def fetch(
    task_text: str, stored: str, settings: NodeSettings, seconds: float, beat: Beat
) -> dict[str, bytes]:
    """The bundles of a message that are in an object store, by key.

    Args:
        stored: the StoredShard as JSON.
        seconds: until nobody waits for the answer any more.

    Raises:
        FomoeError: the message cannot be read, or is another site's; StoreError: one of them could not be fetched.
    """
    shard = StoredShard.from_json(stored)
    return fetch_shard(shard, *_by_store(task_text, shard, settings, seconds), lambda: beat(TRANSFER))


def send(
    blobs: dict[str, bytes], task_text: str, stored: str, settings: NodeSettings, seconds: float, beat: Beat
) -> str:
    """Write a reply's bundles into the object store; returns what the answer says of them, as JSON.

    Args:
        blobs: emptied. A reply may have none, and then nothing is written or said.
        stored: the StoredShard of the message.

    Raises:
        StoreError, WorkerError: they could not be written.
    """
    shard = StoredShard.from_json(stored)
    folder, shared, patience = _by_store(task_text, shard, settings, seconds)
    written = ""
    if blobs:
        written = send_reply(blobs, shard, folder, shared, patience, lambda: beat(TRANSFER)).to_json()
    forget(shard, folder)
    return written


def answer(
    kind: str,
    task_text: str,
    stored: str,
    blobs: dict[str, bytes],
    settings: NodeSettings,
    memory: Memory,
    beat: Beat,
    seconds: float,
) -> Answer:
    """`perform`, and before and after it what travels by an object store: one after the other.

    Args:
        stored: the StoredShard as JSON; empty: the bundles came with the message, and go with the answer.
        seconds: until nobody waits for the answer any more.

    Raises:
        FomoeError, FloatingPointError: as `fetch`, `perform` and `send`.
    """
    began = time.monotonic()

    def left_s() -> float:
        return seconds - (time.monotonic() - began)

    if stored:
        blobs = fetch(task_text, stored, settings, left_s(), beat)
    blobs, reply = perform(kind, task_text, blobs, settings, memory, beat)
    written = send(blobs, task_text, stored, settings, left_s(), beat) if stored else ""
    return Answer(blobs, reply.to_json(), written)


def _by_store(
    task_text: str, shard: StoredShard, settings: NodeSettings, seconds: float
) -> tuple[Path, Path | None, Patience]:
    """The site's folder, that of a `file://` store, and how long to wait."""
    task = own_task(task_text, settings)
    # Of a simulated site the server's own. A real one reads and writes where its operator said, and nowhere else.
    store_dir = settings.store_dir if settings.partition is None else shard.folder
    return (
        state_folder(task, settings),
        None if store_dir is None else expanded(store_dir),
        # Another seed for each site, so that they do not come back all at once; and a second at the least, for a reply
        # that comes late may be refused in peace.
        Patience(max(seconds, 1.0), seed=zlib.crc32(task.name.encode())),
    )


def perform(
    kind: str, task_text: str, blobs: dict[str, bytes], settings: NodeSettings, memory: Memory, beat: Beat
) -> tuple[dict[str, bytes], Reply]:
    """Train or evaluate, and what to answer.

    Args:
        kind: `train` or `evaluate`.
        task_text: the Task as JSON.
        blobs: the shard's bundles by key; emptied, so that they can be freed before the work is done.

    Raises:
        FomoeError: a message that this version cannot read, that is another site's, or whose work cannot be done.
        FloatingPointError: the loss is not finite.
    """
    task = own_task(task_text, settings)
    with memory.serving(task.run):
        parts = wire.from_blobs(blobs.values())
        blobs.clear()
        if kind == "evaluate":
            return evaluate_shard(task, _whole(task, parts), settings, memory, beat)
        return train_round(task, parts, settings, memory, beat)


def _whole(task: Task, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shard of a message of whole tensors."""
    return decode(down_codec(task.strategy), parts, {name: part.shape for name, part in parts.items()})


def _shard(task: Task, parts: dict[str, Tensor], state: SiteState) -> dict[str, Tensor]:
    """The tensors that a message to train brings, by what this site was sent in the round that it goes on from.

    Raises:
        WireError: the parts are damaged, or differences to what is not here.
    """
    if (differences := down_differences(task.strategy)) is None:
        return _whole(task, parts)
    try:
        return received(differences, parts, state.public)
    except WireError as error:
        raise _cannot_go_on(task, state, str(error)) from error


def _cannot_go_on(task: Task, state: SiteState, reason: str) -> WireError:
    return WireError(
        f"site {task.name}: cannot go on from what it was sent in round {task.counted_round}"
        f"{', which is lost here' if state.lost else ''}; the next message will be whole ({reason})"
    )


def _start(task: Task, arrived: dict[str, Tensor], state: SiteState) -> tuple[dict[str, Tensor], bool]:
    """What a round begins from, and whether all of it was known before the message came (strategy.delay=1).

    What the message does not bring goes on from where it was at the end of the round that counts.

    Raises:
        WireError: that is not here.
    """
    start, known = dict(arrived), False
    if task.strategy.delay:
        start, known = delay.start(task, arrived, state.public, state.sent, state.round)
    if not takes_turns(task.strategy):
        return start, known
    for name in _names(task):
        if name not in arrived:
            if name not in state.local:
                raise _cannot_go_on(task, state, f"{name}: did not come, and is not here")
            start[name] = state.local[name]
    return start, known


def _names(task: Task) -> Collection[str]:
    """The parameters that the site holds."""
    return parameters(task.model, task.residents, task.strategy.routing).keys()


def resting_of(task: Task) -> frozenset[str]:
    """The parameters that the site holds and that are not due in this round."""
    if not takes_turns(task.strategy):
        return frozenset()
    layers, sole, moving = expert_layers(task.model), set(), set()
    for row, experts in enumerate(task.residents):
        sole |= {(layers[row], expert) for expert in task.sole[row]}
        until = zip(experts, task.until[row], strict=True)
        moving |= {(layers[row], expert) for expert, last in until if last == task.round}
    last_round = task.train.rounds
    return resting(_names(task), task.model, task.strategy, task.round, last_round, sole, moving)


def train_round(
    task: Task, parts: dict[str, Tensor], settings: NodeSettings, memory: Memory, beat: Beat
) -> tuple[dict[str, bytes], Reply]:
    """K local steps from the shard, by the site's own optimizer state and place in its data.

    Args:
        parts: of the shard; emptied when they are no longer needed.

    Raises:
        FomoeError: wrong data, device or shard.
        FloatingPointError: the loss is not finite.
    """
    use_cpu(task.train.threads)
    beat(DATA)
    stream = site_stream(task, settings, memory)
    inputs = own_inputs(task, stream.corpus, settings)
    beat(WORK)
    folder = state_folder(task, settings)
    if task.round == 1 and folder.parent.parent == state_root(settings):
        forget_old_runs(state_root(settings), task.name, folder)
    discard_later(folder, task.counted_round)
    trained = memory.take_begun(task)
    state = trained.state if trained else _state_of(task, folder, memory)
    arrived = _shard(task, parts, state)
    parts.clear()
    delayed, known = bool(task.strategy.delay), True
    metrics = {STATE_LOST: 1.0} if state.lost else {}
    public: dict[str, Tensor] = {}
    if delayed or down_differences(task.strategy) is not None:
        names = _names(task)
        public = {name: tensor for name, tensor in state.public.items() if name in names} | arrived
    # With a delay what is loaded is known here alone; what came is what the next round begins from.
    start = wire.digests(arrived, down_codec(task.strategy)) if delayed else b""
    if trained is None:
        shard, known = _start(task, arrived, state)
        came = set(arrived)
        # Else the message would be in memory until the reply is made.
        del arrived
        trained = _train(task, shard, came, state, stream, settings, memory, beat)
    blobs, report = trained.blobs, trained.report
    new_state = SiteState(
        task.round,
        trained.position,
        task.train.rounds,
        trained.engine,
        trained.encoder,
        public,
        local=trained.local,
        pending=trained.pending,
        stream=trained.stream,
    )
    if delayed:
        new_state.sent = delay.sent(task, blobs)
        metrics[AHEAD] = float(known)
    # The last chance to break off: from here on there is a state of this round.
    beat(WORK)
    save_state(folder, new_state, task.counted_round, task.checkpoint_every, task.keep)
    memory.keep_state(folder, new_state)
    reply = Reply(
        task.run,
        task.round,
        task.name,
        report.tokens,
        {**report.metrics, **_passes(stream, new_state.position), **metrics},
        start or trained.start,
        report.load_LE,
        bundle_digests(blobs),
        inputs,
    )
    return blobs, reply


def _passes(stream: Stream, position: int) -> dict[str, float]:
    """How often the site has read its text, and of a mixture those parts that it has read most."""
    parts = sorted(stream.passes_by_domain(position).items(), key=lambda part: -part[1])[:MOST_SAID]
    return {"passes": stream.passes(position)} | {f"passes/{domain:.50}": number for domain, number in parts}


def _state_of(task: Task, folder: Path, memory: Memory) -> SiteState:
    """The state that the task's round goes on from."""
    first = task.counted_round * task.train.local_steps * task.train.batch_size
    return memory.take_state(folder, task.counted_round) or load_state(folder, task.counted_round, first)


def _train(
    task: Task,
    shard: dict[str, Tensor],
    came: Collection[str],
    state: SiteState,
    stream: Stream,
    settings: NodeSettings,
    memory: Memory,
    beat: Beat,
) -> Trained:
    """The local steps of a round.

    Args:
        shard: what it begins from; emptied.
        came: what of it the message brought, or will bring.
        state: what it goes on from; what is changed of it in place is not in it afterwards.
    """
    batch, steps = task.train.batch_size, task.train.local_steps
    stream.restore(state.stream)

    def batches() -> Iterator[Tensor]:
        for step in range(steps):
            beat(WORK)
            yield stream.batch(state.position + step * batch, batch)
        beat(WORK)

    engine = memory.engine(task, devices_of(task, settings))
    engine.load(task, shard, state.engine)
    shard.clear()
    start = b""
    if not task.strategy.delay:
        loaded = {name: tensor for name, tensor in engine.loaded().items() if name in came}
        start = wire.digests(loaded, down_codec(task.strategy))
    resting = resting_of(task)
    # What came takes the place of what the site had made of a tensor since it was last synchronised.
    pending = {name: tensor for name, tensor in state.pending.items() if name not in came}
    encoder = {name: tensor for name, tensor in state.encoder.items() if name in resting}
    report = engine.train(batches(), resting)
    if engine.device == "cpu":
        # On a GPU it is the allocator's peak.
        report.metrics["memory_bytes"] += sum(tensor.nbytes for tensor in pending.values())
    update = engine.update()
    for name in update.keys() & pending.keys():
        update[name].add_(pending.pop(name).to(update[name].device))
    pending = {name: update.pop(name).to("cpu", copy=True) for name in sorted(resting)}
    # Encoded before the state is saved: what the encoder could not send is part of it.
    blobs, left = wire.encode_update(update, up_codec(task.strategy), state.encoder)
    position = state.position + steps * batch
    # The engine holds the moments now.
    state.engine, state.encoder, state.local, state.pending = EngineState(), {}, {}, {}
    return Trained(
        state,
        start,
        report,
        blobs,
        engine.state(),
        encoder | left,
        position,
        stream.state(),
        engine.kept(),
        pending,
    )


# ----- strategy.delay=1: a round is begun before its message is there


def may_begin_next(task_text: str, settings: NodeSettings) -> bool:
    """Whether the round after this one may be begun."""
    task = own_task(task_text, settings)
    return bool(task.strategy.delay) and task.round < task.train.rounds


def begin_next(task_text: str, settings: NodeSettings, memory: Memory, beat: Beat) -> None:
    """Take the local steps of the round after this one, whose message is not there yet. `train_round` finds them.

    They are what the message will ask for if nothing changes: this round's reply counts, and the site holds what it
    held. Else they are dropped, and the state on the disk is what counts.

    Args:
        task_text: of the round that was just done.

    Raises:
        FomoeError, FloatingPointError: as `train_round`; and what `beat` raises.
    """
    task = own_task(task_text, settings)
    following, folder = _following(task), state_folder(task, settings)
    stream = site_stream(task, settings, memory)
    if (state := memory.take_state(folder, task.round)) is None:
        return
    # What was due will come.
    coming = {name: tensor for name, tensor in state.public.items() if name not in state.local}
    shard, known = delay.start(following, coming, state.public, state.sent, state.round)
    shard |= state.local
    if not known or shard.keys() != _names(following):
        # Some of it will begin from what the message brings.
        memory.keep_state(folder, state)
        return
    memory.begun = following, None
    try:
        memory.begun = following, _train(following, shard, set(coming), state, stream, settings, memory, beat)
    except BaseException:
        memory.begun = None
        raise


def _following(task: Task) -> Task:
    """The task of the next round, if nothing changes."""
    nominal = round(task.train.local_steps * task.lr_stride)
    return replace(task, round=task.round + 1, counted_round=task.round, first_step=task.first_step + nominal)


def evaluate_shard(
    task: Task, shard: dict[str, Tensor], settings: NodeSettings, memory: Memory, beat: Beat
) -> tuple[dict[str, bytes], Reply]:
    """Loss of the shard, nats a token, with this site's residents only: of the validation text, and in round 0 of the
    text that round 1 will train on, with what its tokens ask for and stand-ins for its residents.
    """
    use_cpu(task.train.threads)
    devices = devices_of(task, settings)
    beat(DATA)
    batch, first = task.train.batch_size, task.round == 0
    if first:
        stream = site_stream(task, settings, memory)
        corpus = stream.corpus
        text: Iterator[Tensor] = (stream.batch(step * batch, batch) for step in range(task.train.local_steps))
    else:
        data = data_of(task, settings)
        corpus = open_corpus(
            data, task.model.vocab_size, None if shares_cache(settings) else validation_documents
        )
        most = max(task.train.eval_batches, 1)
        text = validation_batches(corpus, None, task.train.seq_len, batch, most)
    inputs = own_inputs(task, corpus, settings)
    beat(WORK)
    engine = memory.engine(task, devices)
    module, device = engine.evaluator(shard), engine.device
    shard.clear()
    start = wire.digests(read_shard(module), down_codec(task.strategy))

    def batches() -> Iterator[Tensor]:
        for tokens_BT in text:
            beat(WORK)
            yield tokens_BT

    load_LE: list[list[int]] = []
    blobs: dict[str, bytes] = {}
    if first:
        loss, tokens, load_LE, standins = survey(
            module, batches(), task.train.local_steps, task.train.dtype, device
        )
        blobs, _ = wire.encode_update(standins, down_codec(task.strategy), {})
    else:
        loss, tokens = evaluate(module, batches(), task.train.dtype, device)
    reply = Reply(
        task.run, task.round, task.name, tokens, {"val_loss": loss}, start, load_LE, bundle_digests(blobs), inputs
    )  # fmt: skip
    return blobs, reply


def own_inputs(task: Task, corpus: TokenCorpus, settings: NodeSettings) -> Inputs:
    """What this site found, once it is known to be what the run goes by.

    An operator may change the site's own text: nobody else's part depends on it, and the server is told. What the
    federation file of a simulation names may not change, for nobody asked for it.

    Raises:
        ConfigError: another tokenizer, or other text.
    """
    own_text = data_of(task, settings).partition == "own"
    found = replace(
        task.inputs,
        tokenizer=short(corpus.tokenizer),
        corpus=short(corpus.digest),
        split=short(corpus.split),
        partition=OWN_TEXT if own_text else task.inputs.partition,
    )
    by_operator = settings.partition is None or settings.data_path is not None
    free = ("partition", "split", "corpus") if by_operator else ("partition", "split")
    for difference in differences(task.inputs, found):
        if not (own_text and difference.part in free):
            raise ConfigError(f"site {task.name}: not what the run goes by: {difference}")
    return found


# A process that serves many messages (simulation, `runtime=local`) opens and deals its corpus once.


def site_stream(task: Task, settings: NodeSettings, memory: Memory) -> Stream:
    """The site's own text, or its part of the common corpus.

    Raises:
        FomoeError: there is none, it cannot be read, or it holds less than one sequence.
    """
    data, vocab_size, seq_len = data_of(task, settings), task.model.vocab_size, task.train.seq_len
    deal = OWN if data.partition == "own" else task.deal

    def own_documents(corpus: TokenCorpus) -> NDArray[np.int64]:
        return _dealt(corpus, data, replace(deal, place=0), seq_len, task.seed)[deal.place]

    def open_stream() -> Stream:
        if data.stream:
            return StreamedText(open_corpus(data, vocab_size), data, deal.place, deal.sites, seq_len)
        # Its own share is opened once, with the stream.
        corpus = (
            open_corpus(data, vocab_size)
            if shares_cache(settings)
            else open_corpus.__wrapped__(data, vocab_size, own_documents)
        )
        documents = own_documents(corpus)
        stream: Stream = (
            MixedStream(corpus, documents, seq_len, task.seed, data.mix)
            if data.mix
            else TokenStream(corpus, documents, seq_len, task.seed)
        )
        # Of other text the server says it.
        if data.partition == "own":
            sequences = task.train.rounds * task.train.local_steps * task.train.batch_size
            warn_of_own_text(task.run, task.name, stream.passes(sequences))
        return stream

    return memory.stream((data, vocab_size, deal, seq_len, task.seed), open_stream)


def shares_cache(settings: NodeSettings) -> bool:
    """Whether this is one of the sites of a simulation: they tokenise the common corpus once, for all of them."""
    return settings.partition is not None


@functools.lru_cache(maxsize=CORPORA)
def open_corpus(data: DataConfig, vocab_size: int, choose: Choose | None = None) -> TokenCorpus:
    """The tokenised corpus, once its tokenizer is known to fit the vocabulary.

    Args:
        choose: the documents that must be tokenised; None: all.

    Raises:
        ConfigError: the vocabulary is too small.
        DataError: the corpus or tokenizer cannot be read.
    """
    check_vocabulary(load_tokenizer(data.tokenizer), vocab_size)
    return prepare(data, choose)


@functools.lru_cache(maxsize=CORPORA)
def _dealt(
    corpus: TokenCorpus, data: DataConfig, deal: Deal, seq_len: int, seed: int
) -> list[NDArray[np.int64]]:
    sites = [
        SiteConfig(name=f"{i + 1} of {deal.sites}", domain=domain) for i, domain in enumerate(deal.domains())
    ]
    return deal_documents(corpus, sites, data, seed, seq_len)
