"""The environment in which Flower's commands are started."""

from __future__ import annotations

import http.server
import os
import threading

import httpx
import pytest

from fomoe_flwr.deploy import server as server_command
from fomoe_flwr.deploy.flower import flower_environment, past_the_proxy

PROXY = {
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
}


@pytest.fixture(autouse=True)
def _behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not there."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in PROXY.items():
        monkeypatch.setenv(name, value)


def test_flowers_own_client_finds_this_machine_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            with pytest.raises(httpx.ConnectError):
                httpx.get(url)
            for name, value in flower_environment().items():
                monkeypatch.setenv(name, value)
            assert httpx.get(url).status_code == 204
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_what_the_user_excepted_stays(name: str) -> None:
    changed = past_the_proxy({name: "lab.example, 10.0.0.1"})
    assert changed["no_proxy"] == changed["NO_PROXY"] == "lab.example,10.0.0.1,127.0.0.1,localhost,::1"
    assert past_the_proxy(changed) == changed


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        ("--host 10.0.0.7 --port 1", "10.0.0.7"),
        ("--host=[fd00::1]", "fd00::1"),
        ("--host 0.0.0.0", None),
        ("", None),
    ],
)
def test_the_address_that_the_server_listens_on_is_its_own(
    monkeypatch: pytest.MonkeyPatch, arguments: str, host: str | None
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: started.append(environment))
    server_command.server(arguments.split())
    loopback = ["127.0.0.1", "localhost", "::1"]
    assert started[0]["no_proxy"].split(",") == loopback + [host] * (host is not None)
