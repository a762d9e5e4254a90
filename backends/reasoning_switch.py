"""How much a model shall reason, said in the variables that its chat template knows."""

import re
from collections.abc import Mapping

from core.errors import UnsupportedParameter
from core.types import JsonValue

_PARAM = "reasoning_effort"
_EFFORT = re.compile(r"\breasoning_effort\b")
_SWITCHES = {
    "enable_thinking": re.compile(r"\benable_thinking\b"),
    "thinking": re.compile(r"\b(?:if|not|and|or)\s+thinking\b|\bthinking\s+is\s+defined\b"),
}
_COMMON = ("low", "medium", "high")


def effort_variables(template: str, effort: str | None) -> Mapping[str, JsonValue]:
    """Return the template's variables for `effort`, none for None.

    A template that reads `reasoning_effort` gets it, `none` and other uncommon words only where
    it names them; one that only switches reasoning on and off understands `none` alone.  Raises
    UnsupportedParameter for everything else.
    """
    if effort is None:
        return {}
    is_named = re.search(rf"['\"]{re.escape(effort)}['\"]", template) is not None
    if _EFFORT.search(template) and (effort in _COMMON or is_named):
        return {"reasoning_effort": effort}
    for name, pattern in _SWITCHES.items():
        if pattern.search(template) and effort == "none":
            return {name: False}
    raise UnsupportedParameter(_reason(template, effort), param=_PARAM)


def _reason(template: str, effort: str) -> str:
    if _EFFORT.search(template):
        return f"This model's chat template knows no reasoning_effort {effort!r}."
    if any(pattern.search(template) for pattern in _SWITCHES.values()):
        return (
            "This model's chat template switches reasoning on and off only: send "
            'reasoning_effort "none", or bound it with reasoning.max_tokens.'
        )
    return "This model's chat template knows no reasoning_effort."
