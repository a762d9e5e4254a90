"""The size limit of messages between Serve replicas, and its error as 413 with both numbers."""

import os
import re
from typing import Any

from core.errors import BodyTooLarge
from core.settings import Settings
from core.units import MIB, format_bytes

# Serve reads it when it is imported, in the calling process and in the called one.
VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
_SERVES_DEFAULT = 4 * MIB
# 2,048 embeddings of 16,384 numbers take 128 MiB.
_LEAST = 256 * MIB
_MOST = 2**31 - 1
# A message holds the body's texts, decoded; stored conversations may add as much again.
_BODIES_PER_MESSAGE = 4

# Source: gRPC, the text of RESOURCE_EXHAUSTED for a message over max_receive_message_length.
_TOO_LARGE = re.compile(r"(SERVER|CLIENT): Received message larger than max \((\d+) vs\. (\d+)\)")


def message_limit(settings: Settings) -> int:
    """Return the maximum bytes of one message, enough for any request and answer accepted."""
    return min(max(_LEAST, _BODIES_PER_MESSAGE * settings.max_body), _MOST)


def runtime_env_options(settings: Settings) -> dict[str, Any]:
    """Return the actor options that raise Serve's limit; empty where the environment does.

    `scripts/serve` and `scripts/env` set the variable for all processes.  A runtime environment
    costs a new process per replica, so it is only the fallback.
    """
    wanted = message_limit(settings)
    if _limit_of_environment() >= wanted:
        return {}
    return {"runtime_env": {"env_vars": {VARIABLE: str(wanted)}}}


def _limit_of_environment() -> int:
    try:
        return int(os.environ.get(VARIABLE, _SERVES_DEFAULT))
    except ValueError:
        return 0


def size_error(text: str) -> BodyTooLarge | None:
    """Return the error for gRPC's message about an oversized message; None for another text."""
    match = _TOO_LARGE.search(text)
    if match is None:
        return None
    size, limit = (format_bytes(int(number)) for number in match.group(2, 3))
    if match[1] == "SERVER":
        return BodyTooLarge(
            f"The request takes {size} inside the server; at most {limit} are accepted. Shorten "
            "the prompt, or split the inputs over several requests."
        )
    return BodyTooLarge(
        f"The answer takes {size} inside the server; at most {limit} are possible. Split the "
        "inputs over several requests."
    )
