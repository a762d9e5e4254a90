"""Configuration files and contents of each client that can be set up."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from router.clients.agents import AGENTS
from router.clients.client import Client, answer_tokens, folder, is_mac, require_chat
from router.clients.documents import changed_json, changed_yaml
from router.clients.editors import EDITORS
from router.clients.files import FileChange
from router.clients.target import Model, Target
from router.clients.texts import langchain_text, open_webui_text, openai_text


def _cline_paths() -> Sequence[Path]:
    data = os.environ.get("CLINE_DATA_DIR")
    base = Path(data).expanduser() if data else folder("CLINE_DIR", ".cline") / "data"
    return [base / "settings" / "providers.json", base / "settings" / "models.json"]


def _cline_changes(target: Target, model: Model) -> Sequence[FileChange]:
    def change(data: Any) -> None:
        data.setdefault("version", 1)
        data["lastUsedProvider"] = "openai-compatible"
        provider = data.setdefault("providers", {}).setdefault("openai-compatible", {})
        wanted = {
            **provider.get("settings", {}),
            "provider": "openai-compatible",
            "apiKey": target.shown_key,
            "model": model.id,
            "baseUrl": target.base_url,
        }
        if wanted != provider.get("settings"):
            provider["settings"] = wanted
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            provider["updatedAt"] = now.replace("+00:00", "Z")
            provider["tokenSource"] = "manual"

    def add_model(data: Any) -> None:
        data.setdefault("version", 1)
        provider = data.setdefault("providers", {}).setdefault("openai-compatible", {})
        # Cline assumes 128,000 tokens otherwise, and editors do not offer the model.
        provider.setdefault("models", {}).setdefault(model.id, {}).update(
            name=model.id,
            contextWindow=model.context_tokens,
            maxInputTokens=model.context_tokens - answer_tokens(model),
        )

    providers, models = _cline_paths()
    return [
        FileChange(providers, partial(changed_json, change=change)),
        FileChange(models, partial(changed_json, change=add_model)),
    ]


def _continue_paths() -> Sequence[Path]:
    return [folder("CONTINUE_GLOBAL_DIR", ".continue") / "config.yaml"]


def _continue_changes(target: Target, model: Model) -> Sequence[FileChange]:
    roles = ["chat", "edit", "apply"] if model.chats else []
    roles += ["autocomplete"] if "infill" in model.capabilities else []
    roles += ["embed"] if "embedding" in model.capabilities else []
    entry: dict[str, Any] = {
        "name": model.id,
        "provider": "openai",
        "model": model.id,
        "apiBase": target.base_url,
        "apiKey": target.shown_key,
        "roles": roles,
    }
    if model.chats:
        entry["capabilities"] = ["tool_use"]
        entry["defaultCompletionOptions"] = {"contextLength": model.context_tokens}

    def change(data: Any) -> None:
        for key, value in (("name", "Local"), ("version", "1.0.0"), ("schema", "v1")):
            data.setdefault(key, value)
        models = data.get("models")
        if models is None:
            models = data["models"] = []
        for known in models:
            if (known.get("apiBase"), known.get("model")) == (target.base_url, model.id):
                known.update(entry)
                return
        models.append(entry)

    return [FileChange(_continue_paths()[0], partial(changed_yaml, change=change))]


def _claude_paths() -> Sequence[Path]:
    return [folder("CLAUDE_CONFIG_DIR", ".claude") / "settings.json"]


def _claude_changes(target: Target, model: Model) -> Sequence[FileChange]:
    variables = {
        "ANTHROPIC_BASE_URL": target.root,
        "ANTHROPIC_AUTH_TOKEN": target.shown_key,
        "ANTHROPIC_MODEL": model.id,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model.id,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(model.context_tokens),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(answer_tokens(model)),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }

    def change(data: Any) -> None:
        data.setdefault("env", {}).update(variables)

    return [FileChange(_claude_paths()[0], partial(changed_json, change=change))]


def _roo_paths() -> Sequence[Path]:
    return [Path.home() / ".roo" / "impetus-settings.json"]


def _roo_changes(target: Target, model: Model) -> Sequence[FileChange]:
    def change(data: Any) -> None:
        profiles = data.setdefault("providerProfiles", {})
        profiles["currentApiConfigName"] = "impetus"
        profiles.setdefault("apiConfigs", {})["impetus"] = {
            "id": "impetus",
            "apiProvider": "openai",
            "openAiBaseUrl": target.base_url,
            "openAiApiKey": target.shown_key,
            "openAiModelId": model.id,
            "openAiCustomModelInfo": {
                "contextWindow": model.context_tokens,
                "maxTokens": -1,
                "supportsImages": False,
                "supportsPromptCache": False,
            },
        }
        data.setdefault("globalSettings", {})

    return [FileChange(_roo_paths()[0], partial(changed_json, change=change))]


def _llm_paths() -> Sequence[Path]:
    default = (
        ("Library", "Application Support", "io.datasette.llm")
        if is_mac()
        else (".config", "io.datasette.llm")
    )
    base = folder("LLM_USER_PATH", *default)
    return [base / "extra-openai-models.yaml", base / "keys.json"]


def _llm_changes(target: Target, model: Model) -> Sequence[FileChange]:
    require_chat("llm", model)
    models_path, keys_path = _llm_paths()
    entry = {
        "model_id": model.id,
        "model_name": model.id,
        "api_base": target.base_url,
        "api_key_name": "impetus",
        "supports_schema": True,
        "supports_tools": True,
    }

    def change(data: Any) -> None:
        for known in data:
            if known.get("model_id") == model.id:
                known.update(entry)
                return
        data.append(entry)

    def change_keys(data: Any) -> None:
        data["impetus"] = target.shown_key

    return [
        FileChange(models_path, partial(changed_yaml, change=change, is_list=True)),
        FileChange(keys_path, partial(changed_json, change=change_keys), holds_secrets=True),
    ]


def _no_paths() -> Sequence[Path]:
    return []


def _no_changes(target: Target, model: Model) -> Sequence[FileChange]:
    del target, model
    return []


CLIENTS: Mapping[str, Client] = {
    "cline": Client(
        "Cline's command line", _cline_paths, _cline_changes, hint="Run: cline -P openai-compatible"
    ),
    "continue": Client("Continue", _continue_paths, _continue_changes, hint="Run: cn"),
    "claude-code": Client(
        "Claude Code", _claude_paths, _claude_changes, wire="anthropic", hint="Run: claude"
    ),
    "roo": Client(
        "Roo Code",
        _roo_paths,
        _roo_changes,
        hint="In Roo's settings choose About Roo Code, Import, and this file.",
    ),
    "open-webui": Client(
        "Open WebUI",
        _no_paths,
        _no_changes,
        open_webui_text,
        hint="Set these variables where Open WebUI starts.",
    ),
    "openai": Client(
        "OpenAI's SDKs",
        _no_paths,
        _no_changes,
        openai_text,
        hint="Set these variables where your program starts.",
    ),
    "langchain": Client(
        "LangChain",
        _no_paths,
        _no_changes,
        langchain_text,
        hint="Install langchain-openai where your program runs, and begin it with these lines.",
    ),
    "llm": Client("llm", _llm_paths, _llm_changes, hint="Run: llm -m MODEL 'Say hello.'"),
    **AGENTS,
    **EDITORS,
}
