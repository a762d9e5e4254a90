"""Finds out whether a client is installed on this machine."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A server that launchd started has a short PATH; installers put programs here.
_FOLDERS = (
    "~/.local/bin",
    "~/.npm-global/bin",
    "~/.bun/bin",
    "~/.opencode/bin",
    "/opt/homebrew/bin",
    "/usr/local/bin",
)
_EDITORS = (".vscode", ".vscode-insiders", ".vscode-server", ".cursor", ".windsurf")


@dataclass(frozen=True, slots=True)
class Traces:
    """What an installed client leaves: commands, extensions of VS Code, applications of macOS."""

    commands: Sequence[str] = ()
    extensions: Sequence[str] = ()
    applications: Sequence[str] = ()


# Libraries are installed in environments of their own, which cannot be found.
TRACES: Mapping[str, Traces] = {
    "cline": Traces(("cline",), ("saoudrizwan.claude-dev",)),
    "continue": Traces(("cn",), ("continue.continue",)),
    "claude-code": Traces(("claude",), ("anthropic.claude-code",)),
    "codex": Traces(("codex",), ("openai.chatgpt",)),
    "opencode": Traces(("opencode",)),
    "aider": Traces(("aider",)),
    "copilot": Traces((), ("github.copilot-chat", "github.copilot")),
    "copilot-cli": Traces(("copilot",)),
    "zed": Traces(("zed", "zeditor"), (), ("Zed",)),
    "roo": Traces((), ("rooveterinaryinc.roo-cline",)),
    "llm": Traces(("llm",)),
    "open-webui": Traces(("open-webui",), (), ("Open WebUI",)),
}


def installed_path(client: str) -> Path | None:
    """Return where a client was found; None if it was not.  Reads folders, so it blocks."""
    traces = TRACES.get(client, Traces())
    for command in traces.commands:
        if found := shutil.which(command, path=_search_path()):
            return Path(found)
    for name in traces.extensions:
        for editor in _EDITORS:
            # The folder's name ends in the version.
            folders = (Path.home() / editor / "extensions").glob(f"{name}-[0-9]*")
            if (folder := next(folders, None)) is not None:
                return folder
    for application in traces.applications:
        for base in (Path("/Applications"), Path.home() / "Applications"):
            if os.path.isdir(base / f"{application}.app"):
                return base / f"{application}.app"
    return None


def _search_path() -> str:
    known = [os.path.expanduser(folder) for folder in _FOLDERS]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *known])
