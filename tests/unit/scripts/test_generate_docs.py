"""Tests of the generated pages."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.errors import UnsupportedParameter
from core.settings import Settings
from router.requests.fields import RequestBody
from scripts import fields_table, generate_docs
from scripts.openapi_document import openapi_text


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
    pages = {
        "CONFIGURATION": "configuration.md",
        "FORMATS": "formats.md",
        "REFERENCE": "API_REFERENCE.md",
        "OPENAPI": "openapi.json",
    }
    for constant, name in pages.items():
        shutil.copy(getattr(generate_docs, constant), tmp_path / name)
        monkeypatch.setattr(generate_docs, constant, tmp_path / name)
    for name in pages.values():
        assert generate_docs.main([]) == 0
        assert generate_docs.main(["--check"]) == 0
        page = tmp_path / name
        old = page.read_text().replace("| --- |", "| -- |").replace("listModels", "modelList")
        page.write_text(old)
        assert generate_docs.main(["--check"]) == 1
        assert page.read_text() == old
        assert f"{name} is out of date: run scripts/docs" in capsys.readouterr().err


def test_unknown_argument_is_refused() -> None:
    assert generate_docs.main(["--chekc"]) == 2


def test_reference_has_the_fields_as_the_apis_treat_them_now() -> None:
    assert generate_docs.reference_page() == generate_docs.REFERENCE.read_text()


def test_openapi_document_has_the_routes_as_they_are_now() -> None:
    text = generate_docs.OPENAPI.read_text()
    assert openapi_text() == text, "run scripts/docs"
    document = json.loads(text)
    assert list(document["paths"]) == sorted(document["paths"])
    assert {"/api/models", "/api/jobs", "/api/hub/search", "/api/keys", "/v1/models"} <= set(
        document["paths"]
    )


def test_openapi_document_does_not_depend_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_PORT", "9")
    monkeypatch.setenv("IMPETUS_STORED_RESPONSES", "-1")
    assert openapi_text() == generate_docs.OPENAPI.read_text()


@pytest.mark.parametrize("api", fields_table.APIS)
def test_every_api_treats_each_field_as_the_table_says(api: str) -> None:
    model = fields_table.APIS[api]
    required: dict[str, Any] = {
        "model": "m",
        "messages": [],
        "prompt": ("x",),
        "input": "x",
        "max_tokens": 1,
    }
    for name in fields_table.all_fields():
        body = model.model_construct(**required)
        if name in model.model_fields:
            assert fields_table.treatment(model, name) == "read"
            continue
        object.__setattr__(body, "__pydantic_extra__", {name: "on"})
        try:
            RequestBody.refuse_unsupported(body)
        except UnsupportedParameter:
            seen = "refused"
        else:
            seen = "ignored" if name in RequestBody.ignored_names(body) else "no effect"
        assert fields_table.treatment(model, name) == seen, name


def test_page_without_the_tables_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        fields_table.with_fields("# API\n")
