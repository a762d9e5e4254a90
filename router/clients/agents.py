"""Configuration files of agents in a terminal: Codex, opencode, aider, GitHub Copilot's CLI."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from router.clients.client import (
    PROVIDER,
    Client,
    answer_tokens,
    config_folder,
    folder,
    put,
    require_chat,
)
from router.clients.documents import changed_json, changed_jsonc, changed_yaml
from router.clients.files import FileChange
from router.clients.target import KEY_VARIABLE, Model, Target
from router.clients.toml import changed_toml

_TITLE = "Impetus"
# Codex gives up after 5 minutes without an event; loading a large model may take longer.
_CODEX_IDLE_MS = 900_000


def _codex_paths() -> Sequence[Path]:
    return [folder("CODEX_HOME", ".codex") / "config.toml"]


def _codex_changes(target: Target, model: Model) -> Sequence[FileChange]:
    """Source of the keys: developers.openai.com/codex/config-reference."""
    require_chat("Codex", model)

    def change(data: Any) -> None:
        data["model"] = model.id
        data["model_provider"] = PROVIDER
        if model.context_tokens:
            data["model_context_window"] = model.context_tokens
            data["model_auto_compact_token_limit"] = model.context_tokens - answer_tokens(model)
        provider = data.setdefault("model_providers", {}).setdefault(PROVIDER, {})
        provider |= {
            "name": _TITLE,
            "base_url": target.base_url,
            "wire_api": "responses",
            "stream_idle_timeout_ms": _CODEX_IDLE_MS,
        }
        # Codex refuses to start if the variable that it names is not set.
        if target.key:
            provider["env_key"] = KEY_VARIABLE
        else:
            provider.pop("env_key", None)

    return [FileChange(_codex_paths()[0], partial(changed_toml, change=change))]


def _opencode_paths() -> Sequence[Path]:
    if file := os.environ.get("OPENCODE_CONFIG"):
        return [Path(file).expanduser()]
    own = os.environ.get("OPENCODE_CONFIG_DIR")
    base = Path(own).expanduser() if own else config_folder() / "opencode"
    names = ("opencode.jsonc", "opencode.json")
    # It reads both, and what the first says wins.
    return [next((base / name for name in names if os.path.exists(base / name)), base / names[1])]


def _opencode_changes(target: Target, model: Model) -> Sequence[FileChange]:
    """Source of the keys: opencode.ai/config.json."""
    require_chat("opencode", model)

    def change(data: Any) -> None:
        data.setdefault("$schema", "https://opencode.ai/config.json")
        provider = data.setdefault("provider", {}).setdefault(PROVIDER, {})
        provider["npm"] = "@ai-sdk/openai-compatible"
        provider.setdefault("name", _TITLE)
        provider.setdefault("options", {}).update(
            {"baseURL": target.base_url, "apiKey": target.shown_key}
        )
        entry = provider.setdefault("models", {}).setdefault(model.id, {})
        entry |= {"name": model.id, "tool_call": True}
        if model.context_tokens:
            entry["limit"] = {"context": model.context_tokens, "output": answer_tokens(model)}
        # Titles are written by the small model, which is otherwise one of another provider.
        data["model"] = data["small_model"] = f"{PROVIDER}/{model.id}"

    return [FileChange(_opencode_paths()[0], partial(changed_jsonc, change=change))]


def _aider_paths() -> Sequence[Path]:
    return [Path.home() / ".aider.conf.yml", Path.home() / ".aider.model.metadata.json"]


def _aider_changes(target: Target, model: Model) -> Sequence[FileChange]:
    """Source of the keys: aider.chat/docs/config, and litellm's model metadata."""
    require_chat("aider", model)
    name = f"openai/{model.id}"

    def change(data: Any) -> None:
        data.update(
            {
                "model": name,
                "openai-api-base": target.base_url,
                "openai-api-key": target.shown_key,
            }
        )

    def change_metadata(data: Any) -> None:
        entry = data.setdefault(name, {})
        entry |= {"litellm_provider": "openai", "mode": "chat"}
        if model.context_tokens:
            entry["max_tokens"] = entry["max_output_tokens"] = answer_tokens(model)
            entry["max_input_tokens"] = model.context_tokens - answer_tokens(model)

    settings, metadata = _aider_paths()
    return [
        FileChange(settings, partial(changed_yaml, change=change)),
        FileChange(metadata, partial(changed_jsonc, change=change_metadata)),
    ]


def _copilot_paths() -> Sequence[Path]:
    home = folder("COPILOT_HOME", ".copilot")
    named = os.environ.get("COPILOT_PROVIDERS_CONFIG", "").strip()
    providers = Path(named).expanduser() if named else home / "providers.json"
    return [providers, home / "settings.json"]


def _copilot_changes(target: Target, model: Model) -> Sequence[FileChange]:
    """Source of the keys: `copilot help providers` and api.schema.json in its package."""
    require_chat("GitHub Copilot's command line", model)

    def change(data: Any) -> None:
        provider = {
            "name": PROVIDER,
            "type": "openai",
            "baseUrl": target.base_url,
            "apiKey": target.shown_key,
        }
        put(data.setdefault("providers", []), provider, ("name",))
        entry: dict[str, Any] = {"provider": PROVIDER, "id": model.id}
        if model.context_tokens:
            entry |= {
                "maxContextWindowTokens": model.context_tokens,
                "maxPromptTokens": model.context_tokens - answer_tokens(model),
                "maxOutputTokens": answer_tokens(model),
            }
        put(data.setdefault("models", []), entry, ("provider", "id"))

    def change_settings(data: Any) -> None:
        data["model"] = f"{PROVIDER}/{model.id}"

    providers, settings = _copilot_paths()
    return [
        FileChange(providers, partial(changed_json, change=change)),
        FileChange(settings, partial(changed_jsonc, change=change_settings)),
    ]


AGENTS: Mapping[str, Client] = {
    "codex": Client(
        "Codex",
        _codex_paths,
        _codex_changes,
        wire="responses",
        hint="Run: codex",
        key_hint=f"Codex reads the key from {KEY_VARIABLE}: set it where Codex runs.",
    ),
    "opencode": Client("opencode", _opencode_paths, _opencode_changes, hint="Run: opencode"),
    "aider": Client("aider", _aider_paths, _aider_changes, hint="Run: aider"),
    "copilot-cli": Client(
        "GitHub Copilot's command line", _copilot_paths, _copilot_changes, hint="Run: copilot"
    ),
}
