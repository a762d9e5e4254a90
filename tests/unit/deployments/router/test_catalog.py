"""What a name means to the router: variants, states, and what was converted."""

import asyncio
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import RuntimeChoice
from catalog.inspections import Inspection, arriving
from catalog.models import Converted, Local, ScannedModel
from catalog.store import CatalogStore
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ConversionNeeded,
    EngineFailed,
    ImpetusError,
    InsufficientMemory,
    ModelFileMissing,
    ModelNotFound,
    Unavailable,
)
from core.settings import Settings
from core.types import JsonValue
from core.units import GIB
from deployments.messages import Fault, ModelStates, Residency
from deployments.router import catalog as catalog_module
from deployments.router.catalog import CatalogView
from deployments.router.model_states import ModelStatesWatch
from router.job_service import ConversionView, QualityView
from router.services import RuntimeView
from tests.unit.catalog.builders import make_info
from tests.unit.deployments.handles import FakeHandle, answering

# Enough for the smallest model's estimate and no more than that of a large one.
BUDGET = GIB


class Scheduler:
    """Answers the view's questions; a rescan may find something."""

    def __init__(self) -> None:
        self.residencies: list[Residency] = []
        self.loading: list[str] = []
        self.on_rescan: Any = None
        self.urgent: list[str] = []
        self.problem: Exception | None = None
        self.faults: dict[str, Fault] = {}
        self.keeps_cool = False
        self.version = 0
        self.handle = FakeHandle(
            rescan=self.rescan,
            explain=self.explain,
            model_states=self.model_states,
        )

    async def rescan(self, urgent: str = "") -> None:
        self.urgent.append(urgent)
        if self.on_rescan is not None:
            result = self.on_rescan()
            if isinstance(result, Awaitable):
                await result

    async def model_states(self, known_version: int) -> ModelStates:
        assert known_version == -1
        self.version += 1
        return ModelStates(
            self.faults,
            self.keeps_cool,
            tuple(self.residencies),
            tuple(self.loading),
            self.version,
        )

    async def explain(self, model_id: str) -> Exception | None:
        del model_id
        return self.problem

    async def converted(self, model_id: str, problem: ImpetusError) -> ImpetusError:
        """Stand in for the jobs' process, which tells of a conversion."""
        return ConversionNeeded(f"{problem.message} {model_id} can be converted.")


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CatalogStore]:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    yield store
    store.close()


@pytest.fixture
def view(tmp_path: Path, store: CatalogStore, scheduler: Scheduler) -> Iterator[CatalogView]:
    del store
    settings = Settings(
        home=tmp_path, formats=["gguf", "echo"], memory_budget=BUDGET, context_length=512
    )
    handle: Any = scheduler.handle
    view = CatalogView(settings, handle, ModelStatesWatch(handle), scheduler.converted)
    yield view
    view.close()


def found(
    name: str, format: str = "gguf", quantization: str = "q4_0", **changes: Any
) -> ScannedModel:
    source = changes.pop("source", Local("/m"))
    reason = changes.pop("reason", "")
    size_bytes = changes.pop("size_bytes", 1000)
    path = f"/m/{name}-{format}-{quantization}"
    details = {"n_layer": 2, "n_embd": 64, "n_head_kv": 2, "key_length": 32, "value_length": 32}
    info = make_info(path, format=format, quantization=quantization, size_bytes=size_bytes)
    info = replace(info, name=name, details={**details, "vocabulary_size": 100, **changes})
    return ScannedModel(info, source, f"1:{path}", reason)


def write(store: CatalogStore, *entries: ScannedModel, missing: tuple[str, ...] = ()) -> None:
    store.record_scan(entries, missing, (), now=100.0)


async def test_an_id_and_a_bare_name_are_found(view: CatalogView, store: CatalogStore) -> None:
    write(store, found("m"), found("m", quantization="q8_0", size_bytes=2000))
    assert (await view.resolve("m@gguf-q4_0")).id == "m@gguf-q4_0"
    chosen = await view.resolve("m")
    assert chosen.id == "m@gguf-q8_0"
    assert (chosen.state, chosen.runtime) == ("available", "llama.cpp")
    assert chosen.max_model_len == 512


