"""The router's Serve deployment: runs the HTTP application on its own listener."""

import gc
import logging
from collections.abc import Mapping

import ray
from starlette.types import ASGIApp

from core.errors import ImpetusError
from core.keys import MANAGEMENT_TOKEN, read_key
from core.metrics import Metrics
from core.settings import Settings
from core.supervision import Supervisor
from deployments.activity import DeathRecords
from deployments.decisions import DecisionLog
from deployments.router.catalog import CatalogView
from deployments.router.credentials import StoredCredentials
from deployments.router.dispatch import HandleDispatcher
from deployments.router.events.sources import RouterEventSources
from deployments.router.jobs import JobsClient
from deployments.router.listener import Listener
from deployments.router.management import SchedulerManagement
from deployments.router.model_states import ModelStatesWatch
from deployments.router.monitor.log_files import LogFiles
from deployments.router.monitor.sampler import ServerMonitor
from deployments.router.monitor.settings import StoredSettings
from deployments.router.readiness import Readiness
from deployments.router.telemetry import ReplicaTelemetry
from deployments.router.uploads import RouterUploads
from deployments.serve.awake import keep_awake
from deployments.serve.broadcast import broadcast_handles
from deployments.serve.handles import Handle, direct
from deployments.serve.logs import log_folder
from deployments.serve.worker import prepare_worker
from deployments.transport.socket import FrameReceiver
from router.app import create_app
from router.events.hub import EventHub
from router.http.drain import Drain
from router.services import Services

logger = logging.getLogger(__name__)


class RouterReplica:
    """Answers HTTP on the configured port, and through Serve's proxy if that is enabled."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self,
        settings: Settings,
        scheduler: Handle,
        formats: Mapping[str, Handle],
        jobs: Handle,
    ) -> None:
        prepare_worker()
        self._supervisor = Supervisor()
        self._receiver = FrameReceiver()
        await self._receiver.start(self._supervisor)
        node_id = ray.get_runtime_context().get_node_id()
        log = DecisionLog()
        has_many = settings.max_replicas > 1
        model_states = self._model_states = ModelStatesWatch(scheduler)
        model_states.start(self._supervisor)
        dispatcher = self._dispatcher = HandleDispatcher(
            scheduler,
            formats,
            self._receiver,
            node_id,
            model_states,
            DeathRecords(settings.home),
            has_many=has_many,
            log=log,
        )
        everywhere = broadcast_handles(
            {name: direct(handle) for name, handle in formats.items()}, settings
        )
        telemetry = ReplicaTelemetry(
            everywhere,
            lambda: model_states.resident_formats,
            scheduler,
            own_parts=self._supervisor.parts,
        )
        jobs_client = JobsClient(jobs)
        self._catalog = CatalogView(
            settings, scheduler, model_states, jobs_client.explain_unrunnable
        )
        sources = RouterEventSources(scheduler, jobs, self._catalog, model_states, log)
        sources.run(self._supervisor)
        self._events = EventHub(sources)
        self._management = SchedulerManagement(settings, scheduler, log, sources.models.look)
        self._credentials = StoredCredentials(settings.key_database)
        self._supervisor.keep_running("uses of API keys", self._credentials.save_uses)
        metrics = Metrics()
        metrics.registry.register(telemetry)
        requests = Drain()
        monitor = ServerMonitor(
            settings, telemetry, metrics, node_id, lambda: requests.in_flight > 0
        )
        monitor.run(self._supervisor)
        services = Services(
            settings,
            self._catalog,
            dispatcher,
            Readiness(
                scheduler,
                [
                    lambda: " ".join(self._supervisor.problems()),
                    lambda: self._receiver.problem,
                    lambda: self._listener.problem,
                    self._catalog.problem,
                ],
                model_states,
            ),
            telemetry,
            self._management,
            _management_token(settings),
            jobs_client,
            jobs_client,
            self._credentials,
            conversions=jobs_client,
            uploads=RouterUploads(settings, jobs_client),
            files=jobs_client,
            events=self._events,
            logs=LogFiles(log_folder),
            monitor=monitor,
            stored_settings=StoredSettings(settings),
        )
        self._app = create_app(services, metrics=metrics, drain=requests)
        keep_awake(self._supervisor, settings, lambda: requests.in_flight > 0)
        self._listener = Listener(self._app, settings)
        self._listener.start(self._supervisor)
        # Imported objects stay; a collection, which stops all streams, need not visit them again.
        gc.collect()
        gc.freeze()
        logger.info("listening on %s", settings.base_url)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application for Serve's proxy; see `serve.ingress`."""
        return self._app

    async def check_health(self) -> None:
        """Raise Unavailable if clients would get no answer: Serve then replaces this process."""
        self._supervisor.check_health()
        await self._listener.check_answers()

    async def __del__(self) -> None:
        """Stop listening; Serve awaits this at shutdown."""
        if hasattr(self, "_events"):
            # Its streams would be waited for.
            self._events.close()
        if hasattr(self, "_listener"):
            await self._listener.stop()
            await self._dispatcher.close()
        if hasattr(self, "_model_states"):
            self._model_states.stop()
        if hasattr(self, "_catalog"):
            self._catalog.close()
        if hasattr(self, "_management"):
            self._management.close()
        if hasattr(self, "_credentials"):
            self._credentials.close()
        await self._receiver.stop()
        await self._supervisor.stop()


def _management_token(settings: Settings) -> str:
    """Return the management token; empty, so that no token is accepted, if it cannot be kept."""
    try:
        return read_key(settings.home, MANAGEMENT_TOKEN)
    except ImpetusError as problem:
        logger.error("web pages cannot manage models: %s", problem.message)
        return ""
