"""Adds the option `--tool-report` to the tool-call conformance tests."""

from pathlib import Path

import pytest

from tests.unit.backends.tool_calls.tool_report import ToolReport


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the report's file name."""
    parser.addoption("--tool-report", type=Path, help="write which family passed which case")


def pytest_configure(config: pytest.Config) -> None:
    """Collect outcomes where a report is wanted."""
    path = config.getoption("--tool-report", None)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ToolReport(path), "tool-report")
