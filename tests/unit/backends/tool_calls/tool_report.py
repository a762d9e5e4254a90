"""Which family passed which case of the tool-call conformance tests, as a page."""

from collections import defaultdict
from pathlib import Path

import pytest

from backends.tool_calls.families import FAMILIES

_SIGNS = {"failed": "✗", "passed": "✓"}
_INTRO = """\
# Tool calls

Written by `.venv/bin/python -m pytest tests/unit/backends/tool_calls/test_tool_conformance.py \\
--tool-report=docs/tool_calls.md`; do not edit.

A model's family of tool calls is told by its chat template; `PATCH /api/models/{id}` with
`tool_parser` sets it where the template does not tell. A template that knows no tools gets them
written into the system message, in the form of `hermes`.

Streamed or not, answers go through the same parser. Arguments are sent as they grow where the
form allows it: JSON, and texts between tags; values that are no text, Python's syntax and Gemma's
notation come out when they are closed. What is no well-formed call of a declared function stays
text. An answer that is nothing but one JSON call, bare or in a code fence, is a call in every
family but `harmony`; in `pythonic` and `lfm2` a list in Python's syntax is. A call within
reasoning stays reasoning. Values between tags become numbers, words, lists and objects where the
function's schema says so. Calls that do not fit the schema, break off or name an undeclared
function are counted in `impetus_tool_call_mismatches_total`, by model and kind.

With `tool_choice` `required` or a named function the answer is one call in the family's form;
with `required` and `parallel_tool_calls: true` further ones may follow, but in `harmony` and
`llama3_json`, whose forms hold one.
With `auto`, what follows the family's marker is held to the form and to the function's schema; so
is an answer that begins as a bare call, as soon as it has named one of the functions.
"""
_ABOUT = """
## Conformance
✓: the calls that the family's template writes are read whole, and every cut of the text in two or
in pieces of 1, 2, 3 and 7 characters gives the same.
"""


class ToolReport:
    """Collects the outcomes of tests that run for every family and case."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, str]] = defaultdict(dict)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's outcome; one that failed weighs most."""
        is_set_up = report.when != "call" and report.outcome == "passed"
        if is_set_up or "test_tool_conformance.py" not in report.nodeid:
            return
        test, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        family, _, case = parameters.rstrip("]").partition("-")
        if family in FAMILIES:
            name = case or test.removeprefix("test_").removeprefix("i10_").replace("_", " ")
            before = self._outcomes[name].get(family, "passed")
            self._outcomes[name][family] = min(before, report.outcome)

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Write the page."""
        families = [
            f"| `{family.name}` | {_code(family.tool_call_start)} | "
            + " or ".join(" and ".join(map(_code, group)) for group in family.needles)
            + " |"
            for family in FAMILIES.values()
        ]
        rows = [
            f"| {case} | "
            + " | ".join(_SIGNS.get(outcomes.get(name, ""), "") for name in FAMILIES)
            + " |"
            for case, outcomes in self._outcomes.items()
        ]
        lines = [
            "\n## Families\nThe first whose marks are in the template is taken.\n",
            "| family | a call begins with | the template has |",
            "| --- | --- | --- |",
            *families,
            _ABOUT,
            f"| case | {' | '.join(FAMILIES)} |",
            "| --- |" + " :-: |" * len(FAMILIES),
            *rows,
        ]
        self._path.write_text(_INTRO + "\n".join(lines) + "\n")


def _code(text: str) -> str:
    """Return `text` as code in a table's cell."""
    mark = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{mark}{space}{text}{space}{mark}".replace("|", "\\|")
