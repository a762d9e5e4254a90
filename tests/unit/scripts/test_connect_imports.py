"""Tests that `scripts/setup` installs what `scripts/connect` imports."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[3]
OWN = {"backends", "catalog", "core", "deployments", "router", "scheduler", "scripts"}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_connect_imports_only_what_the_runtime_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w.-]", one)[0].lower() for one in project["dependencies"]}
    folders = ("scripts/connect_lib", "router/clients")
    files = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
    foreign = set[str]().union(*map(imported, files)) - OWN - set(sys.stdlib_module_names)
    assert "httpx" in foreign
    known = packages_distributions()
    for name in foreign:
        assert declared & {distribution.lower() for distribution in known[name]}, name
