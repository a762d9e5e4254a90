"""Limits of request bodies, the same for all APIs; docs/API_REFERENCE.md lists them.

The limits of counts keep one request from stopping the router's event loop: what a body may hold is
counted before anything is parsed, parsed before anything is validated.
"""

from core.errors import RequestError
from core.units import KIB

# Of a whole body.
MAX_VALUES = 1_048_576
MAX_FIELDS = 262_144
MAX_CONTAINERS = 262_144
MAX_DEPTH = 200
MAX_NUMBER_CHARACTERS = 1024

# Of one message, tool, input or prompt, and of all other fields together.
MAX_ITEM_VALUES = 262_144
MAX_ITEM_FIELDS = 16_384
MAX_ITEM_CONTAINERS = 16_384

MAX_MESSAGES = 2048
MAX_PARTS = 4096
MAX_TOOLS = 512
MAX_TOOL_CALLS = 128
MAX_DOCUMENTS = 2048
MAX_FIELDS_PER_OBJECT = 1024
# Lists that all APIs count before they validate them, wherever a message or tool has them.
MAX_LIST_LENGTHS = {
    "messages": MAX_MESSAGES,
    "input": MAX_MESSAGES,
    "documents": MAX_DOCUMENTS,
    "tools": MAX_TOOLS,
    "functions": MAX_TOOLS,
    "tool_calls": MAX_TOOL_CALLS,
    "content": MAX_PARTS,
    "output": MAX_PARTS,
    "summary": MAX_PARTS,
    "system": MAX_PARTS,
}

MAX_N = 128
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARACTERS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_SCHEMA_BYTES = 256 * KIB
MAX_SCHEMA_DEPTH = 32
MAX_INT32 = 2**31 - 1
MAX_ERROR_CHARACTERS = 2048


def too_many(param: str, count: int, what: str, limit: int) -> RequestError:
    """Return the error of a field, or without `param` of a body, with more parts than `limit`."""
    subject = f"{param}: has" if param else "The body has"
    return RequestError(
        f"{subject} {count:,} {what}; at most {limit:,} are accepted", param=param or None
    )
