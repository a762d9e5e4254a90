"""The architecture page names what exists: every room in its map, every file in its lists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "enhanced_architecture_design.md").read_text()
PACKAGES = ("core", "backends", "catalog", "scheduler", "router", "deployments")


def test_every_file_and_folder_on_the_page_exists() -> None:
    named = set(re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w./]*)`", PAGE))
    assert len(named) > 80
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_room_is_on_the_map() -> None:
    rooms = {
        f"{init.parent.relative_to(ROOT)}/"
        for package in PACKAGES
        for init in (ROOT / package).rglob("__init__.py")
    }
    mapped = re.findall(r"^\| `([\w/]+/)` \| (\S.*) \|$", PAGE, re.MULTILINE)
    assert sorted(rooms) == sorted(name for name, _ in mapped)


def test_the_lives_of_a_request_and_of_a_load_are_numbered_lists_of_files() -> None:
    for title in ("The life of a request", "The life of a load"):
        section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
        steps = re.findall(r"^(\d+)\. ", section, re.MULTILINE)
        assert steps == [str(number + 1) for number in range(len(steps))]
        assert len(steps) >= 6
        assert len(re.findall(r"`[\w/]+\.py`", section)) >= len(steps)


def test_the_glossary_names_classes_that_exist() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    glossary = page.split("## Glossary\n")[1].split("\n## ")[0]
    names = set(re.findall(r"`([A-Z]\w+)`", glossary))
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(names) >= 10
    assert sorted(n for n in names if not any(f"class {n}" in text for text in sources)) == []
