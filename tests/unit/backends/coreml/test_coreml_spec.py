"""Reading Core ML packages: bounds, damaged files, and what is no package at all."""

import json
import os
from pathlib import Path

import pytest

from backends.coreml.layout import causal_mask, read_layout
from backends.coreml.mil.program import decode, read_program
from backends.coreml.mil.wire import Message, WireError, read_varint
from backends.coreml.spec import CoremlSpec, Feature, read_spec
from core.errors import BrokenModel, NotThisFormat


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def nested(field: int, *content: bytes) -> bytes:
    data = b"".join(content)
    return varint(field << 3 | 2) + varint(len(data)) + data


def array(name: str, shape: tuple[int, ...]) -> bytes:
    """Return a feature: an int32 array."""
    kind = nested(5, b"".join(number(1, length) for length in shape), number(2, 131104))
    return nested(1, name.encode()) + nested(3, kind)


def model(*features: bytes, program: bytes = b"") -> bytes:
    return number(1, 9) + nested(2, *features) + nested(502, program)


def write_package(folder: Path, data: bytes, path: str = "com.apple.CoreML/model.mlmodel") -> Path:
    package = folder / "tiny.mlpackage"
    (package / "Data/com.apple.CoreML").mkdir(parents=True)
    (package / "Data/com.apple.CoreML/model.mlmodel").write_bytes(data)
    items = {"a": {"path": path, "name": "model.mlmodel"}}
    manifest = {"itemInfoEntries": items, "rootModelIdentifier": "a"}
    (package / "Manifest.json").write_text(json.dumps(manifest))
    return package / "Manifest.json"


def test_spec_is_read_from_the_manifest_and_from_the_model_file(tmp_path: Path) -> None:
    manifest = write_package(tmp_path, model(nested(1, array("inputIds", (1, 8)))))
    spec = read_spec(manifest)
    assert spec.inputs["inputIds"] == Feature("inputIds", "int32", (1, 8), ((1, 1), (8, 8)))
    assert spec.package == tmp_path / "tiny.mlpackage"
    assert read_spec(spec.model_file) == spec


@pytest.mark.parametrize("path", ["../../secret", "/etc/hosts", "a/../../../b", "x\0y"])
def test_manifest_cannot_lead_out_of_the_package(tmp_path: Path, path: str) -> None:
    manifest = write_package(tmp_path, model(), path)
    with pytest.raises(BrokenModel, match="outside of it"):
        read_spec(manifest)


@pytest.mark.parametrize("text", ["{}", "[]", '{"itemInfoEntries": {}}', '{"itemInfoEntries": []}'])
def test_another_manifest_is_not_this_format(tmp_path: Path, text: str) -> None:
    (tmp_path / "Manifest.json").write_text(text)
    with pytest.raises(NotThisFormat):
        read_spec(tmp_path / "Manifest.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "not json"])
def test_a_damaged_manifest_is_broken(tmp_path: Path, text: str) -> None:
    manifest = write_package(tmp_path, model())
    manifest.write_text(text)
    with pytest.raises(BrokenModel, match="not valid JSON"):
        read_spec(manifest)


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    manifest = write_package(tmp_path, model())
    read_spec(manifest).model_file.unlink()
    with pytest.raises(BrokenModel, match=r"model\.mlmodel is missing"):
        read_spec(manifest)


def test_a_pipe_in_place_of_the_model_does_not_hang(tmp_path: Path) -> None:
    manifest = write_package(tmp_path, model())
    model_file = read_spec(manifest).model_file
    model_file.unlink()
    os.mkfifo(model_file)
    with pytest.raises(BrokenModel, match="missing"):
        read_spec(manifest)


def test_a_file_cut_anywhere_is_broken(tmp_path: Path) -> None:
    data = model(nested(1, array("inputIds", (1, 8))), program=b"abc")
    manifest = write_package(tmp_path, data)
    model_file = read_spec(manifest).model_file
    for end in range(len(data)):
        model_file.write_bytes(data[:end])
        with pytest.raises(BrokenModel):
            read_spec(manifest)


def test_a_length_beyond_the_file_is_broken(tmp_path: Path) -> None:
    manifest = write_package(tmp_path, number(1, 9) + varint(2 << 3 | 2) + varint(2**62))
    with pytest.raises(BrokenModel, match="cut off"):
        read_spec(manifest)


def test_an_impossible_shape_is_broken(tmp_path: Path) -> None:
    manifest = write_package(tmp_path, model(nested(1, array("inputIds", (1, 2**40)))))
    with pytest.raises(BrokenModel, match="invalid"):
        read_spec(manifest)


def test_a_text_file_named_mlmodel_is_not_this_format(tmp_path: Path) -> None:
    (tmp_path / "x.mlmodel").write_text("hello")
    with pytest.raises(NotThisFormat):
        read_spec(tmp_path / "x.mlmodel")


def test_a_compiled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "m.mlmodelc/weights").mkdir(parents=True)
    (tmp_path / "m.mlmodelc/coremldata.bin").write_bytes(b"x")
    with pytest.raises(BrokenModel, match="compiled"):
        read_spec(tmp_path / "m.mlmodelc/coremldata.bin")


