"""Whether a site's clock is the reason why a SuperLink takes nothing from it."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from email.utils import formatdate

import pytest

from fomoe_flwr.deploy import clock
from fomoe_flwr.deploy.clock import clock_fault, server_time


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as a SuperLink does: there is no such page, and a `Date`."""

    date: str | None = None

    def do_GET(self) -> None:
        self.send_response_only(404)
        if self.date is not None:
            self.send_header("Date", self.date)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def superlink() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("ahead", "said"), [(8, "8 s ahead"), (-400, "400 s behind"), (86400 * 365, "31536000 s ahead")]
)
def test_a_clock_that_is_off_is_said_with_both_times_and_what_is_allowed(
    superlink: str, monkeypatch: pytest.MonkeyPatch, ahead: int, said: str
) -> None:
    monkeypatch.setattr(Server, "date", formatdate(1_700_000_000, usegmt=True))
    monkeypatch.setattr(clock.time, "time", lambda: 1_700_000_000.5 + ahead)
    fault = clock_fault(superlink, insecure=True)
    assert fault is not None
    assert said in fault
    assert "2023-11-14 22:13:20 UTC" in fault
    assert re.search("at most 5 s ahead and 305 s behind are allowed.*NTP", fault)
    assert "\n" not in fault


@pytest.mark.parametrize("ahead", [0, 3, -300])
def test_a_clock_that_is_taken_is_no_fault(
    superlink: str, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(Server, "date", formatdate(1_700_000_000, usegmt=True))
    monkeypatch.setattr(clock.time, "time", lambda: 1_700_000_000.5 + ahead)
    assert clock_fault(superlink, insecure=True) is None


@pytest.mark.parametrize("date", [None, "yesterday"])
def test_without_a_date_nothing_is_known(
    superlink: str, monkeypatch: pytest.MonkeyPatch, date: str | None
) -> None:
    monkeypatch.setattr(Server, "date", date)
    assert server_time(superlink, insecure=True) is None
    assert clock_fault(superlink, insecure=True) is None


def test_without_a_server_or_without_its_tls_nothing_is_known(superlink: str) -> None:
    assert clock_fault("127.0.0.1:1", insecure=True) is None
    assert clock_fault("127.0.0.1:1", insecure=False) is None
    assert clock_fault(superlink, insecure=False) is None


def test_the_limits_are_flowers() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert clock.MOST_AHEAD_S == SYSTEM_TIME_TOLERANCE
    assert clock.MOST_BEHIND_S == TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
