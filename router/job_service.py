"""Long jobs as the API shows them, and the Protocol that the routes reach them through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from core.types import JsonValue

JobStateName: TypeAlias = Literal[
    "queued", "running", "paused", "waiting", "interrupted", "done", "failed", "cancelled"
]


class Answer(BaseModel):
    """Base of the answers of the management API; every field is sent, also one with a default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_serialization_defaults_required=True
    )


class JobView(Answer):
    """A job, with its place in the queue as its place in the list; times are in Unix seconds.

    `reason` says why it waits, failed or was interrupted, `code` is the error's.  One that waits
    is tried again at `retry_at`, null: when what it waits for is over.  The speed is that of the
    last 30 s, 0 when nothing arrives; `remaining_s` is null while it is unknown.
    """

    id: str
    kind: str
    title: str
    state: JobStateName
    reason: str
    code: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    retry_at: float | None
    done_bytes: int
    total_bytes: int
    bytes_per_s: float = 0.0
    remaining_s: float | None = None
    stalled_s: float = 0.0


class JobFile(Answer):
    """A file of a download; `sha256` is empty where the hub states none."""

    path: str
    size_bytes: int
    sha256: str


class QualityView(Answer):
    """How a converted model differs from its source; null is what was not measured.

    `tokens` of a text were compared: `kl_mean` and `kl_p99` are the divergence of the next-token
    distributions in nats, `same_top_share` how often both find the same token most probable.  Of
    models for embeddings `cosine_mean` and `cosine_least` are compared.  `reason` says why
    something was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: int = 0
    kl_mean: float | None = None
    kl_p99: float | None = None
    same_top_share: float | None = None
    perplexity_source: float | None = None
    perplexity_result: float | None = None
    cosine_mean: float | None = None
    cosine_least: float | None = None
    reason: str = ""


class ConversionView(Answer):
    """What a conversion makes, or made, of the model `source`.

    `group_size` is null for formats without that choice, `quality` where it was not measured yet.
    """

    source: str
    format: str
    quantization: str
    group_size: int | None
    quality: QualityView | None = None

    @classmethod
    def of(
        cls,
        source: str,
        choices: Mapping[str, JsonValue],
        quality: Mapping[str, JsonValue],
    ) -> "ConversionView | None":
        """Return what a record of the catalog says; None without valid choices."""
        known = {name: quality[name] for name in QualityView.model_fields.keys() & quality.keys()}
        try:
            return cls.model_validate(
                {
                    "source": source,
                    "format": choices["target_format"],
                    "quantization": choices["quantization"],
                    "group_size": choices.get("group_size"),
                    "quality": known or None,
                }
            )
        except (KeyError, ValidationError):
            return None


class JobDetail(JobView):
    """A job with what it does; `commit` and `url` are empty where there is none.

    `folder` is that of the model, `model_ids` are what the catalog has of it.  `conversion` is null
    for other jobs.
    """

    repository: str = ""
    commit: str = ""
    url: str = ""
    folder: str = ""
    files: tuple[JobFile, ...] = ()
    model_ids: tuple[str, ...] = ()
    conversion: ConversionView | None = None


class JobList(Answer):
    """All jobs in the order of the queue."""

    jobs: tuple[JobView, ...]


@dataclass(frozen=True, slots=True)
class JobChanges:
    """What changed of the jobs: `jobs` are their new views, `ids` all jobs in order.

    `ids` is None if neither the jobs nor their order changed.  With `is_whole` it is everything.
    """

    version: int
    is_whole: bool
    jobs: tuple[JobView, ...]
    ids: tuple[str, ...] | None


class DownloadLimitsView(Answer):
    """How many downloads run at once, their bytes in a second together (0: no limit), and when.

    `hours` are local, such as 22:30-06:00; empty means the whole day.
    """

    parallel: int
    bytes_per_s: int
    hours: str


class PartialView(Answer):
    """What has arrived of a download that no job goes on with.

    `id` is the model's folder below that of downloads.  Nothing was added since `changed_at`; it is
    removed at `removed_at`, both in Unix seconds.
    """

    id: str
    size_bytes: int
    changed_at: float
    removed_at: float


class PartialList(Answer):
    """The unfinished downloads that no job goes on with, the oldest first."""

    partials: tuple[PartialView, ...]
    size_bytes: int


class Jobs(Protocol):
    """The long jobs.  All raise Unavailable while their process does not answer."""

    async def jobs(self) -> Sequence[JobView]:
        """Return all jobs in the order of the queue."""
        ...

    async def job(self, job_id: str) -> JobDetail:
        """Return a job.  Raises NotFound."""
        ...

    async def pause(self, job_id: str) -> JobDetail:
        """Stop a job and keep what is done.  Raises NotFound, RequestError."""
        ...

    async def resume(self, job_id: str) -> JobDetail:
        """Put a paused or failed job back into the queue.  Raises NotFound, RequestError."""
        ...

    async def cancel(self, job_id: str) -> JobDetail:
        """Stop a job and remove what is done.  Raises NotFound, RequestError."""
        ...

    async def move(self, job_id: str, before: str) -> JobDetail:
        """Put a job before another one, or at the end.  Raises NotFound, RequestError."""
        ...

    async def download(self, model: str, revision: str, entry: str) -> JobDetail:
        """Return the job of a download, a new one or that which downloads the same already.

        `model` is what a user pasted; an empty `revision` means the reference's or main, an empty
        `entry` the best model of what is meant.  Raises RequestError for what cannot be
        downloaded, and the errors `Hub…`.
        """
        ...

    async def partials(self) -> Sequence[PartialView]:
        """Return the unfinished downloads that no job goes on with."""
        ...

    async def remove_partial(self, partial_id: str) -> None:
        """Remove one of them.  Raises NotFound."""
        ...

    async def limits(self) -> DownloadLimitsView:
        """Return the limits of downloads."""
        ...

    async def change_limits(self, changes: Mapping[str, Any]) -> DownloadLimitsView:
        """Set the fields that `changes` names, None meaning the usual value.

        Raises RequestError for hours that are none.
        """
        ...
