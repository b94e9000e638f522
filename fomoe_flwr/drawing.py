"""Pictures into files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_flwr.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a picture, and return where it is.

    Raises:
        RunError: it cannot be written.
    """
    try:
        figure.savefig(path, pil_kwargs={"optimize": True})
    except OSError as error:
        raise RunError(f"{path}: cannot write the picture: {error}") from error
    return path
