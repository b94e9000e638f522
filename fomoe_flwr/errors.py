"""Errors a user can act on. Each carries one line: which key, which value, what is allowed."""

from fomoe_flwr.untrusted import one_line

LONGEST = 2000  # characters of an error's line; of a longer one the middle is left out


class FomoeError(Exception):
    """Base of every error that ends a command with one line and a non-zero exit code."""

    def __init__(self, message: str) -> None:
        # A value or a name may be anybody's.
        super().__init__(one_line(message, LONGEST))


class ConfigError(FomoeError):
    """A configuration that cannot be composed or cannot work."""


class DataError(FomoeError):
    """A corpus, tokenizer or token cache that cannot be read or does not fit the configuration."""


class CheckpointError(FomoeError):
    """A checkpoint that is missing, damaged or of another model."""


class WireError(FomoeError):
    """A message whose payload is not what its reader was promised."""


class DtypeError(WireError):
    """A payload in another dtype than was agreed."""


class NotFiniteError(WireError):
    """A figure that is no finite number."""


class RunError(FomoeError):
    """A federated run that cannot go on."""


class StoreError(FomoeError):
    """An object that could not be read from, or written to, an object store."""


class WorkerError(FomoeError):
    """The work of a site that could not be handed to its worker, or did not come back."""
