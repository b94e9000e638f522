"""One round at one site, without Flower: shard in, pseudo-gradient out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.identity import NodeSettings, data_of, device_of, state_folder
from clients.state import SiteState, load_state, save_state
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
from fomoe_flwr.model.names import MOMENTS, is_moment, moment_name
from fomoe_flwr.model.transformer import Transformer, build, read_shard
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


class Outcome(NamedTuple):
    """What a site answers: by name, the pseudo-gradient (and LocalAdamW's moments); and the round's figures."""

    update: dict[str, Tensor]
    report: TrainReport
    new_experts: int  # tensors that had no moments and were warmed up


def train_round(task: SiteTask, shard: Mapping[str, Tensor], settings: NodeSettings) -> Outcome:
    """K local steps from the shard, by the site's own optimizer state and place in its data.

    Raises:
        FomoeError: wrong data, device or shard.
        FloatingPointError: the loss is not finite.
    """
    use_cpu(task.train.threads)
    device = resolve_device(device_of(task, settings))
    stream = site_stream(task, settings)
    folder = state_folder(task, settings)
    state = load_state(folder, task.round)
    sent = {name: tensor for name, tensor in shard.items() if not is_moment(name)}
    module = build(task.model, task.residents, task.strategy.routing, sent, device)
    batch, steps = task.train.batch_size, task.train.local_steps
    batches = (stream.batch(state.position + step * batch, batch) for step in range(steps))

    new_experts, moments = 0, {}
    if task.strategy.inner == "gradient":
        report, update = train_gradient(module, batches, task.train, device)
    else:
        known = _moments_at_start(task, shard, state)
        # Moments that are missing at the start, or dropped on purpose, are no reason for a warm-up.
        newborn = task.first_step if task.strategy.keep_moments and task.round > 1 else 0
        optimizer = LocalAdamW(
            module, task.model, task.train, task.warmup_steps, task.first_step, known, newborn
        )
        new_experts = sum(name not in known for name in sent) if newborn else 0
        report = train_adamw(module, optimizer, batches, task.train, device)
        moments = optimizer.moments()
        update = _pseudo_gradient(sent, module)
        if task.strategy.outer == "local_adamw":
            update |= _moments_by_name(moments)
            moments = {}  # they live on the server
    kept = moments if task.strategy.keep_moments else {}
    new_state = SiteState(task.round, state.position + steps * batch, kept)
    save_state(folder, new_state, task.checkpoint_every, task.keep)
    return Outcome(update, report, new_experts)


def evaluate_shard(task: SiteTask, shard: Mapping[str, Tensor], settings: NodeSettings) -> tuple[float, int]:
    """Validation loss (nats a token) with this site's residents only, and the number of tokens."""
    use_cpu(task.train.threads)
    device = resolve_device(device_of(task, settings))
    corpus = open_corpus(data_of(task, settings), task.model.vocab_size)
    module = build(task.model, task.residents, task.strategy.routing, shard, device)
    batches = validation_batches(
        corpus, None, task.train.seq_len, task.train.batch_size, max(task.train.eval_batches, 1)
    )
    return evaluate(module, batches, task.train.dtype, device)


# A process that serves many messages (simulation, `runtime=local`) opens and deals its corpus once.


def site_stream(task: SiteTask, settings: NodeSettings) -> TokenStream:
    """The site's own part of the corpus."""
    data, train = data_of(task, settings), task.train
    corpus = open_corpus(data, task.model.vocab_size)
    dealt = _dealt(data, task.model.vocab_size, tuple(task.sites), train.seq_len, task.seed)
    return TokenStream(corpus, dealt[task.site], train.seq_len, task.seed)


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


def _moments_at_start(task: SiteTask, shard: Mapping[str, Tensor], state: SiteState) -> Mapping[str, Moments]:
    if task.strategy.outer == "local_adamw":
        names = [name for name in shard if not is_moment(name)]
        return {
            name: Moments(
                shard[moment_name("exp_avg", name)],
                shard[moment_name("exp_avg_sq", name)],
                task.first_step,
                born=0,
            )
            for name in names
        }
    if not state.round and task.round > 1:
        log.warning("site %s has no state of an earlier round: it starts with fresh moments", task.name)
    return state.moments


def _pseudo_gradient(sent: Mapping[str, Tensor], module: Transformer) -> dict[str, Tensor]:
    """Parameters sent minus parameters returned: a descent direction (FoMoE, algorithm 2)."""
    returned = read_shard(module)
    return {name: value.to(torch.float32) - returned[name].cpu() for name, value in sent.items()}


def _moments_by_name(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    return {
        moment_name(moment, name): getattr(state, moment).cpu()
        for moment in MOMENTS
        for name, state in moments.items()
    }