def test_a_damaged_program_is_broken(tmp_path: Path) -> None:
    for program in (b"", b"\xff", nested(2, nested(1, b"main"), nested(2, b"\x0a\xff"))):
        folder = tmp_path / str(len(program))
        spec = read_spec(write_package(folder, model(program=program)))
        with pytest.raises(BrokenModel, match="program"):
            read_program(spec)


def test_wire_numbers_are_bounded() -> None:
    assert read_varint(memoryview(varint(300)), 0) == (300, 2)
    with pytest.raises(WireError):
        read_varint(memoryview(b"\x80" * 11), 0)
    assert Message(memoryview(number(1, 2**64 - 5))).number(1) == -5


def test_packed_elements_are_unpacked_in_order() -> None:
    assert decode(b"\x21\xf3", "int4", (4,)).tolist() == [1, 2, 3, -1]
    assert decode(bytes([0b11_010_001, 0b0]), "uint3", (3,)).tolist() == [1, 2, 3]
    assert decode(b"\x80\x3f", "bfloat16", (1,)).tolist() == [1.0]
    with pytest.raises(WireError, match="3 bytes"):
        decode(b"abc", "float16", (2,))


def test_causal_mask_shows_the_past_and_hides_the_future() -> None:
    shown = causal_mask(2, 2)[0, 0] == 0
    assert shown.tolist() == [[True, True, True, False], [True] * 4]
    slid = causal_mask(2, 2, 2)[0, 0] == 0
    assert slid.tolist() == [[False, True, True, False], [False, False, True, True]]


def spec_of(inputs: dict[str, tuple[int | None, ...]], outputs: tuple[str, ...]) -> CoremlSpec:
    """Return a description; a number is the highest length, a negative one the only length."""

    def feature(name: str, highest: tuple[int | None, ...]) -> Feature:
        bounds = tuple((-n, -n) if n is not None and n < 0 else (1, n) for n in highest)
        return Feature(name, "int32", tuple(low for low, _ in bounds), bounds)

    cache = Feature("keyCache", "float16", (2, 1, 3, 64, 8))
    return CoremlSpec(
        files=(Path("/m/m.mlpackage/Manifest.json"),),
        model_file=Path("/m/m.mlpackage/Data/model.mlmodel"),
        root=Path("/m/m.mlpackage/Data"),
        version=9,
        kind=502,
        inputs={name: feature(name, highest) for name, highest in inputs.items()},
        outputs={name: Feature(name, "float16", ()) for name in outputs},
        states={"keyCache": cache} if "causalMask" in inputs else {},
    )


def test_layout_of_a_stateful_model() -> None:
    spec = spec_of({"inputIds": (-1, 64), "causalMask": (-1, -1, 64, 64)}, ("logits",))
    layout = read_layout(spec, 8192)
    assert (layout.context, layout.causal, layout.is_encoder) == (64, "causalMask", False)
    endless = spec_of({"inputIds": (-1, None), "causalMask": (-1, -1, None, None)}, ("logits",))
    assert read_layout(endless, 8192).context == 64


def test_layout_of_a_padded_model() -> None:
    spec = spec_of({"inputIds": (-1, -128), "attentionMask": (-1, -128)}, ("logits",))
    layout = read_layout(spec, 8192)
    assert (layout.context, layout.causal, layout.padded_length(5)) == (128, "", 128)


@pytest.mark.parametrize(
    ("inputs", "outputs", "problem"),
    [
        ({"image": (-1, -3)}, ("logits",), "not a text model"),
        ({"input_ids": (-1, 64), "current_pos": (1,)}, ("hidden_states",), "one chunk"),
        ({"inputIds": (-1, 8), "pixels": (-1, -3)}, ("logits",), "'pixels'"),
        ({"inputIds": (-1, -8), "causalMask": (-1, -1, 8, 8)}, ("logits",), "at least 8"),
        ({"inputIds": (-1, 8), "causalMask": (-1, -1, 8, -8)}, ("logits",), "total"),
        ({"inputIds": (-1, 8), "causalMask": (-1, -1, 8, 8)}, ("hidden",), "gives no logits"),
        ({"inputIds": (-1, -8)}, ("last_hidden_state",), "no attention mask"),
        ({"inputIds": (-1, 8)}, ("a", "b"), "neither logits nor"),
    ],
)
def test_layout_that_is_not_known_is_refused_with_the_reason(
    inputs: dict[str, tuple[int | None, ...]], outputs: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(BrokenModel, match=problem):
        read_layout(spec_of(inputs, outputs), 512)
