"""`fomoe eval`: the figures of a checkpoint on any text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from rich.console import Console
from tqdm import tqdm

from fomoe_flwr.checkpoint import Checkpoint, named_checkpoint
from fomoe_flwr.checks import FILE_SOURCES
from fomoe_flwr.compose import compose
from fomoe_flwr.config import DataConfig, ModelConfig, TrainConfig
from fomoe_flwr.console import Parser, at_least_1
from fomoe_flwr.data import (
    LabelledBatch,
    TokenCorpus,
    check_vocabulary,
    load_tokenizer,
    prepare,
    validation_documents,
)
from fomoe_flwr.data.tokenizer import Tokenizer, at_hand
from fomoe_flwr.engine.device import resolve_device, use_cpu
from fomoe_flwr.errors import CheckpointError, ConfigError, DataError, WireError
from fomoe_flwr.evaluation import (
    DRAWS,
    Figures,
    Judged,
    Text,
    describe_text,
    evaluate_model,
    necessity,
    text_of,
)
from fomoe_flwr.inputs import Inputs, differences, inputs_of, short
from fomoe_flwr.model.spec import is_moment
from fomoe_flwr.overrides import read_overrides, setting
from fomoe_flwr.report.tables import show_evaluation
from fomoe_flwr.units import finite

NECESSITY_BATCHES = 32  # without --batches: necessity takes 1 + draws · (1 + layers) passes

# What may be overridden: the text, and how it is computed. The model is the checkpoint's.
TRAIN_KEYS = ("device", "dtype", "batch_size", "seq_len", "threads")
KEYS = ("data", *(f"train.{key}" for key in TRAIN_KEYS), "model.experts_impl")
ALLOWED = ", ".join((*KEYS, "data.*"))
USAGE = "fomoe eval CHECKPOINT [OVERRIDE ...] [--json] [--reference CHECKPOINT] [--batches N] [--draws N]"
WORDS_HELP = f"""CHECKPOINT is a run directory, its checkpoints folder, or one checkpoint. OVERRIDE names the text, as
in data=text data.path=FILE, or another key ({ALLOWED}). Without a text, the validation part of the run's own corpus
is used; any other text is used whole."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the sections of its configuration that are used here."""

    checkpoint: Checkpoint
    judged: Judged
    train: TrainConfig
    data: DataConfig
    inputs: Inputs  # unknown in a checkpoint of an earlier version


def evaluate_command(arguments: Sequence[str], console: Console | None = None) -> None:
    """The command.

    Raises:
        ConfigError: an argument is wrong.
        CheckpointError: the checkpoint is missing, damaged or not of this program.
        DataError: the text cannot be read.
    """
    given = parse(arguments)
    content = evaluate_request(given)
    if given.json:
        print(json.dumps(content, allow_nan=False, ensure_ascii=False))
    else:
        show_evaluation(content, console or Console())


