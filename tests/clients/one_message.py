"""A ClientApp without Flower, for tests that kill it: hands one message over and prints what came back.

python one_message.py FOLDER      with kind, task.json, settings.json and blob files in it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clients.relay import hand_over
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.errors import FomoeError
from fomoe_flwr.site.identity import NodeSettings


def main(folder: Path) -> int:
    settings = NodeSettings(**json.loads((folder / "settings.json").read_text()))
    blobs = ((path.stem, path.read_bytes()) for path in sorted(folder.glob("*.blob")))
    try:
        answer = hand_over(
            (folder / "kind").read_text(), (folder / "task.json").read_text(), "", blobs, settings, 300.0
        )
    except FomoeError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    assert "torch" not in sys.modules
    reply = json.loads(answer.header)
    print(json.dumps({"digests": bundle_digests(answer.blobs), "metrics": reply["metrics"]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
