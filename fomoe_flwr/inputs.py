"""The identity of what a run's numbers come from: text, tokenizer, who gets which part, and the model's shape.

One value, kept in each checkpoint, sent with each task, given back in each reply and written with each line of
metrics; one comparison, for a resume, a site, `fomoe eval` and `fomoe report`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fomoe_flwr.config import RunConfig

if TYPE_CHECKING:
    # Not at run time: it needs PyTorch, and a ClientApp that starts for each message does not.
    from fomoe_flwr.data import TokenCorpus

OWN_TEXT = "own"  # the partition of a site that has text of its own
# Of the model, what may differ between a checkpoint and the run that goes on from it.
FREE_MODEL_KEYS = ("experts_impl", "load_balance", "path", "init", "document_end")
# They count where they are given; a run of an earlier version has none of them.
_NEW_MODEL_KEYS = ("hf", "expert_layers", "standins")
_LONGEST = 80  # characters of a part


@dataclass(frozen=True)
class Inputs:
    """Each part is a short text. An empty one is unknown, and equal to any."""

    model: str = ""  # digest of its configuration
    tokenizer: str = ""  # digest
    val_fraction: str = ""
    corpus: str = ""  # what of all documents it is of, and digest
    split: str = ""  # digest of which of them are kept for validation
    partition: str = ""  # how the corpus is dealt, and digest of which site claims what
    seq_len: str = ""


UNKNOWN = Inputs()


class Difference(NamedTuple):
    """A part that is not what it was; `part` is a field of `Inputs`."""

    part: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{KEYS[self.part]}: {_MEANS[self.part]} {self.now}, before {self.before}"


# The key of the configuration by which a user sets each part.
KEYS = {
    "model": "model",
    "tokenizer": "data.tokenizer",
    "val_fraction": "data.val_fraction",
    "corpus": "data",
    "split": "data",
    "partition": "data.partition",
    "seq_len": "train.seq_len",
}
_MEANS = {
    "model": "its shape is",
    "tokenizer": "the tokenizer is",
    "val_fraction": "the share kept for validation is",
    "corpus": "the text is",
    "split": "the documents kept for validation are",
    "partition": "the text is dealt by",
    "seq_len": "a sequence has",
}


def digest_of(values: Any) -> str:
    """16 hex digits of the SHA-256 of JSON values: enough to tell apart what differs by accident."""
    return short(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())


def short(digest: str) -> str:
    """The first 16 digits of a digest in hex, and before them what it is of, if it says so."""
    kind, colon, digits = digest.rpartition(":")
    return f"{kind}{colon}{digits[:16]}"


def run_inputs(config: RunConfig, tokenizer: str, corpus: TokenCorpus | None, deals: Any) -> Inputs:
    """Those of a run, as far as the server knows them.

    Args:
        tokenizer: its fingerprint.
        corpus: the common one; None if the server does not read it.
        deals: what each site is told of its part, as JSON values.
    """
    model = {
        key: value
        for key, value in dataclasses.asdict(config.model).items()
        if key not in FREE_MODEL_KEYS and not (key in _NEW_MODEL_KEYS and not value)
    }
    data = config.data
    alpha = data.dirichlet_alpha if data.partition == "dirichlet" else None
    return Inputs(
        model=digest_of(model),
        tokenizer=short(tokenizer),
        val_fraction=f"{data.val_fraction:g}",
        corpus=short(corpus.digest) if corpus else "",
        split=short(corpus.split) if corpus else "",
        partition=f"{data.partition} {digest_of([alpha, deals, data.mix] if data.mix else [alpha, deals])}",
        seq_len=f"{config.train.seq_len} tokens",
    )


def inputs_of(values: object) -> Inputs:
    """The inverse of `dataclasses.asdict`, for values that may come from anywhere; what is missing is unknown.

    Raises:
        TypeError, ValueError: not short texts by known names.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"inputs: a {type(values).__name__}")
    for key, value in values.items():
        if key not in KEYS or not isinstance(value, str) or len(value) > _LONGEST or not value.isprintable():
            raise ValueError(f"inputs {key!r:.40}: {value!r:.40}")
    return Inputs(**values)


def differences(before: Inputs, now: Inputs) -> list[Difference]:
    """What is known on both sides and not equal.

    The digest of the split depends on the share and the text: where one of those differs, it says nothing more. A run
    of an earlier version has a digest of the tokens for its corpus, which depends on the tokenizer and cannot be
    compared with one of the text.
    """
    found = [
        Difference(part, was, is_)
        for part in KEYS
        if (was := getattr(before, part)) and (is_ := getattr(now, part)) and was != is_
    ]
    parts = {difference.part for difference in found}
    of_tokens = {":" not in corpus for corpus in (before.corpus, now.corpus)}
    if len(of_tokens) > 1 or ("tokenizer" in parts and of_tokens == {True}):
        parts -= {"corpus"}
    if parts & {"corpus", "val_fraction"}:
        parts -= {"split"}
    return [difference for difference in found if difference.part in parts]
