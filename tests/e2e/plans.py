"""What a model would write, in the forms in which models write tool calls."""

import json
from typing import Any

# An object that an agent ends with, and its schema.
REPORT = {"file": "greet.py", "words": 2}
REPORT_SCHEMA = {
    "type": "object",
    "properties": {"file": {"type": "string"}, "words": {"type": "integer"}},
    "required": ["file", "words"],
    "additionalProperties": False,
}


def tagged(name: str, **arguments: Any) -> str:
    """Return a call within tags, as Hermes and Qwen models write it."""
    return f"<tool_call>\n{written(name, **arguments)}\n</tool_call>"


def fenced(name: str, **arguments: Any) -> str:
    """Return a call in a code fence, as small coder models write it."""
    return f"```json\n{written(name, **arguments)}\n```"


def written(name: str, **arguments: Any) -> str:
    """Return a call as bare JSON."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
