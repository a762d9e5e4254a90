"""The clients of the end-to-end tests are installed once for each set of pins."""

import subprocess
from pathlib import Path

import pytest

from scripts import install_clients


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pins of an environment named `tried`, in a cache folder of the test's own."""
    file = tmp_path / "tried.txt"
    file.write_text("# Nothing.\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(install_clients.REQUIREMENTS, "tried", file)
    return file


def test_an_environment_is_made_once_for_its_pins(requirements: Path) -> None:
    python = install_clients.python_client("tried")
    where = [str(python), "-c", "import sys; print(sys.prefix, 'site-packages' in str(sys.path))"]
    said = subprocess.run(where, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(python.parents[1]), "True"]
    made = python.parents[1].stat().st_ino
    assert install_clients.python_client("tried") == python
    assert python.parents[1].stat().st_ino == made
    requirements.write_text("# Other pins.\n")
    assert install_clients.python_client("tried") != python


def test_a_failed_installation_leaves_nothing_and_tells_why(
    requirements: Path, tmp_path: Path
) -> None:
    requirements.write_text("./no_such_package\n")
    with pytest.raises(RuntimeError, match="no_such_package"):
        install_clients.python_client("tried")
    left = {path.name for path in (tmp_path / "cache" / "impetus" / "clients").iterdir()}
    assert left == {"install.lock"}


@pytest.mark.parametrize("name", sorted(install_clients.REQUIREMENTS))
def test_python_clients_are_pinned_exactly(name: str) -> None:
    lines = install_clients.REQUIREMENTS[name].read_text().splitlines()
    assert len(lines) > 20
    assert all(len(line.split("==")) == 2 and " " not in line for line in lines), lines
