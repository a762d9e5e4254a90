"""Recovers after a start of the scheduler: the first scan, and what the replicas already hold."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from catalog.models import ModelRecord
from core.supervision import PartView, RestartPolicy, Supervisor
from deployments.messages import NodeMemory, Residency
from deployments.scheduler.formats import FormatClients
from deployments.scheduler.ledger import Ledger
from deployments.scheduler.load_plans import LoadPlanner
from deployments.scheduler.lookup import ModelLookup
from deployments.scheduler.scanning import Scanner

# A process that starts imports its runtime, which takes up to a minute on a slow disk.
_ANSWER_LIMIT_S = 120.0
# From then on the formats that answered are served without the others.
_WAIT_S = 30.0
_PART = "recovery of {}"
# A format that cannot start is no fault of the scheduler's process.
_POLICY = RestartPolicy(is_vital=False)


class Recovery:
    """Asks each format what it holds, repeatedly until it answers.  Belongs to one event loop.

    `is_done` is set once the folders are scanned and the formats have answered; after 30 s those
    that have answered suffice.  `has_asked` is set as soon as all have answered, or with `is_done`:
    before, a load might exceed the budget.
    """

    def __init__(
        self,
        scanner: Scanner,
        lookup: ModelLookup,
        planner: LoadPlanner,
        clients: FormatClients,
        ledger_of: Callable[[NodeMemory], Ledger],
        residency: Callable[[str], Residency | None],
    ) -> None:
        self._scanner = scanner
        self._lookup = lookup
        self._planner = planner
        self._clients = clients
        self._ledger_of = ledger_of
        self._residency = residency
        self._answered: dict[str, bool] = {}
        self._change = asyncio.Event()
        self.is_done = asyncio.Event()
        self.has_asked = asyncio.Event()

    def start(
        self,
        supervisor: Supervisor,
        formats: Sequence[str],
        prepare: Callable[[], Awaitable[None]],
    ) -> "list[asyncio.Task[None]]":
        """Start the recovery; `prepare` runs once after the first scan."""
        self._answered = dict.fromkeys(formats, False)
        return [
            supervisor.run_until_done("start of the scheduler", partial(self._run, prepare)),
            *(
                supervisor.run_until_done(_PART.format(name), partial(self._recover, name), _POLICY)
                for name in formats
            ),
        ]

    def missing(self) -> Sequence[str]:
        """Return the formats that have not answered yet."""
        return [name for name, has_answered in self._answered.items() if not has_answered]

    def problem(self, parts: Sequence[PartView]) -> str:
        """Return which formats have not answered, with the reasons that `parts` have."""
        reasons = {part.name: part.reason for part in parts}
        waited = [
            f"{name} ({reason})" if (reason := reasons.get(_PART.format(name))) else name
            for name in self.missing()
        ]
        return f"Waiting for the processes of {', '.join(waited)}."

    async def _run(self, prepare: Callable[[], Awaitable[None]]) -> None:
        await self._scanner.wait_first()
        await prepare()
        end = time.monotonic() + _WAIT_S
        while missing := self.missing():
            self._change.clear()
            has_some = len(missing) < len(self._answered)
            left_s = end - time.monotonic()
            if has_some and left_s <= 0:
                break
            try:
                await asyncio.wait_for(self._change.wait(), left_s if has_some else None)
            except TimeoutError:
                break
        self.has_asked.set()
        self.is_done.set()

    async def _recover(self, name: str) -> None:
        """Restore the models that a format's replicas hold.  Raises what the calls raise."""
        async with asyncio.timeout(_ANSWER_LIMIT_S):
            held = await self._clients.residencies(name)
        if held:
            usage = await self._clients.report(held)
            ledger = self._ledger_of(usage.node_of(name))
            known = await self._records(held)
            for residency in held:
                found = known.get(residency.model_id)
                if found is not None and self._residency(residency.model_id) is None:
                    ledger.restore(residency, self._planner.size_bytes(found, residency))
        self._answered[name] = True
        if not self.missing():
            self.has_asked.set()
        self._change.set()

    async def _records(self, held: Sequence[Residency]) -> Mapping[str, ModelRecord]:
        """Return the records of the held models; a catalog that lost them gets them by a scan."""
        found = {one.model_id: await self._lookup.find(one.model_id) for one in held}
        if None in found.values():
            await self._scanner.wait_first()
            found = {one: await self._lookup.find(one) for one in found}
        return {one: record for one, record in found.items() if record is not None}
