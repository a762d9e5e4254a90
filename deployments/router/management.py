"""Management operations: settings in the catalog, loads and unloads through the scheduler."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from backends.abilities import check_deterministic, check_kv_type, check_runtime
from backends.prompt.settings_check import check_template, check_variables
from backends.registry import backends_for
from backends.tool_calls.families import check_family
from catalog.models import ModelRecord, ModelSettings
from catalog.store import CatalogStore
from core.errors import ImpetusError, ModelNotFound, Unavailable
from core.settings import Settings
from deployments.decisions import DecisionLog
from deployments.messages import BinEntry, Decision, LoadContext
from deployments.serve.handles import Handle, call, direct
from router.services import Binned, DecisionView, MemoryPreviewView, SettingsView

logger = logging.getLogger(__name__)

_NOTICE_TIMEOUT_S = 5.0


class SchedulerManagement:
    """Implements `router.services.Management`."""

    def __init__(
        self,
        settings: Settings,
        scheduler: Handle,
        log: DecisionLog,
        on_alias: Callable[[], None] = lambda: None,
    ) -> None:
        """`log` contains the decisions of this process; `on_alias` is called when one changed."""
        self._log = log
        self._on_alias = on_alias
        self._store = CatalogStore(settings.catalog_file)
        self._backends = backends_for(settings.formats)
        self._scheduler = direct(scheduler)

    async def settings_of(self, model_ids: Sequence[str]) -> Mapping[str, SettingsView]:
        """Return the settings of those models that are in the catalog."""
        wanted = frozenset(model_ids)
        records = await asyncio.to_thread(self._store.models)
        return {
            record.id: settings_view(record.settings) for record in records if record.id in wanted
        }

    async def change_settings(self, model_id: str, changes: Mapping[str, Any]) -> SettingsView:
        """Store the settings, then notify the scheduler, which applies them to resident models.

        They stay stored if the scheduler does not answer: it reads them when it starts.  Raises
        RequestError for an unknown tool parser or a bad template, UnsupportedParameter for a KV
        cache type, a runtime or determinism that the model cannot have.
        """
        await self.check_settings(model_id, changes)
        settings = await asyncio.to_thread(self._store.change_settings, model_id, changes)
        try:
            async with asyncio.timeout(_NOTICE_TIMEOUT_S):
                await call(self._scheduler.settings_changed.remote(model_id))
        except (ImpetusError, TimeoutError) as problem:
            logger.warning("cannot notify the scheduler of settings of %s: %r", model_id, problem)
        return settings_view(settings)

    async def check_settings(self, model_id: str, changes: Mapping[str, Any]) -> SettingsView:
        """Return the settings as they would be with `changes`; raises as `change_settings` does.

        A chat template is tried on a short conversation, in a process of its own.
        """
        check_family(changes.get("tool_parser"))
        record = await self._record(model_id)
        if (kv_type := changes.get("kv_type")) is not None:
            check_kv_type(self._backends.get(record.info.format), record.info, kv_type)
        if (runtime := changes.get("runtime")) is not None:
            check_runtime(record.info, runtime)
        if changes.get("deterministic"):
            check_deterministic(record.info)
        check_variables(changes.get("template_kwargs") or {}, "template_kwargs")
        if (template := changes.get("chat_template")) is not None:
            await asyncio.to_thread(check_template, template, "chat_template")
        return settings_view(replace(record.settings, **changes))

    async def preview_memory(
        self, model_id: str, changes: Mapping[str, Any]
    ) -> MemoryPreviewView | None:
        """Ask the scheduler; None if it does not answer within 5 s."""
        try:
            async with asyncio.timeout(_NOTICE_TIMEOUT_S):
                found = await call(self._scheduler.preview_load.remote(model_id, changes))
        except (ImpetusError, TimeoutError) as problem:
            logger.warning("the scheduler does not tell the memory of %s: %r", model_id, problem)
            return None
        load = found.load
        return MemoryPreviewView(
            fit=load.fit,
            reason=load.reason,
            evicted=load.evicted,
            context_tokens=found.context_tokens,
            weights_bytes=found.weights_bytes,
            kv_bytes=found.kv_bytes,
            overhead_bytes=found.overhead_bytes,
            budget_bytes=found.budget_bytes,
            held_bytes=found.held_bytes,
            limit_bytes=found.limit_bytes,
        )

    async def aliases(self) -> Mapping[str, str]:
        """Return every alias with its model's id."""
        return await asyncio.to_thread(self._store.aliases)

    async def set_alias(self, alias: str, model_id: str) -> None:
        """Store the alias; the next request with it goes to the model."""
        await asyncio.to_thread(self._store.set_alias, alias, model_id)
        self._on_alias()

    async def remove_alias(self, alias: str) -> None:
        """Delete an alias."""
        await asyncio.to_thread(self._store.remove_alias, alias)
        self._on_alias()

    async def _record(self, model_id: str) -> ModelRecord:
        record = await asyncio.to_thread(self._store.get, model_id)
        if record is None:
            raise ModelNotFound.of(model_id, [])
        return record

    async def load(self, model_id: str) -> None:
        """Return once the scheduler has the model in memory."""
        await call(self._scheduler.ensure_loaded.remote(model_id, LoadContext(is_retry=True)))

    async def unload(self, model_id: str) -> None:
        """Return once the scheduler has the model out of memory."""
        await call(self._scheduler.unload.remote(model_id))

    async def delete_model(self, model_id: str) -> Binned:
        """Have the scheduler move a model's files into the bin."""
        return _binned(await call(self._scheduler.delete_model.remote(model_id)))

    async def locate_model(self, model_id: str, path: str) -> None:
        """Have the scheduler give a missing model its files at another place."""
        await call(self._scheduler.locate_model.remote(model_id, path))

    async def binned(self) -> Sequence[Binned]:
        """Return what is in the bin, oldest first."""
        return [_binned(one) for one in await call(self._scheduler.binned.remote())]

    async def restore_model(self, entry_id: str) -> Binned:
        """Have the scheduler move a model back from the bin."""
        return _binned(await call(self._scheduler.restore_model.remote(entry_id)))

    async def purge_model(self, entry_id: str) -> Binned:
        """Have the scheduler delete a model in the bin for good."""
        return _binned(await call(self._scheduler.purge_model.remote(entry_id)))

    async def decisions(self) -> Sequence[DecisionView]:
        """Return the last decisions of the scheduler and of this process.

        Raises Unavailable if the scheduler does not answer within 5 s.
        """
        try:
            async with asyncio.timeout(_NOTICE_TIMEOUT_S):
                theirs: list[Decision] = await call(self._scheduler.decisions.remote())
        except (ImpetusError, TimeoutError) as problem:
            raise Unavailable(
                "The scheduler does not answer; try again.", retry_after_s=5
            ) from problem
        return [
            DecisionView(one.at, one.event, one.action, one.reason)
            for one in (*theirs, *self._log.last())
        ]

    def close(self) -> None:
        """Close the database."""
        self._store.close()


def _binned(entry: BinEntry) -> Binned:
    return Binned(
        entry.id,
        entry.model_id,
        entry.paths,
        entry.size_bytes,
        entry.deleted_at,
        entry.purge_at,
    )


def settings_view(settings: ModelSettings) -> SettingsView:
    """Return settings as the API shows them."""
    return SettingsView(**asdict(settings))
