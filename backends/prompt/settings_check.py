"""Checks chat templates and their variables before they are stored or used."""

from collections.abc import Mapping

from backends.prompt.templates import TemplateRenderer
from core.errors import BrokenModel, RequestError, TemplateRefused
from core.types import JsonValue

_RESERVED = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "chat_template",
        "tokenize",
        "raise_exception",
        "strftime_now",
    ]
)
_EXAMPLE: Mapping[str, JsonValue] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "tools": None,
    "add_generation_prompt": True,
    "bos_token": "",
    "eos_token": "",
}


def check_variables(variables: Mapping[str, JsonValue], param: str) -> None:
    """Raise RequestError if a variable is one that the server sets itself."""
    reserved = sorted(_RESERVED & variables.keys())
    if reserved:
        raise RequestError(
            f"{param} cannot set {reserved[0]}, which the server sets itself.", param=param
        )


def check_template(template: str, param: str) -> None:
    """Raise RequestError if a chat template cannot be rendered; blocks up to some seconds.

    It renders one user's message in a process of its own.  A template that refuses that message
    with words of its own is sound.
    """
    renderer = TemplateRenderer(template)
    try:
        renderer.render(_EXAMPLE)
    except TemplateRefused:
        return
    except BrokenModel as problem:
        raise RequestError(
            f"{param}: it cannot be rendered for a user's message: {problem.message}", param=param
        ) from problem
    finally:
        renderer.close()
