"""Telling a running server to take nothing new, and waiting for what runs."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from core.settings import Settings

_POLL_S = 0.1
_ANSWER_LIMIT_S = 2.0


def local_url(settings: Settings) -> str:
    """Return the server's root as this machine reaches it."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.port}"


def drain(settings: Settings, is_impatient: Callable[[], bool]) -> None:
    """Return once no request runs, after the limit, or as soon as somebody is impatient.

    Blocks.  A server that is gone has nothing to wait for; one that is slow to answer has.
    """
    end = time.monotonic() + settings.drain_limit_s
    while not is_impatient() and time.monotonic() < end:
        in_flight = _ask(settings)
        if not in_flight:
            return
        time.sleep(_POLL_S)


def _ask(settings: Settings) -> int:
    """Tell the server to drain; return how many requests still run, 1 where it is too slow to say.

    0 where it refuses, is gone, or says nothing that makes sense.
    """
    headers = {"content-type": "application/json"}
    if settings.api_key is not None:
        headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    request = urllib.request.Request(
        f"{local_url(settings)}/api/drain", b"{}", headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_LIMIT_S) as answer:
            return int(json.load(answer)["in_flight"])
    except urllib.error.URLError as problem:
        return int(isinstance(problem.reason, TimeoutError))
    except TimeoutError:
        return 1
    except (OSError, ValueError, KeyError):
        return 0
