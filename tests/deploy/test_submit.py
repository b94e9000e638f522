"""`fomoe submit` refuses what the server would read otherwise than its user meant; and the page on deployment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fomoe_flwr.deploy.submit import check_absolute
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.overrides import read_overrides
from tests.e2e.deployment import blocks


@pytest.mark.parametrize(
    "override",
    [
        "plan.measured=runs/before",
        "data.path='a=b/text'",
        "data.cache_dir=cache",
        "data.tokenizer=mine.json",
        "resume=runs/before",
        "federation=labs.yaml",
        "federation.path=labs.yaml",
        "hydra.run.dir=run",
        "++data.path=text",
        "federation.sites=[{name: a, data_path: text}]",
    ],
)
def test_a_relative_path_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="must be an absolute path"):
        check_absolute(read_overrides([override]))


def test_what_the_server_finds_is_taken() -> None:
    check_absolute(
        read_overrides(
            [
                "plan.measured='/a=b/run'", "data.path='~/text'", "data.tokenizer=bytes", "data.cache_dir=null",
                "federation=labs", "federation.sites=[{name: a, data_path: /text}, {name: b}]", "model=tiny",
            ]
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("server", "name"),
    [
        ("[2001:db8::1]:8443", "IP Address:2001:DB8:0:0:0:0:0:1"),
        ("moe.example.org:8443", "DNS:moe.example.org"),
        ("127.0.0.1:8443", "IP Address:127.0.0.1"),
    ],
)
def test_the_certificate_of_the_document_is_for_the_servers_address(
    server: str, name: str, tmp_path: Path
) -> None:
    (block,) = (text for heading, text in blocks() if heading == "Certificates")
    environment = {"FOLDER": str(tmp_path), "SERVER": server, "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-ec", block], env=environment, capture_output=True, check=True, timeout=60)
    show = ["openssl", "x509", "-in", str(tmp_path / "server.crt"), "-noout", "-ext", "subjectAltName"]
    found = subprocess.run(show, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f" {name}," in found
