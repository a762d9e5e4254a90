"""Publishes changes of models: what the catalog has of them, and what the scheduler does."""

import asyncio
import time
from collections.abc import Mapping

from core.errors import ImpetusError
from core.supervision import call_in_thread
from deployments.messages import Residency
from deployments.router.catalog import CatalogView
from deployments.router.events.changes import change_of, with_states
from deployments.router.model_states import ModelStatesWatch
from router.events.hub import Publish
from router.events.messages import ModelEvent, ModelStateName, ModelSummary, ResetEvent
from router.services import LibraryEntry, ModelView

_LONGEST_REASON = 1000


class ModelEvents:
    """The models by id; belongs to one event loop.

    Changes of the scheduler's states are published at once, those of the catalog after it was read
    on a thread.  Each answer of the scheduler's long poll, the last after 10 s, is also a look at
    the catalog's version, which other programs may change.
    """

    def __init__(self, catalog: CatalogView, states: ModelStatesWatch) -> None:
        self._catalog = catalog
        self._states = states
        states.on_change = self._on_change
        self._publish: Publish | None = None
        self._version: int | None = None
        self._entries: Mapping[str, LibraryEntry] = {}
        # As the catalog has them, and with the scheduler's states.
        self._stored: dict[str, ModelSummary] = {}
        self._shown: dict[str, ModelSummary] = {}
        self._residencies: Mapping[str, Residency] = {}
        # The ids of which the scheduler's states say something.
        self._active: frozenset[str] = frozenset()
        self._problem = ""
        # Whether a client was told that the models are missing.
        self._was_missing = False
        self._look = asyncio.Event()
        self._reading = asyncio.Lock()

    @property
    def is_known(self) -> bool:
        """Whether the catalog was read since the start."""
        return self._version is not None

    def known(self) -> list[ModelSummary]:
        """Return all models in the catalog's order."""
        return [self._shown[model_id] for model_id in self._stored if model_id in self._shown]

    def problem(self) -> str:
        """Return why the models may be outdated; empty if they are not."""
        if self._version is None:
            self._was_missing = True
            return self._problem or "The catalog was not read yet."
        return self._problem or self._states.problem()

    def start(self, publish: Publish) -> None:
        """Begin to publish changes."""
        self._publish = publish
        self._look.set()

    def stop(self) -> None:
        """Publish nothing any more and forget the models."""
        self._publish = None
        self._version, self._problem, self._was_missing = None, "", False
        self._entries, self._stored, self._shown = {}, {}, {}
        self._residencies, self._active = {}, frozenset()

    def look(self) -> None:
        """Have the catalog looked at, because this process changed it."""
        self._look.set()

    async def run(self) -> None:
        """Read the catalog after changes, until cancelled."""
        while True:
            await self._look.wait()
            self._look.clear()
            if self._publish is not None:
                await self._try_to_read()

    async def refresh(self) -> None:
        """Ask the scheduler and read the catalog now."""
        await self._states.refresh()
        await self._try_to_read()

    async def _try_to_read(self) -> None:
        """Read the catalog; one that cannot be read is looked at again after the next answer."""
        try:
            await self._read_catalog()
        except ImpetusError as problem:
            self._problem = problem.message
        else:
            self._problem = ""

    async def _read_catalog(self) -> None:
        async with self._reading:
            publish = self._publish
            library, arriving = await call_in_thread("impetus-catalog", self._catalog.stored)
            if library.version == self._version:
                return
            if publish is None or publish is not self._publish:
                # Stopped, or started anew, meanwhile.
                return
            # An entry that did not change is the same object.
            entries = {entry.view.id: entry for entry in library.entries}
            changed = {one for one in entries if entries[one] is not self._entries.get(one)}
            self._entries = entries
            stored = {
                model_id: _summary(
                    entry.view, is_arriving=library.records[model_id].key in arriving
                )
                for model_id, entry in entries.items()
            }
            arrived = {one for one in stored if stored[one] != self._stored.get(one)}
            gone = self._stored.keys() - stored.keys()
            is_first, self._version = self._version is None, library.version
            self._stored = stored
            self._update(changed | arrived | gone, changed, is_silent=is_first)
            if is_first and self._was_missing:
                publish(ResetEvent(at=time.time(), reason="source_restarted"))

    def _on_change(self) -> None:
        if self._publish is None:
            return
        self._look.set()
        if self.is_known:
            self._update(set(), set())

    def _update(self, ids: set[str], edited: set[str], *, is_silent: bool = False) -> None:
        """Show models anew: `ids`, and all that the scheduler's states name or named.

        Of those `edited` the catalog has another record, also where it is shown the same.
        """
        states, residencies = self._states.current, self._states.residencies
        active = frozenset((*residencies, *states.loading, *states.unloading, *states.faults))
        changed = [
            (model_id, self._next(model_id), self._is_other_load(model_id))
            for model_id in sorted(ids | active | self._active)
        ]
        self._active, self._residencies = active, dict(residencies)
        for model_id, new, is_other_load in changed:
            old = self._shown.pop(model_id, None)
            if new is not None:
                self._shown[model_id] = new
            change = change_of(old, new, is_other_load=is_other_load)
            if change is None and model_id in edited:
                change = "changed"
            model = new or old
            if change is not None and model is not None and not is_silent and self._publish:
                self._publish(ModelEvent(at=time.time(), change=change, model=model))

    def _next(self, model_id: str) -> ModelSummary | None:
        stored = self._stored.get(model_id)
        if stored is None:
            return None
        return with_states(stored, self._states.current, self._states.residencies)

    def _is_other_load(self, model_id: str) -> bool:
        old, new = self._residencies.get(model_id), self._states.residencies.get(model_id)
        return old is not None and new is not None and not old.is_same_load(new)


def _summary(view: ModelView, *, is_arriving: bool) -> ModelSummary:
    state: ModelStateName = "arriving" if is_arriving else view.state
    return ModelSummary(
        id=view.id,
        name=view.name,
        format=view.format,
        size_bytes=view.size_bytes,
        state=state,
        reason=view.reason[:_LONGEST_REASON],
        context_tokens=view.max_model_len,
        aliases=view.aliases,
    )
