"""Calls every replica of a format and merges the answers."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ray.serve.exceptions import DeploymentUnavailableError

from core.settings import Settings
from deployments.messages import ReplicaReport, Residency, UnloadResult
from deployments.serve.handles import Handle, direct

_POLL_S = 0.1
Merge: TypeAlias = Callable[[Sequence[Any]], Any]


def broadcast_handles(formats: Mapping[str, Handle], settings: Settings) -> Mapping[str, Any]:
    """Return handles whose calls reach every replica, except `load_model`, which goes to one.

    With one replica per format these are the given handles.
    """
    if settings.max_replicas == 1:
        return formats
    return {name: _BroadcastHandle(handle) for name, handle in formats.items()}


class _BroadcastHandle:
    """A format's handle that answers for all its replicas as if they were one."""

    def __init__(self, handle: Handle) -> None:
        self._handle = direct(handle)
        self.load_model = self._handle.load_model
        self.unload_model = _Broadcast(self._handle, "unload_model", _first_result)
        self.set_limits = _Broadcast(self._handle, "set_limits", lambda _: None)
        self.residencies = _Broadcast(self._handle, "residencies", _concatenated)
        self.report = _Broadcast(self._handle, "report", _merged_report)


class _Broadcast:
    """One method of all replicas, with the interface of a handle's method."""

    def __init__(self, handle: Handle, method: str, merge: Merge) -> None:
        self._handle = handle
        self._method = method
        self._merge = merge

    def remote(self, *arguments: Any) -> "_BroadcastResponse":
        """Call every running replica."""
        return _BroadcastResponse(self._ask(arguments))

    async def _ask(self, arguments: tuple[Any, ...]) -> Any:
        while True:
            try:
                calls = self._handle.broadcast(self._method, *arguments)
                return self._merge(await calls.results_async())
            except DeploymentUnavailableError:
                # A handle's own call waits for the first replica as well.
                await asyncio.sleep(_POLL_S)


class _BroadcastResponse:
    """What `remote` returns: awaitable and cancellable, like a handle's response."""

    def __init__(self, work: Any) -> None:
        self._task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        """Stop waiting for the answers."""
        self._task.cancel()


def _concatenated(answers: Sequence[list[Residency]]) -> list[Residency]:
    return [residency for answer in answers for residency in answer]


def _merged_report(answers: Sequence[ReplicaReport]) -> ReplicaReport:
    residents = tuple(resident for answer in answers for resident in answer.residents)
    processes = tuple(process for answer in answers for process in answer.processes)
    return ReplicaReport(answers[0].format, answers[0].pid, residents, processes)


def _first_result(answers: Sequence[UnloadResult | None]) -> UnloadResult | None:
    """Return the answer of the replica that held the model; None if none did."""
    return next((answer for answer in answers if answer is not None), None)
