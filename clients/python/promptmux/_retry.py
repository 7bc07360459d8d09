"""When to try again, and how long to wait.

Asking may be repeated, and so may publishing: the same bytes under the same name are the same version. What may not
(`Call.repeatable`), such as a step back to the version before, is sent again only if the server never began with it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

RETRIED_STATUSES = frozenset({429, 502, 503})
REFUSED_UNSEEN = frozenset({429})
"""Of them, those that come before anything is done; behind a 502 or a 503 something may have happened."""


@dataclass(frozen=True)
class RetryPolicy:
    """`max_retries` further tries, `first_delay_s` before the first of them, doubled each time up to `max_delay_s`."""

    max_retries: int = 2
    first_delay_s: float = 0.25
    max_delay_s: float = 8.0

    def delay_s(self, attempt: int, response: httpx2.Response | None, *, repeatable: bool = True) -> float | None:
        """Seconds to wait after try number `attempt` (from 0), or None to give up.

        The server's Retry-After (seconds or a date) and retry-after-ms win over the backoff, which has full jitter.
        """
        if attempt >= self.max_retries:
            return None
        if response is not None:
            statuses = RETRIED_STATUSES if repeatable else REFUSED_UNSEEN
            if response.status_code not in statuses or response.headers.get("x-should-retry") == "false":
                return None
            asked = _asked_delay_s(response)
            if asked is not None:
                return min(asked, 60.0)
        return random.uniform(0.0, min(self.max_delay_s, self.first_delay_s * 2.0**attempt))


def _asked_delay_s(response: httpx2.Response) -> float | None:
    headers = response.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000.0)
        return max(0.0, float(headers["retry-after"]))
    except KeyError:
        return None
    except ValueError:
        return _until(headers["retry-after"])


def _until(date: str) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