def evaluate_request(given: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON values."""
    saved = load(given.checkpoint, f"fomoe eval {given.checkpoint}")
    reference = load(given.reference, f"--reference {given.reference}") if given.reference else None
    train, data, model = _overridden(saved, given.overrides)
    judged = dataclasses.replace(saved.judged, model=model)
    device = resolve_device(train.device)
    use_cpu(train.threads)
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocabulary(tokenizer, model.vocab_size)
    keys = [override.key_or_group for override in given.overrides]
    check_tokenizer(saved, tokenizer, asked="data.tokenizer" in keys)
    if reference is not None:
        _check_reference(reference, tokenizer)
    if data.source in FILE_SOURCES and data.path is None:
        raise ConfigError("fomoe eval: the run has no common text; give one by data.path=FILE_OR_FOLDER")
    corpus, part = choose_text(saved, data, "data.val_fraction" in keys)
    about = describe_text(data, part, corpus, corpus.val_documents)
    if about["tokens"] < 1:
        raise DataError(f"data.path={data.path}: one token; there is nothing to predict")
    # One window of all the text takes memory by the square of its length.
    if "train.seq_len" in keys and train.seq_len > about["tokens"]:
        raise ConfigError(
            f"train.seq_len={train.seq_len}: the text has {about['tokens']} tokens; at most that"
        )

    def text(num_batches: int | None) -> Text:
        batches = text_of(corpus, corpus.val_documents, train.seq_len, train.batch_size, num_batches)
        return _with_progress_bar(batches)

    whole, sample = text(given.batches), text(given.batches or NECESSITY_BATCHES)
    with _naming(saved.checkpoint):
        figures = evaluate_model(judged, whole, train.dtype, device, given.draws, sample)
    content = {"checkpoint": str(saved.checkpoint.path)}
    if reference is not None:
        content["reference"] = str(reference.checkpoint.path)
        with _naming(reference.checkpoint):
            module = reference.judged.module(reference.judged.everything, device)
            theirs = necessity(module, sample, train.dtype, given.draws)
        figures["routing"] |= compared(figures["routing"], theirs)
    return {**content, "round": saved.checkpoint.round, "text": about, **figures}


def compared(ours: Figures, reference: Figures) -> Figures:
    """Routing necessity as a share of the reference's; null if that is not above 0."""
    needed, there = ours["necessity"], reference["necessity"]
    figures = {
        "reference_necessity": there,
        "necessity_share": needed / there if needed is not None and there > 0 else None,
        "reference_necessity_by_layer": reference["necessity_by_layer"],
    }
    return {key: finite(value) for key, value in figures.items()}


def _with_progress_bar(text: Text) -> Text:
    """The text with a progress bar for each long pass over it, on a terminal only."""
    hidden = not sys.stderr.isatty()

    def batches() -> Iterator[LabelledBatch]:
        yield from tqdm(text.batches(), unit=" batches", leave=False, delay=2.0, disable=hidden)

    return dataclasses.replace(text, batches=batches)


# ----- checkpoint


def load(where: str, asked: str) -> Saved:
    """The checkpoint that the user names.

    Raises:
        CheckpointError: it is missing, damaged or not of this program.
    """
    checkpoint = named_checkpoint(where, asked)
    try:
        config, placement = checkpoint.manifest["config"], checkpoint.manifest["placement"]
        routing = config["strategy"]["routing"]
        # A key that the checkpoint does not have gets its default.
        model, train = ModelConfig(**config["model"]), TrainConfig(**config["train"])
        data = DataConfig(**config["data"])
        data.tokenizer = at_hand(data.tokenizer, checkpoint.path.parent.parent)
        inputs = inputs_of(checkpoint.manifest.get("inputs", {}))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: manifest.json is not that of a run of this version ({error})"
        ) from error
    state = {name: tensor for name, tensor in checkpoint.parameters.items() if not is_moment(name)}
    return Saved(checkpoint, Judged(model, routing, state, placement), train, data, inputs)


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """An error about a tensor names the checkpoint in which it is."""
    try:
        yield
    except WireError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: not of the model it names: {error}") from error


def check_tokenizer(saved: Saved, tokenizer: Tokenizer, asked: bool) -> None:
    """Hold the tokenizer against the one that the model was trained with.

    Args:
        asked: the user named another one, which is only warned of.

    Raises:
        CheckpointError: the file of that name is another one now.
    """
    for difference in differences(saved.inputs, Inputs(tokenizer=short(tokenizer.fingerprint))):
        line = f"checkpoint {saved.checkpoint.path}: {difference}, with which the model was trained"
        if not asked:
            raise CheckpointError(f"{line}; name the right one by data.tokenizer=FILE")
        print(f"warning: {line}", file=sys.stderr)


def _check_reference(reference: Saved, ours: Tokenizer) -> None:
    """Losses can only be compared if the tokens are the same."""
    theirs = reference.inputs.tokenizer or short(load_tokenizer(reference.data.tokenizer).fingerprint)
    if short(ours.fingerprint) != theirs:
        raise CheckpointError(
            f"--reference {reference.checkpoint.path}: trained with data.tokenizer={reference.data.tokenizer}, the "
            f"text is cut by {ours.name}; nats a token cannot be compared"
        )
    check_vocabulary(ours, reference.judged.model.vocab_size)


# ----- text


