"""See the package: `python -m tests.golden [--write | --print]`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from fomoe_flwr.console import setup_logging
from tests.golden import SAME_KERNELS
from tests.golden.runs import SETTINGS, TRACES, digest, trace, trained

if not SAME_KERNELS.items() <= os.environ.items():
    # Once more from the start.
    os.execve(
        sys.executable, [sys.executable, "-m", "tests.golden", *sys.argv[1:]], {**os.environ, **SAME_KERNELS}
    )
setup_logging()
traces = {}
with tempfile.TemporaryDirectory() as folder:
    for name in SETTINGS:
        run_dir = trained(name, Path(folder))
        traces[name] = trace(run_dir)
        if "--print" not in sys.argv[1:]:
            print(f"{digest(run_dir)}  {name}")
if "--print" in sys.argv[1:]:
    print(json.dumps(traces))
if "--write" in sys.argv[1:]:
    TRACES.mkdir(exist_ok=True)
    for name, lines in traces.items():
        (TRACES / f"{name}.json").write_text(json.dumps(lines, indent=1) + "\n")
