"""The shipped Grafana dashboard: valid, and about metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from backends.base import EngineLoad
from core.metrics import Metrics
from deployments.messages import ModelUsage, ReplicaReport
from tests.unit.deployments.handles import FakeHandle, answering
from tests.unit.deployments.router.test_telemetry import SNAPSHOT, telemetry

DASHBOARD = Path(__file__).resolve().parents[3] / "docs" / "grafana" / "impetus.json"
PANEL_FIELDS = {"id", "title", "type", "datasource", "gridPos", "fieldConfig", "options", "targets"}
COLUMNS = 24


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def test_the_dashboard_has_grafanas_shape(dashboard: dict[str, Any]) -> None:
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["title"]
    assert len(dashboard["uid"]) <= 40
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    (source,) = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel.keys() >= PANEL_FIELDS
        assert panel["datasource"]["uid"] == f"${{{source['name']}}}"
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= COLUMNS
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & covered
        cells |= covered
        names = [target["refId"] for target in panel["targets"]]
        assert names
        assert len(set(names)) == len(names)


async def test_every_metric_of_the_dashboard_is_exported(dashboard: dict[str, Any]) -> None:
    metrics = Metrics()
    load = EngineLoad(kv_tokens=1)
    report = ReplicaReport("echo", 1, (ModelUsage("m", 0.0, 0, load),))
    handle: Any = FakeHandle(report=answering(report))
    scheduler: Any = FakeHandle(snapshot=answering(SNAPSHOT))

    async def echo_runs() -> frozenset[str]:
        return frozenset({"echo"})

    subject = type(telemetry(scheduler))(
        {"echo": handle}, lambda: frozenset({"echo"}), scheduler, echo_runs
    )
    metrics.registry.register(subject)
    await subject.refresh()
    exported: set[str] = set()
    for line in metrics.render().decode().splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            exported |= {f"{name}_bucket"} if kind == "histogram" else {name}
    text = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    used = set(re.findall(r"impetus_\w+", text))
    assert len(used) > 15
    assert used <= exported, sorted(used - exported)
