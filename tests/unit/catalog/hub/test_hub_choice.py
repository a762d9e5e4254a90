"""Which model of a repository is best here: native first, then what fits, speed, precision."""

from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import ModelInfo
from catalog.convert.graph import plan
from catalog.hub.choice import Candidate, HubChoice, choose, preferred_formats
from catalog.hub.entries import HubEntry, RepositoryFile
from catalog.hub.fit import Fit, Room, Verdict
from catalog.hub.remote import RemoteModel
from core.units import GIB

PARAMETERS = 8_000_000_000
MAC = preferred_formats("darwin")
ALL = frozenset(MAC)
ROOM = Room(10 * GIB, 10 * GIB)
CONVERTIBLE = {source: plan(source, "gguf")[-1] for source in ("safetensors", "pytorch")}


def candidate(
    name: str, format: str, bits: float, verdict: Verdict = "fits", refused: str = ""
) -> Candidate:
    quantization = name.rpartition("-")[2]
    size = int(PARAMETERS * bits / 8)
    weights = (RepositoryFile(name, size, ""),)
    entry = HubEntry(name, format, quantization, weights, ())
    info = ModelInfo(
        format, "m", "llama", quantization, (Path(name),), size, PARAMETERS, 8192, frozenset()
    )
    model = RemoteModel(entry, None if refused else info, refused, bool(refused))
    return Candidate(model, Fit(verdict, "Numbers.", ROOM, weights_bytes=size))


def chosen(*candidates: Candidate, runnable: frozenset[str] = ALL) -> tuple[str, HubChoice]:
    found = choose(candidates, runnable, CONVERTIBLE, MAC)
    return found.candidate.model.entry.name if found.candidate else "", found


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        # The most precise of 4 to 8 bits that fits.
        ([("m-q4_k_m", "gguf", 4.9), ("m-q8_0", "gguf", 8.5), ("m-f16", "gguf", 16)], "m-q8_0"),
        ([("m-q4_k_m", "gguf", 4.9), ("m-q8_0", "gguf", 8.5, "too_big")], "m-q4_k_m"),
        ([("m-q4_k_m", "gguf", 4.9), ("m-q8_0", "gguf", 8.5, "tight")], "m-q4_k_m"),
        ([("m-q4_k_m", "gguf", 4.9, "tight"), ("m-q8_0", "gguf", 8.5, "too_big")], "m-q4_k_m"),
        # Fewer bits only without any other.
        ([("m-q2_k", "gguf", 2.9), ("m-q3_k", "gguf", 3.6), ("m-f16", "gguf", 16)], "m-f16"),
        ([("m-q2_k", "gguf", 2.9), ("m-q3_k", "gguf", 3.6)], "m-q3_k"),
        ([("m-bf16", "gguf", 16), ("m-f32", "gguf", 32)], "m-bf16"),
        # The faster format.
        ([("m-q8_0", "gguf", 8.5), ("m-4bit", "mlx", 4.5)], "m-4bit"),
        ([("m-bf16", "safetensors", 16), ("m-q4", "onnx", 4.5)], "m-bf16"),
        ([("m-bf16", "mlx", 16, "too_big"), ("m-q4_0", "gguf", 4.5)], "m-q4_0"),
    ],
)  # fmt: skip
def test_hub_choice_is_the_best_here(
    candidates: list[tuple[str, str, float]], expected: str
) -> None:
    name, found = chosen(*(candidate(*one) for one in candidates))
    assert name == expected
    assert found.convert_to == ""
    assert found.reason.endswith("Numbers.")


def test_hub_choice_says_why() -> None:
    q4, q8 = candidate("m-q4_k_m", "gguf", 4.9), candidate("m-q8_0", "gguf", 8.5)
    mlx = candidate("m-4bit", "mlx", 4.5)
    assert chosen(q4, q8)[1].reason == (
        "gguf runs here. q8_0 is the most precise of 4 to 8 bits that fits. Numbers."
    )
    assert chosen(q4, mlx)[1].reason == "mlx is the fastest of its formats here. Numbers."
    tight = replace(mlx, fit=replace(mlx.fit, verdict="tight"))
    assert chosen(q4, tight)[1].reason.startswith("gguf fits better than mlx, which is faster")


def test_hub_choice_converts_only_what_cannot_run() -> None:
    weights = candidate("m-bf16", "safetensors", 16)
    name, found = chosen(weights, runnable=frozenset({"gguf"}))
    assert (name, found.convert_to) == ("m-bf16", "gguf")
    assert "can be converted to gguf" in found.reason
    native = candidate("m-q2_k", "gguf", 2.9)
    name, found = chosen(weights, native, runnable=frozenset({"gguf"}))
    assert (name, found.convert_to) == ("m-q2_k", "")


def test_hub_choice_of_nothing_has_a_reason() -> None:
    assert "no model in a format" in chosen()[1].reason
    big = candidate("m-q4_0", "gguf", 4.5, "too_big")
    larger = candidate("m-q8_0", "gguf", 8.5, "too_big")
    assert chosen(larger, big)[1].reason == "Even the smallest, m-q4_0 (gguf), is too big. Numbers."
    refused = candidate("m-q4_0", "gguf", 4.5, "unknown", "It is an image generator.")
    assert "It is an image generator." in chosen(refused)[1].reason
    other = candidate("m", "coreml", 16)
    found = chosen(other, runnable=frozenset({"gguf"}))[1]
    assert found.reason == "Its formats (coreml) do not run here and cannot be converted."
    unknown = candidate("m-int8", "onnx", 8, "unknown")
    name, found = chosen(unknown)
    assert (name, found.reason) == ("m-int8", "Whether it fits is unknown: Numbers.")


def test_hub_choice_reads_bits_from_names_without_an_inspection() -> None:
    for name, bits in (("m-q4_k_m", 4), ("m-iq2_xs", 2), ("m-8bit", 8), ("m-bf16", 16), ("m-", 16)):
        assert candidate(name, "gguf", 5.0, refused="why").bits == bits


def test_hub_formats_of_a_mac_begin_with_its_gpu() -> None:
    assert preferred_formats("darwin")[0] == "mlx"
    assert preferred_formats("linux")[0] == "gguf"
    assert set(preferred_formats("darwin")) == set(preferred_formats("linux"))
