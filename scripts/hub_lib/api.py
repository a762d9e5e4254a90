"""The test hub's routes: search, model information, file listings, files, control."""

import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias
from urllib.parse import unquote, urlencode

from scripts.hub_lib import describe, search
from scripts.hub_lib.answers import Answer, Request, error, json_answer, too_many, web_page
from scripts.hub_lib.faults import Fault, Faults, parse_fault
from scripts.hub_lib.files import CONTENT, RESOLVE, FileAnswers
from scripts.hub_lib.repositories import Commit, Repository
from scripts.hub_lib.search import BadQuery, first

# Faults that are decided before anything else, and those of answers in JSON.
_EARLY = frozenset({"drop", "status", "move"})
_JSON = frozenset({"html", "size", "hash", "stall", "slow", "truncate"})
_NO_REPOSITORY = "Repository not found"
_Route: TypeAlias = "tuple[re.Pattern[str], Callable[..., Answer]]"


@dataclass(slots=True)
class Logged:
    """One request as it came: where to, what for, with which token; and what it was answered."""

    host: str
    method: str
    target: str
    headers: Mapping[str, str]
    status: int = 0


@dataclass(slots=True)
class HubState:
    """Repositories, tokens by user, faults and the log of requests; `lock` guards them."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    requests: list[Logged] = field(default_factory=list)
    page_items: int = search.PAGE_ITEMS
    tree_items: int = 1000
    lock: threading.RLock = field(default_factory=threading.RLock)


class HubApi:
    """Answers requests for the hub's own origin."""

    def __init__(self, state: HubState, cdn_origin: str) -> None:
        self._state = state
        self._files = FileAnswers(cdn_origin)
        name = r"(?P<name>[\w.-]+/[\w.-]+)"
        revision = r"(?P<revision>[^/]+)"
        routes: tuple[tuple[str, Callable[..., Answer]], ...] = (
            (r"/api/models", self._search),
            (r"/api/whoami-v2", self._whoami),
            (rf"/api/models/{name}(?:/revision/{revision})?", self._model),
            (rf"/api/models/{name}/tree/{revision}(?:/(?P<folder>.+))?", self._tree),
            (rf"/api/resolve-cache/models/{name}/{revision}/(?P<file>.+)", self._small_file),
            (rf"/{name}/resolve/{revision}/(?P<file>.+)", self._resolve),
            (r"/_control/(?P<what>faults|requests)", self._control),
        )
        self._routes: list[_Route] = [(re.compile(path), route) for path, route in routes]

    def answer(self, request: Request) -> Answer:
        """Return the answer to one request; never raises for what a client sent."""
        with self._state.lock:
            for pattern, route in self._routes:
                if match := pattern.fullmatch(request.path):
                    try:
                        found = match.groupdict()
                        return route(request, **{k: v and unquote(v) for k, v in found.items()})
                    except BadQuery as problem:
                        return error(400, str(problem))
        return error(404, "Sorry, we can't find the page you are looking for.")

    def _user(self, request: Request) -> str | None:
        """Return the user whose token was sent, empty without one, None for an unknown token."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return ""
        return self._state.users.get(token) if scheme.lower() == "bearer" else None

    def _found(
        self, request: Request, name: str, revision: str, kind: str, faults: Collection[str]
    ) -> "tuple[Repository, Commit, Mapping[str, Fault]] | Answer":
        """Return the repository, its commit and the faults of this answer, or a refusal."""
        early = self._state.faults.take(_EARLY, name, kind)
        if refusal := _early(early):
            return refusal
        user = self._user(request)
        if user is None:
            return error(401, "Invalid credentials in Authorization header")
        repository = self._state.repositories.get(name)
        if repository is None or (repository.is_private and user not in repository.readers):
            if user:
                return error(404, _NO_REPOSITORY, "RepoNotFound")
            return error(401, "Invalid username or password.", "RepoNotFound")
        if repository.is_disabled:
            return error(403, "Access to this resource is disabled.")
        if faults != _JSON and repository.gated and user not in repository.readers:
            return _gated(name, user)
        if "move" in early:
            repository.move()
        commit = repository.commit(revision)
        if commit is None:
            return error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit, self._state.faults.take(faults, name, kind)

    def _search(self, request: Request) -> Answer:
        if refusal := _early(self._state.faults.take(_EARLY, "", "search")):
            return refusal
        if self._user(request) is None:
            return error(401, "Invalid credentials in Authorization header")
        found = search.find(list(self._state.repositories.values()), request.query)
        items, cursor = search.page(found, request.query, self._state.page_items)
        flags = {name: _flag(request, name) for name in ("full", "cardData", "config")}
        body = [
            describe.listed(
                each,
                expand=request.query.get("expand", ()),
                is_full=flags["full"],
                has_card=flags["cardData"],
                has_config=flags["config"],
            )
            for each in items
        ]
        return _json(body, _next(request, cursor), self._state.faults.take(_JSON, "", "search"))

    def _whoami(self, request: Request) -> Answer:
        user = self._user(request)
        if not user:
            return error(401, "Invalid username or password.")
        return json_answer({"type": "user", "name": user, "auth": {"type": "access_token"}})

    def _model(self, request: Request, name: str, revision: str | None) -> Answer:
        found = self._found(request, name, revision or "main", "api", _JSON)
        if isinstance(found, Answer):
            return found
        repository, commit, faults = found
        body = describe.one(
            repository,
            commit,
            expand=request.query.get("expand", ()),
            has_blobs=_flag(request, "blobs"),
            has_security=_flag(request, "securityStatus"),
            lies=faults,
        )
        return _json(body, {}, faults)

    def _tree(self, request: Request, name: str, revision: str, folder: str | None) -> Answer:
        found = self._found(request, name, revision, "tree", _JSON)
        if isinstance(found, Answer):
            return found
        repository, commit, faults = found
        is_expanded = _flag(request, "expand")
        entries = describe.tree(
            repository,
            commit,
            folder or "",
            is_recursive=_flag(request, "recursive"),
            is_expanded=is_expanded,
            lies=faults,
        )
        if entries is None:
            return error(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        size = min(self._state.tree_items, 50) if is_expanded else self._state.tree_items
        items, cursor = search.page(entries, request.query, size)
        return _json(items, _next(request, cursor), faults)

    def _resolve(self, request: Request, name: str, revision: str, file: str) -> Answer:
        found = self._found(request, name, revision, file, RESOLVE)
        if isinstance(found, Answer):
            return found
        return self._files.resolve(*found, file)

    def _small_file(self, request: Request, name: str, revision: str, file: str) -> Answer:
        wanted = CONTENT if request.method == "GET" else frozenset()
        found = self._found(request, name, revision, file, wanted)
        if isinstance(found, Answer):
            return found
        _, commit, faults = found
        if file not in commit.files:
            return error(404, "Entry not found", "EntryNotFound")
        return self._files.content(request, commit.files[file], faults, commit)

    def cdn_answer(self, request: Request) -> Answer:
        """Return the answer of the other origin, which has the large files by their hash.

        As storage behind signed addresses does, it refuses a request that brings a token too.
        """
        match = re.fullmatch(r"/repos/([\w.-]+/[\w.-]+)/([0-9a-f]+)/(.+)", unquote(request.path))
        with self._state.lock:
            repository = self._state.repositories.get(match[1]) if match else None
            if match is None or repository is None:
                return error(404, "NoSuchKey")
            if "authorization" in request.headers:
                return error(400, "Only one auth mechanism allowed")
            if refusal := _early(self._state.faults.take(_EARLY, match[1], match[3])):
                return refusal
            files = (commit.files.get(match[3]) for commit in repository.commits)
            file = next((one for one in files if one and one.sha256 == match[2]), None)
            if file is None:
                return error(404, "NoSuchKey")
            wanted = CONTENT if request.method == "GET" else frozenset()
            faults = self._state.faults.take(wanted, match[1], match[3])
            return self._files.content(request, file, faults, None)

    def _control(self, request: Request, what: str) -> Answer:
        """Read, add or clear faults; read or clear the log of requests."""
        if what == "faults":
            if request.method == "DELETE":
                self._state.faults.clear()
            if request.method == "POST":
                try:
                    self._state.faults.add(parse_fault(request.body.decode()))
                except ValueError as problem:
                    return error(400, str(problem))
            return json_answer([asdict(fault) for fault in self._state.faults.active()])
        if request.method == "DELETE":
            self._state.requests.clear()
        return json_answer([asdict(logged) for logged in self._state.requests])


def _early(faults: Mapping[str, Fault]) -> Answer | None:
    """Return the answer of a fault that comes before everything else."""
    if "drop" in faults:
        return Answer(faults={"drop": faults["drop"]})
    if "status" in faults:
        fault = faults["status"]
        return too_many(int(fault.value), int(fault.seconds))
    return None


def _json(value: Any, headers: Mapping[str, str], faults: Mapping[str, Fault]) -> Answer:
    """Return a JSON answer with its faults: it may be a web page instead."""
    return web_page() if "html" in faults else replace(json_answer(value, headers), faults=faults)


def _gated(name: str, user: str) -> Answer:
    text = f"Access to model {name} is restricted"
    if user:
        return error(
            403,
            f"{text} and you are not in the authorized list. Ask for access.",
            "GatedRepo",
        )
    return error(
        401, f"{text}. You must have access to it and be authenticated to access it.", "GatedRepo"
    )


def _flag(request: Request, name: str) -> bool:
    return first(request.query, name).lower() in ("true", "1")


def _next(request: Request, cursor: str) -> dict[str, str]:
    """Return the Link header of the next page, with the other parameters as they are."""
    if not cursor:
        return {}
    query: dict[str, Any] = {**request.query, "cursor": cursor}
    address = f"{request.origin}{request.path}?{urlencode(query, doseq=True)}"
    return {"Link": f'<{address}>; rel="next"'}
