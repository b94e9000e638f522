"""`fomoe eval`: a checkpoint judged on any text, in one go."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from fomoe_flwr.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from fomoe_flwr.compose import compose
from fomoe_flwr.config import DataConfig, ModelConfig, TrainConfig
from fomoe_flwr.data import LabelledBatch, check_vocabulary, load_tokenizer, prepare
from fomoe_flwr.data.corpus import source_digest
from fomoe_flwr.engine.device import resolve_device, use_cpu
from fomoe_flwr.errors import CheckpointError, ConfigError, DataError, WireError
from fomoe_flwr.evaluation import (
    DRAWS,
    Judged,
    Text,
    as_json,
    describe_text,
    evaluate_model,
    necessity,
    text_of,
)
from fomoe_flwr.model.spec import is_moment
from fomoe_flwr.report.tables import show_evaluation

USAGE = """usage: fomoe eval CHECKPOINT [OVERRIDE ...] [--json] [--reference CHECKPOINT] [--batches N] [--draws N]
CHECKPOINT     a run directory, its checkpoints folder, or one checkpoint
OVERRIDE       the text: data=text data.path=FILE, data=jsonl ..., data.tokenizer=...; without, the run's own
               corpus, of which the validation part is used (any other text is used whole); and
               train.{device,dtype,batch_size,seq_len,threads}, model.experts_impl
--json         one JSON object instead of the table
--reference    a centralised run, of whose routing necessity this one's is a share
--batches N    at most so many batches, spread over the text; without, all of it (necessity: 32 batches)
--draws N      draws of random routing to average over; without, 3"""

NECESSITY_BATCHES = 32  # without --batches: necessity takes 1 + draws · (1 + layers) passes

# What an override may change: where and how it is computed. The model is the checkpoint's.
TRAIN_KEYS = ("device", "dtype", "batch_size", "seq_len", "threads")
ALLOWED = f"allowed are data, data.*, {', '.join(f'train.{key}' for key in TRAIN_KEYS)}, model.experts_impl"


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    checkpoint: str
    overrides: list[str] = field(default_factory=list)
    as_json: bool = False
    reference: str | None = None
    batches: int | None = None
    draws: int = DRAWS


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the sections of its configuration that matter here."""

    checkpoint: Checkpoint
    judged: Judged
    train: TrainConfig
    data: DataConfig


def evaluate_command(arguments: Sequence[str], console: Console | None = None) -> None:
    """The command.

    Raises:
        ConfigError: an argument that cannot be.
        CheckpointError: missing, damaged or foreign.
        DataError: a text that cannot be read.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    request = parse(arguments)
    content = evaluate_request(request)
    if request.as_json:
        print(json.dumps(content, allow_nan=False, ensure_ascii=False))
    else:
        show_evaluation(content, console or Console())


def evaluate_request(request: Request) -> dict[str, Any]:
    """All figures, as JSON values."""
    saved = load(request.checkpoint, f"fomoe eval {request.checkpoint}")
    reference = load(request.reference, f"--reference {request.reference}") if request.reference else None
    train, data, model = _overridden(saved, request.overrides)
    judged = dataclasses.replace(saved.judged, model=model)
    device = resolve_device(train.device)
    use_cpu(train.threads)
    check_vocabulary(load_tokenizer(data.tokenizer), model.vocab_size)
    if reference is not None:
        _check_reference(reference, data)
    data, part = choose_part(saved.data, data, _given(request.overrides, "data.val_fraction"))
    corpus = prepare(data)
    about = describe_text(data, part, corpus, corpus.val_documents)
    if about["tokens"] < 1:
        raise DataError(f"data.path={data.path}: one token; there is nothing to predict")

    def text(num_batches: int | None) -> Text:
        batches = text_of(corpus, corpus.val_documents, train.seq_len, train.batch_size, num_batches)
        return _watched(batches)

    whole, sample = text(request.batches), text(request.batches or NECESSITY_BATCHES)
    with _naming(saved.checkpoint):
        evaluation = evaluate_model(judged, whole, train.dtype, device, request.draws, sample)
    other, others_path = None, {}
    if reference is not None:
        others_path = {"reference": str(reference.checkpoint.path)}
        with _naming(reference.checkpoint):
            module = reference.judged.module(reference.judged.everything, device)
            other = necessity(module, sample, train.dtype, request.draws)
    return {
        "checkpoint": str(saved.checkpoint.path),
        **others_path,
        "round": saved.checkpoint.round,
        "text": about,
        **as_json(evaluation, other),
    }


def _watched(text: Text) -> Text:
    """The text with a bar for each pass over it that takes long, if somebody looks."""
    hidden = not sys.stderr.isatty()

    def batches() -> Iterator[LabelledBatch]:
        yield from tqdm(text.batches(), unit=" batches", leave=False, delay=2.0, disable=hidden)

    return dataclasses.replace(text, batches=batches)


# ----- checkpoint


def load(where: str, asked: str) -> Saved:
    """The checkpoint that the user names.

    Raises:
        CheckpointError: missing, damaged, or not one that can be judged.
    """
    folder = Path(where).expanduser().absolute()
    if (folder / "manifest.json").is_file():  # one checkpoint; it may have been copied to another name
        checkpoint = read_checkpoint(folder)
    else:
        _, checkpoint = find_checkpoint(where, asked)
    try:
        config, placement = checkpoint.manifest["config"], checkpoint.manifest["placement"]
        routing = config["strategy"]["routing"]
        # A key that is newer than the checkpoint takes its default.
        model, train, data = (
            ModelConfig(**config["model"]),
            TrainConfig(**config["train"]),
            DataConfig(**config["data"]),
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: manifest.json is not that of a run of this version ({error})"
        ) from error
    state = {name: tensor for name, tensor in checkpoint.parameters.items() if not is_moment(name)}
    return Saved(checkpoint, Judged(model, routing, state, placement), train, data)


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """A tensor that is missing or of another shape is the checkpoint's fault."""
    try:
        yield
    except WireError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: not of the model it names: {error}") from error


