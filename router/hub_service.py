"""What the API shows of a model hub, and the Protocol that the routes reach it through."""

from datetime import datetime
from typing import Literal, Protocol, TypeAlias

from core.types import Capability
from router.job_service import Answer

Verdict: TypeAlias = Literal["fits", "tight", "too_big", "unknown"]
HubSort: TypeAlias = Literal["trending", "downloads", "likes", "updated", "created", "size"]


class FitAnswer(Answer):
    """Whether a model fits this machine, and why; bytes are 0 where they are unknown.

    `context_length` is the context that was asked about, at most the model's own;
    `largest_context` the longest that fits alone, 0 if none does.
    """

    verdict: Verdict
    reason: str
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    total_bytes: int
    free_bytes: int
    budget_bytes: int
    context_length: int
    largest_context: int


class HubModelAnswer(Answer):
    """A repository; 0, empty and null where the hub says nothing.

    `gated` tells how access is granted: empty, auto or manual.
    """

    id: str
    author: str
    task: str
    licence: str
    gated: Literal["", "auto", "manual"]
    is_private: bool
    likes: int
    downloads: int
    trending: int
    parameters: int
    formats: tuple[str, ...]
    capabilities: tuple[Capability, ...]
    base_models: tuple[str, ...]
    created: datetime | None
    updated: datetime | None


class HubResult(HubModelAnswer):
    """A repository in the results of a search; its fit is an estimate."""

    fit: FitAnswer


class HubResults(Answer):
    """Results of a search; `cursor` continues it, empty at its end."""

    models: tuple[HubResult, ...]
    cursor: str


class HubEntryAnswer(Answer):
    """One model of a repository; `problem` says why it is refused or could not be inspected.

    `name` is what a download names as its `entry`.  `files` are paths; `pickles` those of them
    that could run code, `missing` is the number of shards that are not there.
    """

    name: str
    format: str
    quantization: str
    size_bytes: int
    files: tuple[str, ...]
    pickles: tuple[str, ...]
    missing: int
    context_length: int
    is_refused: bool
    problem: str
    is_downloaded: bool
    fit: FitAnswer


class HubChoiceAnswer(Answer):
    """Which entry is best here, empty if none is, and why; `convert_to` is a format or empty."""

    entry: str
    reason: str
    convert_to: str


class HubSafetyAnswer(Answer):
    """What of a repository could run code; `findings` are paths with the scanners' levels."""

    pickles: tuple[str, ...]
    remote_code: tuple[str, ...]
    findings: tuple[tuple[str, str], ...]
    is_scanned: bool


class HubRepositoryAnswer(HubModelAnswer):
    """A repository at one commit, with its models."""

    commit: str
    has_readme: bool
    safety: HubSafetyAnswer
    entries: tuple[HubEntryAnswer, ...]
    choice: HubChoiceAnswer


class HubReadme(Answer):
    """A README as Markdown without HTML, images and scripts; empty without one."""

    markdown: str


class HubReferenceAnswer(Answer):
    """What a pasted text refers to; empty strings where it says nothing.

    A repository of the hub has a `repository`, and perhaps a revision, a `file` or folder in it,
    and a `quantization` such as Q4_K_M; an address elsewhere is a `url`.
    """

    kind: Literal["repository", "url"]
    repository: str
    revision: str
    file: str
    quantization: str
    url: str


class HubTokenAnswer(Answer):
    """Which token for the hub is in use, never the token itself.

    `source` is the environment (HF_TOKEN), the one that was stored here, the login of
    `hf auth login`, or empty without any; `owner` is the user's name, where the hub was asked.
    """

    source: Literal["environment", "stored", "login", ""]
    owner: str = ""


class HubSearch(Answer):
    """A search; empty strings and null mean no filter."""

    text: str = ""
    author: str = ""
    format: str = ""
    capability: Capability | None = None
    licence: str = ""
    gated: bool | None = None
    min_parameters: int | None = None
    max_parameters: int | None = None
    updated_after: datetime | None = None
    sort: HubSort = "trending"
    limit: int = 20
    cursor: str = ""


class Hub(Protocol):
    """A model hub.  All raise the errors `Hub…`, and Unavailable without an answer."""

    async def search(self, search: HubSearch) -> HubResults:
        """Return the next results."""
        ...

    async def repository(
        self, name: str, revision: str, context_tokens: int
    ) -> HubRepositoryAnswer:
        """Return the repository `name` and whether its models fit at a context.

        Raises RequestError for what is not a name or a revision.
        """
        ...

    async def readme(self, name: str, revision: str) -> HubReadme:
        """Return the README of a repository.  Raises RequestError as `repository` does."""
        ...

    async def resolve(self, text: str) -> HubReferenceAnswer:
        """Return what a pasted text refers to; asks nobody.

        Raises RequestError with the reason for what is neither a repository nor an address.
        """
        ...

    async def token(self) -> HubTokenAnswer:
        """Return which token is in use; asks nobody."""
        ...

    async def store_token(self, token: str) -> HubTokenAnswer:
        """Store a token once the hub has said whose it is.

        Raises RequestError for what is not a token, HubTokenRejected for an unknown one.
        """
        ...

    async def remove_token(self) -> HubTokenAnswer:
        """Forget the stored token; return which one is in use then."""
        ...
