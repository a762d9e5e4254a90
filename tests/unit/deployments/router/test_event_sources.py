"""What the router publishes: changes of models, jobs and the machine, over deaths of processes."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from core.errors import Unavailable
from core.supervision import Supervisor
from deployments.decisions import DecisionLog
from deployments.messages import Decision, Fault, MachineState, MemoryUse, ModelStates, Residency
from deployments.router.events.sources import RouterEventSources
from deployments.router.library import KnownLibrary
from deployments.router.model_states import ModelStatesWatch
from deployments.serve.handles import ReplicaDied
from router.events.hub import EventHub, EventReader
from router.events.messages import ServerState
from router.job_service import JobChanges
from router.services import LibraryEntry, ModelView, SettingsView
from tests.fakes import make_view
from tests.unit.deployments.handles import FakeHandle
from tests.unit.router.events.sources import job_view, parsed
from tests.waiting import wait_until

M = Residency("m", "gguf", "a", "node", 2048, 0.1)
GB = 10**9


class Published:
    """One process: answers long polls with its state, or is down."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.problem: Exception | None = None
        self.changed = asyncio.Event()
        self.calls = 0

    def set(self, **changes: Any) -> None:
        self.state = replace(self.state, version=self.state.version + 1, **changes)
        self.changed.set()

    def die(self, problem: Exception) -> None:
        self.problem = problem
        self.changed.set()

    async def wait(self, version: int, limit_s: float = 30.0) -> Any:
        self.calls += 1
        if self.problem is None and version == self.state.version and limit_s:
            self.changed.clear()
            await self.changed.wait()
        if self.problem is not None:
            raise self.problem
        return self.state


class Catalog:
    """Models as the catalog has them; counts how often they are read."""

    def __init__(self, *ids: str) -> None:
        self.number = 1
        self.views: dict[str, ModelView] = {one: make_view(one) for one in ids}
        self.arriving: set[str] = set()
        self.problem: Exception | None = None
        self.reads = 0
        self.entries: dict[str, LibraryEntry] = {}
        self.library = KnownLibrary(-1, {}, ())

    def set(self, model_id: str, **changes: Any) -> None:
        self.views[model_id] = make_view(model_id, **changes)
        self.number += 1

    def stored(self) -> tuple[KnownLibrary, frozenset[str]]:
        if self.problem is not None:
            raise self.problem
        if self.library.version != self.number:
            self.reads += 1
            for model_id, view in self.views.items():
                if model_id not in self.entries or self.entries[model_id].view is not view:
                    self.entries[model_id] = LibraryEntry(view, SettingsView())
            records: Any = {one: type("Record", (), {"key": one}) for one in self.views}
            entries = [self.entries[one] for one in self.views]
            self.library = KnownLibrary(self.number, records, entries)
        return self.library, frozenset(self.arriving)


class Server:
    """A router's sources over stand-ins of the other processes."""

    def __init__(self) -> None:
        self.models = Published(ModelStates(version=1))
        self.machine = Published(MachineState(version=1, budget_bytes=8 * GB, limit_bytes=8 * GB))
        self.jobs = Published(JobChanges(1, True, (job_view("j"),), ("j",)))
        self.catalog = Catalog("m", "n")
        scheduler: Any = FakeHandle(model_states=self.models.wait, machine_state=self._machine)
        jobs: Any = FakeHandle(job_changes=self.jobs.wait)
        catalog: Any = self.catalog
        self.watch = ModelStatesWatch(scheduler)
        self.log = DecisionLog()
        self.sources = RouterEventSources(scheduler, jobs, catalog, self.watch, self.log)
        self.hub = EventHub(self.sources)
        self.supervisor = Supervisor()

    async def _machine(self, version: int, known_decision: int, limit_s: float) -> MachineState:
        state: MachineState = await self.machine.wait(version, limit_s)
        count = state.decision_number - known_decision
        return replace(state, decisions=state.decisions[-count:] if count else ())


class Client:
    """Reads the state and what happened since."""

    def __init__(self, server: Server, reader: EventReader, state: ServerState) -> None:
        self.state = state
        self.server = server
        self.seen: list[Any] = []
        self._reader = reader

    async def until(self, *types: str) -> list[Any]:
        """Return the events since the last call once these types are among them, in this order."""
        found: list[Any] = []

        def has_come() -> bool:
            while text := self._reader.take():
                found.extend(data for _, _, data in parsed(text))
            return [one["type"] for one in found if one["type"] in types] == list(types)

        await wait_until(has_come, f"{types} come", 10)
        self.seen += found
        return [one for one in found if one["type"] in types]


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr("deployments.router.model_states._FIRST_BACK_OFF_S", 0.0)
    monkeypatch.setattr("deployments.router.events.polling._FIRST_BACK_OFF_S", 0.01)
    server = Server()
    server.watch.start(server.supervisor)
    server.sources.run(server.supervisor)
    yield server
    server.hub.close()
    await server.supervisor.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    state = await server.hub.state()
    with server.hub.reader(state.event_id) as reader:
        yield Client(server, reader, state)


