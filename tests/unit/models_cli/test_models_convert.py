"""`scripts/models convert`: what is possible, and beginning a conversion."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from core.errors import RequestError
from router.app import create_app
from router.conversion_service import (
    ConversionChoice,
    ConversionTarget,
    ConversionTargets,
    ConversionWish,
    ForecastView,
)
from router.job_service import ConversionView, JobDetail, QualityView
from tests.fakes import CHAT_MODEL, MANAGING, FakeCatalog, make_services, make_view
from tests.live_server import serving
from tests.unit.models_cli.conftest import DONE, JOB, Run, ScriptedJobs, Stand
from tests.unit.router.api.test_router_api import FakeManagement

FORECAST = ForecastView(
    seconds=90.0, is_measured=False, result_bytes=2**30, disk_bytes=2**31, memory_bytes=2**29
)
KEY = "canary-key-1234"


def target(name: str, *quantizations: str, reason: str = "") -> ConversionTarget:
    choices = tuple(ConversionChoice(quantization=one, forecast=FORECAST) for one in quantizations)
    return ConversionTarget(
        format=name,
        reason=reason,
        runs_here=name != "coreml",
        runs_here_reason="Core ML needs macOS." if name == "coreml" else "",
        choices=choices,
        group_sizes=(32, 64) if name == "mlx" else (),
    )


TARGETS = ConversionTargets(
    model="tiny@gguf-q8_0",
    targets=(
        target("mlx", "8bit", "4bit"),
        target("coreml", "f16"),
        target("onnx", reason="The architecture is not supported."),
    ),
    used_bytes=0,
    limit_bytes=2**36,
    free_bytes=2**35,
)


@dataclass
class FakeConversions:
    """Notes what is wished for."""

    wishes: list[ConversionWish] = field(default_factory=list)
    problem: RequestError | None = None
    jobs: ScriptedJobs = field(default_factory=ScriptedJobs)
    catalog: FakeCatalog = field(default_factory=FakeCatalog)

    async def conversion_targets(self, model: str) -> ConversionTargets:
        assert model == "tiny"
        return TARGETS

    async def convert(self, wish: ConversionWish) -> JobDetail:
        if self.problem is not None:
            raise self.problem
        self.wishes.append(wish)
        return JOB.model_copy(update={"kind": "conversion"})


@pytest.fixture
async def conversions(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FakeConversions]:
    del stand
    fake = FakeConversions()
    services = replace(
        make_services(api_key=KEY),
        catalog=fake.catalog,
        management=FakeManagement(),
        jobs=fake.jobs,
        conversions=fake,
        management_token=MANAGING["x-impetus-token"],
    )
    async with serving(create_app(services)) as port:
        monkeypatch.setenv("IMPETUS_API_KEY", KEY)
        monkeypatch.setenv("IMPETUS_PORT", str(port))
        yield fake


async def test_what_is_possible_is_listed_with_a_forecast(
    conversions: FakeConversions, run: Run
) -> None:
    shown = await run("convert", "tiny")
    assert shown.code == 0, shown.err
    mlx = ["1.0", "GiB", "512.0", "MiB", "about", "1", "min", "30", "s"]
    assert shown.lines[2] == ["mlx", "8bit", *mlx]
    assert shown.out.splitlines()[4].endswith("cannot run: Core ML needs macOS.")
    assert shown.out.splitlines()[5].endswith("not possible: The architecture is not supported.")
    assert "0 B of at most 64.0 GiB; 32.0 GiB are free" in shown.out
    assert (await run("convert", "tiny", "--json")).document == TARGETS.model_dump(mode="json")
    assert conversions.wishes == []


@pytest.mark.parametrize(
    ("options", "quantization", "group_size"),
    [
        ((), "", None),
        (("--bits", "4"), "4bit", None),
        (("--quantization", "8bit", "--group-size", "32"), "8bit", 32),
    ],
)
async def test_conversion_is_followed_to_its_model(
    conversions: FakeConversions,
    run: Run,
    options: tuple[str, ...],
    quantization: str,
    group_size: int | None,
) -> None:
    shown = await run("convert", "tiny", "--to", "mlx", *options, "--name", "small")
    assert (shown.code, shown.out) == (0, "Ready: tiny@gguf-q8_0 (4.0 KiB)\n")
    assert conversions.wishes == [
        ConversionWish("tiny", "mlx", quantization, group_size, name="small")
    ]


@pytest.mark.parametrize(
    ("quality", "told"),
    [
        (
            QualityView(
                tokens=9,
                kl_mean=0.05171,
                same_top_share=0.912,
                perplexity_source=20.5,
                perplexity_result=22.25,
            ),
            "91.2% the same likeliest token, KL divergence 0.0517 nats, "
            "perplexity from 20.5 to 22.25",
        ),
        (QualityView(cosine_mean=0.99871), "cosine similarity 0.9987"),
        (QualityView(reason="There is no room."), "not measured: There is no room."),
    ],
)
async def test_quality_of_the_result_is_told(
    conversions: FakeConversions,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    quality: QualityView,
    told: str,
) -> None:
    made = ConversionView(
        source="tiny", format="mlx", quantization="4bit", group_size=64, quality=quality
    )
    conversions.jobs.script = [
        JOB.model_copy(update={"done_bytes": 2048, "reason": "writing"}),
        JOB.model_copy(update={"done_bytes": 4096, "reason": "comparing"}),
        DONE.model_copy(update={"conversion": made}),
    ]
    shown = await run("convert", "tiny", "--to", "mlx")
    assert "2.0 KiB of 4.0 KiB, 2.0 KiB/s, 2 s left, writing" in shown.err
    assert "4.0 KiB of 4.0 KiB, comparing" in shown.err
    assert shown.out == f"Ready: tiny@gguf-q8_0\nCompared with its source: {told}\n"
    monkeypatch.setattr(conversions.catalog, "_views", (make_view(conversion=made),))
    assert f"quality:         {told}" in (await run("show", CHAT_MODEL)).out


async def test_conversion_that_is_not_possible_is_refused(
    conversions: FakeConversions, run: Run
) -> None:
    for options, code, told in (
        (("--to", "mlx", "--bits", "3"), 1, "8bit, 4bit"),
        (("--to", "onnx", "--bits", "4"), 1, "The architecture is not supported."),
        (("--to", "ogg", "--bits", "4"), 1, "'ogg'"),
        (("--bits", "4"), 2, "--to"),
        (("--to", "mlx", "--bits", "4", "--quantization", "4bit"), 2, "not allowed"),
    ):
        shown = await run("convert", "tiny", *options)
        assert (shown.code, told in shown.err) == (code, True), shown.err
    conversions.problem = RequestError("It is in this format already.")
    shown = await run("convert", "tiny", "--to", "gguf")
    assert (shown.code, shown.err) == (1, "It is in this format already.\n")
    assert conversions.wishes == []


async def test_conversion_goes_on_without_waiting(conversions: FakeConversions, run: Run) -> None:
    shown = await run("convert", "tiny", "--to", "mlx", "--no-wait", "--json")
    assert (shown.code, shown.document["kind"]) == (0, "conversion")
    assert len(conversions.wishes) == 1
