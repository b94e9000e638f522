"""One round at one site, without Flower: shard in, pseudo-gradient out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.identity import NodeSettings, data_of, device_of, state_folder
from clients.memory import Memory
from clients.state import SiteState, discard_later, load_state, save_state
from fomoe_flwr import wire
from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import (
    TokenCorpus,
    TokenStream,
    check_vocabulary,
    deal_documents,
    load_tokenizer,
    prepare,
    validation_batches,
)
from fomoe_flwr.load import averaged, difference
from fomoe_flwr.model.names import MOMENTS, is_moment, moment_name
from fomoe_flwr.model.transformer import Transformer, read_shard
from fomoe_flwr.task import SiteTask
from fomoe_flwr.training import (
    LocalAdamW,
    Moments,
    TrainReport,
    evaluate,
    resolve_device,
    train_adamw,
    train_gradient,
    use_cpu,
)

log = logging.getLogger("fomoe.site")

# Called with the name of the phase, DATA or WORK, wherever a round may be broken off: it raises to do so.
Beat = Callable[[str], None]
DATA = "data"  # opening the corpus; the first time it is read and tokenised, and nobody knows how long that takes
WORK = "work"


class Outcome(NamedTuple):
    """What a site answers: by name, the pseudo-gradient (and LocalAdamW's moments); and the round's figures.

    The update is in the model's own memory: it must be encoded before the next round begins.
    """

    update: dict[str, Tensor]
    report: TrainReport
    new_experts: int  # tensors that had no moments and were warmed up
    start: bytes  # wire.digests of what the site started from, read back from its model
    memory_bytes: int  # see _memory_bytes


class Evaluation(NamedTuple):
    """What a site measured."""

    loss: float  # nats a token, with this site's residents only
    tokens: int
    start: bytes  # as in Outcome


def train_round(
    task: SiteTask, shard: dict[str, Tensor], settings: NodeSettings, memory: Memory, beat: Beat
) -> Outcome:
    """K local steps from the shard, by the site's own optimizer state and place in its data.

    Memory at the most: the parameters and their gradients in fp32, the optimizer's moments, and the shard as it
    was sent.

    Args:
        shard: is emptied when it is no longer needed.

    Raises:
        FomoeError: wrong data, device or shard.
        FloatingPointError: the loss is not finite.
    """
    use_cpu(task.train.threads)
    device = resolve_device(device_of(task, settings))
    beat(DATA)
    stream = site_stream(task, settings, memory)
    beat(WORK)
    folder, batch, steps = state_folder(task, settings), task.train.batch_size, task.train.local_steps
    discard_later(folder, task.after)
    state = memory.take_state(folder, task.after) or load_state(
        folder, task.after, task.after * steps * batch
    )
    sent = {name: tensor for name, tensor in shard.items() if not is_moment(name)}
    module = memory.module(task, sent, device)
    module.begin_round(state.bias, difference(task.global_load, state.load))

    def batches() -> Iterator[Tensor]:
        for step in range(steps):
            beat(WORK)
            yield stream.batch(state.position + step * batch, batch)
        beat(WORK)

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    new_experts, moments = 0, dict[str, Moments]()
    kept: Mapping[str, Moments] = {}
    if task.strategy.inner == "gradient":
        start = _digests(task, read_shard(module))
        report, update = train_gradient(module, batches(), task.train, device)
    else:
        on_server = task.strategy.outer == "local_adamw"
        known = _moments_in(shard, task.first_step) if on_server else state.moments
        # Moments that are missing at the start, or dropped on purpose, are no reason for a warm-up.
        newborn = task.first_step if task.strategy.keep_moments and task.round > 1 else 0
        optimizer = LocalAdamW(
            module,
            task.model,
            task.train,
            task.warmup_steps,
            task.first_step,
            known,
            newborn,
            adopt=not on_server,
            pace=task.pace,
        )
        new_experts = sum(name not in known for name in sent) if newborn else 0
        loaded = _moments_by_name(optimizer.moments()) if on_server else {}
        start = _digests(task, read_shard(module) | loaded)
        del known, loaded
        state.moments = {}
        report = train_adamw(module, optimizer, batches(), task.train, device)
        moments = optimizer.moments()
        update = _pseudo_gradient(sent, module)
        if on_server:
            update |= _moments_by_name(moments)
        elif task.strategy.keep_moments:
            kept = moments
    memory_bytes = _memory_bytes(device, module, moments, shard)
    shard.clear()
    sent.clear()
    position = state.position + steps * batch
    load = averaged(state.load, report.load_LE) if task.model.balance == "global" else None
    new_state = SiteState(task.round, position, kept, task.train.rounds, module.biases(), load)
    beat(WORK)  # the last chance to break off: from here on there is a state of this round
    save_state(folder, new_state, task.after, task.checkpoint_every, task.keep)
    memory.keep_state(folder, new_state)
    return Outcome(update, report, new_experts, start, memory_bytes)


def evaluate_shard(
    task: SiteTask, shard: dict[str, Tensor], settings: NodeSettings, memory: Memory, beat: Beat
) -> Evaluation:
    """Validation loss of the shard, which is emptied when it is no longer needed."""
    use_cpu(task.train.threads)
    device = resolve_device(device_of(task, settings))
    beat(DATA)
    corpus = open_corpus(data_of(task, settings), task.model.vocab_size)
    beat(WORK)
    module = memory.module(task, shard, device)
    shard.clear()
    start = _digests(task, read_shard(module))

    def batches() -> Iterator[Tensor]:
        for tokens_BT in validation_batches(
            corpus, None, task.train.seq_len, task.train.batch_size, max(task.train.eval_batches, 1)
        ):
            beat(WORK)
            yield tokens_BT

    loss, tokens = evaluate(module, batches(), task.train.dtype, device)
    return Evaluation(loss, tokens, start)


# A process that serves many messages (simulation, `runtime=local`) opens and deals its corpus once.


def site_stream(task: SiteTask, settings: NodeSettings, memory: Memory) -> TokenStream:
    """The site's own part of the corpus."""
    data, vocab_size, seq_len = data_of(task, settings), task.model.vocab_size, task.train.seq_len

    def open_stream() -> TokenStream:
        dealt = _dealt(data, vocab_size, tuple(task.sites), seq_len, task.seed)
        return TokenStream(open_corpus(data, vocab_size), dealt[task.site], seq_len, task.seed)

    return memory.stream((data, vocab_size, task.sites, task.site, seq_len, task.seed), open_stream)


@functools.lru_cache(maxsize=2)
def open_corpus(data: DataConfig, vocab_size: int) -> TokenCorpus:
    """The tokenised corpus, once its tokenizer is known to fit the vocabulary.

    Raises:
        ConfigError: the vocabulary is too small.
        DataError: the corpus or tokenizer cannot be read.
    """
    check_vocabulary(load_tokenizer(data.tokenizer), vocab_size)
    return prepare(data)


@functools.lru_cache(maxsize=2)
def _dealt(
    data: DataConfig, vocab_size: int, sites: tuple[SiteConfig, ...], seq_len: int, seed: int
) -> list[NDArray[np.int64]]:
    return deal_documents(open_corpus(data, vocab_size), sites, data, seed, seq_len)


def _digests(task: SiteTask, named: Mapping[str, Tensor]) -> bytes:
    return wire.digests(named, wire.WIRE_DTYPES[task.strategy.wire_dtype])


def _moments_in(shard: Mapping[str, Tensor], first_step: int) -> dict[str, Moments]:
    """LocalAdamW's moments travel with the parameters."""
    return {
        name: Moments(
            shard[moment_name("exp_avg", name)], shard[moment_name("exp_avg_sq", name)], first_step, born=0
        )
        for name in shard
        if not is_moment(name)
    }


@torch.no_grad()
def _pseudo_gradient(sent: Mapping[str, Tensor], module: Transformer) -> dict[str, Tensor]:
    """Parameters sent minus parameters returned: a descent direction (FoMoE, algorithm 2).

    In the place of the parameters: the next round overwrites them anyway.
    """
    update = read_shard(module)
    for name, value in sent.items():
        update[name].neg_().add_(value.to(update[name].device))
    return update


def _memory_bytes(
    device: str, module: Transformer, moments: Mapping[str, Moments], shard: Mapping[str, Tensor]
) -> int:
    """What the round needed: on a GPU the allocator's peak.

    On a CPU what stood side by side in a training step: parameters and their gradients, moments, and the shard as
    it was sent. Activations do not count there, for nobody counts a CPU's.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    tensors = [*shard.values(), *_moments_by_name(moments).values()]
    parameters = sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
    return 2 * parameters + sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _moments_by_name(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    return {
        moment_name(moment, name): getattr(state, moment)
        for moment in MOMENTS
        for name, state in moments.items()
    }
