"""Checks the arguments of earlier tool calls, which chat templates parse and print again."""

from core.errors import RequestError
from core.text import MAX_JSON_DEPTH, is_nested_deeper


def check_arguments(arguments: str, param: str) -> str:
    """Return the JSON text of a call's arguments; text that is not JSON is accepted too.

    Raises RequestError for nesting over 200 levels.
    """
    if is_nested_deeper(arguments):
        raise RequestError(
            f"{param}: nested deeper than {MAX_JSON_DEPTH} levels; leave the call out or shorten "
            "its arguments",
            param=param,
        )
    return arguments
