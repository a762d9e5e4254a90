"""Tests of `scripts/connect`: merging, hiding secrets, writing and restoring."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from catalog.compatibility import Traits, compatibility
from core.types import Capability
from router.clients import files
from router.clients.check import Outcome
from router.clients.clients import CLIENTS
from router.clients.documents import changed_json, changed_yaml
from router.clients.files import Edit, apply, preview, undo
from router.clients.problems import ConnectError
from router.clients.target import Model, Target, normal_url
from scripts.connect_lib import __main__ as connect
from scripts.connect_lib.server import choose
from tests.unit.scripts.conftest import Entry, checks_with

TARGET = Target("http://127.0.0.1:8000/v1", "sesame-42")
MODEL = Model("coder@gguf-q4_0", 32_768, frozenset({"chat", "completion", "tools", "infill"}))
FILES = {
    "cline": ".cline/data/settings/providers.json",
    "continue": ".continue/config.yaml",
    "claude-code": ".claude/settings.json",
    "roo": ".roo/impetus-settings.json",
    "llm": ".config/io.datasette.llm/extra-openai-models.yaml",
    "codex": ".codex/config.toml",
    "opencode": ".config/opencode/opencode.json",
    "aider": ".aider.conf.yml",
    "copilot-cli": ".copilot/providers.json",
    "copilot": ".config/Code/User/chatLanguageModels.json",
    "zed": ".config/zed/settings.json",
}
pytestmark = pytest.mark.usefixtures("home")

CONTINUE_FILE = """\
# My assistant
name: Mine   # of all things
version: 0.0.1
schema: v1

models:
  # The old one stays.
  - name: "Other"
    provider: openai
    model: other
    apiKey: 'foreign-secret'
rules:
  - Be brief.
