"""A very small federation for the whole suite: real code, real text, seconds a run."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fomoe_flwr.compose import Composed, compose
from tests.store.servers import Line, s3_store

# The same examples every time, and no deadline: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

WORDS = [
    "site",
    "expert",
    "token",
    "router",
    "dense",
    "wire",
    "round",
    "loss",
    "gate",
    "model",
    "shard",
    "bundle",
    "link",
    "update",
    "mean",
    "outer",
]

SMALL_MODEL = (
    "model.d_model=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_experts=8",
    "model.d_expert=16",
    "model.vocab_size=264",
)
SMALL_TRAIN = (
    "train.local_steps=3",
    "train.batch_size=2",
    "train.seq_len=32",
    "train.rounds=2",
    "train.warmup_steps=4",
    "train.eval_batches=2",
    "train.final_eval_batches=1",
    "train.device=cpu",
)


# Whoever starts the suite in the background has it inherit that Ctrl-C is ignored, and all processes that it starts;
# some tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _processor_as_it_was() -> None:
    """A site sets threads and denormals for good; a test must not find what the one before it set."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four domains of made-up prose, one folder each."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for domain in ("anatomy", "botany", "chemistry", "dance"):
        (folder / domain).mkdir()
        for index in range(12):
            text = " ".join(rng.choice(WORDS) for _ in range(200))
            (folder / domain / f"{index}.txt").write_text(f"{domain} {text}\n")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


Compose = Callable[..., Composed]


@pytest.fixture
def small(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> Compose:
    """`small("strategy.overlap=4", …)` composes a small run in `tmp_path/run`."""

    def compose_small(*overrides: str, run_dir: Path | None = None) -> Composed:
        chosen = {item.partition("=")[0] for item in overrides}
        defaults = (
            *SMALL_MODEL,
            *SMALL_TRAIN,
            "data=text",
            f"data.path={corpus_dir}",
            f"data.cache_dir={cache_dir}",
            "runtime=local",
            "wandb.mode=disabled",
            f"hydra.run.dir={run_dir or tmp_path / 'run'}",
        )
        return compose([item for item in defaults if item.partition("=")[0] not in chosen] + list(overrides))

    return compose_small


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Line]]:
    """A real S3 server, and the line that leads to it."""
    pytest.importorskip("obstore")
    pytest.importorskip("nanio")
    with s3_store(tmp_path_factory.mktemp("s3")) as found:
        yield found
