"""Which backend passed which case, as a table."""

from collections import defaultdict
from pathlib import Path

import pytest

# The weightiest first.
_SIGNS = {"failed": "✗", "passed": "✓", "skipped": "–"}


class ContractReport:
    """Collects the outcomes of tests that run on every variant and writes them as Markdown."""

    def __init__(self, path: Path, variants: tuple[str, ...]) -> None:
        self._path = path
        self._variants = variants
        self._outcomes: dict[str, dict[str, str]] = defaultdict(dict)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's outcome; a failed set-up counts as failed."""
        if report.when != "call" and report.outcome == "passed":
            return
        case, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        name = parameters.partition("]")[0]
        found = [each for each in self._variants if name == each or name.startswith(f"{each}-")]
        found += [each for each in self._variants if name.endswith(f"-{each}")]
        if found:
            variant = max(found, key=len)
            self._note(case.removeprefix("test_").replace("_", " "), variant, report.outcome)

    def _note(self, case: str, variant: str, outcome: str) -> None:
        """Keep the outcome that weighs most of a case's parameters."""
        before = self._outcomes[case].get(variant, "skipped")
        self._outcomes[case][variant] = min(before, outcome, key=list(_SIGNS).index)

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        rows = [
            f"| {case} | "
            + " | ".join(_SIGNS.get(outcomes.get(name, ""), "") for name in self._variants)
            + " |"
            for case, outcomes in self._outcomes.items()
        ]
        head = f"| case | {' | '.join(self._variants)} |"
        line = "| --- |" + " :-: |" * len(self._variants)
        self._path.write_text("\n".join([head, line, *rows]) + "\n")
