"""What `fomoe server` tells the parts that Flower starts for it."""

from __future__ import annotations

import pytest

from fomoe_flwr.deploy import server
from fomoe_flwr.deploy.flower import REGISTERED


@pytest.mark.parametrize("arguments", [["--insecure"], ["--enable-supernode-auth", "--database", "x.db"]])
def test_a_serverapp_is_told_whether_keys_are_registered(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(server.os, "execve", lambda path, command, environment: started.append(environment))
    server.server(arguments)
    assert started[0].get(REGISTERED) == ("1" if "--enable-supernode-auth" in arguments else None)
