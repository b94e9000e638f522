"""A data set of Hugging Face read as a stream: nothing is downloaded or tokenised before it is needed.

Notable: where a site stands is the number of sequences that it has consumed, as in any other stream, and the state that
the package `datasets` gives for it. The number says all; the state saves reading everything before it once more.

A document is for validation if its digest says so, so a site knows it when it meets one. The text is not shuffled, for
no state brings back a buffer in which it would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data.corpus import Document, is_validation, load_streamed, streamed_documents
from fomoe_flwr.data.shards import TokenCorpus
from fomoe_flwr.data.stream import Stream
from fomoe_flwr.data.tokenizer import load_tokenizer
from fomoe_flwr.errors import DataError

State = dict[str, Any]


class StreamedText(Stream):
    """A site's part of the stream: every so-manieth file, or row, as the data set's files allow.

    Args:
        corpus: the validation text, by which sites and server are held against each other.
        place: of the site among `sites`.
    """

    def __init__(self, corpus: TokenCorpus, config: DataConfig, place: int, sites: int, seq_len: int) -> None:
        self.corpus, self.seq_len = corpus, seq_len
        self._config, self._place, self._sites = config, place, sites
        self._tokenizer = load_tokenizer(config.tokenizer)
        self._position = self._epoch = 0
        self._begin()

    def batch(self, position: int, batch_size: int) -> torch.Tensor:
        """As `Stream`. Going back, or further than the next, reads all that is before it.

        Raises:
            DataError: the data set cannot be read, or has less than one sequence for this site.
        """
        if position < self._position:
            self._begin()
        while self._position < position:
            self._window()
        return torch.from_numpy(np.stack([self._window() for _ in range(batch_size)]))

    def passes(self, position: int) -> float:
        """Whole passes so far; how much there is in one is known when it is over."""
        return float(self._epoch)

    def state(self) -> State:
        """JSON values, with which another process goes on from here (`restore`)."""
        if not self._position:
            return {}
        return {
            "position": self._position,
            "epoch": self._epoch,
            "document": self._before,
            "carried": self._carried.tolist(),
            "taken": self._taken,
        }

    def restore(self, state: State) -> None:
        """Go to where `state` was asked for; an empty one is of the beginning, or of nobody knows where.

        Raises:
            DataError: it is not of this data set.
        """
        if not state or state["position"] == self._position:
            return
        try:
            self._begin(state["document"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"data.name={self._config.name}: another data set than before: {error}"
            ) from error
        self._position, self._epoch = state["position"], state["epoch"]
        tokens = np.array(state["carried"], dtype=np.int64)
        self._carried = self._tokens = tokens
        self._read()
        self._taken = state["taken"]

    def _begin(self, state: State | None = None) -> None:
        """Open the data set, at its first row or at that of its state."""
        self._dataset = load_streamed(self._config, self._place, self._sites)
        if state is not None:
            self._dataset.load_state_dict(state)
        self._documents: Iterator[Document] = streamed_documents(self._config, self._dataset)
        self._before: State = self._dataset.state_dict()
        # Of the document that is read now: its tokens, after those of the ones before that no sequence has had.
        self._tokens = self._carried = np.zeros(0, dtype=np.int64)
        self._taken = 0  # of these, by sequences
        self._position = self._epoch = 0

    def _window(self) -> NDArray[np.int64]:
        while len(self._tokens) - self._taken < self.seq_len + 1:
            self._carried = self._tokens[self._taken :]
            self._read()
        window = self._tokens[self._taken : self._taken + self.seq_len + 1]
        self._taken += self.seq_len
        self._position += 1
        return window

    def _read(self) -> None:
        """The next document for training. After the last one comes the first."""
        ends = 0
        while True:
            self._before = self._dataset.state_dict()
            document = next(self._documents, None)
            if document is None:
                ends += 1
                if ends > 1:
                    raise DataError(
                        f"data.name={self._config.name}: the stream has no text for training for site "
                        f"{self._place + 1} of {self._sites}; use fewer sites, or data.stream=false"
                    )
                position, epoch, carried = self._position, self._epoch, self._carried
                self._begin()
                self._position, self._epoch, self._carried = position, epoch + 1, carried
            elif not is_validation(document, self._config.val_fraction):
                break
        (tokens,) = self._tokenizer.encode_batch([document.text])
        self._tokens = np.concatenate([self._carried, tokens, [self._tokenizer.eos_id]]).astype(np.int64)
        self._taken = 0
