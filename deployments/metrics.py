"""Prometheus metrics derived from the scheduler's snapshot."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deployments.messages import SchedulerSnapshot

Values = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its help text, its label (none: ""), and a function that reads its values."""

    help_text: str
    label: str
    read: Callable[[SchedulerSnapshot], Values]


def _one(read: Callable[[SchedulerSnapshot], float]) -> Callable[[SchedulerSnapshot], Values]:
    return lambda snapshot: [("", read(snapshot))]


GAUGES: Mapping[str, Spec] = {
    "impetus_memory_budget_bytes": Spec(
        "Memory budget for all models, in bytes.", "", _one(lambda one: one.budget_bytes)
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
