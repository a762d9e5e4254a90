"""Values that OpenAI's and Anthropic's APIs document and this server refuses, each with the reason.

Sources: the request types of the openai and anthropic SDKs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_MODERATION = "it needs OpenAI's moderation models"

# Fields that are refused, with the reason as part of a sentence.
REASONS: Mapping[str, str] = {
    "conversation": "it names an object that is stored at OpenAI",
    "modalities": "no model here writes more than text",
    "moderation": _MODERATION,
    "prompt": "it names a template that is stored at OpenAI",
}


@dataclass(frozen=True, slots=True)
class RefusedValue:
    """A value that is refused; `param` is where, `value` which, in words."""

    apis: tuple[str, ...]
    param: str
    value: str
    reason: str


# What is refused within fields that are read.
VALUES = (
    RefusedValue(
        ("chat",), "response_format", "`json_schema` without a schema", "nothing says what is bound"
    ),
    RefusedValue(
        ("chat", "responses", "messages"),
        "the user's last message",
        "an image, audio, a PDF or a file that is not text",
        "no model here reads more than text",
    ),
    RefusedValue(
        ("responses", "messages"),
        "tool_choice",
        "a tool of OpenAI's or Anthropic's servers, forced",
        "it runs there, or only their models know how to call it",
    ),
    RefusedValue(
        ("responses", "messages"),
        "previous_response_id, item_reference, thread",
        "the id of what is not stored here",
        "it is stored elsewhere, or was dropped",
    ),
    RefusedValue(
        ("completions",),
        "suffix",
        "any, for a model without tokens for filling in the middle",
        "the model was not trained for it",
    ),
)
