"""Whether this machine's clock is one that the SuperLink takes messages from.

A SuperLink turns away every request whose time is more than 5 s ahead of its own, or more than 305 s behind (Flower
1.41 and 1.42), and does not say why; the SuperNode just ends, with exit code 0. But each answer has a `Date`, which
need not be trusted: it only serves to say what is wrong.
"""

from __future__ import annotations

import ssl
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

MOST_AHEAD_S, MOST_BEHIND_S = 5.0, 305.0
# A Date has whole seconds, and the answer takes time.
UNSURE_S = 1.0
ANSWER_S = 5.0


def server_time(superlink: str, insecure: bool) -> float | None:
    """The clock of the server at HOST:PORT, in seconds since 1970; None if it does not say.

    It is asked the way a SuperNode asks, so through the same proxy. A reverse proxy before it gives its own time.
    """
    # A certificate is not yet valid, or not any more, by a clock that is far off.
    trust = None if insecure else ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(
            f"{'http' if insecure else 'https'}://{superlink}/", timeout=ANSWER_S, context=trust
        ) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        # There is no such page; that, too, is an answer with a date.
        date = error.headers["Date"]
        error.close()
    except (OSError, ValueError):
        return None
    try:
        # In the middle of the second that it names.
        return parsedate_to_datetime(date).timestamp() + 0.5
    except (TypeError, ValueError):
        return None


def clock_fault(superlink: str, insecure: bool) -> str | None:
    """What is wrong with this machine's clock, in one line; None if nothing is, or if it cannot be known."""
    before = time.time()
    server = server_time(superlink, insecure)
    # The middle of asking.
    here = (before + time.time()) / 2
    if server is None or UNSURE_S - MOST_BEHIND_S <= here - server <= MOST_AHEAD_S - UNSURE_S:
        return None
    ahead = here - server
    return (
        f"the clock of this machine says {_utc(here)}, that of the SuperLink at {superlink} {_utc(server)}: "
        f"{abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}, where at most {MOST_AHEAD_S:g} s ahead and "
        f"{MOST_BEHIND_S:g} s behind are allowed, so it takes nothing from this site; set it, by NTP "
        "(`timedatectl set-ntp true`)"
    )


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
