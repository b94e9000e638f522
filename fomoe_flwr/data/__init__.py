"""From a corpus to a site's stream: documents, tokens on disk, the deal to sites, batches."""

from fomoe_flwr.data.corpus import Document, read_documents
from fomoe_flwr.data.partition import deal_documents
from fomoe_flwr.data.shards import TokenCorpus, prepare, validation_documents
from fomoe_flwr.data.stream import (
    LabelledBatch,
    MixedStream,
    Stream,
    TokenStream,
    bytes_per_target,
    labelled_batches,
    validation_batches,
)
from fomoe_flwr.data.streamed import StreamedText
from fomoe_flwr.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "Document",
    "LabelledBatch",
    "MixedStream",
    "Stream",
    "StreamedText",
    "TokenCorpus",
    "TokenStream",
    "Tokenizer",
    "bytes_per_target",
    "check_vocabulary",
    "deal_documents",
    "labelled_batches",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "validation_batches",
    "validation_documents",
]
