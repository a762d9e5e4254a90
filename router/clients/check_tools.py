"""The tools that the checks of a connection offer to a model."""

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NAME = "get_weather"
ABOUT = "Tells the weather of a city."
# The kinds of tools in each request of Codex 0.171; those of OpenAI's models add apply_patch.
CODEX_TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "type": "function",
        "name": NAME,
        "description": ABOUT,
        "strict": False,
        "parameters": SCHEMA,
    },
    {
        "type": "namespace",
        "name": "multi_agent_v1",
        "description": "Tools for spawning and managing sub-agents.",
        "tools": [
            {
                "type": "function",
                "name": "close_agent",
                "description": "Closes an agent.",
                "strict": False,
                "parameters": {
                    "type": "object",
                    "properties": {"target": {"type": "string"}},
                    "required": ["target"],
                    "additionalProperties": False,
                },
            }
        ],
    },
    {"type": "web_search", "external_web_access": False},
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {
            "type": "grammar",
            "syntax": "lark",
            "definition": 'start: "*** Begin Patch\\n" LINE+ "*** End Patch"\nLINE: /[^\\n]*\\n/\n',
        },
    },
)
