"""A deployment whose bundles travel through an S3 server: real processes, of which the server's alone have keys."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_flwr.compose import compose
from fomoe_flwr.deploy.processes import program_of
from fomoe_flwr.deploy.supernode import CLIENT_APP, EXECUTOR, SUPERNODE
from tests.e2e.deployment import SITE_MARK, Deployment, until
from tests.e2e.test_deployment import assert_same_losses, small
from tests.store.servers import BUCKET, KEY, SECRET, bad_line, environment, s3_server
from tests.strategies.helpers import metrics
from tests.strategies.helpers import run as run_here

SIGNED = re.compile(rb"Signature(=|%3D)|X-Amz-|" + SECRET.encode())
SITES = ("a", "b")


def site_processes(deployment: Deployment) -> Iterator[tuple[str, bytes]]:
    """Program and environment of every process below `fomoe site`."""
    marks = [f"{SITE_MARK}={deployment.mark}-{site}\0".encode() for site in SITES]
    for process in deployment.marked.look():
        try:
            found = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        if any(mark in found for mark in marks):
            yield program_of(process.pid), found


@pytest.mark.slow
def test_a_deployment_by_an_s3_server(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("nanio")
    # Shards of some megabytes.
    overrides = [
        *small(corpus_dir, cache_dir), "model.d_model=128", "model.d_expert=512", "strategy.overlap=1",
        "train.rounds=1",
    ]  # fmt: skip
    overrides = list({text.partition("=")[0]: text for text in overrides}.values())
    deployment = Deployment(tmp_path / "deployment", SITES)
    seen: dict[str, bytes] = {}
    with (
        s3_server(tmp_path / "s3") as s3_port,
        bad_line(s3_port) as (store_port, by_store),
        bad_line(deployment.port) as (flower_port, by_flower),
    ):
        deployment.server_environment = environment(store_port)
        deployment.site_options += ["--superlink", f"127.0.0.1:{flower_port}"]
        with deployment:
            run = deployment.submit([*overrides, f"store=s3://{BUCKET}/here"], tmp_path / "run")

            def ended() -> bool:
                seen.update(site_processes(deployment))
                # Looking at all processes costs something, too.
                time.sleep(0.4)
                return run.poll() is not None

            until(ended, 300, deployment.logs)
            assert run.wait() == 0, deployment.logs()

    here = [
        *overrides,
        f"federation={deployment.federation}",
        "runtime=local",
        f"hydra.run.dir={tmp_path}/local",
    ]
    assert_same_losses(tmp_path / "run", run_here(compose(here)))
    lines = metrics(tmp_path / "run")
    assert all(line["failures"] == {} and len(line["sites"]) == 2 for line in lines[1:])

    # Through Flower: what messages say besides tensors, the app itself for each site, and questions for work.
    tensors = sum(line["bytes_by_class"][name] for line in lines for name in ("dense", "expert"))
    assert tensors > 15e6
    assert all(line["bytes_by_class"]["other"] < 40_000 for line in lines)
    assert by_flower.uploaded < 0.4e6
    assert by_flower.downloaded < 3e6
    # Through the store: all tensors, once up and once down, and a bundle for both sites once up.
    assert tensors < by_store.downloaded < 1.02 * tensors
    assert tensors / 2 < by_store.uploaded < 0.98 * tensors

    # Credentials and links stay where they are needed.
    assert {SUPERNODE, EXECUTOR, CLIENT_APP, "clients.worker"} <= seen.keys()
    for program, found in seen.items():
        assert not any(word.encode() in found for word in (KEY, SECRET, "AWS_SECRET")), program
    said = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"superlink.log", "run.log", "a.worker.log", "a.log", "metrics.jsonl"} <= {
        path.name for path in said
    }
    assert [path for path in said if SIGNED.search(path.read_bytes())] == []

    # And nothing is left, at the store and at the sites.
    assert [path for path in (tmp_path / "s3").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "deployment/sites").rglob("incoming*")) == []
