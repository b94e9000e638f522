"""Which room may import which: the method knows nothing of Flower's two sides, and these stay thin."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The command starts the Flower app, whose two sides lie beside the package.
ENTRY = ROOT / "fomoe_flwr" / "cli.py"
# The only rooms of the method that know Flower: what its messages carry, and its commands.
KNOW_FLOWER = [ROOT / "fomoe_flwr" / "bundles.py", ROOT / "fomoe_flwr" / "deploy"]
MOST_LINES = 1200


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importers(folder: str, packages: tuple[str, ...]) -> set[Path]:
    return {
        file
        for file in (ROOT / folder).rglob("*.py")
        if any(name.split(".")[0] in packages for name in imports(file))
    }


def test_the_method_does_not_import_the_flower_app() -> None:
    assert importers("fomoe_flwr", ("strategies", "clients")) <= {ENTRY}


def test_the_method_knows_flower_in_two_rooms() -> None:
    found = importers("fomoe_flwr", ("flwr",))
    assert [file for file in found if not any(file.is_relative_to(room) for room in KNOW_FLOWER)] == []


def test_what_a_site_does_needs_no_flower() -> None:
    modules = "fomoe_flwr.site.work, fomoe_flwr.store.at_site, fomoe_flwr.server.rounds"
    code = f"import sys, {modules}; assert 'flwr' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_site_does_not_import_the_server() -> None:
    assert importers("clients", ("strategies",)) == set()
    # Simulations run the sites' app.
    assert importers("strategies", ("clients",)) <= {ROOT / "strategies" / "launch.py"}


@pytest.mark.parametrize("folder", ["strategies", "clients"])
def test_the_flower_app_stays_thin(folder: str) -> None:
    lines = sum(len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py"))
    assert lines <= MOST_LINES, f"{folder}/ has {lines} lines; what is not Flower's belongs into fomoe_flwr/"


def test_make_clean_leaves_runs_alone() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\nclean:\n")[1].split("\n\n")[0]
    assert ".pytest_cache" in recipe
    assert not {"runs", "outputs", "multirun", "wandb"} & set(recipe.split())
