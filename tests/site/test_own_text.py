"""A site with text of its own trains on all of it, and asks nothing of the others' text."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

import fomoe_flwr.site.work
from fomoe_flwr.data import TokenCorpus, TokenStream
from fomoe_flwr.errors import ConfigError, RunError
from strategies.local_grid import LocalGrid
from tests.conftest import WORDS, Compose
from tests.strategies.helpers import run

SITES = 4


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of each corpus that a site trains on, by its first domain: the share of the training tokens that it uses."""
    shares: dict[str, float] = {}

    def spy(corpus: TokenCorpus, documents: object, seq_len: int, seed: int) -> TokenStream:
        tokens, all_tokens = (
            corpus.doc_lengths[chosen].sum() for chosen in (documents, corpus.train_documents)
        )
        shares[corpus.domains[0]] = float(tokens / all_tokens)
        return TokenStream(corpus, documents, seq_len, seed)  # type: ignore[arg-type]

    monkeypatch.setattr(fomoe_flwr.site.work, "TokenStream", spy)
    return shares


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A folder of text for each site, with one domain named after it."""
    rng = random.Random(1)
    for site in range(SITES):
        folder = tmp_path / f"text-{site}" / f"own-{site}"
        folder.mkdir(parents=True)
        for index in range(12):
            text = " ".join(rng.choice(WORDS) for _ in range(60))
            (folder / f"{index}.txt").write_text(f"{site} {text}\n")
    return [tmp_path / f"text-{site}" for site in range(SITES)]


@pytest.mark.parametrize("partition", ["iid", "domain", "dirichlet"])
def test_a_site_uses_all_of_the_text_that_its_operator_gave(
    partition: str, small: Compose, folders: list[Path], used: dict[str, float]
) -> None:
    composed = small(f"federation.num_sites={SITES}", f"data.partition={partition}", "train.rounds=1")
    given = {site: {"data-path": str(folder)} for site, folder in enumerate(folders)}

    run(composed, grid_type=partial(LocalGrid, node_configs=given))  # type: ignore[arg-type]

    assert used == {f"own-{site}": 1.0 for site in range(SITES)}


def federation(tmp_path: Path, folders: list[Path]) -> str:
    """Two sites with text of their own, and two that share the common corpus by domain."""
    lines = [f"  - {{name: own-{site}, data_path: {folders[site]}, domain: elsewhere}}" for site in range(2)]
    lines += ["  - {name: shared-0, domain: botany}", "  - {name: shared-1}"]
    file = tmp_path / "sites.yaml"
    file.write_text("\n".join(["sites:", *lines]) + "\n")
    return f"federation={file}"


def test_a_federation_file_may_name_text_and_the_others_share_the_rest(
    small: Compose, tmp_path: Path, folders: list[Path], used: dict[str, float]
) -> None:
    composed = small(federation(tmp_path, folders), "data.partition=domain", "train.rounds=1")

    run(composed)

    assert used["own-0"] == used["own-1"] == 1.0
    # The common corpus: shared-0 has botany and shared-1 the other three domains; the spy kept one of the two.
    assert used["anatomy"] == pytest.approx(0.25, abs=0.06) or used["anatomy"] == pytest.approx(
        0.75, abs=0.06
    )


def test_without_a_common_corpus_every_site_must_have_text(
    small: Compose, folders: list[Path], used: dict[str, float]
) -> None:
    composed = small(f"federation.num_sites={SITES}", "data.partition=own", "train.rounds=1")
    given = {site: {"data-path": str(folder)} for site, folder in enumerate(folders)}
    run(composed, grid_type=partial(LocalGrid, node_configs=given))  # type: ignore[arg-type]
    assert used == {f"own-{site}": 1.0 for site in range(SITES)}

    with pytest.raises(RunError, match=r"data\.partition=own: site site-\d has no text"):
        run(small(f"federation.num_sites={SITES}", "data.partition=own", run_dir=folders[0] / "run"))


def test_own_text_needs_a_source_that_reads_files(
    small: Compose, tmp_path: Path, folders: list[Path]
) -> None:
    with pytest.raises(ConfigError, match=r"data_path=.*own-0.*data\.source=stdlib"):
        small(federation(tmp_path, folders), "data=stdlib", "data.path=null")


def test_several_sites_do_not_share_text_of_their_own(
    small: Compose, tmp_path: Path, folders: list[Path]
) -> None:
    file = tmp_path / "sites.yaml"
    file.write_text(f"sites:\n  - {{name: lab, count: 4, data_path: {folders[0]}}}\n")
    with pytest.raises(ConfigError, match=r"data_path=.* of 4 sites lab"):
        small(f"federation={file}")
