"""With everything resident, a run equals plain DiLoCo (and LocalAdamW) written with PyTorch's own optimizers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.config import RunConfig
from fomoe_flwr.data import TokenStream, deal_documents, prepare
from fomoe_flwr.model.base import load_shard, named_views, read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import is_moment, parameters
from fomoe_flwr.placement import full_residents
from tests.conftest import Compose
from tests.strategies.helpers import run

ROUNDS = 2


def streams(config: RunConfig) -> list[TokenStream]:
    corpus = prepare(config.data)
    dealt = deal_documents(corpus, config.federation.sites, config.data, config.seed, config.train.seq_len)
    return [TokenStream(corpus, documents, config.train.seq_len, config.seed) for documents in dealt]


def whole_model(config: RunConfig) -> Transformer:
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    state = initial_state(config.model, everything, config.strategy.routing, config.seed)
    return build(config.model, everything, config.strategy.routing, state, "cpu")


def adamw(module: Transformer, config: RunConfig) -> torch.optim.AdamW:
    """PyTorch's AdamW on the stacked parameters; a stack has one learning rate, for its experts have one."""
    train = config.train
    name_of = {id(view.parameter): view.name for view in named_views(module)}
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    table = parameters(config.model, everything, config.strategy.routing)
    groups = []
    for parameter in module.parameters():
        row = table[name_of[id(parameter)]]
        decay = train.weight_decay * row.decay
        groups.append({"params": [parameter], "multiplier": row.lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps)


def local_steps(
    module: Transformer, optimizer: torch.optim.AdamW, config: RunConfig, stream: TokenStream, round_: int
) -> None:
    """K steps of one worker, as anybody would write them."""
    train, module = config.train, module.train()
    for step in range((round_ - 1) * train.local_steps, round_ * train.local_steps):
        losses = module(stream.batch(step * train.batch_size, train.batch_size))
        optimizer.zero_grad()
        (losses.cross_entropy + losses.balance).backward()
        nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * group["multiplier"] * min(1.0, (step + 1) / train.warmup_steps)
        optimizer.step()


def final_parameters(config: RunConfig, run_dir: Path) -> dict[str, Tensor]:
    parameters = read_checkpoint(checkpoint_path(run_dir, config.train.rounds)).parameters
    return {name: value for name, value in parameters.items() if not is_moment(name)}


def assert_same_parameters(config: RunConfig, ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Equal up to rounding: what differs is less than a thousandth of what was learnt, tensor by tensor.

    No tighter than that, because Adam's first steps divide a gradient by its own size: where it is next to
    nothing, its rounding decides the direction of a full step.
    """
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    start = initial_state(config.model, everything, config.strategy.routing, config.seed)
    assert ours.keys() == reference.keys() == start.keys()
    for name, value in reference.items():
        learnt = (value - start[name]).norm()
        assert learnt > 1e-3, f"{name} never moved: the comparison would say nothing"
        assert (ours[name] - value).norm() < 1e-3 * learnt, name


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_our_diloco_is_plain_diloco(small: Compose, routing: str) -> None:
    composed = small(
        "strategy=diloco", f"strategy.routing={routing}", "strategy.up=fp32", "strategy.down=fp32",
        f"train.rounds={ROUNDS}", "federation.num_sites=2",
    )  # fmt: skip
    config = composed.config

    globally = whole_model(config)
    outer = torch.optim.SGD(globally.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    workers = [copy.deepcopy(globally) for _ in range(2)]
    inner = [adamw(worker, config) for worker in workers]
    for round_ in range(1, ROUNDS + 1):
        for worker, optimizer, stream in zip(workers, inner, streams(config), strict=True):
            load_shard(worker, read_shard(globally))
            local_steps(worker, optimizer, config, stream, round_)
        for parameter, *replicas in zip(
            globally.parameters(), *(w.parameters() for w in workers), strict=True
        ):
            parameter.grad = parameter.detach() - torch.stack([r.detach() for r in replicas]).mean(0)
        outer.step()

    assert_same_parameters(config, final_parameters(config, run(composed)), read_shard(globally))


def test_our_local_adamw_averages_parameters_and_both_moments(small: Compose) -> None:
    composed = small(
        "strategy=local_adamw", "strategy.up=fp32", "strategy.down=fp32",
        f"train.rounds={ROUNDS}", "federation.num_sites=2",
    )  # fmt: skip
    config = composed.config

    globally = whole_model(config)
    workers = [copy.deepcopy(globally) for _ in range(2)]
    inner = [adamw(worker, config) for worker in workers]
    for round_ in range(1, ROUNDS + 1):
        for worker, optimizer, stream in zip(workers, inner, streams(config), strict=True):
            local_steps(worker, optimizer, config, stream, round_)
        with torch.no_grad():
            for replicas in zip(*(w.parameters() for w in workers), strict=True):
                states = [o.state[p] for o, p in zip(inner, replicas, strict=True)]
                for tensors in (replicas, *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))):
                    mean = torch.stack([t.detach() for t in tensors]).mean(0)
                    for tensor in tensors:
                        tensor.copy_(mean)

    assert_same_parameters(config, final_parameters(config, run(composed)), read_shard(workers[0]))


def test_our_ddp_is_one_adamw_on_the_mean_gradient(small: Compose) -> None:
    composed = small(
        "strategy=ddp",
        "train.local_steps=1",
        "strategy.up=fp32",
        "strategy.down=fp32",
        "train.rounds=4",
        "federation.num_sites=2",
    )
    config, train = composed.config, composed.config.train

    module = whole_model(config).train()
    optimizer = adamw(module, config)
    for step in range(4):
        optimizer.zero_grad()
        for stream in streams(config):
            losses = module(stream.batch(step * train.batch_size, train.batch_size))
            ((losses.cross_entropy + losses.balance) / 2).backward()
        nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * group["multiplier"] * min(1.0, (step + 1) / train.warmup_steps)
        optimizer.step()

    assert_same_parameters(config, final_parameters(config, run(composed)), read_shard(module))


def test_fedavg_is_the_mean_of_what_sites_return_with_fresh_moments_every_round(small: Compose) -> None:
    composed = small(
        "strategy=fedavg",
        "strategy.up=fp32",
        "strategy.down=fp32",
        f"train.rounds={ROUNDS}",
        "federation.num_sites=2",
    )
    config = composed.config

    globally = whole_model(config)
    for round_ in range(1, ROUNDS + 1):
        workers = [copy.deepcopy(globally) for _ in range(2)]
        for worker, stream in zip(workers, streams(config), strict=True):
            local_steps(worker, adamw(worker, config), config, stream, round_)
        with torch.no_grad():
            for parameter, *replicas in zip(
                globally.parameters(), *(w.parameters() for w in workers), strict=True
            ):
                parameter.copy_(torch.stack(replicas).mean(0))

    assert_same_parameters(config, final_parameters(config, run(composed)), read_shard(globally))
