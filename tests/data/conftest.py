"""Small corpora: on disk for the readers, in memory (token value = position) where tokens must be traced."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_flwr.data import TokenCorpus


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[..., Path]:
    """Write rows as JSON lines and return the path."""

    def write(path: Path, rows: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def corpus_of() -> Callable[..., TokenCorpus]:
    """A corpus in memory with the given document lengths; the token at position p is p."""

    def build(
        lengths: Sequence[int],
        domain: Sequence[int] | None = None,
        is_val: Sequence[bool] | None = None,
        shard_tokens: int = 1000,
    ) -> TokenCorpus:
        starts = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
        tokens = np.arange(starts[-1], dtype="<u4")
        doc_domain = np.array(domain if domain is not None else [0] * len(lengths), dtype=np.int32)
        return TokenCorpus(
            domains=[f"d{index}" for index in range(int(doc_domain.max()) + 1)],
            doc_starts=starts,
            doc_bytes=np.array(lengths, dtype=np.int64) - 1,
            doc_domain=doc_domain,
            is_val=np.array(is_val if is_val is not None else [False] * len(lengths)),
            token_bytes=np.ones(int(starts[-1]) + 1, dtype=np.int32),
            vocab_size=int(starts[-1]) + 1,
            eos_id=0,
            tokenizer="",
            digest="",
            split="",
            shards=tuple(tokens[i : i + shard_tokens] for i in range(0, len(tokens), shard_tokens)),
        )

    return build
