"""Mirrors the scheduler's metrics into Ray's metrics endpoint."""

from ray.util import metrics as ray_metrics

from deployments.messages import SchedulerSnapshot
from deployments.metrics import COUNTERS, GAUGES, Spec


class RayMirror:
    """Keeps the metrics in Ray's registry, for its dashboard and Prometheus endpoint.

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
        """Set every gauge, and increase every counter to its new value."""
        for name, spec in GAUGES.items():
            values = dict(spec.read(snapshot))
            # A label that is not set again would keep its last value forever.
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
