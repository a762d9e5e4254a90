"""Tests of what `scripts/connect` writes for Codex, opencode, aider, Copilot and Zed, and where."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.clients.clients import CLIENTS
from router.clients.jsonc import parse
from scripts.connect_lib import __main__ as connect
from tests.unit.scripts.conftest import Entry

MODEL = "coder@gguf-q4_0"
URL = "http://127.0.0.1:8000/v1"
KEY = "sesame-42"
NEW = ("codex", "opencode", "aider", "copilot-cli", "copilot", "zed")

pytestmark = pytest.mark.usefixtures("home", "entries")


def run(*arguments: str) -> int:
    return connect.main([*arguments, "--base-url", "http://127.0.0.1:8000"])


def file_of(client: str, index: int = 0) -> Path:
    return CLIENTS[client].paths()[index]


def lay_down(client: str, text: str, index: int = 0) -> Path:
    file = file_of(client, index)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


def test_codex_gets_a_provider_of_the_responses_api(home: Path) -> None:
    before = '# mine\nmodel = "gpt-5.6" # old\n\n[mcp_servers.docs]\ncommand = "npx"\n'
    file = lay_down("codex", before)
    assert file == home / ".codex" / "config.toml"
    assert run("codex", "--apply") == 0
    data = tomllib.loads(file.read_text())
    assert data["model"] == MODEL
    assert data["model_provider"] == "impetus"
    assert data["model_context_window"] == 32_768
    assert data["model_auto_compact_token_limit"] == 24_576
    provider = data["model_providers"]["impetus"]
    assert (provider["base_url"], provider["wire_api"]) == (URL, "responses")
    assert "env_key" not in provider
    assert file.read_text().startswith(f'# mine\nmodel = "{MODEL}" # old\n')
    assert data["mcp_servers"] == {"docs": {"command": "npx"}}
    assert run("codex", "--undo") == 0
    assert file.read_text() == before


def test_codex_reads_the_key_from_a_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("codex", "--key", KEY, "--apply") == 0
    assert "set it where Codex runs" in capsys.readouterr().out
    text = file_of("codex").read_text()
    assert tomllib.loads(text)["model_providers"]["impetus"]["env_key"] == "IMPETUS_API_KEY"
    assert KEY not in text
    # Without a key Codex would refuse to start for want of the variable.
    assert run("codex", "--apply") == 0
    assert "env_key" not in file_of("codex").read_text()


def test_opencode_keeps_comments_and_other_providers(home: Path) -> None:
    folder = home / ".config" / "opencode"
    folder.mkdir(parents=True)
    (folder / "opencode.json").write_text("{}")
    text = '{\n  // mine\n  "provider": {\n    "x": { "npm": "y" }, // kept\n  },\n}\n'
    (folder / "opencode.jsonc").write_text(text)
    assert run("opencode", "--apply") == 0
    after = (folder / "opencode.jsonc").read_text()
    assert after.startswith('{\n  // mine\n  "provider": {\n    "x": { "npm": "y" }, // kept\n')
    data = parse(after).value
    assert data["model"] == data["small_model"] == f"impetus/{MODEL}"
    provider = data["provider"]["impetus"]
    assert provider["npm"] == "@ai-sdk/openai-compatible"
    assert provider["options"] == {"baseURL": URL, "apiKey": "none"}
    assert provider["models"][MODEL]["limit"] == {"context": 32_768, "output": 8_192}
    assert (folder / "opencode.json").read_text() == "{}"


def test_aider_keeps_the_sample_of_its_settings(home: Path) -> None:
    sample = "# Sample .aider.conf.yml\n\n## Specify the model\n#model: xxx\n"
    settings = lay_down("aider", sample)
    assert settings == home / ".aider.conf.yml"
    assert run("aider", "--key", KEY, "--apply") == 0
    text = settings.read_text()
    assert text.startswith(sample)
    assert yaml.safe_load(text) == {
        "model": f"openai/{MODEL}",
        "openai-api-base": URL,
        "openai-api-key": KEY,
    }
    metadata = json.loads((home / ".aider.model.metadata.json").read_text())
    entry = metadata[f"openai/{MODEL}"]
    assert (entry["max_input_tokens"], entry["max_output_tokens"]) == (24_576, 8_192)
    assert run("aider", "--undo") == 0
    assert settings.read_text() == sample
    assert not (home / ".aider.model.metadata.json").exists()


def test_copilots_command_line_gets_a_provider_and_a_model(home: Path) -> None:
    other = {"name": "other", "type": "openai", "baseUrl": "https://x/v1"}
    lay_down("copilot-cli", json.dumps({"providers": [other], "models": []}))
    lay_down("copilot-cli", '{\n  // mine\n  "banner": "never"\n}\n', 1)
    assert run("copilot-cli", "--apply") == 0
    data = json.loads((home / ".copilot" / "providers.json").read_text())
    assert data["providers"][0] == other
    assert data["providers"][1] == {
        "name": "impetus",
        "type": "openai",
        "baseUrl": URL,
        "apiKey": "none",
    }
    (model,) = data["models"]
    assert (model["provider"], model["id"]) == ("impetus", MODEL)
    assert (model["maxPromptTokens"], model["maxOutputTokens"]) == (24_576, 8_192)
    assert (home / ".copilot" / "settings.json").read_text() == (
        f'{{\n  // mine\n  "banner": "never",\n  "model": "impetus/{MODEL}"\n}}\n'
    )


def test_copilot_in_vs_code_gets_a_custom_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        '[\n  // mine\n  {\n    "name": "impetus",\n    "apiKey": "${input:chat.lm.secret.1}",\n'
        '    "models": [\n      { "id": "old" }\n    ]\n  }\n]\n'
    )
    file = lay_down("copilot", text)
    assert run("copilot", "--apply") == 0
    (group,) = parse(file.read_text()).value
    assert "// mine" in file.read_text()
    assert (group["vendor"], group["apiType"]) == ("customendpoint", "chat-completions")
    assert group["apiKey"] == "${input:chat.lm.secret.1}"
    old, model = group["models"]
    assert old == {"id": "old"}
    assert model["url"] == f"{URL}/chat/completions"
    assert (model["maxInputTokens"], model["maxOutputTokens"]) == (24_576, 8_192)
    assert model["toolCalling"] is True
    # VS Code keeps keys in its secret storage and ignores one in the file.
    assert run("copilot", "--key", KEY, "--apply") == 0
    assert KEY not in file.read_text()
    file.unlink()
    assert run("copilot", "--key", KEY, "--apply") == 0
    assert "apiKey" not in file.read_text()
    assert "Update API Key" in capsys.readouterr().out


def test_zed_gets_a_provider_and_a_default_model() -> None:
    text = '// Zed\n{\n  "theme": "One", // t\n  "agent": {\n    "dock": "left",\n  },\n}\n'
    file = lay_down("zed", text)
    assert run("zed", "--key", KEY, "--apply") == 0
    after = file.read_text()
    assert after.startswith(
        '// Zed\n{\n  "theme": "One", // t\n  "agent": {\n    "dock": "left",\n'
    )
    assert KEY not in after
    data = parse(after).value
    assert data["agent"]["default_model"] == {"provider": "impetus", "model": MODEL}
    provider = data["language_models"]["openai_compatible"]["impetus"]
    assert provider["api_url"] == URL
    (model,) = provider["available_models"]
    assert (model["name"], model["max_tokens"], model["max_output_tokens"]) == (
        MODEL,
        32_768,
        8_192,
    )
    assert run("zed", "--undo") == 0
    assert file.read_text() == text


@pytest.mark.parametrize("client", NEW)
def test_a_models_entry_is_renewed_in_place(
    client: str, entries: list[Mapping[str, Any]], entry: Entry
) -> None:
    assert run(client, "--apply") == 0
    first = [path.read_text() for path in CLIENTS[client].paths()]
    entries[0] = entry(MODEL, max_model_len=8_192)
    assert run(client, "--apply") == 0
    second = [path.read_text() for path in CLIENTS[client].paths()]
    assert [len(text.splitlines()) for text in first] == [len(text.splitlines()) for text in second]
    assert first != second
    assert not any("32768" in text for text in second)


@pytest.mark.parametrize("client", NEW)
def test_a_model_that_cannot_chat_is_refused(
    client: str,
    entries: list[Mapping[str, Any]],
    entry: Entry,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries[0] = entry("embedder", capabilities=["embedding"])
    assert run(client, "--model", "embedder", "--apply") == 1
    assert "needs a chat model" in capsys.readouterr().err
    assert not any(path.exists() for path in CLIENTS[client].paths())


@pytest.mark.parametrize("client", NEW)
def test_an_unknown_context_is_left_out_or_refused(
    client: str,
    entries: list[Mapping[str, Any]],
    entry: Entry,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries[0] = entry(MODEL, max_model_len=None)
    is_needed = client in ("copilot", "zed")
    assert run(client, "--apply") == (1 if is_needed else 0)
    if is_needed:
        assert "must be told the context" in capsys.readouterr().err
    texts = [path.read_text() for path in CLIENTS[client].paths() if path.exists()]
    assert not any(name in text for text in texts for name in ("context", "limit", "max"))


@pytest.mark.parametrize(
    ("client", "text"),
    [
        ("codex", "model = \n"),
        ("codex", 'model_providers = { a = { name = "x" } }\n'),
        ("opencode", '{"provider": "x"}'),
        ("opencode", "{'provider': {}}"),
        ("aider", "model:   a\nread: []  # kept\n\n"),
        ("copilot-cli", '{"providers": [] // mine\n}'),
        ("copilot-cli", '{"providers": {}}'),
        ("copilot", "{}"),
        ("copilot", "[1]"),
        ("zed", '{"agent": [], }'),
        ("zed", '{"language_models": {}'),
    ],
)
def test_what_cannot_be_merged_is_left_alone(
    client: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lay_down(client, text)
    assert run(client, "--apply") == 1
    shown = capsys.readouterr().err
    assert f"{file} was not changed: it" in shown
    assert file.read_text() == text
    assert [path for path in file.parent.iterdir() if path.is_file()] == [file]


@pytest.mark.parametrize("client", NEW)
def test_line_ends_of_windows_stay(client: str) -> None:
    texts = {
        "codex": 'model = "x"\r\n[a]\r\nb = 1\r\n',
        "aider": "model: x\r\nread: []\r\n",
        "copilot": "[\r\n]\r\n",
    }
    text = texts.get(client, '{\r\n  "a": 1\r\n}\r\n')
    file = lay_down(client, text)
    assert run(client, "--apply") == 0
    after = file.read_bytes().decode()
    assert after.count("\n") == after.count("\r\n") > text.count("\n")
    assert run(client, "--undo") == 0
    assert file.read_bytes().decode() == text


@pytest.mark.parametrize("client", ["codex", "opencode", "copilot", "zed"])
def test_a_byte_order_mark_stays(client: str) -> None:
    text = {"codex": 'a = "x"\n', "copilot": "[]\n"}.get(client, "{}\n")
    file = lay_down(client, f"\ufeff{text}")
    assert run(client, "--apply") == 0
    assert file.read_bytes().decode().count("\ufeff") == 1
    assert file.read_bytes().decode().startswith("\ufeff")


@pytest.mark.parametrize(
    ("client", "variable", "value", "expected"),
    [
        ("codex", "CODEX_HOME", "{home}/c", "c/config.toml"),
        ("codex", "CODEX_HOME", "~/c", "c/config.toml"),
        ("opencode", "OPENCODE_CONFIG", "{home}/o.json", "o.json"),
        ("opencode", "OPENCODE_CONFIG_DIR", "{home}/d", "d/opencode.json"),
        ("opencode", "XDG_CONFIG_HOME", "{home}/x", "x/opencode/opencode.json"),
        ("opencode", "XDG_CONFIG_HOME", "relative", ".config/opencode/opencode.json"),
        ("copilot-cli", "COPILOT_HOME", "{home}/g", "g/providers.json"),
        ("copilot-cli", "COPILOT_PROVIDERS_CONFIG", "{home}/p.json", "p.json"),
        ("copilot", "XDG_CONFIG_HOME", "{home}/x", "x/Code/User/chatLanguageModels.json"),
        ("copilot", "VSCODE_APPDATA", "{home}/x", "x/Code/User/chatLanguageModels.json"),
        ("copilot", "VSCODE_PORTABLE", "{home}/p", "p/user-data/User/chatLanguageModels.json"),
        ("zed", "XDG_CONFIG_HOME", "{home}/x", "x/zed/settings.json"),
        ("zed", "FLATPAK_XDG_CONFIG_HOME", "{home}/f", "f/zed/settings.json"),
    ],
)
def test_variables_move_the_files(
    client: str,
    variable: str,
    value: str,
    expected: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value.format(home=home))
    assert file_of(client) == home / expected
    assert run(client, "--apply") == 0
    assert (home / expected).exists()
    assert run(client, "--undo") == 0
    assert not (home / expected).exists()


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ("codex", ".codex/config.toml"),
        ("opencode", ".config/opencode/opencode.json"),
        ("aider", ".aider.conf.yml"),
        ("copilot-cli", ".copilot/providers.json"),
        ("copilot", "Library/Application Support/Code/User/chatLanguageModels.json"),
        ("zed", ".config/zed/settings.json"),
    ],
)
def test_the_files_of_macos(
    client: str, expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert file_of(client) == home / expected
    # Zed and VS Code do not read it there; opencode does.
    if client != "opencode":
        monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "x"))
        assert file_of(client) == home / expected


def test_the_insiders_of_vs_code_are_found(home: Path) -> None:
    (home / ".config" / "Code - Insiders").mkdir(parents=True)
    assert "Code - Insiders" in str(file_of("copilot"))
    (home / ".config" / "Code").mkdir()
    assert "Insiders" not in str(file_of("copilot"))
