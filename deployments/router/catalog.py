"""The router's catalog: resolves names from SQLite and the published model states."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from backends.base import Backend, EngineOptions, ModelInfo
from backends.registry import backends_for
from catalog.compatibility import Traits, compatibility
from catalog.inspections import Inspection, is_arriving
from catalog.models import STOP_STRINGS, SYSTEM_PROMPT, Converted, ModelRecord
from catalog.names import bare_name, nearest_names
from catalog.scan.places import folder_owners
from catalog.store import CatalogStore
from catalog.variants import best_variant
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ImpetusError,
    InsufficientMemory,
    ModelFileMissing,
    ModelNotFound,
    Unavailable,
)
from core.settings import Settings
from deployments.messages import Fault, Residency
from deployments.options import budget_bytes, engine_options
from deployments.router.library import KnownLibrary, LibraryCache
from deployments.router.model_states import ModelStatesWatch
from deployments.serve.handles import Handle, call, direct
from router.job_service import ConversionView
from router.services import (
    FitView,
    LibraryView,
    ModelState,
    ModelView,
    RequestDefaults,
    RuntimeView,
)

logger = logging.getLogger(__name__)

_LOOKED_AT_AGAIN = ("missing", "uninspected")
_SCAN_LIMIT_S = 10.0
_RETRY_S = 10
_RUNTIMES = {"gguf": "llama.cpp", "onnx": "onnxruntime"}


class CatalogView:
    """Implements `router.services.Catalog`; resolves known names without a scheduler call."""

    def __init__(
        self,
        settings: Settings,
        scheduler: Handle,
        model_states: ModelStatesWatch,
        explain: Callable[[str, ImpetusError], Awaitable[ImpetusError]],
    ) -> None:
        """`explain` returns the error for a model that cannot run here, given why it cannot."""
        self._explain = explain
        self._store = CatalogStore(settings.catalog_file)
        self._scheduler = direct(scheduler)
        self._model_states = model_states
        self._backends = backends_for(settings.formats)
        self._budget_bytes = budget_bytes(settings)
        self._options = engine_options(settings, self._budget_bytes)
        self._version = -1
        self._resolved: dict[str, tuple[ModelRecord, ...]] = {}
        # For suggestions; None: not read since the catalog changed.
        self._ids: list[str] | None = None
        # Estimates take a millisecond each; they are valid until the catalog changes.
        self._usable: dict[str, ModelView] = {}
        self._library = LibraryCache(
            self._store,
            lambda record: self._view(record, {}, frozenset()),
            lambda: folder_owners(settings),
        )

    async def resolve(self, name: str) -> ModelView:
        """Return the model that `name` means.

        For an unknown name and a file that is missing or was not inspected, the folders are
        scanned first, at most every 10 s unless files were added.
        """
        chosen = self._chosen(name)
        if chosen is None or chosen[0].state in _LOOKED_AT_AGAIN:
            await self._look_again(name, chosen[0] if chosen else None)
            chosen = self._chosen(name)
        if chosen is None:
            raise await self._unknown(name)
        record, view = chosen
        if record.state == "refused":
            raise BrokenModel(f"{record.id} was refused: {record.reason}", param="model")
        if record.state == "missing":
            raise ModelFileMissing(
                f"The file of {record.id} is gone; put it back or choose another model.",
                param="model",
            )
        if record.state == "uninspected":
            raise _uninspected(record.id, record.reason)
        if view.state == "unavailable":
            converted = self._converted(record)
            if converted is not None:
                return converted
            raise await self._unrunnable(record, view)
        return view

    async def _unrunnable(self, record: ModelRecord, view: ModelView) -> ImpetusError:
        """Return why a model cannot run here, with the conversion that helps, if there is one."""
        try:
            await call(self._scheduler.explain.remote(record.id))
        except (BackendUnavailable, InsufficientMemory) as problem:
            return await self._explain(record.id, problem)
        return BackendUnavailable(f"{record.id} cannot run here: {view.reason}", param="model")

    def _chosen(self, name: str) -> tuple[ModelRecord, ModelView] | None:
        candidates = self._candidates(name)
        return self._choose(candidates) if candidates else None

    async def _look_again(self, name: str, record: ModelRecord | None) -> None:
        """Have the scheduler scan.  Raises Unavailable after 10 s if the model is not known."""
        if record is not None:
            urgent = record.key if record.state == "uninspected" else ""
        else:
            found = await self._uninspected_file(name)
            urgent = found.path if found is not None else ""
        try:
            async with asyncio.timeout(_SCAN_LIMIT_S):
                await call(self._scheduler.rescan.remote(urgent))
        except TimeoutError as problem:
            if self._chosen(name) is None:
                raise Unavailable(
                    f"The model {name[:100]!r} is not in the catalog, and the model folders are "
                    "still being scanned. Try again later.",
                    param="model",
                    retry_after_s=_RETRY_S,
                ) from problem
        except ImpetusError as problem:
            if record is None:
                raise
            logger.info("the model folders are not scanned for %s: %s", record.id, problem)

    async def _unknown(self, name: str) -> ImpetusError:
        """Return the error for a name that the catalog does not know."""
        found = await self._uninspected_file(name)
        if found is not None:
            return _uninspected(Path(found.path).name, found.reason)
        if self._ids is None:
            self._ids = [record.id for record in await asyncio.to_thread(self._store.models)]
        return ModelNotFound.of(name, await asyncio.to_thread(nearest_names, name, self._ids))

    async def _uninspected_file(self, name: str) -> Inspection | None:
        """Return the file that may be the model `name` and was not inspected yet, if any."""
        wanted = name.lower()
        for found in await asyncio.to_thread(self._store.uninspected):
            path = Path(found.path)
            if wanted == path.name.lower() or wanted.partition("@")[0] == bare_name(path.parts, ""):
                return found
        return None

    def _choose(self, candidates: Sequence[ModelRecord]) -> tuple[ModelRecord, ModelView]:
        """Return the variant to use, preferring those that can run here."""
        views = {record.id: self._estimated_view(record) for record in candidates}
        usable = [record for record in candidates if views[record.id].state == "available"]
        model_states = self._model_states.current
        healthy = [record for record in usable if record.id not in model_states.faults]
        record = best_variant(
            healthy or usable or candidates,
            frozenset(self._model_states.residencies),
            self._budget_bytes,
            keeps_cool=model_states.keeps_cool,
        )
        return record, views[record.id]

    def _estimated_view(self, record: ModelRecord) -> ModelView:
        """Return the model's view before a load; only views of usable models are cached."""
        view = self._usable.get(record.id)
        if view is None:
            view = self._view(record, {}, frozenset())
            if view.state == "available":
                self._usable[record.id] = view
        return view

    def _converted(self, record: ModelRecord) -> ModelView | None:
        """Return the model's converted version, if one can run here."""
        results = [
            other
            for other in self._store.models()
            if isinstance(other.source, Converted) and other.source.model_id == record.id
        ]
        if not results:
            return None
        _, view = self._choose(results)
        return view if view.state == "available" else None

    def _candidates(self, name: str) -> tuple[ModelRecord, ...]:
        version = self._store.data_version()
        if version != self._version:
            self._version = version
            self._resolved.clear()
            self._usable.clear()
            self._ids = None
        found = self._resolved.get(name)
        if found is None:
            found = tuple(self._store.resolve(name))
            # Unknown names are not cached: clients can send any number of them.
            if found:
                self._resolved[name] = found
        return found

    async def models(self) -> Sequence[ModelView]:
        """Return all models, with the reason for those that cannot run or are arriving."""
        found = await self.library()
        return [found.changed.get(entry.view.id, entry.view) for entry in found.entries]

    async def library(self) -> LibraryView:
        """Return all models with their settings, for queries."""
        model_states = await self._model_states.refresh()
        library = await asyncio.to_thread(self._library.current)
        resident, loading = self._model_states.residencies, frozenset(model_states.loading)
        changed = {}
        for model_id in {*resident, *loading, *model_states.faults} & library.records.keys():
            view = self._view(library.records[model_id], resident, loading)
            changed[model_id] = _with_fault(view, model_states.faults.get(model_id))
        for entry in library.entries if changed else ():
            kept = entry.view
            if (now := changed.get(kept.id)) is not None:
                changed[kept.id] = replace(now, duplicates=kept.duplicates, source=kept.source)
        return LibraryView(library.entries, changed)

    def stored(self) -> tuple[KnownLibrary, frozenset[str]]:
        """Return all models as they are while none is loaded, and the keys of arriving ones.

        Blocks; the library is the same object until the catalog changes.
        """
        library = self._library.current()
        arriving = frozenset(one.path for one in self._store.uninspected() if is_arriving(one))
        return library, arriving

    def _view(
        self, record: ModelRecord, resident: Mapping[str, Residency], loading: frozenset[str]
    ) -> ModelView:
        info = record.settings.described(record.info)
        state, reason = self._state(record, resident, loading)
        granted, loaded = 0, resident.get(record.id)
        if loaded is not None:
            granted = loaded.context_tokens
        elif state == "available":
            state, reason, granted = self._estimate(record)
        return ModelView(
            id=record.id,
            name=info.name,
            format=info.format,
            architecture=info.architecture,
            quantization=info.quantization,
            parameters=info.parameters,
            size_bytes=info.size_bytes,
            context_length=info.context_length,
            max_model_len=granted,
            capabilities=info.capabilities,
            state=state,
            reason=reason,
            aliases=record.aliases,
            license=info.license,
            created_at=int(record.added_at),
            runtime=(loaded.runtime if loaded is not None else "") or _runtime(record),
            runtime_reason=_runtime_reason(record, loaded),
            runtime_choice=None if info.choice is None else RuntimeView(**asdict(info.choice)),
            converted_from=record.source.model_id if isinstance(record.source, Converted) else "",
            conversion=_conversion(record),
            priority=record.settings.priority or "interactive",
            compatibility=_compatibility(info, granted, reason),
            limitations=loaded.limitations if loaded is not None else (),
            continue_answers=record.settings.continue_answers,
            defaults=_defaults(record),
        )

    def _state(
        self, record: ModelRecord, resident: Mapping[str, Residency], loading: frozenset[str]
    ) -> tuple[ModelState, str]:
        if record.state == "refused":
            return "refused", record.reason
        if record.state == "missing":
            return (
                "missing",
                f"its file {Path(record.key).name} is gone; locate it, or delete the model",
            )
        if record.state == "uninspected":
            return "unavailable", record.reason
        backend = self._backends.get(record.info.format)
        if backend is None:
            return (
                "unavailable",
                f"the format {record.info.format} is switched off; IMPETUS_FORMATS can enable it",
            )
        availability = backend.availability()
        if not availability.is_available:
            return "unavailable", availability.reason
        if record.id in resident:
            return "resident", ""
        return ("loading", "") if record.id in loading else ("available", "")

    def _estimate(self, record: ModelRecord) -> tuple[ModelState, str, int]:
        """Return the state, reason and context tokens that a load would give."""
        backend: Backend = self._backends[record.info.format]
        options: EngineOptions = record.engine_options(self._options)
        try:
            return "available", "", backend.estimate(record.info, options).context_tokens
        except ImpetusError as problem:
            return "unavailable", problem.message, 0

    def problem(self) -> str:
        """Return nothing if the catalog can be read.  Raises ImpetusError if it cannot."""
        self._store.data_version()
        return ""

    def close(self) -> None:
        """Close the database."""
        self._store.close()


