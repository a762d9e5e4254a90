"""Looks up models for a load: their records, the ways to load them, why they cannot run."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from catalog.models import ModelRecord
from catalog.store import CatalogStore
from core.errors import InsufficientMemory, ModelNotFound
from deployments.scheduler.load_plans import LoadPlanner
from scheduler.state import LoadPlan


class ModelLookup:
    """Catalog records and their load plans.  SQLite is read on a thread; opens nothing."""

    def __init__(
        self,
        store: CatalogStore,
        planner: LoadPlanner,
        inspect_again: Callable[[str], Awaitable[None]],
    ) -> None:
        """`inspect_again` inspects the file at a path whose inspection failed the last time."""
        self._inspect_again = inspect_again
        self._store = store
        self._planner = planner

    async def records(self) -> Sequence[ModelRecord]:
        """Return all models of the catalog."""
        return await asyncio.to_thread(self._store.models)

    async def find(self, model_id: str) -> ModelRecord | None:
        """Return the model's record; None where the catalog does not have it."""
        return await asyncio.to_thread(self._store.get, model_id)

    async def loadable(self, model_id: str) -> ModelRecord:
        """Return the record of a model that can be loaded.

        Inspects its file first if that failed the last time.  Raises ModelNotFound, BrokenModel,
        ModelFileMissing and Unavailable.
        """
        record = await self.find(model_id)
        if record is not None and record.state == "uninspected":
            await self._inspect_again(record.key)
            record = await self.find(model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        self._planner.check(record)
        return record

    async def plans(self, record: ModelRecord, budget_bytes: int) -> tuple[LoadPlan, ...]:
        """Return the ways to load the model.  Raises InsufficientMemory, naming a smaller one."""
        try:
            return self._planner.plans(record, budget_bytes)
        except InsufficientMemory as problem:
            raise self._planner.with_smaller(record, problem, await self.records()) from problem

    async def explain(self, model_id: str) -> None:
        """Raise why a model cannot run here, naming a smaller variant; return where it can."""
        record = await self.find(model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        self._planner.check(record)
        try:
            self._planner.estimate(record)
        except InsufficientMemory as problem:
            raise self._planner.with_smaller(record, problem, await self.records()) from problem
