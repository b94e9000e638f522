"""Text to token ids: raw bytes, or any Hugging Face `tokenizer.json`.

Notable: truncation and padding that a `tokenizer.json` may carry are turned off, and the text of a special
token inside a document is encoded as ordinary text. The token that ends a document is added by `shards.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.errors import ConfigError, DataError
from fomoe_flwr.files import expanded, write_atomically

END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
    "<｜end▁of▁sentence｜>",
)
KEPT = "tokenizer.json"  # in the run directory
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Tokenizer:
    """What the rest needs to know of a tokenizer."""

    name: str  # as given in data.tokenizer
    vocab_size: int  # one above the largest id
    eos_id: int  # ends every document
    fingerprint: str  # SHA-256 (hex); equal fingerprints give equal tokens
    encode_batch: Callable[[Sequence[str]], list[NDArray[np.integer]]]  # no end token added
    count_bytes: Callable[[], NDArray[np.int32]]  # [vocab_size], of text that each token stands for


def keep_tokenizer(spec: str, run_dir: Path) -> None:
    """Keep a copy of a tokenizer's file with the run, which may outlive the folder that it came from.

    Raises:
        OSError: it cannot be read or written.
    """
    if spec != "bytes" and (file := expanded(spec).resolve()) != (run_dir / KEPT).resolve():
        write_atomically(run_dir / KEPT, lambda path: path.write_bytes(file.read_bytes()))


def at_hand(spec: str, run_dir: Path) -> str:
    """The tokenizer of a run: as it was given, or the run's own copy where that is gone."""
    gone = spec != "bytes" and not expanded(spec).is_file()
    return str(run_dir / KEPT) if gone and (run_dir / KEPT).is_file() else spec


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes` (256 byte values and an end token), or the path of a `tokenizer.json`.

    Raises:
        DataError: no such file, not a tokenizer, no end token in it, or the package `tokenizers` is missing.
    """
    if spec == "bytes":
        fingerprint = hashlib.sha256(b"bytes").hexdigest()
        return Tokenizer("bytes", 257, 256, fingerprint, _to_bytes, _one_byte_each)
    file = expanded(spec)
    if not file.is_file():
        raise DataError(
            f"data.tokenizer={spec}: no such file; allowed are bytes or the path of a tokenizer.json"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"data.tokenizer={spec}: needs tokenizers; pip install 'fomoe-flwr[data]'") from error
    content = file.read_bytes()
    try:
        encoder = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"data.tokenizer={spec}: not a tokenizer.json: {error}") from error
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    eos_id = next((vocabulary[token] for token in END_TOKENS if token in vocabulary), None)
    if eos_id is None:
        raise DataError(f"data.tokenizer={spec}: has no end token; looked for {', '.join(END_TOKENS)}")

    def encode_batch(texts: Sequence[str]) -> list[NDArray[np.integer]]:
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    # Not the number of entries: ids may have gaps.
    vocab_size = max(vocabulary.values()) + 1
    return Tokenizer(
        spec,
        vocab_size,
        eos_id,
        hashlib.sha256(content).hexdigest(),
        encode_batch,
        lambda: _decoded_bytes(encoder, json.loads(content), eos_id, vocab_size),
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Hold the tokenizer against the model's embedding.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has ids.
    """
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: too small for tokenizer {tokenizer.name!r}, "
            f"which needs {tokenizer.vocab_size}"
        )


def _to_bytes(texts: Sequence[str]) -> list[NDArray[np.integer]]:
    return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def _one_byte_each() -> NDArray[np.int32]:
    return np.array([1] * 256 + [0], dtype=np.int32)


def _decoded_bytes(encoder: Any, content: dict[str, Any], eos_id: int, vocab_size: int) -> NDArray[np.int32]:
    """How many bytes of text each token stands for, by what it decodes to between two letters: [vocab_size].

    The end token and the token for unknown text stand for none. Where a tokenizer puts a space before each text, that
    one is counted: a byte a document.
    """
    vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
    added = {str(token) for token in encoder.get_added_tokens_decoder().values()}
    decoder = json.dumps(content.get("decoder") or {})
    letter = next(([vocabulary[token]] for token in string.ascii_letters if token in vocabulary), [])
    texts = encoder.decode_batch(
        [[*letter, token_id, *letter] for token_id in vocabulary.values()], skip_special_tokens=False
    )
    around = len(encoder.decode(letter + letter))
    num_bytes = np.zeros(vocab_size, dtype=np.int32)
    for (token, token_id), text in zip(vocabulary.items(), texts, strict=True):
        if '"ByteLevel"' in decoder and token not in added:
            # Each character is a byte. One token alone may be no whole letter, which cannot be decoded.
            num_bytes[token_id] = len(token)
        elif '"ByteFallback"' in decoder and _BYTE.fullmatch(token):
            num_bytes[token_id] = 1
        elif decoder == "{}":
            # Then decoding puts a space between any two tokens.
            num_bytes[token_id] = len(token.encode())
        else:
            num_bytes[token_id] = max(len(text.encode()) - around, 0)
    model = content["model"]
    for nothing in (eos_id, model.get("unk_id"), vocabulary.get(str(model.get("unk_token")))):
        if nothing is not None:
            num_bytes[nothing] = 0
    return num_bytes
