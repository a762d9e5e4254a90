"""Drains a running server: no new requests, wait for the running ones."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from core.errors import ImpetusError
from core.keys import MANAGEMENT_TOKEN, read_key
from core.settings import Settings
from deployments.start.readiness import BAD_ANSWER, local_url, open_direct

_POLL_S = 0.1
_ANSWER_LIMIT_S = 2.0


def drain(settings: Settings, is_impatient: Callable[[], bool]) -> None:
    """Block until no request runs, the limit is over, or `is_impatient()` is true.

    A server that is gone counts as drained; one that is slow to answer does not.
    """
    end = time.monotonic() + settings.drain_limit_s
    while not is_impatient() and time.monotonic() < end:
        in_flight = _ask(settings)
        if not in_flight:
            return
        time.sleep(_POLL_S)


def _ask(settings: Settings) -> int:
    """Tell the server to drain; return the number of running requests.

    1 if it does not answer in time; 0 if it refuses, is gone, or its answer is invalid.
    """
    headers = {"content-type": "application/json"}
    if settings.api_key is not None:
        headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    with suppress(ImpetusError):
        headers["x-impetus-token"] = read_key(settings.home, MANAGEMENT_TOKEN)
    request = urllib.request.Request(
        f"{local_url(settings)}/api/drain", b"{}", headers, method="POST"
    )
    try:
        with open_direct(request, _ANSWER_LIMIT_S) as answer:
            return int(json.load(answer)["in_flight"])
    except urllib.error.URLError as problem:
        return int(isinstance(problem.reason, TimeoutError))
    except TimeoutError:
        return 1
    except BAD_ANSWER:
        return 0
