"""Tests of reading ONNX graphs: true ones, and damaged or hostile ones."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from backends.onnx.graph import read_graph
from core.errors import BrokenModel, NotThisFormat
from tests.onnx_files import HEAD_DIM, LAYERS, VOCABULARY, WIDTH, decoder, encoder, write


def tensor(**changes: Any) -> Any:
    """Return a weight of four float32 numbers with some fields changed."""
    from onnx import TensorProto

    fields = {"name": "w", "data_type": TensorProto.FLOAT, "dims": [4], "raw_data": bytes(16)}
    return TensorProto(**(fields | changes))


def external(location: str, offset: str = "0", length: str = "16") -> Any:
    from onnx import TensorProto

    weight = tensor(data_location=TensorProto.EXTERNAL)
    weight.ClearField("raw_data")
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=value)
    return weight


def with_weight(folder: Path, weight: Any) -> Path:
    model = encoder()
    model.graph.initializer.append(weight)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def field(number: int, data: bytes) -> bytes:
    """Return a length-delimited field of fewer than 16 KiB."""
    assert len(data) < 1 << 14
    return bytes((number << 3 | 2, len(data) & 0x7F | 0x80, len(data) >> 7)) + data


def test_reads_what_the_onnx_package_wrote(tmp_path: Path) -> None:
    model = decoder(extras=("position_ids", "use_cache_branch"))
    graph = read_graph(write(tmp_path, model))
    assert graph.ir_version == 8
    assert graph.opsets == {"": 17, "com.microsoft": 1}
    assert [value.name for value in graph.inputs] == [value.name for value in model.graph.input]
    past = graph.input("past_key_values.1.value")
    assert past is not None
    assert past.dtype == "float32"
    assert past.shape == ("batch", 2, "past", HEAD_DIM)
    logits = graph.output("logits")
    assert logits is not None
    assert logits.shape == ("batch", "kept", VOCABULARY)
    assert graph.operators["If"] == 2 * LAYERS
    # Those inside of the branches count as well.
    assert graph.consumers["past_key_values.0.key"] == {"Identity", "Slice"}
    assert graph.producers["present.0.key"] == "Concat"
    assert graph.external_files == ()
    floats = sum(len(w.raw_data) for w in model.graph.initializer if w.data_type == 1)
    assert graph.weights["float32"] == floats
    assert graph.shapes["head"] == (WIDTH, VOCABULARY)


def test_weights_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    model = encoder()
    model.graph.input.append(helper.make_tensor_value_info("embed", TensorProto.FLOAT, [64, 32]))
    graph = read_graph(write(tmp_path, model))
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask"]


def test_packed_weights_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    model = encoder()
    packed = tensor(
        name="packed", data_type=TensorProto.UINT8, dims=[32, 2, 16], raw_data=bytes(1024)
    )
    model.graph.initializer.append(packed)
    model.graph.node.append(
        helper.make_node(
            "MatMulNBits", ["x", "packed"], ["y"], domain="com.microsoft", K=64, N=32, bits=4
        )
    )
    before = read_graph(write(tmp_path, encoder(), name="plain.onnx")).parameters
    graph = read_graph(write(tmp_path, model))
    assert graph.packed == {4: 64 * 32}
    assert graph.parameters == before + 64 * 32


def test_weights_beside_the_graph_are_found(tmp_path: Path) -> None:
    graph = read_graph(write(tmp_path, decoder(), external=True))
    assert graph.external_files == (tmp_path / "model.onnx_data",)
    assert graph.external["model.onnx_data"] <= graph.external_files[0].stat().st_size


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    write(blobs, decoder(), external=True)
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx_data"):
        (snapshot / name).symlink_to(blobs / name)
    graph = read_graph(snapshot / "model.onnx")
    assert graph.external_files == (snapshot / "model.onnx_data",)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", b"GGUF" * 10, bytes(100),
     b"\x08\x08", b"\x08\x08\x12\x02ab", b"\x09" + bytes(8)],
)  # fmt: skip
def test_other_files_are_not_this_format(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises((NotThisFormat, BrokenModel)) as caught:
        read_graph(path)
    # Only what starts as ONNX models do and breaks off is called damaged.
    assert (caught.type is BrokenModel) == (content == b"\x08")


def test_a_pointer_to_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(BrokenModel, match="Git LFS pointer"):
        read_graph(path)


def test_what_is_no_file_is_not_this_format(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("missing.onnx", "pipe.onnx", "."):
        with pytest.raises(NotThisFormat):
            read_graph(tmp_path / name)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = write(tmp_path, encoder()).read_bytes()
    path = tmp_path / "cut.onnx"
    whole = read_graph(tmp_path / "model.onnx")
    graph_end = data.rindex(b"\x42")
    for end in [*range(0, 200), *range(200, graph_end - 20, 37)]:
        path.write_bytes(data[:end])
        with pytest.raises((BrokenModel, NotThisFormat)):
            read_graph(path)
    assert whole.inputs


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    data = write(tmp_path, decoder(attention="grouped", extras=())).read_bytes()
    chance = random.Random(3)
    path = tmp_path / "damaged.onnx"
    outcomes = set()
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            read_graph(path)
            outcomes.add("read")
        except (BrokenModel, NotThisFormat) as problem:
            outcomes.add(type(problem).__name__)
    assert {"read", "BrokenModel"} <= outcomes


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/passwd", "a/../../outside", "", "..\\outside"]
)
def test_weights_outside_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(16))
    with pytest.raises(BrokenModel, match="outside of its folder"):
        read_graph(with_weight(folder, external(location)))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(16))
    (folder / "data").symlink_to(tmp_path / "outside")
    with pytest.raises(BrokenModel, match="outside of its folder"):
        read_graph(with_weight(folder, external("data")))


def test_a_location_without_its_flag_is_checked_too(tmp_path: Path) -> None:
    weight = external("../outside")
    weight.ClearField("data_location")
    with pytest.raises(BrokenModel, match="outside of its folder"):
        read_graph(with_weight(tmp_path, weight))


@pytest.mark.parametrize("place", ["attribute", "branch", "function", "sparse"])
def test_weights_are_checked_wherever_they_hide(tmp_path: Path, place: str) -> None:
    from onnx import SparseTensorProto, helper

    model, weight = encoder(), external("../outside")
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    if place == "attribute":
        model.graph.node.append(constant)
    elif place == "branch":
        branch = helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=branch))
    elif place == "function":
        opset = helper.make_opsetid("", 17)
        model.functions.append(helper.make_function("own", "f", [], ["c"], [constant], [opset]))
    else:
        model.graph.sparse_initializer.append(SparseTensorProto(values=weight, dims=[4]))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BrokenModel, match="outside of its folder"):
        read_graph(path)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: external("data"), "missing"),
        (lambda: external("data", offset="-1"), "is not a number"),
        (lambda: external("data", offset="9" * 30), "is not a number"),
        (lambda: external("data", length="15"), "15 bytes, not 16"),
        (lambda: tensor(dims=[5]), "16 bytes, not 20"),
        (lambda: tensor(dims=[-4]), "invalid shape"),
        (lambda: tensor(dims=[1] * 20), "invalid shape"),
        (lambda: tensor(dims=[2**40, 2**40]), "elements"),
        (lambda: tensor(data_type=99), "unknown type"),
        (lambda: tensor(raw_data=None, dims=[1_000_000]), "no data"),
    ],
)
def test_impossible_weights_are_refused(tmp_path: Path, build: Any, reason: str) -> None:
    with pytest.raises(BrokenModel, match=reason):
        read_graph(with_weight(tmp_path, build()))


def test_weights_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(10))
    with pytest.raises(BrokenModel, match="6 bytes of its weights are missing"):
        read_graph(with_weight(tmp_path, external("data")))


def test_graphs_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    graph = b""
    for _ in range(50):
        graph = field(1, field(5, field(6, graph)))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08" + field(7, graph))
    with pytest.raises(BrokenModel, match="nested"):
        read_graph(path)


def test_a_graph_of_endless_fields_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.onnx.proto._MAX_FIELDS", 1000)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08" + field(7, field(1, b"") * 1001))
    with pytest.raises(BrokenModel, match="more than 1,000 fields"):
        read_graph(path)


def test_a_text_of_endless_length_is_refused(tmp_path: Path) -> None:
    model = encoder()
    model.graph.input[0].name = "x" * 70_000
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BrokenModel, match="70,000 bytes"):
        read_graph(path)


def test_a_number_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08" + b"\xff" * 20)
    with pytest.raises(BrokenModel, match="no end"):
        read_graph(path)
