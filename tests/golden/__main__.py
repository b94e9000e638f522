"""See the package: `python -m tests.golden [--write]`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from fomoe_flwr.console import setup_logging
from tests.golden.runs import SETTINGS, TRACES, digest, trace, trained

setup_logging()
with tempfile.TemporaryDirectory() as folder:
    for name in SETTINGS:
        run_dir = trained(name, Path(folder))
        print(f"{digest(run_dir)}  {name}")
        if "--write" in sys.argv[1:]:
            TRACES.mkdir(exist_ok=True)
            (TRACES / f"{name}.json").write_text(json.dumps(trace(run_dir), indent=1) + "\n")
