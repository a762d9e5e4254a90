"""Checks the arguments of earlier tool calls, which chat templates parse and print again."""

import json
import re

from core.errors import RequestError
from core.text import MAX_JSON_DEPTH, is_nested_deeper

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_arguments(arguments: str, param: str) -> str:
    """Return the JSON text of a call's arguments; text that is not JSON is accepted too.

    Raises RequestError for nesting over 200 levels and for lone surrogates.
    """
    if is_nested_deeper(arguments):
        raise RequestError(
            f"{param}: nested deeper than {MAX_JSON_DEPTH} levels; leave the call out or shorten "
            "its arguments",
            param=param,
        )
    if _SURROGATE.search(arguments) and _has_lone_surrogate(arguments):
        raise RequestError(
            f"{param}: contains the escape of a lone surrogate (\\ud800 to \\udfff), which is not "
            "a Unicode character; replace it, for example with \\ufffd",
            param=param,
        )
    return arguments


def _has_lone_surrogate(text: str) -> bool:
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except ValueError:
        return False
    return False
