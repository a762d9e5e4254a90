"""The scheduler's snapshot as metrics: in the router's registry, and in Ray's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from ray.util import metrics as ray_metrics

from deployments.messages import SchedulerSnapshot

Values = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: what it says, the label that tells its values apart (none: ""), the values."""

    help_text: str
    label: str
    read: Callable[[SchedulerSnapshot], Values]


def _one(read: Callable[[SchedulerSnapshot], float]) -> Callable[[SchedulerSnapshot], Values]:
    return lambda snapshot: [("", read(snapshot))]


GAUGES: Mapping[str, Spec] = {
    "impetus_memory_budget_bytes": Spec(
        "Bytes that models may use together.", "", _one(lambda one: one.budget_bytes)
    ),
    "impetus_memory_used_bytes": Spec(
        "Bytes that models hold or are promised.", "", _one(lambda one: one.used_bytes)
    ),
    "impetus_memory_promised_bytes": Spec(
        "Bytes promised to models that are being loaded.",
        "",
        _one(lambda one: one.promised_bytes),
    ),
    "impetus_model_resident_bytes": Spec(
        "Bytes that a resident model holds.",
        "model",
        lambda one: [(item.model_id, item.size_bytes) for item in one.residents],
    ),
    "impetus_model_requests": Spec(
        "Requests on a resident model when its replica was last asked.",
        "model",
        lambda one: [(item.model_id, item.in_flight) for item in one.residents],
    ),
    "impetus_loading_models": Spec(
        "Models that are being loaded.", "", _one(lambda one: len(one.loading))
    ),
    "impetus_scheduler_waiting_requests": Spec(
        "Requests that wait for a model's memory, by class.",
        "priority",
        lambda one: list(one.waiting.items()),
    ),
    "impetus_thermal_state": Spec(
        "-1 unknown, 0 nominal, 1 fair, 2 serious, 3 critical.",
        "",
        _one(lambda one: one.thermal.level),
    ),
}
COUNTERS: Mapping[str, Spec] = {
    "impetus_throttled_seconds": Spec(
        "Seconds under thermal limits.", "", _one(lambda one: one.thermal.throttled_s)
    ),
    "impetus_thermal_changes": Spec(
        "Changes of the thermal state.", "", _one(lambda one: one.thermal.changes)
    ),
    "impetus_loads": Spec("Models loaded.", "", _one(lambda one: one.loads)),
    "impetus_load_failures": Spec(
        "Models that could not be loaded.", "", _one(lambda one: one.load_failures)
    ),
    "impetus_evictions": Spec(
        "Models unloaded to make room for another.", "", _one(lambda one: one.evictions)
    ),
}


def families(snapshot: SchedulerSnapshot) -> Iterator[Metric]:
    """Yield the snapshot as prometheus families."""
    for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, spec in table.items():
            family = kind(name, spec.help_text, labels=[spec.label] if spec.label else [])
            for label, value in spec.read(snapshot):
                family.add_metric([label] if spec.label else [], value)
            yield family


class RayMirror:
    """The same metrics in Ray's registry, so that its dashboard and Prometheus endpoint show them.

    Source: ray.util.metrics, which names them with the prefix `ray_` and sends them on a thread.
    """

    def __init__(self) -> None:
        self._gauges = {
            name: ray_metrics.Gauge(name, spec.help_text, tag_keys=_tags(spec))
            for name, spec in GAUGES.items()
        }
        self._counters = {
            name: ray_metrics.Counter(f"{name}_total", spec.help_text, tag_keys=_tags(spec))
            for name, spec in COUNTERS.items()
        }
        self._counted: dict[str, float] = {}
        self._shown: dict[str, set[str]] = {name: set() for name in GAUGES}

    def show(self, snapshot: SchedulerSnapshot) -> None:
        """Set every gauge, and add to every counter what is new."""
        for name, spec in GAUGES.items():
            values = dict(spec.read(snapshot))
            # A value that is not set again would be shown for ever.
            gone = dict.fromkeys(self._shown[name] - values.keys(), 0.0)
            self._shown[name] = set(values)
            for label, value in {**gone, **values}.items():
                self._gauges[name].set(value, {spec.label: label} if spec.label else {})
        for name, spec in COUNTERS.items():
            ((_, value),) = spec.read(snapshot)
            added = value - self._counted.get(name, 0.0)
            self._counted[name] = value
            if added > 0:
                self._counters[name].inc(added)


def _tags(spec: Spec) -> tuple[str, ...]:
    return (spec.label,) if spec.label else ()