"""


def nothing(data: Any) -> None:
    del data


def run(*arguments: str) -> int:
    return connect.main([*arguments, "--base-url", "http://127.0.0.1:8000"])


def test_every_client_is_rated() -> None:
    rated = compatibility(Traits({Capability.CHAT}, 32_768))
    assert set(rated) == set(CLIENTS)
    assert set(FILES) == {name for name, client in CLIENTS.items() if client.text is None}


@pytest.mark.parametrize("client", FILES)
def test_preview_writes_nothing_and_apply_is_idempotent(
    client: str, home: Path, entries: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del entries
    file = home / FILES[client]
    assert run(client, "--key", TARGET.key) == 0
    shown = capsys.readouterr().out
    assert "Nothing was written" in shown
    assert f"+++ {file}" in shown
    assert not file.exists()
    assert run(client, "--key", TARGET.key, "--apply") == 0
    shown += capsys.readouterr().out
    text = file.read_text()
    assert "coder@gguf-q4_0" in text
    assert file.stat().st_mode & 0o077 == 0
    assert run(client, "--key", TARGET.key, "--apply") == 0
    shown += capsys.readouterr().out
    assert "is set up already" in shown
    assert file.read_text() == text
    assert TARGET.key not in shown
    assert run(client, "--undo") == 0
    assert not file.exists()
    assert run(client, "--undo") == 1


def test_continue_keeps_comments_order_and_foreign_models(home: Path, entries: Any) -> None:
    del entries
    file = home / FILES["continue"]
    file.parent.mkdir()
    file.write_text(CONTINUE_FILE)
    assert run("continue", "--apply") == 0
    text = file.read_text()
    before, after = text.split("  - name: coder@gguf-q4_0\n")
    assert before + after[after.index("rules:") :] == CONTINUE_FILE
    data = yaml.safe_load(text)
    assert data["name"] == "Mine"
    assert [model["model"] for model in data["models"]] == ["other", MODEL.id]
    assert data["models"][1]["roles"] == ["chat", "edit", "apply", "autocomplete"]
    assert data["models"][1]["defaultCompletionOptions"] == {"contextLength": 32_768}
    assert run("continue", "--undo") == 0
    assert file.read_text() == CONTINUE_FILE


def test_a_models_entry_is_renewed_in_place(
    entries: list[Mapping[str, Any]], entry: Entry, home: Path
) -> None:
    assert run("continue", "--apply") == 0
    entries[0] = entry(MODEL.id, max_model_len=8_192)
    assert run("continue", "--apply") == 0
    (model,) = yaml.safe_load((home / FILES["continue"]).read_text())["models"]
    assert model["defaultCompletionOptions"] == {"contextLength": 8_192}


def test_claude_code_keeps_its_other_settings(home: Path, entries: Any) -> None:
    del entries
    file = home / FILES["claude-code"]
    file.parent.mkdir()
    file.write_text('{\n\t"env": {\n\t\t"EDITOR": "vi"\n\t},\n\t"theme": "dark"\n}\n')
    assert run("claude-code", "--apply") == 0
    text = file.read_text()
    data = json.loads(text)
    assert data["theme"] == "dark"
    assert data["env"]["EDITOR"] == "vi"
    assert data["env"]["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8000"
    assert data["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"
    assert text.startswith('{\n\t"env": {\n\t\t"EDITOR": "vi",\n')


def test_cline_is_configured_as_its_own_command_does(home: Path, entries: Any) -> None:
    del entries
    assert run("cline", "--apply") == 0
    data = json.loads((home / FILES["cline"]).read_text())
    assert data["lastUsedProvider"] == "openai-compatible"
    assert data["providers"]["openai-compatible"]["settings"] == {
        "provider": "openai-compatible",
        "apiKey": "none",
        "model": MODEL.id,
        "baseUrl": TARGET.base_url,
    }


def test_cline_is_told_the_models_context(home: Path, entries: Any) -> None:
    del entries
    file = (home / FILES["cline"]).with_name("models.json")
    file.parent.mkdir(parents=True)
    mine = {"other": {"models": {"x": {"temperature": 1}}}}
    file.write_text(json.dumps({"version": 1, "providers": mine}))
    assert run("cline", "--apply") == 0
    providers = json.loads(file.read_text())["providers"]
    assert providers.pop("openai-compatible")["models"] == {
        MODEL.id: {"name": MODEL.id, "contextWindow": 32_768, "maxInputTokens": 24_576}
    }
    assert providers == mine


@pytest.mark.parametrize(
    ("client", "text", "reason"),
    [
        ("claude-code", '{"a": 1, // mine\n "b": 2}', "remove its comments"),
        ("claude-code", '{"a": 1, "a": 2}', "a key appears twice"),
        ("claude-code", "[]", "not a JSON object"),
        ("claude-code", '{"env": "x"}', "not the one that the client writes"),
        ("continue", "models: [", "not valid YAML"),
        ("continue", "a:   1\nmodels: []  # kept\n\n", "layout could not be preserved"),
        ("continue", "- 1\n", "not a YAML mapping"),
        ("llm", "a: 1\n", "not a YAML list"),
    ],
)
def test_what_cannot_be_merged_is_left_alone(
    client: str,
    text: str,
    reason: str,
    home: Path,
    entries: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del entries
    file = home / FILES[client]
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert run(client, "--apply") == 1
    assert reason in capsys.readouterr().err
    assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_named(
    home: Path, entries: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del entries
    (home / ".roo").write_text("a file")
    assert run("roo", "--apply") == 1
    assert str(home / ".roo") in capsys.readouterr().err
    assert (home / ".roo").read_text() == "a file"


def test_either_both_files_of_llm_are_written_or_none(
    home: Path, entries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del entries

    def failing(edit: Edit) -> Path:
        if edit.path.name == "keys.json":
            raise ConnectError("full")
        return apply(edit)

    monkeypatch.setattr(files, "apply", failing)
    assert run("llm", "--apply") == 1
    assert list((home / FILES["llm"]).parent.iterdir()) == []


def test_undo_does_not_overwrite_later_changes(
    home: Path, entries: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del entries
    file = home / FILES["claude-code"]
    assert run("claude-code", "--apply") == 0
    file.write_text("{}")
    assert run("claude-code", "--undo") == 1
    assert "was changed since" in capsys.readouterr().err
    assert file.read_text() == "{}"
    assert run("claude-code", "--undo", "--force") == 0
    assert [(path.name, path.read_text()) for path in file.parent.iterdir()] == [
        ("settings.json.undone", "{}")
    ]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("{}")
    real.chmod(0o640)
    link.symlink_to(real)
    apply(Edit(link, "{}", '{"a": 1}'))
    assert link.is_symlink()
    assert real.read_text() == '{"a": 1}'
    assert real.stat().st_mode & 0o777 == 0o640
    assert undo(link) is not None
    assert real.read_text() == "{}"


def test_preview_hides_every_secret() -> None:
    before = CONTINUE_FILE
    after = changed_yaml(
        before, lambda data: data.update(models=[{"apiKey": "mine-1"}], note="mine-1")
    )
    shown = preview(Edit(Path("/x"), before, after), ["mine-1"])
    assert "foreign-secret" not in shown
    assert "mine-1" not in shown
    assert "note: ***" in shown
    keys = Edit(Path("/k"), '{\n  "openai": "sk-1"\n}', '{\n  "openai": "sk-1",\n  "b": 1\n}', True)
    assert "sk-1" not in preview(keys, [])
    assert preview(Edit(Path("/x"), None, '"MAX_TOKENS": "5"\n'), []).endswith('"5"')


@pytest.mark.parametrize(
    "line",
    [
        'args = ["--api-key", "foreign-1"]',
        'args = ["--api-key=foreign-1"]',
        '  "command": "npx server --token foreign-1",',
        'http_headers = { Authorization = "Bearer foreign-1" }',
        'header = "Bearer foreign-1"',
        '  "url": "https://me:foreign-1@host/v1",',
        '    "sk-foreign-1",',
        'experimental_bearer_token = "foreign-1"',
        "openai-api-key: foreign-1",
    ],
)
def test_preview_hides_secrets_of_other_entries(line: str) -> None:
    shown = preview(Edit(Path("/x"), f"{line}\n", f"{line}\nmodel = 1\n"), [])
    assert "foreign-1" not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "line",
    [
        '  "limit": { "context": 32768, "output": 8192 },',
        'base_url = "http://127.0.0.1:8000/v1"',
        "task-model: desk_lamp_sketch",
        '"max_output_tokens": 4096,',
        '"vendor": "customendpoint",',
    ],
)
def test_preview_shows_what_is_no_secret(line: str) -> None:
    assert line in preview(Edit(Path("/x"), f"{line}\n", f"{line}\nmodel = 1\n"), [])


def test_json_and_yaml_without_a_change_stay_byte_for_byte() -> None:
    assert changed_json('{"a":1}', nothing) == '{"a":1}'
    assert changed_yaml(CONTINUE_FILE, nothing) == CONTINUE_FILE


@pytest.mark.parametrize("client", ["open-webui", "openai", "langchain"])
def test_texts_name_the_server_and_never_the_key(
    client: str, entries: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del entries
    assert run(client, "--key", TARGET.key, "--apply") == 0
    shown = capsys.readouterr().out
    assert TARGET.base_url in shown
    assert "IMPETUS_API_KEY" in shown
    assert TARGET.key not in shown


def test_the_model_that_fits_best_is_chosen(entry: Entry) -> None:
    listed = [
        entry("no", "no", parameters=10**12),
        entry("large", "limited", parameters=10**11),
        entry("small"),
        entry("better", parameters=8_000_000_000, aliases=["b"]),
    ]
    assert choose(listed, "cline", None).id == "better"
    named = choose(listed, "cline", "no")
    assert (named.id, named.level, named.reasons) == ("no", "no", ("for a reason",))
    assert choose(listed, "cline", "b").id == "b"
    with pytest.raises(ConnectError, match="better, large, no, small"):
        choose(listed, "cline", "unknown")
    with pytest.raises(ConnectError, match="no model that cline can use"):
        choose(listed[:1], "cline", None)


def test_a_model_that_chats_comes_before_one_for_embeddings(entry: Entry) -> None:
    embedder = entry("embedder", capabilities=["embedding"])
    listed = [embedder, entry("starter", "limited"), entry("unfit", "no")]
    assert choose(listed, "openai", None).id == "starter"
    assert choose([embedder, listed[2]], "openai", None).id == "embedder"


def test_a_name_without_a_variant_has_the_shortest_context_of_all(entry: Entry) -> None:
    listed = [
        entry("coder@gguf-q8_0"),
        entry("coder@gguf-q4_0", max_model_len=8_192),
        entry("other", aliases=["mine"]),
    ]
    model = choose(listed, "cline", "coder")
    assert (model.id, model.context_tokens) == ("coder", 8_192)
    assert choose(listed, "cline", "coder@gguf-q8_0").context_tokens == 32_768
    assert choose(listed, "cline", "mine").id == "mine"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
    ],
)
def test_addresses_are_completed(given: str, wanted: str) -> None:
    assert normal_url(given) == wanted
    with pytest.raises(ConnectError, match="not a valid address"):
        normal_url("127.0.0.1:8000")


def test_a_server_that_is_not_there_changes_nothing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert connect.main(["cline", "--apply", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "Start the server" in capsys.readouterr().err
    assert list(home.iterdir()) == []


def test_a_failed_check_is_told_without_the_key(
    entries: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del entries
    monkeypatch.setattr(connect, "run_checks", checks_with(Outcome("stream", f"bad {TARGET.key}")))
    assert run("openai", "--key", TARGET.key) == 1
    assert "FAILED  stream: bad ***" in capsys.readouterr().out


def test_echo_is_chosen_by_its_name_alone(entry: Entry) -> None:
    echo = entry("echo@echo", format="echo")
    assert choose([echo, entry("gguf", "limited")], "codex", None).id == "gguf"
    for client in CLIENTS:
        with pytest.raises(ConnectError, match=f"no model that {client} can use"):
            choose([echo], client, None)
    assert choose([echo], "codex", "echo").id == "echo"


def test_a_client_that_no_model_suits_is_told_what_would(entry: Entry) -> None:
    short = {"level": "no", "reasons": ["the context is 8,192 tokens; 16,384 are needed"]}
    starter = entry(
        "starter", max_model_len=8_192, context_length=8_192, compatibility={"codex": short}
    )
    listed = [entry("echo@echo", format="echo"), starter]
    with pytest.raises(ConnectError) as told:
        choose(listed, "codex", None)
    assert "starter: the context is 8,192 tokens; 16,384 are needed" in str(told.value)
    assert "a context of at least 16,384 tokens on this machine (65,536 for" in str(told.value)
    assert "IMPETUS_MODELS_PATH" in str(told.value)
    assert "MEMORY_BUDGET" not in str(told.value)

    listed[1] = {**starter, "context_length": 131_072}
    with pytest.raises(ConnectError, match="starter was trained with 131,072 tokens") as told:
        choose(listed, "codex", None)
    assert "IMPETUS_MEMORY_BUDGET" in str(told.value)

    many = [{**starter, "id": f"starter-{index}"} for index in range(9)]
    with pytest.raises(ConnectError, match="and 4 more"):
        choose(many, "codex", None)