def _check_reference(reference: Saved, data: DataConfig) -> None:
    """Nats a token can be compared where the tokens are the same."""
    ours, theirs = load_tokenizer(data.tokenizer), load_tokenizer(reference.data.tokenizer)
    if ours.fingerprint != theirs.fingerprint:
        raise CheckpointError(
            f"--reference {reference.checkpoint.path}: trained with data.tokenizer={theirs.name}, the text is "
            f"cut by {ours.name}; nats a token cannot be compared"
        )
    check_vocabulary(ours, reference.judged.model.vocab_size)


# ----- text


def _overridden(saved: Saved, overrides: Sequence[str]) -> tuple[TrainConfig, DataConfig, ModelConfig]:
    """The checkpoint's sections with what the user changed.

    Composed as for a run, which checks keys, types and bounds; but of the result only what was asked for is taken.
    A new source (`data=text`) begins from the defaults, except for the tokenizer, which the model knows, and the
    place of the cache.
    """
    composed = compose(overrides).config
    data = saved.data
    if _given(overrides, "data"):
        data = dataclasses.replace(
            composed.data,
            tokenizer=data.tokenizer,
            cache_dir=data.cache_dir,
            val_fraction=data.val_fraction,
        )
    given = [key for key in map(_key, overrides) if key.startswith("data.")]
    changed = {key.removeprefix("data."): getattr(composed.data, key.removeprefix("data.")) for key in given}
    train = {key: getattr(composed.train, key) for key in TRAIN_KEYS if _given(overrides, f"train.{key}")}
    model = saved.judged.model
    if _given(overrides, "model.experts_impl"):
        model = dataclasses.replace(model, experts_impl=composed.model.experts_impl)
    return dataclasses.replace(saved.train, **train), dataclasses.replace(data, **changed), model


def choose_part(own: DataConfig, data: DataConfig, share_given: bool) -> tuple[DataConfig, str]:
    """Of the corpus that the run was trained on, its validation part; any other text whole (ours).

    It is the run's own if it holds the same, wherever it lies now. Whether another text is a part of what the run
    was trained on, nobody can tell from outside.

    Args:
        share_given: data.val_fraction was, so that is the share of another text.

    Raises:
        ConfigError: a larger validation part than the run's own, for it would hold text that it was trained on.
    """
    if not _same_source(own, data):
        return (data, "validation") if share_given else (dataclasses.replace(data, val_fraction=1.0), "whole")
    if data.val_fraction > own.val_fraction:
        raise ConfigError(
            f"data.val_fraction={data.val_fraction}: the run kept {own.val_fraction} of this corpus from training; "
            f"at most that"
        )
    return data, "validation"


def _same_source(own: DataConfig, data: DataConfig) -> bool:
    if own.source != data.source:
        return False
    place = ("path", "name", "config_name", "split")
    if own.source == "huggingface" or all(getattr(own, key) == getattr(data, key) for key in place):
        return all(getattr(own, key) == getattr(data, key) for key in place)
    try:
        return source_digest(own) == source_digest(data)
    except DataError:  # the run's own is not on this machine
        return False


# ----- arguments


def parse(arguments: Sequence[str]) -> Request:
    """The arguments, each looked at before anything is read.

    Raises:
        ConfigError: the first that cannot be.
    """
    checkpoint: str | None = None
    overrides: list[str] = []
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        key, equals, value = item.partition("=")
        if item == "--json":
            values["as_json"] = True
        elif key in ("--reference", "--batches", "--draws"):
            text = value if equals else rest.pop(0) if rest else ""
            values[key.removeprefix("--")] = text if key == "--reference" else _number(key, text)
            if not text:
                raise ConfigError(f"{key}: needs the checkpoint of another run")
        elif item.startswith("-"):
            raise ConfigError(
                f"{item}: no option of fomoe eval; it has --json, --reference, --batches, --draws and --help"
            )
        elif checkpoint is None and ("=" not in item or Path(item).exists()):
            checkpoint = item
        else:
            overrides.append(item)
    if checkpoint is None:
        raise ConfigError("fomoe eval: which checkpoint? fomoe eval RUN_DIR; --help says more")
    _check_keys(overrides)
    return Request(checkpoint, overrides, **values)


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} {text}".rstrip() + ": needs a whole number of at least 1")
    return int(text)


def _check_keys(overrides: Sequence[str]) -> None:
    for item in overrides:
        key = _key(item)
        if not (
            key == "data"
            or key.startswith("data.")
            or key == "model.experts_impl"
            or key in (f"train.{name}" for name in TRAIN_KEYS)
        ):
            raise ConfigError(
                f"{item}: not for fomoe eval, which takes the rest from the checkpoint; {ALLOWED}"
            )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _given(overrides: Sequence[str], key: str) -> bool:
    return key in map(_key, overrides)
