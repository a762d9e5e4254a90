"""`chat_template_kwargs`: a request's own variables for the model's chat template."""

import re
from typing import Annotated, TypeAlias

from pydantic import PlainValidator

from core.errors import UnsupportedParameter

MAX_TEMPLATE_VARIABLES = 64


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_RESERVED_VARIABLES = frozenset(
    {"tokenize", "chat_template", "messages", "tools", "add_generation_prompt"}
)


def parse_template_variables(value: object) -> dict[str, bool | int | float | str | None]:
    """Return the chat template's extra variables.  Raises ValueError, UnsupportedParameter."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_VARIABLES:
        raise ValueError(f"must be an object of at most {MAX_TEMPLATE_VARIABLES} entries")
    for name, item in value.items():
        if name in _RESERVED_VARIABLES:
            param = f"chat_template_kwargs.{name}"
            raise UnsupportedParameter(
                f"{param} cannot be set by a request; leave it out.", param=param
            )
        if not _VARIABLE.fullmatch(name):
            raise ValueError("its names must be identifiers of at most 64 characters")
        if not isinstance(item, bool | int | float | str | None):
            raise ValueError("its values must be strings, numbers, booleans or null")
    return value


TemplateVariables: TypeAlias = Annotated[
    dict[str, bool | int | float | str | None], PlainValidator(parse_template_variables)
]