def _overridden(saved: Saved, overrides: Sequence[Override]) -> tuple[TrainConfig, DataConfig, ModelConfig]:
    """The checkpoint's sections with what the user changed.

    `compose` checks keys, types and bounds as for a run; only the keys that were given are taken from its result.
    With a new source (`data=text`) the other data keys get their defaults, except the tokenizer, on which the model
    depends, the cache and the validation share.
    """
    given = [override.key_or_group for override in overrides]
    data = saved.data
    # What does not name a source is about the run's own.
    own = (
        {}
        if {"data", "data.source"} & set(given)
        else {"source": data.source, "path": data.path, "name": data.name}
    )
    kept = [setting(f"data.{key}", value) for key, value in own.items() if f"data.{key}" not in given]
    composed = compose([*kept, *overrides]).config
    if "data" in given:
        same = {key: getattr(data, key) for key in ("tokenizer", "cache_dir", "val_fraction")}
        data = dataclasses.replace(composed.data, **same)

    def changed(section: str) -> dict[str, Any]:
        names = [key.partition(".")[2] for key in given if key.startswith(f"{section}.")]
        return {name: getattr(getattr(composed, section), name) for name in names}

    return (
        dataclasses.replace(saved.train, **changed("train")),
        dataclasses.replace(data, **changed("data")),
        dataclasses.replace(saved.judged.model, **changed("model")),
    )


def choose_text(saved: Saved, data: DataConfig, share_given: bool) -> tuple[TokenCorpus, str]:
    """The validation part of the corpus on which the run was trained; any other text whole.

    A corpus with the same tokens is the run's own, wherever it lies; and what lies where the run's own lay is taken for
    it, with a warning if it has changed. This does not find out whether another text was part of the training text.

    Args:
        share_given: whether the user gave data.val_fraction, which is then the share of another text.

    Returns:
        The corpus, of which the part that is kept for validation is the text; and how to call that part.

    Raises:
        ConfigError: the validation part is larger than the run's own, so it has text on which the run was trained.
        DataError: the text cannot be read.
    """
    own = saved.data
    place = ("source", "path", "name", "config_name", "split")
    if any(getattr(own, key) != getattr(data, key) for key in place):
        whole = prepare(dataclasses.replace(data, val_fraction=1.0))
        if saved.inputs.corpus != short(whole.digest):
            return (prepare(data, validation_documents), "validation") if share_given else (whole, "whole")
    if data.val_fraction > own.val_fraction:
        raise ConfigError(
            f"data.val_fraction={data.val_fraction}: the run kept {own.val_fraction} of this corpus from training; "
            f"at most that"
        )
    corpus = prepare(data, validation_documents)
    now = Inputs(tokenizer=short(corpus.tokenizer), corpus=short(corpus.digest))
    for difference in differences(saved.inputs, now):
        if difference.part == "corpus":
            print(f"warning: {difference}: not all of it is what the run was trained on", file=sys.stderr)
    return corpus, "validation"


# ----- arguments


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments. They are checked before anything is read.

    Raises:
        ConfigError: an argument is wrong.
    """
    parser = Parser(prog="fomoe eval", usage=USAGE, description="The figures of a checkpoint on any text.")
    parser.add_argument("words", nargs="*", metavar="CHECKPOINT OVERRIDE", help=WORDS_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument(
        "--reference", metavar="CHECKPOINT", type=_name,
        help="a centralised run; the table shows routing necessity as a share of this run's",
    )  # fmt: skip
    parser.add_argument(
        "--batches", metavar="N", type=at_least_1,
        help=f"at most N batches, spread over the text; default: all of it, for necessity {NECESSITY_BATCHES}",
    )  # fmt: skip
    parser.add_argument(
        "--draws", metavar="N", type=at_least_1, default=DRAWS,
        help="draws of random routing, of which necessity is the mean; default: %(default)s",
    )  # fmt: skip
    given = parser.parse_intermixed_args(list(arguments))
    if "" in given.words:
        raise ConfigError("fomoe eval: '' is empty; give a checkpoint, KEY=VALUE, or leave it out")
    # An override has a "=", but so may a path.
    places = [word for word in given.words if "=" not in word or Path(word).exists()]
    if not places:
        raise ConfigError("fomoe eval: which checkpoint? fomoe eval RUN_DIR; --help says more")
    given.checkpoint = places[0]
    given.words.remove(given.checkpoint)
    given.overrides = read_overrides(given.words)
    for override in given.overrides:
        key = override.key_or_group
        if key not in KEYS and not key.startswith("data."):
            raise ConfigError(
                f"{override.input_line}: not for fomoe eval, which takes the rest from the checkpoint; allowed are "
                f"{ALLOWED}"
            )
    return given


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("needs the checkpoint of another run")
    return text
