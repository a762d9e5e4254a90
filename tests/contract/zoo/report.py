"""Writes which runtime each architecture of the zoo ran on, for the table in docs/formats.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends.base import Engine
from catalog.scan.identify import Refused
from tests.contract.zoo.architectures import ARCHITECTURES
from tests.contract.zoo.expectations import KNOWN_FAULTS

# The key of a test's outcome among its user properties, which travel between pytest's processes.
PROPERTY = "zoo"
RECORDED = Path(__file__).resolve().parents[3] / "docs" / "architectures.json"


class ZooReport:
    """Collects the outcomes of the zoo's tests and writes them as JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what a test found; a known fault is shown as one."""
        found = dict(report.user_properties).get(PROPERTY)
        if report.when != "call" or not isinstance(found, dict):
            return
        shown = {key: str(value) for key, value in found.items()}
        name, layout = shown.pop("name"), shown.pop("layout")
        if report.outcome != "passed":
            shown["fault"] = KNOWN_FAULTS.get((name, layout), "unknown")
        # A model that does not open has no runtime.
        shown.setdefault("runtime", "none")
        head = {"model_type": shown.pop("model_type"), "variant": ARCHITECTURES[name].variant}
        self._outcomes.setdefault(name, head)[layout] = shown

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Write the file; models that did not run keep their entries."""
        known = json.loads(self._path.read_text()) if self._path.is_file() else {}
        models = {name: known[name] for name in ARCHITECTURES if name in known}
        for name, outcome in self._outcomes.items():
            models[name] = {**models.get(name, {}), **outcome}
        self._path.write_text(json.dumps(models, indent=1, sort_keys=True) + "\n")


def report_path(config: pytest.Config) -> Path | None:
    """Return where the report of this run goes, None if there is none."""
    path: Path | None = config.getoption("--zoo-report", None)
    return path


def described(outcome: Refused | Engine) -> dict[str, str]:
    """Return what the table says of a file that was refused, or of a model that was opened."""
    if isinstance(outcome, Refused):
        return {"runtime": "refused", "reason": outcome.reason}
    info = outcome.info
    runtime = info.choice.runtime if info.choice else info.format
    limits = [
        text.removeprefix(f"{info.name} ")
        for text in outcome.limitations
        # The column tells it.
        if not text.startswith(f"{info.name} runs on ")
    ]
    return {"runtime": runtime, **({"limits": " ".join(limits)} if limits else {})}


def recorded_runtime(name: str, layout: str) -> str:
    """Return the runtime that docs/formats.md names for a model; empty if it has no entry."""
    models: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text())
    runtime: str = models.get(name, {}).get(layout, {}).get("runtime", "")
    return runtime