def _uninspected(name: str, reason: str) -> Unavailable:
    return Unavailable(
        f"{name} cannot be used yet: {reason}. Its file is inspected again; try again later.",
        param="model",
        retry_after_s=_RETRY_S,
    )


def _with_fault(view: ModelView, fault: Fault | None) -> ModelView:
    """Return the view with the model's fault, if it is otherwise available."""
    if fault is None or view.state != "available":
        return view
    state: ModelState = "quarantined" if fault.is_quarantined else "failed"
    return replace(view, state=state, reason=fault.reason)


def _compatibility(info: ModelInfo, context_tokens: int, reason: str) -> dict[str, FitView]:
    """Return how well each client can use the model; `reason` says why it cannot run, if so."""
    traits = Traits(info.capabilities, context_tokens, info.parameters, reason)
    return {
        client: FitView(fit.level, fit.reasons) for client, fit in compatibility(traits).items()
    }


def _defaults(record: ModelRecord) -> RequestDefaults | None:
    """Return what the settings, or the model itself, fill into requests; None if nothing."""
    settings = record.settings
    prompt = settings.system_prompt or str(record.info.details.get(SYSTEM_PROMPT, ""))
    stop = tuple(json.loads(str(record.info.details.get(STOP_STRINGS, "[]"))))
    if not (settings.sampling or prompt or settings.template_kwargs or stop):
        return None
    return RequestDefaults(settings.sampling or {}, prompt, settings.template_kwargs or {}, stop)


def _conversion(record: ModelRecord) -> ConversionView | None:
    """Return what the model was converted from and how; None where that is not known."""
    match record.source:
        case Converted(model_id=model_id, choices=choices, quality=quality):
            return ConversionView.of(model_id, choices, quality)
        case _:
            return None


def _runtime(record: ModelRecord) -> str:
    """Return the library that runs the model: the user's choice, else the scan's."""
    info = record.info
    if info.choice is not None:
        return info.choice.resolve(record.settings.runtime)
    return str(info.details.get("runtime") or _RUNTIMES.get(info.format, info.format))


def _runtime_reason(record: ModelRecord, loaded: Residency | None) -> str:
    """Return why the runtime was chosen, or why a loaded model has another one."""
    if loaded is not None and loaded.limitations and loaded.runtime not in ("", _runtime(record)):
        return loaded.limitations[0]
    choice = record.info.choice
    if choice is None:
        return ""
    if choice.resolve(record.settings.runtime) != choice.runtime:
        return f"the model's setting runtime asks for it; the scan chose {choice.runtime}"
    return choice.reason
