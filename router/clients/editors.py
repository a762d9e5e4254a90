"""Configuration files of editors: Zed, and GitHub Copilot in VS Code."""

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
    is_mac,
    put,
    require_context,
)
from router.clients.documents import changed_jsonc
from router.clients.files import FileChange
from router.clients.target import KEY_VARIABLE, Model, Target

_VS_CODE_FOLDERS = ("Code", "Code - Insiders")


def _zed_paths() -> Sequence[Path]:
    """Source: zed-industries/zed, crates/paths; on macOS it does not read XDG's variables."""
    flatpak = os.environ.get("FLATPAK_XDG_CONFIG_HOME")
    base = Path.home() / ".config" if is_mac() else Path(flatpak or config_folder())
    return [base / "zed" / "settings.json"]


def _zed_changes(target: Target, model: Model) -> Sequence[FileChange]:
    """Source of the keys: zed-industries/zed, crates/settings_content/src/language_model.rs."""
    require_context("Zed", model)
    entry = {
        "name": model.id,
        "display_name": model.id,
        "max_tokens": model.context_tokens,
        "max_output_tokens": answer_tokens(model),
        "capabilities": {
            "tools": True,
            "images": False,
            "parallel_tool_calls": True,
            "prompt_cache_key": False,
        },
    }

    def change(data: Any) -> None:
        providers = data.setdefault("language_models", {}).setdefault("openai_compatible", {})
        provider = providers.setdefault(PROVIDER, {})
        provider["api_url"] = target.base_url
        put(provider.setdefault("available_models", []), entry, ["name"])
        chosen = {"provider": PROVIDER, "model": model.id}
        data.setdefault("agent", {}).setdefault("default_model", {}).update(chosen)

    return [FileChange(_zed_paths()[0], partial(changed_jsonc, change=change))]


def _vs_code_paths() -> Sequence[Path]:
    """Source: microsoft/vscode, src/vs/platform/environment/node/userDataPath.ts."""
    if portable := os.environ.get("VSCODE_PORTABLE"):
        user = Path(portable) / "user-data"
    else:
        default = Path.home() / "Library" / "Application Support" if is_mac() else config_folder()
        base = Path(os.environ.get("VSCODE_APPDATA") or default)
        found = [base / name for name in _VS_CODE_FOLDERS if os.path.isdir(base / name)]
        user = found[0] if found else base / _VS_CODE_FOLDERS[0]
    return [user / "User" / "chatLanguageModels.json"]


def _vs_code_changes(target: Target, model: Model) -> Sequence[FileChange]:
    """Source of the keys: code.visualstudio.com/docs/agent-customization/language-models."""
    require_context("GitHub Copilot in VS Code", model)
    entry = {
        "id": model.id,
        "name": model.id,
        "url": f"{target.base_url}/chat/completions",
        "toolCalling": True,
        "vision": False,
        "maxInputTokens": model.context_tokens - answer_tokens(model),
        "maxOutputTokens": answer_tokens(model),
    }

    def change(data: Any) -> None:
        group = next((known for known in data if known.get("name") == PROVIDER), None)
        if group is None:
            group = {"name": PROVIDER}
            data.append(group)
        group |= {"vendor": "customendpoint", "apiType": "chat-completions"}
        # VS Code ignores a key in this file; one entered there is kept as a reference.
        put(group.setdefault("models", []), entry, ["id"])

    return [FileChange(_vs_code_paths()[0], partial(changed_jsonc, change=change, is_list=True))]


EDITORS: Mapping[str, Client] = {
    "zed": Client(
        "Zed",
        _zed_paths,
        _zed_changes,
        hint=f"Zed needs a key (any text if the server has none): enter it, or set {KEY_VARIABLE}.",
    ),
    "copilot": Client(
        "GitHub Copilot in VS Code",
        _vs_code_paths,
        _vs_code_changes,
        hint="In VS Code, select the model in the chat's model picker.",
        key_hint="Enter the key in VS Code: Chat: Manage Language Models, impetus, Update API Key.",
    ),
}
