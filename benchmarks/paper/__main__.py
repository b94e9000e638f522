"""python -m benchmarks.paper figure=8|figure=9|figure=10|sweep=sites [--formula paper] [--picture FILE.png] [--json]"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import figures
from benchmarks.paper.formulas import FORMULAS
from fomoe_flwr.units import finite

DRAWINGS: dict[str, Callable[..., Sequence[Any]]] = {
    "figure=8": figures.figure_8,
    "figure=9": figures.figure_9,
    "figure=10": figures.figure_10,
    "sweep=sites": figures.figure_sites,
}
WITH_FLOPS = ("figure=8", "figure=10")  # of the paper, by its formula or by ours


def plain(row: Any) -> Any:
    """A named tuple, and those within it, as objects."""
    return {key: plain(value) for key, value in row._asdict().items()} if hasattr(row, "_asdict") else row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("which", choices=list(DRAWINGS))
    parser.add_argument("--picture", type=Path, help="PNG to write; default: figure_8.png, … here")
    parser.add_argument("--json", action="store_true", help="print the numbers drawn")
    parser.add_argument("--formula", choices=FORMULAS, help="of flops, for figures 8 and 10; default: ours")
    chosen = parser.parse_args(arguments)
    if chosen.formula and chosen.which not in WITH_FLOPS:
        parser.error(
            f"--formula {chosen.formula}: {chosen.which} has none; allowed with {', '.join(WITH_FLOPS)}"
        )
    options = {"formula": chosen.formula} if chosen.formula else {}
    picture = chosen.picture or Path(f"{chosen.which.replace('=', '_')}.png")
    rows = DRAWINGS[chosen.which](picture, **options)
    if chosen.json:
        print(json.dumps(finite([plain(row) for row in rows]), allow_nan=False))
    else:
        print(f"picture: {picture}")


if __name__ == "__main__":
    main()
