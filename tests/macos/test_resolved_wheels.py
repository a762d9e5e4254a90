"""Every package has a wheel for each macOS and Python that set-up accepts, with the exact pins."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.install import ROOT, RUNTIME, read_pins
from tests.macos.mac_packages import EXTRAS, INTEL, MacPackages, NoSolution

PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = (14, 15, 26)


def direct_dependencies(python: str) -> set[str]:
    """Return what pyproject.toml asks for on a Mac, without what the Mac compiles itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][extra] for extra in EXTRAS)
    environment = {"sys_platform": "darwin", "python_version": python}
    needs = [Requirement(text) for group in (project["dependencies"], *extras) for text in group]
    return {
        canonicalize_name(need.name)
        for need in needs
        if need.marker is None or need.marker.evaluate(environment)
    }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("macos", SYSTEMS)
def test_every_package_has_a_wheel(macos: int, python: str, packages: MacPackages) -> None:
    found = packages.resolve(macos, python)
    pins = read_pins("darwin")
    assert {name: pins.get(name) for name in found} == found
    assert direct_dependencies(python) <= set(found)
    assert {"mlx-metal", RUNTIME} <= set(found)


def test_the_pythons_are_those_that_set_up_accepts() -> None:
    script = (ROOT / "scripts" / "find_python").read_text()
    assert f"{' | '.join(PYTHONS)}) ;;" in script
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"


def test_the_oldest_macos_is_the_one_that_set_up_accepts() -> None:
    script = (ROOT / "scripts" / "system_problem").read_text()
    found = re.search(r'"\$release" -lt (\d+)', script)
    assert found
    # Darwin 23 is macOS 14.
    assert int(found[1]) - 9 == min(SYSTEMS)


@pytest.mark.parametrize(
    ("macos", "python", "platform", "lacking"),
    [
        (13, "3.12", None, "macosx_13_0_arm64"),
        (26, "3.14", None, "coremltools==9.0 has no usable wheels"),
        (15, "3.12", INTEL, "x86_64"),
    ],
    ids=["macOS 13", "Python 3.14", "Intel"],
)
def test_what_set_up_refuses_has_no_wheels(
    macos: int, python: str, platform: str | None, lacking: str, packages: MacPackages
) -> None:
    """Otherwise set-up turns away Macs that could run the server."""
    options = {} if platform is None else {"platform": platform}
    with pytest.raises(NoSolution, match=re.escape(lacking)):
        packages.resolve(macos, python, extras=(), **options)
