"""Shows what was read of a hub as the API does; pure."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Literal

from catalog.hub.choice import Candidate, HubChoice
from catalog.hub.fit import Fit, Room, judge_listed
from catalog.hub.reference import HubReference, is_plain_address, parse_reference
from catalog.hub.repository import HubRepository
from catalog.hub.search import HubModel, HubPage
from core.errors import RequestError
from router.hub_service import (
    FitAnswer,
    HubChoiceAnswer,
    HubEntryAnswer,
    HubModelAnswer,
    HubReferenceAnswer,
    HubRepositoryAnswer,
    HubResult,
    HubResults,
    HubSafetyAnswer,
)


def results_of(page: HubPage, room: Room) -> HubResults:
    """Return the results of a search, each with an estimate of whether it fits."""
    return HubResults(
        models=tuple(
            HubResult(
                **_model(model).model_dump(),
                fit=_fit(judge_listed(model.parameters, model.weights_bytes, model.formats, room)),
            )
            for model in page.models
        ),
        cursor=page.cursor,
    )


def repository_of(
    repository: HubRepository,
    candidates: Sequence[Candidate],
    choice: HubChoice,
    downloaded: Collection[str],
) -> HubRepositoryAnswer:
    """Return a repository; `downloaded` are the names of the entries that are here."""
    best = choice.candidate
    return HubRepositoryAnswer(
        **_model(repository.model).model_dump(),
        commit=repository.commit,
        has_readme=repository.has_readme,
        safety=HubSafetyAnswer(**asdict(repository.safety)),
        entries=tuple(_entry(one, one.model.entry.name in downloaded) for one in candidates),
        choice=HubChoiceAnswer(
            entry=best.model.entry.name if best is not None else "",
            reason=choice.reason,
            convert_to=choice.convert_to,
        ),
    )


def reference_of(text: str, endpoint: str) -> HubReferenceAnswer:
    """Return what a pasted text refers to, for the hub at `endpoint`.  Raises RequestError."""
    if is_plain_address(text, endpoint):
        return _reference("url", HubReference(""), text.strip())
    try:
        return _reference("repository", parse_reference(text, endpoint), "")
    except RequestError as error:
        raise RequestError(error.message, param="text") from error


def _reference(
    kind: Literal["repository", "url"], found: HubReference, url: str
) -> HubReferenceAnswer:
    return HubReferenceAnswer(kind=kind, url=url, **asdict(found))


def _entry(one: Candidate, is_downloaded: bool) -> HubEntryAnswer:
    entry, info = one.model.entry, one.model.info
    return HubEntryAnswer(
        name=entry.name,
        format=one.model.format,
        quantization=entry.quantization or (info.quantization if info else ""),
        size_bytes=entry.size_bytes,
        files=tuple(file.path for file in entry.files),
        pickles=entry.pickles,
        missing=entry.missing,
        context_length=info.context_length if info else 0,
        is_refused=one.model.is_refused,
        problem=one.model.problem,
        is_downloaded=is_downloaded,
        fit=_fit(one.fit),
    )


def _model(model: HubModel) -> HubModelAnswer:
    return HubModelAnswer(
        id=model.id,
        author=model.author,
        task=model.task,
        licence=model.licence,
        gated=model.gated,
        is_private=model.is_private,
        likes=model.likes,
        downloads=model.downloads,
        trending=model.trending,
        parameters=model.parameters,
        formats=model.formats,
        capabilities=tuple(sorted(model.capabilities)),
        base_models=model.base_models,
        created=model.created,
        updated=model.updated,
    )


def _fit(fit: Fit) -> FitAnswer:
    return FitAnswer(
        verdict=fit.verdict,
        reason=fit.reason,
        weights_bytes=fit.weights_bytes,
        kv_bytes=fit.kv_bytes,
        overhead_bytes=fit.overhead_bytes,
        total_bytes=fit.total_bytes,
        free_bytes=max(fit.room.free_bytes, 0),
        budget_bytes=fit.room.budget_bytes,
        context_length=fit.context_tokens,
        largest_context=fit.largest_context,
    )