async def test_nothing_is_asked_while_nobody_reads(server: Server) -> None:
    await asyncio.sleep(0.05)
    server.models.set(loading=("m",))
    server.log.record("test", "act", "nobody reads this")
    await asyncio.sleep(0.05)
    assert (server.machine.calls, server.jobs.calls, server.catalog.reads) == (0, 0, 0)
    assert server.models.calls


async def test_state_has_all_parts(client: Client) -> None:
    state = client.state
    assert [(one.id, one.state) for one in state.models] == [("m", "available"), ("n", "available")]
    assert [one.id for one in state.jobs] == ["j"]
    assert state.memory is not None
    assert (state.memory.budget_bytes, state.memory.free_bytes) == (8 * GB, 8 * GB)
    assert state.thermal is not None
    assert state.thermal.state == "unknown"
    assert state.missing == {}


async def test_a_model_is_told_at_each_step_of_its_life(client: Client) -> None:
    models = client.server.models
    steps: list[dict[str, Any]] = [
        {"loading": ("m",)},
        {"loading": (), "residencies": (M,)},
        {"residencies": (replace(M, load_s=0.2),)},
        {"residencies": (), "unloading": ("m",)},
        {"unloading": ()},
        {"loading": ("m",)},
        {"loading": (), "faults": {"m": Fault(False, "it failed")}},
        {"faults": {"m": Fault(True, "it failed often")}},
        {"faults": {}},
    ]
    told = []
    for step in steps:
        models.set(**step)
        told += await client.until("model.state")
    assert [one["change"] for one in told] == [
        *("loading", "loaded", "loaded", "unloading", "unloaded"),
        *("loading", "failed", "quarantined", "changed"),
    ]
    assert {one["model"]["id"] for one in told} == {"m"}
    assert told[1]["model"]["context_tokens"] == 2048
    assert told[6]["model"]["reason"] == "it failed"
    state = await client.server.hub.state()
    assert state.models == client.state.models


async def test_the_catalog_is_told_and_read_only_when_it_changed(client: Client) -> None:
    catalog, server = client.server.catalog, client.server
    catalog.set("new", state="unavailable")
    catalog.arriving.add("new")
    server.models.set(catalog_version=1)
    (event,) = await client.until("model.state")
    assert (event["change"], event["model"]["state"]) == ("arriving", "arriving")
    catalog.arriving.clear()
    catalog.set("new", state="refused", reason="a pickle")
    del catalog.views["n"]
    server.models.set(catalog_version=2)
    events = await client.until("model.state", "model.state")
    assert {(one["model"]["id"], one["change"]) for one in events} == {
        ("n", "removed"),
        ("new", "changed"),
    }
    # A setting that is not shown, changed by this process.
    catalog.set("m")
    server.sources.models.look()
    (event,) = await client.until("model.state")
    assert (event["model"]["id"], event["change"]) == ("m", "changed")
    reads = catalog.reads
    server.models.set(keeps_cool=True)
    await asyncio.sleep(0.2)
    assert catalog.reads == reads


async def test_memory_strain_and_decisions_are_told(client: Client) -> None:
    machine = client.server.machine
    first = Decision(5.0, "wanted", "load m", "a request")
    machine.set(
        used_bytes=2 * GB,
        limit_bytes=5 * GB,
        uses=(MemoryUse("m", "loading", 2 * GB),),
        decisions=(first,),
        decision_number=1,
    )
    decided, memory = await client.until("decision", "memory")
    assert (decided["at"], decided["action"]) == (5.0, "load m")
    assert memory["memory"]["free_bytes"] == 3 * GB
    assert memory["memory"]["holders"][0]["kind"] == "loading"
    machine.set(thermal="serious", heat="serious", strain="the machine is hot (serious)")
    (strain,) = await client.until("thermal")
    assert strain["thermal"]["jobs_pause_because"] == "the machine is hot (serious)"
    client.server.log.record("tool call", "pass on m", "of this process")
    (decided,) = await client.until("decision")
    assert decided["reason"] == "of this process"
    assert [one["type"] for one in client.seen].count("memory") == 1


