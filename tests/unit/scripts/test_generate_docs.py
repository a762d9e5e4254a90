"""Tests of the generated pages."""

import shutil
from pathlib import Path

import pytest

from core.settings import Settings
from scripts import generate_docs


def test_configuration_page_names_every_setting() -> None:
    page = generate_docs.configuration_page()
    for name, field in Settings.model_fields.items():
        assert f"| `IMPETUS_{name.upper()}` | `{name}` |" in page
        assert str(field.description) in page
    assert "integer, ≥ 1, ≤ 65535 | `8000`" in page


def test_configuration_page_does_not_depend_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    before = generate_docs.configuration_page()
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("IMPETUS_PORT", "9")
    assert generate_docs.configuration_page() == before


def test_check_fails_on_an_old_page_and_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {"CONFIGURATION": "configuration.md", "FORMATS": "formats.md"}
    for constant, name in pages.items():
        shutil.copy(getattr(generate_docs, constant), tmp_path / name)
        monkeypatch.setattr(generate_docs, constant, tmp_path / name)
    for name in pages.values():
        assert generate_docs.main([]) == 0
        assert generate_docs.main(["--check"]) == 0
        page = tmp_path / name
        page.write_text(old := page.read_text().replace("| --- |", "| -- |"))
        assert generate_docs.main(["--check"]) == 1
        assert page.read_text() == old
        assert f"{name} is out of date: run scripts/docs" in capsys.readouterr().err


def test_unknown_argument_is_refused() -> None:
    assert generate_docs.main(["--chekc"]) == 2
