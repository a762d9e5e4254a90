"""Tests of recognising ONNX models, from their graphs and the folders around them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import EngineOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.info import onnx_info, read_model
from backends.onnx.layout import DecoderLayout, EncoderLayout, read_layout
from core.errors import BrokenModel, InsufficientMemory, NotThisFormat
from core.types import Capability
from tests.onnx_files import (
    CONFIG,
    ENCODER_CONFIG,
    HEAD_DIM,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    decoder,
    encoder,
    write,
    write_folder,
)

GENERATES = frozenset({Capability.CHAT, Capability.COMPLETION})
EMBEDS = frozenset({Capability.EMBEDDING})
GENAI = {
    "model": {
        "type": "llama",
        "context_length": 100,
        "vocab_size": VOCABULARY,
        "eos_token_id": [1, 3],
        "decoder": {
            "head_size": HEAD_DIM,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": LAYERS,
        },
    },
    "search": {"do_sample": True, "temperature": 0.5},
}


def open_shapes(model: Any) -> Any:
    """Let the width of the cache be a name, as the genai builder writes it."""
    for value in (*model.graph.input, *model.graph.output):
        if "." in value.name:
            value.type.tensor_type.shape.dim[3].dim_param = "width"
    return model


def test_a_decoder_is_described(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny", decoder())
    info = onnx_info(path)
    assert info.format == "onnx"
    assert info.name == "tiny"
    assert info.architecture == "llama"
    assert info.quantization == "f32"
    assert info.capabilities == GENERATES
    assert info.context_length == POSITIONS
    assert info.files[0] == path
    assert {file.name for file in info.files} == {"model.onnx", "config.json", "tokenizer.json"}
    assert info.details["n_layer_kv"] == LAYERS
    assert info.details["head_dim"] == HEAD_DIM
    assert info.details["batching"] == "padded"


def test_grouped_attention_of_half_precision_is_seen(tmp_path: Path) -> None:
    model = decoder(attention="grouped", extras=(), dtype="float16")
    info = onnx_info(write_folder(tmp_path, model))
    assert info.quantization == "f16"
    assert info.details["batching"] == "ragged"
    assert info.details["kv_dtype"] == "float16"


def test_variants_in_a_subfolder_share_the_descriptions_above(tmp_path: Path) -> None:
    repository = tmp_path / "Tiny-Instruct"
    write_folder(repository, decoder(), name="onnx/model.onnx")
    write(repository, decoder(dtype="float16"), name="onnx/model_fp16.onnx", external=True)
    first = onnx_info(repository / "onnx" / "model.onnx")
    second = onnx_info(repository / "onnx" / "model_fp16.onnx")
    assert (first.name, second.name) == ("Tiny-Instruct", "Tiny-Instruct-fp16")
    assert (first.quantization, second.quantization) == ("f32", "f16")
    assert [file.name for file in second.files[:2]] == ["model_fp16.onnx", "model_fp16.onnx_data"]
    assert repository / "config.json" in second.files
    assert repository / "onnx" / "model.onnx" not in second.files


def test_only_the_folder_named_onnx_looks_above(tmp_path: Path) -> None:
    write_folder(tmp_path, decoder(), name="other/model.onnx")
    with pytest.raises(BrokenModel, match=r"config\.json"):
        onnx_info(tmp_path / "other" / "model.onnx")


def test_a_genai_folder_needs_no_other_description(tmp_path: Path) -> None:
    model = open_shapes(decoder(attention="grouped", extras=()))
    path = write(tmp_path, model)
    (tmp_path / "genai_config.json").write_text(json.dumps(GENAI))
    info = onnx_info(path)
    assert info.context_length == 100
    assert info.capabilities == GENERATES
    assert info.details["head_dim"] == HEAD_DIM
    assert tmp_path / "genai_config.json" in info.files
    described = read_model(path)
    assert described.end_ids == {1, 3}
    assert described.folder is not None
    assert described.folder.generation_config["temperature"] == 0.5


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": 3}'])
def test_a_damaged_genai_config_is_no_description(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, decoder())
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(BrokenModel, match="genai_config"):
        onnx_info(path)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: decoder(extras=("position_ids", "pixel_values")), "'pixel_values'"),
        (
            lambda: encoder(inputs=("input_ids", "attention_mask", "encoder_hidden_states")),
            "encoder_hidd",
        ),
        (lambda: encoder(inputs=("attention_mask",)), "no input 'input_ids'"),
        (lambda: encoder("logits"), "no past key values"),
        (lambda: encoder("scores"), "no output of token vectors"),
        (lambda: encoder("text_embeds"), "CLIP"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, build: Any, reason: str) -> None:
    path = write_folder(tmp_path, build())
    with pytest.raises(BrokenModel, match=reason):
        onnx_info(path)


def _past(model: Any) -> Any:
    return model.graph.input[3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: _past(model).type.tensor_type.shape.dim.pop(), "3 dimensions"),
        (lambda model: setattr(_past(model).type.tensor_type, "elem_type", 3), "int8"),
        (lambda model: model.graph.output.pop(), "no output belongs"),
        (lambda model: model.graph.output.pop(0), "no output 'logits'"),
        (
            lambda model: setattr(_past(model).type.tensor_type.shape.dim[2], "dim_value", 9),
            "fixed length",
        ),
        (
            lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 1),
            "of the type 'float32'",
        ),
        (
            lambda model: model.graph.input[2].type.tensor_type.shape.dim.add(),
            "'position_ids' has 3 dimensions",
        ),
    ],
)
def test_interfaces_of_another_shape_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    model = decoder()
    change(model)
    with pytest.raises(BrokenModel, match=reason):
        onnx_info(write_folder(tmp_path, model))


def test_a_width_that_nobody_tells_is_refused(tmp_path: Path) -> None:
    graph = read_model(write_folder(tmp_path, open_shapes(decoder()))).graph
    with pytest.raises(BrokenModel, match="not known"):
        read_layout(graph, {})


def test_rows_are_batched_only_where_the_graph_allows_it(tmp_path: Path) -> None:
    model = decoder()
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    layout = read_model(write_folder(tmp_path, model)).layout
    assert isinstance(layout, DecoderLayout)
    assert not layout.is_batchable


def test_an_encoder_is_described(tmp_path: Path) -> None:
    info = onnx_info(write_folder(tmp_path, encoder(), config=ENCODER_CONFIG))
    assert info.capabilities == EMBEDS
    assert info.architecture == "bert"
    assert info.details["is_encoder"] is True
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    assert onnx_info(tmp_path / "model.onnx").context_length == 40


async def test_an_encoder_of_one_shape_gets_one_padded_row(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = encoder()
    for value in model.graph.input:
        for dimension, size in zip(value.type.tensor_type.shape.dim, (1, 16), strict=True):
            dimension.dim_value = size
    path = write_folder(tmp_path / "fixed", model, config=ENCODER_CONFIG)
    layout = read_model(path).layout
    assert isinstance(layout, EncoderLayout)
    assert (layout.length, layout.is_batchable) == (16, False)
    info = onnx_info(path)
    assert info.context_length == 16
    engine = OnnxBackend().open(info, EngineOptions(threads=1))
    found = await engine.embed(["t3", "t3 t4", "t5 " * 40])
    assert (found.prompt_tokens, found.truncated_tokens) == (1 + 2 + 16, 24)
    free = write_folder(tmp_path / "free", encoder(), config=ENCODER_CONFIG)
    other = OnnxBackend().open(onnx_info(free), EngineOptions(threads=1))
    wanted = await other.embed(["t3", "t3 t4", "t5 " * 16])
    np.testing.assert_allclose(found.vectors, wanted.vectors, atol=1e-5)
    await engine.close()
    await other.close()


def test_the_half_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, encoder(), config=ENCODER_CONFIG)
    for name in ("encoder_model.onnx", "encoder_model_quantized.onnx"):
        half = write(tmp_path, encoder(), name=name)
        with pytest.raises(BrokenModel, match="half of an encoder-decoder"):
            onnx_info(half)


def test_an_encoder_alone_is_described(tmp_path: Path) -> None:
    path = write(tmp_path / "small", encoder())
    info = onnx_info(path)
    assert (info.name, info.context_length, info.capabilities) == ("small", 512, EMBEDS)
    assert info.files == (path,)


def test_other_files_are_not_this_format(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("{}")
    with pytest.raises(NotThisFormat):
        OnnxBackend().identify(path)


def test_the_estimate_grows_with_the_context_and_fits_the_limit(tmp_path: Path) -> None:
    backend = OnnxBackend()
    info = backend.identify(write_folder(tmp_path, decoder(attention="grouped", extras=())))
    small = backend.estimate(info, EngineOptions(context_tokens=64, kv_tokens=64))
    large = backend.estimate(info, EngineOptions(context_tokens=128, kv_tokens=256))
    # Keys and values of one head of each layer, as float32.
    assert small.kv_bytes == 64 * LAYERS * 2 * HEAD_DIM * 4
    assert large.kv_bytes == 4 * small.kv_bytes
    assert large.prefix_bytes == 0
    assert large.weights_bytes == info.details["weights_bytes"]
    with pytest.raises(InsufficientMemory):
        backend.estimate(info, EngineOptions(memory_limit_bytes=1000))


def test_caches_that_are_made_anew_count_twice(tmp_path: Path) -> None:
    backend = OnnxBackend()
    options = EngineOptions(context_tokens=64, kv_tokens=64)
    info = backend.identify(write_folder(tmp_path, decoder()))
    in_place = replace(info, details={**info.details, "batching": "ragged"})
    twice, once = backend.estimate(info, options), backend.estimate(in_place, options)
    assert twice.kv_bytes == 2 * once.kv_bytes


def test_a_graph_that_onnxruntime_refuses_is_broken(tmp_path: Path) -> None:
    model = decoder()
    model.graph.node[0].op_type = "NoSuchOperator"
    backend = OnnxBackend()
    info = backend.identify(write_folder(tmp_path, model))
    with pytest.raises(BrokenModel, match="NoSuchOperator"):
        backend.open(info, EngineOptions(max_sequences=2))


def test_a_model_without_a_tokenizer_is_broken(tmp_path: Path) -> None:
    path = write(tmp_path, decoder())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    backend = OnnxBackend()
    with pytest.raises(BrokenModel, match="tokenizer"):
        backend.open(backend.identify(path), EngineOptions(max_sequences=2))


def test_the_runtime_is_available() -> None:
    assert OnnxBackend().availability().is_available