async def test_jobs_are_told_by_what_changed(client: Client) -> None:
    jobs = client.server.jobs
    jobs.set(is_whole=False, jobs=(job_view("j", 5), job_view("k")), ids=("j", "k"))
    moved, added = await client.until("job.progress", "job.added")
    assert (moved["job"]["done_bytes"], added["job"]["id"]) == (5, "k")
    jobs.set(is_whole=False, jobs=(job_view("j", 5, reason="again in 3 s"),), ids=None)
    await client.until("job.progress")
    waits = job_view("j", 5, state="waiting", reason="the hub is down")
    jobs.set(is_whole=False, jobs=(waits,), ids=None)
    await client.until("job.changed")
    waits = job_view("j", 5, state="waiting", reason="the disk is full")
    jobs.set(is_whole=False, jobs=(waits,), ids=None)
    await client.until("job.changed")
    jobs.set(is_whole=False, jobs=(), ids=("k", "j"))
    (order,) = await client.until("job.order")
    assert order["job_ids"] == ["k", "j"]
    jobs.set(is_whole=False, jobs=(job_view("j", 100, state="done"),), ids=None)
    (ended,) = await client.until("job.changed")
    assert ended["job"]["state"] == "done"
    jobs.set(is_whole=False, jobs=(), ids=("k",))
    (gone,) = await client.until("job.removed")
    assert gone["job_id"] == "j"


async def test_no_transition_is_lost_over_the_death_of_a_process(client: Client) -> None:
    server = client.server
    for process in (server.jobs, server.machine, server.models):
        process.die(ReplicaDied("killed"))
    await wait_until(lambda: server.jobs.calls > 2 and server.machine.calls > 2, "both are asked")
    state = await server.hub.state()
    assert state.missing["jobs"] == "The process of long jobs does not answer."
    assert state.missing["machine"] == "The scheduler does not answer."
    assert (state.jobs, state.memory) == (client.state.jobs, client.state.memory)
    # Their successors know other versions, and are compared with what was known.
    whole = JobChanges(900, True, (job_view("j", 60), job_view("k")), ("j", "k"))
    server.jobs.state, server.jobs.problem = whole, None
    server.machine.state = replace(server.machine.state, version=900, used_bytes=GB)
    server.machine.problem = None
    server.models.state = ModelStates(version=900, residencies=(M,))
    server.models.problem = None
    await client.until("job.progress", "job.added")
    await wait_until(lambda: server.sources.known().missing == {}, "all answer again")
    await server.hub.state()
    kinds = [one["type"] for one in (client.seen + await client.until())]
    assert "reset" not in kinds
    assert server.sources.known().memory == (await server.hub.state()).memory
    assert [one.state for one in (await server.hub.state()).models] == ["resident", "available"]


async def test_a_part_that_was_missing_in_the_state_resets(server: Server) -> None:
    server.jobs.problem = Unavailable("The stored jobs are being read.")
    server.catalog.problem = Unavailable("The catalog is damaged.")
    state = await server.hub.state()
    assert state.missing["jobs"] == "The stored jobs are being read."
    assert state.missing["models"] == "The catalog is damaged."
    assert state.models == ()
    with server.hub.reader(state.event_id) as reader:
        client = Client(server, reader, state)
        server.jobs.problem = None
        (reset,) = await client.until("reset")
        assert reset["reason"] == "source_restarted"
        server.catalog.problem = None
        server.models.set(catalog_version=1)
        await client.until("reset")
        assert len((await server.hub.state()).models) == 2


async def test_two_processes_states_are_never_older_than_what_was_told(server: Server) -> None:
    """Another router's client fetches the state here: it has to be asked for, not remembered."""
    await server.hub.state()
    server.machine.state = replace(server.machine.state, version=2, used_bytes=GB)
    server.jobs.state = JobChanges(2, False, (job_view("j", 8),), None)
    server.models.state = ModelStates(version=2, residencies=(M,))
    server.catalog.set("late")
    state = await server.hub.state()
    assert state.memory is not None
    assert state.memory.used_bytes == GB
    assert [one.done_bytes for one in state.jobs] == [8]
    assert [(one.id, one.state) for one in state.models] == [
        ("m", "resident"),
        ("n", "available"),
        ("late", "available"),
    ]


def test_decisions_after_a_number_are_those_that_are_kept() -> None:
    log = DecisionLog(kept=3)
    start = log.last_number
    for number in range(5):
        log.record("e", f"a{number}", "r")
    assert [one.action for one in log.since(start + 4)] == ["a4"]
    assert [one.action for one in log.since(start)] == ["a2", "a3", "a4"]
    assert [one.action for one in log.since(0)] == ["a2", "a3", "a4"]
    assert log.since(log.last_number) == []
