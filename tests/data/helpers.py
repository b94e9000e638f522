"""What several tests of data need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def lines_of(program: str, *arguments: str, kill_after: int | None = None) -> list[Any]:
    """The lines of JSON that a Python program writes; it is killed after so many."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    lines: list[Any] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(json.loads(line))
        if len(lines) == kill_after:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait(60)
    return lines
