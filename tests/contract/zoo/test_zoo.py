"""Models of many architectures answer as transformers does, or are refused when they are found.

`.bin` files always run on PyTorch, safetensors on MLX where it can run them.  Streams and schemas
are the work of an engine that all runtimes share: models as `.bin` are not asked for them again.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from backends.base import Engine, EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.scan.identify import Refused
from catalog.scan.inspector import Inspector
from tests.contract.zoo.architectures import ARCHITECTURES
from tests.contract.zoo.checks import ALL_WAYS, FEW_WAYS, problems_of
from tests.contract.zoo.expectations import KNOWN_FAULTS, REFUSED
from tests.contract.zoo.models import Builder
from tests.contract.zoo.report import PROPERTY, described, recorded_runtime, report_path
from tests.contract.zoo.sparse import RECURRENT

# The longest prompt is computed in three parts.
OPTIONS = EngineOptions(
    max_sequences=4, threads=1, context_tokens=1024, kv_tokens=4096, prefill_chunk_tokens=200
)
# After the first part of a prompt PyTorch computes a recurrent model token by token, so the rest
# is short: 16 tokens of the longest prompt alone, and more beside the others.
_SHORT_REST = replace(OPTIONS, prefill_chunk_tokens=450)
_RECURRENT = frozenset(each.name for each in RECURRENT)


def _open(name: str, info: ModelInfo) -> Engine:
    """Open a model that a scan called available.  A library that ends the process is a failure."""
    runtime = info.choice.runtime if info.choice else info.format
    is_by_token = name in _RECURRENT and runtime == "pytorch"
    options = _SHORT_REST if is_by_token else OPTIONS
    try:
        return load_backends()[info.format].open(info, options)
    except SystemExit as problem:
        raise RuntimeError(f"opening {info.name} would end the server's process") from problem


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_a_model_answers_as_transformers_does(
    name: str,
    layout: str,
    builder: Builder,
    inspector: Inspector,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    if fault := KNOWN_FAULTS.get((name, layout)):
        request.applymarker(pytest.mark.xfail(reason=fault, strict=True))
    model = builder.model(name)
    outcome = inspector.examine(model.weights(layout))
    shown = {"name": name, "layout": layout, "model_type": model.model_type}
    record_property(PROPERTY, shown)
    if isinstance(outcome, Refused):
        _compare(request.config, shown, outcome)
        assert REFUSED.get((name, layout), "it is to be served") in outcome.reason
        return
    assert isinstance(outcome, ModelInfo)
    assert (name, layout) not in REFUSED
    # Small vectors, such as a tied bias or a router's, may count twice; tables and weights may not.
    # mlx-lm leaves the weights out that see.
    if "vision_config" not in ARCHITECTURES[name].settings:
        assert outcome.parameters == pytest.approx(model.parameters, rel=5e-3)
    engine = _open(name, outcome)
    try:
        assert await problems_of(engine, model, FEW_WAYS if layout == "bin" else ALL_WAYS) == []
        _compare(request.config, shown, engine)
    finally:
        await engine.close()


def _compare(config: pytest.Config, shown: dict[str, str], outcome: Refused | Engine) -> None:
    """Report what the table is to say; without a report, compare it with what it says."""
    shown |= described(outcome)
    if report_path(config) is None:
        # Else run this file with --zoo-report=docs/architectures.json, and scripts/docs.
        assert recorded_runtime(shown["name"], shown["layout"]) == shown["runtime"]
