"""Parses what a user pasted: the name of a repository, its address or a file's; pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from core.errors import RequestError

_LONGEST = 2048
_SHOWN = 80
_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_COMMAND = re.compile(
    r"(?:ollama\s+(?:run|pull)|llama-(?:cli|server)\s+(?:-hfr?|--hf-repo)|(?:huggingface-cli|hf)\s+download|"
    r"git\s+(?:lfs\s+)?clone)\s+"
)
# Source: huggingface_hub's validate_repo_id.
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_REVISION = re.compile(r"[\w.-]+(?:/[\w.-]+)*", re.ASCII)
_QUANTIZATION = re.compile(r"[A-Za-z0-9_.-]{1,200}", re.ASCII)
# The second is LocalAI's.
_SCHEMES = ("hf://", "huggingface://")
_VIEWS = frozenset({"tree", "blob", "resolve", "raw", "blame", "edit", "commits"})
# Views of files, which no folder of a repository is named as.
_SHOWN_PATHS = frozenset({"tree", "blob", "resolve"})
_OTHER_KINDS = {
    "datasets": "a dataset",
    "spaces": "a space",
    "collections": "a collection of models",
    "papers": "a paper",
    "docs": "documentation",
    "kernels": "a kernel",
    "buckets": "a storage bucket",
    "api": "an address of the API",
}


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository, and what of it is meant; empty strings where nothing was said.

    `file` is a file or a folder of the repository, `quantization` a name such as `Q4_K_M` that its
    files are chosen by.
    """

    repository: str
    revision: str = ""
    file: str = ""
    quantization: str = ""


def parse_reference(text: str, endpoint: str = "") -> HubReference:
    """Return what `text` refers to; `endpoint` is the address of another hub than Hugging Face's.

    Understands `org/name`, `org/name:Q4_K_M`, `org/name/file.gguf`, `hf://` and `hf.co/` forms,
    the addresses of a hub's pages and files, and the commands that repositories tell to run.
    Raises RequestError with the reason.
    """
    if len(text) > _LONGEST:
        raise _refused(text, f"it is longer than {_LONGEST:,} characters")
    wanted = _COMMAND.sub("", text.strip().strip("<>\"'` "))
    first, *rest = wanted.split() or [""]
    scheme = next((each for each in _SCHEMES if first.startswith(each)), "")
    if scheme:
        found = _parse_uri(text, first.removeprefix(scheme))
    elif "://" in first or _host(first) in _HOSTS:
        found = _parse_address(text, first, endpoint)
    else:
        found = _parse_name(text, first)
    if rest and rest[0] == "--hf-file":
        rest = rest[1:]
    if rest and not rest[0].startswith("-") and not found.file:
        found = HubReference(found.repository, found.revision, rest[0], found.quantization)
    return _checked(text, found)


def is_plain_address(text: str, endpoint: str = "") -> bool:
    """Whether `text` is an address of the web that is not one of the hub's."""
    address = text.strip()
    if not address.lower().startswith(("http://", "https://")):
        return False
    try:
        parts, own = urlsplit(address), urlsplit(endpoint)
        host, is_own = (parts.hostname or "").lower(), parts.netloc == own.netloc
    except ValueError:
        return False
    return host not in _HOSTS and not is_own


def _host(text: str) -> str:
    return text.partition("/")[0].lower()


def _parse_address(text: str, address: str, endpoint: str) -> HubReference:
    """Return what the address of a page or a file on a hub refers to."""
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
        host, port = (parts.hostname or "").lower(), parts.port
        own = urlsplit(endpoint)
        is_own = bool(endpoint) and (host, port) == ((own.hostname or "").lower(), own.port)
    except ValueError:
        raise _refused(text, "it is not a valid address") from None
    if parts.scheme not in ("http", "https") or not (is_own or host in _HOSTS):
        raise _refused(text, f"{host or address[:_SHOWN]} is not the Hugging Face Hub")
    base = own.path.rstrip("/") if is_own else ""
    if not f"{parts.path}/".startswith(f"{base}/"):
        raise _refused(text, f"what is outside of {base} on {host} is not the Hugging Face Hub")
    path = parts.path.removeprefix(base)
    segments = [unquote(segment) for segment in path.split("/") if segment]
    if segments and segments[0] == "models":
        segments = segments[1:]
    _require_model(text, segments[0] if segments else "")
    if not segments:
        raise _refused(text, "it names no repository")
    owner_only = len(segments) > 1 and segments[1] in _VIEWS
    name, quantization = _split_tag("/".join(segments[: 1 if owner_only else 2]))
    view = segments[1 if owner_only else 2 :]
    if len(view) < 2 or view[0] not in _VIEWS:
        return HubReference(name.removesuffix(".git"), quantization=quantization)
    revision, file = _split_revision(view[1:])
    return HubReference(name, revision, file, quantization)


