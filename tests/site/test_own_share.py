"""A site at a machine of its own tokenises its own share, and says the same as one that tokenised everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fomoe_flwr.data import prepare
from fomoe_flwr.messages import deals
from fomoe_flwr.site.memory import Memory
from fomoe_flwr.site.work import perform
from tests.clients.helpers import bundles_of, site_task, without_seconds
from tests.conftest import Compose
from tests.site.test_memory import nothing, settings


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_real_site_tokenises_its_share_and_a_simulated_one_everything(
    small: Compose, tmp_path: Path, kind: str, partition: str
) -> None:
    config = small(f"data.partition={partition}", "data.dirichlet_alpha=5").config
    assert len(deals(config.data, config.federation.sites)) == 4
    answers, tokens = [], []
    for place, real in (("real", True), ("simulated", False)):
        config.data.cache_dir = str(tmp_path / place / "cache")
        task = site_task(config, 1)
        node = settings(tmp_path / place)
        if not real:
            node = replace(node, site=None, partition=1)
        bundles, reply = perform(
            kind, task.to_json(), bundles_of(config, task, kind == "evaluate"), node, Memory(), nothing
        )
        answers.append((bundles, without_seconds(reply)))
        caches = (tmp_path / place / "cache").iterdir()
        tokens.append(sum(file.stat().st_size for cache in caches for file in cache.glob("tokens-*")) / 2)
    assert answers[0] == answers[1]
    corpus = prepare(config.data)
    assert tokens[1] == corpus.doc_starts[-1]
    most = corpus.doc_lengths[corpus.is_val if kind == "evaluate" else ~corpus.is_val].sum()
    # One of four, by chance more.
    assert tokens[0] == most if kind == "evaluate" else tokens[0] < 0.5 * most
