"""What holds for the repository as a whole."""

import ast
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts import generate_docs
from scripts.install import CONSTRAINTS, PIN, ROOT, read_pins

MAX_SOURCE_LINES = 400
MAX_TEST_LINES = 500
MAX_FOLDER_FILES = 20
# Character classes keep the patterns from finding themselves.
FOREIGN = re.compile(
    r"/[r]oot/|/[w]ork/|/[o]pt/(pypi|wheels)|/(home|Users)/[a-z][a-z0-9_-]+/"
    r"|pypi\.[o]rg|[p]ythonhosted|npmjs\.[o]rg|proxy\.[g]olang"
)
SHELL_SCRIPTS = sorted(
    path
    for folder in ("scripts", ".ci")
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/bin/sh")
)


def repository_files() -> list[Path]:
    """Return the files that are in git or would be added to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def python_files() -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py"]


def code_lines(source: str) -> int:
    """Return how many lines are neither blank nor part of a docstring."""
    lines = source.splitlines()
    counted = {number for number, line in enumerate(lines, 1) if line.strip()}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                assert first.end_lineno is not None
                counted -= set(range(first.lineno, first.end_lineno + 1))
    return len(counted)


def test_repository_files_are_short() -> None:
    too_long = []
    for path in python_files():
        name = path.relative_to(ROOT)
        limit = MAX_TEST_LINES if name.parts[0] == "tests" else MAX_SOURCE_LINES
        if (count := code_lines(path.read_text())) > limit:
            too_long.append(f"{name}: {count} lines, at most {limit}")
    assert too_long == []


def test_repository_lines_are_counted_without_docstrings_and_blank_lines() -> None:
    source = (
        '"""One.\n\nTwo.\n"""\n\nx = 1\n\n\ndef f() -> str:\n    """Three."""\n    return "four"\n'
    )
    assert code_lines(source) == 3


def test_repository_folders_have_few_files() -> None:
    folders = Counter(path.parent for path in python_files() if path.name != "__init__.py")
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder, count in folders.items()
        if count > MAX_FOLDER_FILES
    }
    assert crowded == {}


def test_repository_files_name_no_machine_and_no_registry() -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["/ro" + "ot/x", "/Use" + "rs/me/x", "https://pypi." + "org/x"])
def test_repository_pattern_finds_a_machine_path(text: str) -> None:
    assert FOREIGN.search(text)


def test_repository_modules_have_docstrings() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path.relative_to(ROOT).parts[0] != "tests"
        and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert bare == []


def test_repository_configuration_page_is_up_to_date() -> None:
    assert generate_docs.CONFIGURATION.read_text() == generate_docs.configuration_page()


def test_repository_table_of_architectures_is_up_to_date() -> None:
    assert generate_docs.FORMATS.read_text() == generate_docs.formats_page()


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_repository_constraints_pin_every_dependency(system: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [Requirement(text) for group in groups for text in group]
    pins = read_pins(system)
    unpinned = [
        str(requirement)
        for requirement in wanted
        if (requirement.marker is None or requirement.marker.evaluate({"sys_platform": system}))
        and not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    ]
    assert unpinned == []


def test_repository_every_line_of_the_constraints_is_a_pin() -> None:
    lines = CONSTRAINTS.read_text().splitlines()
    assert [line for line in lines if line[:1] != "#" and not PIN.fullmatch(line)] == []


def test_repository_pytorch_on_macos_multiplies_rightly_on_its_gpu() -> None:
    """PyTorch before 2.14.1 multiplies some matrices wrongly there (pytorch issue 193487)."""
    assert Version(read_pins("darwin")["torch"]) >= Version("2.14.1")


def test_repository_users_get_one_openmp_library() -> None:
    """PyTorch has one on macOS; scikit-learn, which sentence-transformers needs, has another."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [Requirement(text).name for text in (*project["dependencies"], *extras["torch"])]
    assert not {"sentence-transformers", "scikit-learn"} & set(names)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_repository_shell_script_parses_and_is_executable(script: Path) -> None:
    done = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.stat().st_mode & 0o111