def _require_model(text: str, owner: str) -> None:
    """Raise RequestError if what stands in an owner's place says that it is no model."""
    if owner in _OTHER_KINDS:
        raise _refused(text, f"it is {_OTHER_KINDS[owner]}, not a model")


def _split_revision(segments: Sequence[str]) -> tuple[str, str]:
    """Return the revision, of which `refs/pr/1` has three segments, and the path after it."""
    length = 3 if segments[0] == "refs" else 1
    return "/".join(segments[:length]), "/".join(segments[length:])


def _parse_uri(text: str, rest: str) -> HubReference:
    """Return what `hf://[models/]org/name[@revision][/path]` refers to."""
    segments = rest.removeprefix("models/").split("/")
    _require_model(text, segments[0])
    name, _, revision = "/".join(segments[:2]).partition("@")
    path = segments[2:]
    if revision == "refs":
        revision, path = "/".join(["refs", *path[:2]]), path[2:]
    return HubReference(name, unquote(revision), "/".join(path))


def _parse_name(text: str, name: str) -> HubReference:
    """Return what `org/name[:quantization]`, `org/name/file` or a part of an address refers to."""
    if "/" not in name:
        raise _refused(text, "a repository is written OWNER/NAME")
    owner, repository, *path = name.split("/")
    if owner == "models" and path:
        owner, repository, *path = repository, *path
    _require_model(text, owner)
    name, revision, quantization = f"{owner}/{repository}", "", ""
    if not path:
        name, quantization = _split_tag(name)
    elif len(path) > 1 and path[0] in _SHOWN_PATHS:
        segments = "/".join(path[1:]).partition("?")[0].replace("%2F", "/").split("/")
        revision, file = _split_revision(segments)
        return HubReference(name, revision, file)
    name, _, revision = name.partition("@")
    return HubReference(name, revision, "/".join(path), quantization)


def _split_tag(name: str) -> tuple[str, str]:
    repository, _, tag = name.partition(":")
    return repository, "" if tag == "latest" else tag


def _checked(text: str, found: HubReference) -> HubReference:
    """Return `found` if each part of it is valid.  Raises RequestError."""
    name = found.repository
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise _refused(text, f"{name[:_SHOWN]!r} is not the name of a repository (OWNER/NAME)")
    if (found.revision and not _REVISION.fullmatch(found.revision)) or ".." in found.revision:
        raise _refused(text, f"{found.revision[:_SHOWN]!r} is not a revision")
    if found.quantization and not _QUANTIZATION.fullmatch(found.quantization):
        raise _refused(text, f"{found.quantization[:_SHOWN]!r} is not a quantization")
    check_path(found.file)
    return found


def check_path(path: str) -> None:
    """Raise RequestError for a path that does not stay inside its repository."""
    is_odd = "\\" in path or ":" in path or any(ord(char) < 32 for char in path)
    if path.startswith("/") or is_odd or {"..", "."} & set(path.split("/")):
        raise RequestError(
            f"{path[:_SHOWN]!r} is not the path of a file in a repository.", param="file"
        )


def _refused(text: str, reason: str) -> RequestError:
    return RequestError(
        f"{text[:_SHOWN]!r} is not a model on the Hugging Face Hub: {reason}. Paste a name such as "
        "org/name, or the address of its page or of a file in it.",
        param="name",
    )
