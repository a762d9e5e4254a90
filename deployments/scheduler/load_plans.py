"""Plans loads: whether a model can be loaded here, with how much memory, and its keep rules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from backends.base import Backend, EngineOptions, MemoryEstimate
from catalog.models import ModelRecord
from catalog.variants import nearest_smaller
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ImpetusError,
    InsufficientMemory,
    ModelFileMissing,
    Unavailable,
)
from core.settings import Settings
from core.units import MIB, format_bytes
from deployments.messages import LoadRequest, MemoryPreview, Residency
from scheduler.preview import LoadPreview, preview
from scheduler.state import HostState, KeepRules, LoadPlan

# The context is not reduced below this; a model has at most this many plans.
_MIN_CONTEXT = 2048
_MAX_PLANS = 4
_INSPECTION_RETRY_S = 10
# Bytes a second of the slowest load that counts as progress: an old hard disk, with conversion.
_SLOWEST_LOAD = 10 * MIB


class LoadPlanner:
    """Estimates models by their metadata; loads nothing."""

    def __init__(
        self, settings: Settings, backends: Mapping[str, Backend], options: EngineOptions
    ) -> None:
        self._settings = settings
        self._backends = backends
        self._options = options

    def check(self, record: ModelRecord) -> None:
        """Raise BrokenModel, ModelFileMissing or Unavailable if it cannot be loaded."""
        if record.state == "refused":
            raise BrokenModel(f"{record.id} was refused: {record.reason}", param="model")
        if record.state == "missing":
            raise ModelFileMissing(
                f"The file of {record.id} is gone: {record.info.files[0]}. Put it back, or choose "
                "another model.",
                param="model",
            )
        if record.state == "uninspected":
            raise Unavailable(
                f"{record.id} cannot be loaded yet: {record.reason}. Its file is inspected again; "
                "try again later.",
                param="model",
                retry_after_s=_INSPECTION_RETRY_S,
            )
        backend = self._backends.get(record.info.format)
        if backend is None:
            raise BackendUnavailable(
                f"The format {record.info.format} is not enabled; see the setting `formats`."
            )
        availability = backend.availability()
        if not availability.is_available:
            raise BackendUnavailable(availability.reason)

    def estimate(self, record: ModelRecord) -> MemoryEstimate:
        """Return the memory of the model with its full context.  Raises InsufficientMemory."""
        return self._estimate(record, self._full(record))

    def plans(self, record: ModelRecord, budget_bytes: int) -> tuple[LoadPlan, ...]:
        """Return the ways to load the model, largest first; one if the user fixed its context.

        Raises InsufficientMemory if not even the smallest fits the budget.
        """
        options = replace(self._full(record), memory_limit_bytes=budget_bytes)
        full = self._estimate(record, options)
        plans = [LoadPlan(full.total_bytes)]
        context = full.context_tokens // 2
        if options.context_tokens is not None:
            return tuple(plans)
        while context >= _MIN_CONTEXT and len(plans) < _MAX_PLANS:
            try:
                less = self._estimate(record, replace(options, context_tokens=context))
            except ImpetusError:
                break
            if less.total_bytes < plans[-1].needed_bytes:
                plans.append(LoadPlan(less.total_bytes, context))
            context //= 2
        return tuple(plans)

    def preview(self, record: ModelRecord, state: HostState, now: float) -> MemoryPreview:
        """Return what the model would take with the settings of `record`; see `MemoryPreview`."""
        held = sum(one.size_bytes for one in state.residents if one.model_id == record.id)
        held += sum(one.plan.needed_bytes for one in state.loading if one.model_id == record.id)
        numbers = MemoryPreview(
            LoadPreview("no"),
            budget_bytes=state.budget_bytes,
            held_bytes=state.used_bytes - held,
            limit_bytes=state.load_limit_bytes,
        )
        options = self._full(record)
        try:
            self.check(record)
            load = preview(state, record.id, self.plans(record, state.budget_bytes), now)
            options = replace(options, memory_limit_bytes=state.budget_bytes)
            if load.plan is not None and load.plan.context_tokens is not None:
                options = replace(options, context_tokens=load.plan.context_tokens)
            estimate = self._estimate(record, options)
        except InsufficientMemory as problem:
            load = LoadPreview("no", reason=problem.message)
            estimate = self._estimate(record, replace(options, memory_limit_bytes=None))
        except ImpetusError as problem:
            return replace(numbers, load=LoadPreview("no", reason=problem.message))
        return replace(
            numbers,
            load=load,
            context_tokens=estimate.context_tokens,
            weights_bytes=estimate.weights_bytes,
            kv_bytes=estimate.kv_bytes,
            overhead_bytes=estimate.transient_bytes + estimate.prefix_bytes,
        )

    def load_request(self, record: ModelRecord, plan: LoadPlan, budget_bytes: int) -> LoadRequest:
        """Return the request to a replica that loads the model as planned."""
        options = replace(self._full(record), memory_limit_bytes=budget_bytes)
        if plan.context_tokens is not None:
            options = replace(options, context_tokens=plan.context_tokens)
        limit_s = self._settings.load_limit_s + record.info.size_bytes / _SLOWEST_LOAD
        return LoadRequest(
            record.id,
            record.settings.described(record.info),
            options,
            self._settings.step_limit_s,
            limit_s + self._backends[record.info.format].compile_s,
            record.signatures,
        )

    def size_bytes(self, record: ModelRecord, residency: Residency) -> int:
        """Return the estimated bytes of a loaded model with the context it was granted."""
        options = replace(self._full(record), context_tokens=residency.context_tokens or None)
        try:
            return self._estimate(record, options).total_bytes
        except ImpetusError:
            return record.info.size_bytes

    def with_smaller(
        self, record: ModelRecord, problem: ImpetusError, others: Sequence[ModelRecord]
    ) -> ImpetusError:
        """Return `problem`, naming the nearest smaller variant that can be loaded, if any."""
        smaller = nearest_smaller(record, others, self._fits)
        if smaller is None:
            return problem
        note = f"Its variant {smaller.id} takes {format_bytes(self.estimate(smaller).total_bytes)}."
        return type(problem)(
            f"{problem.message} {note}", param=problem.param, retry_after_s=problem.retry_after_s
        )

    def _fits(self, record: ModelRecord) -> bool:
        try:
            self.check(record)
            self.estimate(record)
        except ImpetusError:
            return False
        return True

    def keep_rules(self, record: ModelRecord) -> KeepRules:
        """Return the model's keep rules: its own settings, else the server's."""
        keep_alive_s = record.settings.keep_alive_s
        if keep_alive_s is None:
            keep_alive_s = self._settings.keep_alive_s
        return KeepRules(bool(record.settings.pin), keep_alive_s)

    def _full(self, record: ModelRecord) -> EngineOptions:
        return record.engine_options(self._options)

    def _estimate(self, record: ModelRecord, options: EngineOptions) -> MemoryEstimate:
        return self._backends[record.info.format].estimate(record.info, options)