async def test_a_bare_name_prefers_what_is_resident(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m"), found("m", quantization="q8_0", size_bytes=2000))
    scheduler.residencies = [Residency("m@gguf-q4_0", "gguf", "r", "n", 256, 0.1)]
    await view._model_states.refresh()
    assert (await view.resolve("m")).id == "m@gguf-q4_0"
    states = {model.id: (model.state, model.max_model_len) for model in await view.models()}
    assert states == {"m@gguf-q4_0": ("resident", 256), "m@gguf-q8_0": ("available", 512)}


async def test_f15_a_bare_name_means_the_smallest_variant_while_the_machine_keeps_cool(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m"), found("m", quantization="q8_0", size_bytes=2000))
    scheduler.residencies = [Residency("m@gguf-q8_0", "gguf", "r", "n", 256, 0.1)]
    scheduler.keeps_cool = True
    await view._model_states.refresh()
    assert (await view.resolve("m")).id == "m@gguf-q4_0"
    assert (await view.resolve("m@gguf-q8_0")).id == "m@gguf-q8_0"
    scheduler.keeps_cool = False
    await view._model_states.refresh()
    assert (await view.resolve("m")).id == "m@gguf-q8_0"


async def test_f11_faults_are_shown_and_a_bare_name_avoids_them(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m"), found("m", quantization="q8_0", size_bytes=2000), found("n"))
    scheduler.faults = {
        "m@gguf-q8_0": Fault(True, "it died"),
        "n@gguf-q4_0": Fault(False, "damaged"),
    }
    shown = {model.id: (model.state, model.reason) for model in await view.models()}
    assert shown["m@gguf-q8_0"] == ("quarantined", "it died")
    assert shown["n@gguf-q4_0"] == ("failed", "damaged")
    assert (await view.resolve("m")).id == "m@gguf-q4_0"
    assert (await view.resolve("n")).id == "n@gguf-q4_0"


async def test_a_scheduler_that_does_not_answer_leaves_what_was_known(
    scheduler: Scheduler,
) -> None:
    handle: Any = scheduler.handle
    watch = ModelStatesWatch(handle)
    scheduler.keeps_cool = True
    await watch.refresh()
    handle.model_states = FakeHandle(fail=answering(Unavailable("away"))).fail
    assert (await watch.refresh()).keeps_cool


async def test_a_bare_name_skips_what_cannot_run_here(
    view: CatalogView, store: CatalogStore
) -> None:
    write(store, found("m"), found("m", format="mlx", quantization="f32", size_bytes=9000))
    assert (await view.resolve("m")).id == "m@gguf-q4_0"


async def test_an_unknown_name_makes_the_scheduler_look_first(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    scheduler.on_rescan = lambda: write(store, found("late"))
    assert (await view.resolve("late")).id == "late@gguf-q4_0"
    scheduler.on_rescan = None
    with pytest.raises(ModelNotFound, match="late@gguf-q4_0"):
        await view.resolve("latte")


async def test_refused_and_missing_models_say_why(view: CatalogView, store: CatalogStore) -> None:
    write(store, found("bad", reason="It is damaged."), found("gone"))
    write(store, missing=("/m/gone-gguf-q4_0",))
    with pytest.raises(BrokenModel, match="damaged"):
        await view.resolve("bad@gguf-q4_0")
    with pytest.raises(ModelFileMissing, match="gone"):
        await view.resolve("gone@gguf-q4_0")
    states = {model.name: (model.state, model.reason) for model in await view.models()}
    assert states == {
        "bad": ("refused", "It is damaged."),
        "gone": ("missing", "its file gone-gguf-q4_0 is gone; locate it, or delete the model"),
    }


async def test_a_format_that_is_switched_off_is_unavailable(
    view: CatalogView, store: CatalogStore
) -> None:
    write(store, found("m", format="mlx"))
    with pytest.raises(BackendUnavailable, match="switched off"):
        await view.resolve("m@mlx-q4_0")


async def test_what_the_scheduler_says_of_an_unavailable_model_is_passed_on(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m", size_bytes=100 * GIB))
    scheduler.problem = Unavailable("It is being converted.", retry_after_s=7)
    with pytest.raises(Unavailable, match="converted") as caught:
        await view.resolve("m@gguf-q4_0")
    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize(
    "problem", [InsufficientMemory("It is too large."), BackendUnavailable("It cannot run.")]
)
async def test_a_conversion_that_helps_is_told(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler, problem: ImpetusError
) -> None:
    write(store, found("m", size_bytes=100 * GIB))
    scheduler.problem = problem
    told = f"{problem.message} m@gguf-q4_0 can be converted."
    with pytest.raises(ConversionNeeded, match=told):
        await view.resolve("m@gguf-q4_0")


async def test_a_model_that_cannot_run_is_answered_by_what_it_was_converted_to(
    view: CatalogView, store: CatalogStore
) -> None:
    write(
        store,
        found("m", size_bytes=100 * GIB),
        found("m", quantization="q2_k", source=Converted("/m", "m@gguf-q4_0")),
    )
    chosen = await view.resolve("m@gguf-q4_0")
    assert (chosen.id, chosen.converted_from) == ("m@gguf-q2_k", "m@gguf-q4_0")
    # Its provenance is of an older version, which wrote no choices.
    assert chosen.conversion is None
    assert (await view.resolve("m@gguf-q2_k")).id == "m@gguf-q2_k"


async def test_how_a_model_was_converted_is_shown(view: CatalogView, store: CatalogStore) -> None:
    choices: dict[str, JsonValue] = {
        "target_format": "mlx",
        "quantization": "4bit",
        "group_size": 32,
    }
    figures: dict[str, JsonValue] = {"tokens": 512, "kl_mean": 0.5, "reason": "", "from_later": 1}
    write(store, found("m", source=Converted("/m", "m@gguf-f16", choices, figures)))
    (model,) = await view.models()
    assert model.conversion == ConversionView(
        source="m@gguf-f16",
        format="mlx",
        quantization="4bit",
        group_size=32,
        quality=QualityView(tokens=512, kl_mean=0.5),
    )


async def test_each_client_learns_what_the_model_is_for(
    view: CatalogView, store: CatalogStore
) -> None:
    write(store, found("m"), found("old"))
    write(store, missing=("/m/old-gguf-q4_0",))
    models = {model.id: model for model in await view.models()}
    usable, gone = models["m@gguf-q4_0"], models["old@gguf-q4_0"]
    assert usable.compatibility["cline"].level == "no"
    assert f"{usable.max_model_len:,} tokens" in usable.compatibility["cline"].reasons[0]
    assert usable.compatibility["openai"].level != "no"
    assert {fit.level for fit in gone.compatibility.values()} == {"no"}
    assert gone.compatibility["openai"].reasons == (gone.reason,)


async def test_the_runtime_and_its_reason_are_shown(view: CatalogView, store: CatalogStore) -> None:
    choice = RuntimeChoice("mlx", "its tensors fit", "pytorch", "MLX is faster")
    scanned = found("m", format="safetensors")
    write(store, replace(scanned, info=replace(scanned.info, choice=choice)))
    (model,) = await view.models()
    assert (model.runtime, model.runtime_reason) == ("mlx", "its tensors fit")
    assert model.runtime_choice == RuntimeView("mlx", "its tensors fit", "pytorch", "MLX is faster")
    store.change_settings(model.id, {"runtime": "pytorch"})
    (model,) = await view.models()
    assert model.runtime == "pytorch"
    assert "the scan chose mlx" in model.runtime_reason


async def test_a_runtime_that_can_no_longer_run_the_model_is_not_shown(
    view: CatalogView, store: CatalogStore
) -> None:
    scanned = found("m", format="safetensors")
    choice = RuntimeChoice("pytorch", "MLX lacks a bias", "", "MLX lacks a bias")
    write(store, replace(scanned, info=replace(scanned.info, choice=choice)))
    store.change_settings(store.models()[0].id, {"runtime": "mlx"})
    (model,) = await view.models()
    assert (model.runtime, model.runtime_reason) == ("pytorch", "MLX lacks a bias")


async def test_what_the_trial_of_a_loaded_model_found_is_shown(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    scanned = found("m", format="safetensors")
    choice = RuntimeChoice("mlx", "its tensors fit", "pytorch", "MLX is faster")
    write(store, replace(scanned, info=replace(scanned.info, choice=choice)))
    told = ("m runs on PyTorch: MLX computes it wrongly.",)
    scheduler.residencies = [
        Residency("m@safetensors-q4_0", "safetensors", "r", "n", 256, 0.1, (), "pytorch", told)
    ]
    await view._model_states.refresh()
    (model,) = await view.models()
    assert model.limitations == told
    assert (model.runtime, model.runtime_reason) == ("pytorch", told[0])


def note(store: CatalogStore, path: str, reason: str) -> None:
    """Note that a file could not be inspected."""
    failed = Inspection(path, "1", "uninspected", reason, 1, 1e12)
    store.record_scan((), (), (), now=1.0, inspections=[failed])


async def test_a_model_that_was_not_inspected_is_inspected_for_its_request(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m"))
    key = store.models()[0].key
    note(store, key, "it took longer than 60 s")
    (shown,) = await view.models()
    assert (shown.state, shown.reason) == ("unavailable", "it took longer than 60 s")
    with pytest.raises(Unavailable, match=r"m@gguf-q4_0 .* longer than 60 s") as caught:
        await view.resolve("m")
    assert caught.value.retry_after_s
    assert scheduler.urgent == [key]
    scheduler.on_rescan = lambda: store.record_scan((), (), (), now=1.0, inspected=[key])
    assert (await view.resolve("m")).id == "m@gguf-q4_0"


async def test_models_that_are_arriving_are_listed_with_the_reason(
    view: CatalogView, store: CatalogStore
) -> None:
    write(store, found("m"))
    notes = [
        arriving("/m/new/model.safetensors", "1", "model.safetensors is arriving", 1e12),
        arriving("/m/other/new.safetensors", "1", "new.safetensors is arriving", 1e12),
        Inspection("/m/slow.onnx", "1", "uninspected", "it took longer than 60 s", 1, 1e12),
        Inspection("/m/README.md", "1", "uninspected", "it took longer than 60 s", 1, 1e12),
        arriving(store.models()[0].key, "1", "m is arriving", 1e12),
    ]
    store.record_scan((), (), (), now=1.0, inspections=notes)
    shown = {one.id: (one.state, one.reason) for one in await view.models()}
    assert shown == {
        "m@gguf-q4_0": ("unavailable", "m is arriving"),
        "new@safetensors": ("unavailable", "model.safetensors is arriving"),
        "new@safetensors-2": ("unavailable", "new.safetensors is arriving"),
        "slow@onnx": ("unavailable", "it took longer than 60 s"),
    }
    for name in ("new", "new@safetensors", "new.safetensors"):
        with pytest.raises(Unavailable, match="is arriving") as caught:
            await view.resolve(name)
        assert caught.value.retry_after_s


@pytest.mark.parametrize("name", ["tiny-lm", "tiny-lm@gguf-q4_0", "Tiny-LM-Q4_0.gguf"])
async def test_a_new_file_that_was_not_inspected_is_told_by_its_name(
    name: str, view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    path = "/m/Tiny-LM-Q4_0.gguf"
    note(store, path, "the process that inspects files did not start (Too many open files)")
    with pytest.raises(Unavailable, match="Too many open files") as caught:
        await view.resolve(name)
    assert caught.value.status == 503
    assert scheduler.urgent == [path]
    with pytest.raises(ModelNotFound):
        await view.resolve("another")


async def test_a_model_whose_file_is_back_is_found_by_its_request(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m"))
    write(store, missing=("/m/m-gguf-q4_0",))
    scheduler.on_rescan = lambda: write(store, found("m"))
    assert (await view.resolve("m")).id == "m@gguf-q4_0"


async def test_a_missing_model_is_told_without_the_scheduler(
    view: CatalogView, store: CatalogStore, scheduler: Scheduler
) -> None:
    write(store, found("m"))
    write(store, missing=("/m/m-gguf-q4_0",))

    def die() -> None:
        raise EngineFailed("The scheduler died.")

    scheduler.on_rescan = die
    with pytest.raises(ModelFileMissing):
        await view.resolve("m")
    with pytest.raises(EngineFailed):
        await view.resolve("unknown")


async def test_a_scan_that_takes_long_is_not_waited_for(
    view: CatalogView,
    store: CatalogStore,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalog_module, "_SCAN_LIMIT_S", 0.01)
    write(store, found("m"))
    scheduler.on_rescan = lambda: asyncio.Event().wait()
    with pytest.raises(Unavailable, match="still being scanned"):
        await view.resolve("unknown")
    assert (await view.resolve("m")).id == "m@gguf-q4_0"


async def test_many_unknown_names_read_the_catalog_once(
    view: CatalogView, store: CatalogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, found("m"))
    reads: list[int] = []
    models = view._store.models

    def counted() -> Any:
        reads.append(1)
        return models()

    monkeypatch.setattr(view._store, "models", counted)
    for number in range(20):
        with pytest.raises(ModelNotFound):
            await view.resolve(f"unknown-{number}")
    assert len(reads) == 1
    write(store, found("n"))
    with pytest.raises(ModelNotFound, match="n@gguf-q4_0"):
        await view.resolve("n@gguf-q4_1")
    assert len(reads) == 2
