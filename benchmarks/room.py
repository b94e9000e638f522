"""Who can hold what of an open model: `python -m benchmarks.room FOLDER...` prints the table in docs/plan.md.

A folder has the config.json of a Hugging Face checkpoint; weights are not needed. Nothing is measured: this is what
`fomoe plan` goes by, for sites that are all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.model.spec import expert_parameters, parameter_counts
from fomoe_flwr.plan.memory import state_bytes
from fomoe_flwr.plan.system import BYTES_A_GIB
from fomoe_flwr.units import count

MEMORIES_GIB = (24, 48, 80)
# What the program takes today, and two that it would take with fewer bits (docs/plan.md).
BYTES_A_PARAMETER = (18.0, 12.0, 8.0)


def fitting(config: RunConfig, memory_gib: float) -> int:
    """Residents a layer that such a site has room for; 0: not even the dense part and one expert."""
    residents = range(1, config.model.num_experts + 1)
    return sum(state_bytes(config, float(number)) <= memory_gib * BYTES_A_GIB for number in residents)


def table(folders: Sequence[Path]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    columns = ["model", "bytes", "dense part", *(f"{memory} GiB" for memory in MEMORIES_GIB)]
    yield _row(columns)
    yield "|".join(["", "---", *("---:" for _ in columns[1:]), ""])
    for folder in folders:
        config = compose(["model=hf", f"model.path={folder}", "model.standins=0"]).config
        for bytes_per_parameter in BYTES_A_PARAMETER:
            plan = dataclasses.replace(config.plan, bytes_per_parameter=bytes_per_parameter)
            priced = dataclasses.replace(config, plan=plan)
            dense = f"{state_bytes(priced, 0.0) / BYTES_A_GIB:.1f} GiB"
            cells = [_cell(config.model.num_experts, fitting(priced, memory)) for memory in MEMORIES_GIB]
            first = bytes_per_parameter == BYTES_A_PARAMETER[0]
            name = _described(folder.name, config) if first else ""
            yield _row([name, f"{bytes_per_parameter:g}", dense, *cells])


def _described(name: str, config: RunConfig) -> str:
    counts, model = parameter_counts(config.model), config.model
    active = counts.total - counts.experts + model.num_layers * model.top_k * expert_parameters(model)
    sizes = f"{count(counts.total)}, {count(active)} active"
    return f"{name}: {sizes}; {model.num_experts} experts in {model.num_layers} layers"


def _cell(num_experts: int, residents: int) -> str:
    if residents == 0:
        return "none"
    sites = -(-num_experts // residents)
    return f"{residents} of {num_experts}, {sites} site{'' if sites == 1 else 's'}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.room", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    print("\n".join(table(parser.parse_args().folders)))


if __name__ == "__main__":
    main()
