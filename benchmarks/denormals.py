"""What denormal numbers cost a site once its model is sure of itself. `python -m benchmarks.denormals`"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks.harness import options, paired, ratio, write_result
from fomoe_flwr.compose import compose
from fomoe_flwr.data import TokenStream, prepare
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.engine.optimizer import Schedule, StackedOptimizer
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.placement import full_residents
from fomoe_flwr.schedule import LrSchedule

STEPS = 200


def forward_backward(module: Transformer, stream: TokenStream, flush: bool) -> None:
    torch.set_flush_denormal(flush)
    for position in range(0, 40, 8):
        losses = module(stream.batch(position, 8))
        (losses.cross_entropy + losses.balance).backward()
        module.zero_grad(set_to_none=True)


def main() -> None:
    chosen = options(__doc__ or "", repeats=5)
    use_cpu(chosen.threads)
    config = compose(["train.local_steps=200"]).config
    train = config.train
    corpus = prepare(config.data)
    stream = TokenStream(corpus, corpus.train_documents, train.seq_len, config.seed)
    residents = full_residents(config.model.num_layers, config.model.num_experts)
    module = build(
        config.model, residents, "skip", initial_state(config.model, residents, "skip", config.seed), "cpu"
    )
    rows = []
    for steps in (0, STEPS):
        batches = (stream.batch(step * train.batch_size, train.batch_size) for step in range(steps))
        if steps:
            optimizer = StackedOptimizer(module, train, Schedule(0, 1.0, LrSchedule(50), 0), {})
            for tokens_BT in batches:
                losses = module(tokens_BT)
                (losses.cross_entropy + losses.balance).backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
                optimizer.step()
                module.zero_grad(set_to_none=True)
        module.train()
        runs = {
            name: partial(forward_backward, module, stream, name == "flushed") for name in ("kept", "flushed")
        }
        seconds = paired(runs, chosen.repeats)
        median = {name: 1e3 * statistics.median(values) / 5 for name, values in seconds.items()}
        quotient = ratio(seconds["kept"], seconds["flushed"])
        rows.append(f"| {steps} | {median['kept']:.0f} | {median['flushed']:.0f} | {quotient} |")
    write_result(
        "denormals",
        "Forward and backward of a step with denormal numbers kept and flushed to zero",
        f"model=tiny with all experts, {train.batch_size} x {train.seq_len} tokens, fp32, ms a step, median of "
        f"{chosen.repeats} runs taken in turn. A site flushes (`use_cpu`).\n\n"
        "| steps trained | kept | flushed | kept / flushed |\n|---|---|---|---|\n" + "\n".join(rows),
        "other models, other processors, bf16.",
    )


if __name__ == "__main__":
    main()
