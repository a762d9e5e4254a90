"""What kind of text model a folder holds, how long its inputs may be, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from backends.hf.folder import folder_info, read_folder
from backends.special_frame import gives_types
from core.errors import BrokenModel
from core.types import Capability

CONFIG: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "vocab_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
ROBERTA = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
ROTARY = {"model_type": "nomic_bert", "rope_parameters": {"rope_theta": 1000.0}}


def info(folder: Path, **config: Any) -> ModelInfo:
    """Describe a folder with this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    weights = folder / "model.safetensors"
    weights.write_bytes(b"x")
    return folder_info(
        "safetensors", read_folder(folder), (weights,),
        parameters=1, weights_bytes=1, quantization="f32",
    )  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("labels", [{"id2label": {"0": "LABEL_0"}}, {"num_labels": 1}])
@pytest.mark.parametrize(
    ("model_type", "name"), [("bert", "Bert"), ("xlm-roberta", "XLMRoberta"), ("qwen3", "Qwen3")]
)
def test_a_model_with_one_label_reranks(
    tmp_path: Path, labels: dict[str, Any], model_type: str, name: str
) -> None:
    config = {"model_type": model_type, "architectures": [f"{name}ForSequenceClassification"]}
    assert info(tmp_path, **config, **labels).capabilities == {Capability.RERANK}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "2 labels"),
        (
            {
                "architectures": ["BertForSequenceClassification"],
                "id2label": {str(n): "x" for n in range(5)},
            },
            "5 labels",
        ),
        ({"architectures": ["BertForTokenClassification"]}, "words of a text"),
        ({"architectures": ["BertForQuestionAnswering"]}, "answer to a question"),
        ({"architectures": ["BertForMultipleChoice"]}, "several answers"),
        (
            {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": {"a": 1}},
            "images",
        ),
        ({"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}, "text half"),
        ({"architectures": ["ClapModel"], "audio_config": {"a": 1}}, "sound"),
        (
            {"architectures": ["BartModel"], "model_type": "bart", "is_encoder_decoder": True},
            "encoder-decoder",
        ),
        (
            {
                "architectures": ["MarianMTModel"],
                "model_type": "marian",
                "is_encoder_decoder": True,
            },
            "encoder-decoder",
        ),
        ({"architectures": ["BartEncoder"], "model_type": "bart"}, "halves"),
    ],
)
def test_other_models_that_read_texts_are_refused_with_the_reason(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BrokenModel, match=reason):
        info(tmp_path, **config)


def test_the_text_encoder_of_an_image_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    t5 = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    with pytest.raises(BrokenModel, match="image"):
        info(tmp_path / "text_encoder", **t5)
    assert info(tmp_path / "elsewhere" / "t5", **t5).capabilities == {Capability.EMBEDDING}


def test_a_reranker_with_other_modules_is_refused(tmp_path: Path) -> None:
    kind = "sentence_transformers.cross_encoder.modules.LogitScore"
    write(tmp_path / "modules.json", [{"type": kind, "path": "1_LogitScore"}])
    config = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    with pytest.raises(BrokenModel, match="LogitScore"):
        info(tmp_path, **config)


@pytest.mark.parametrize(
    ("config", "bert", "tokenizer", "limit"),
    [
        ({}, None, {}, 512),
        ({}, None, {"model_max_length": 128}, 128),
        ({}, None, {"model_max_length": 1e30}, 512),
        ({}, None, {"model_max_length": 10**30}, 512),
        ({}, {"max_seq_length": 256}, {"model_max_length": 128}, 256),
        ({}, {"max_seq_length": 4096}, {}, 512),
        ({}, {"max_seq_length": None}, {"model_max_length": 64}, 64),
        (ROBERTA, None, {}, 512),
        (ROBERTA, {"max_seq_length": 514}, {}, 512),
        (ROTARY, {"max_seq_length": 8192}, {}, 8192),
        (ROTARY, None, {"model_max_length": 8192}, 512),
    ],
)
def test_the_limit_of_input_is_the_true_one(
    tmp_path: Path,
    config: dict[str, Any],
    bert: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    limit: int,
) -> None:
    if bert is not None:
        write(tmp_path / "sentence_bert_config.json", bert)
    write(tmp_path / "tokenizer_config.json", tokenizer)
    assert info(tmp_path, **config).context_length == limit


def test_a_decoder_for_text_keeps_its_trained_context(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer_config.json", {"model_max_length": 16})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert info(tmp_path, **config).context_length == 512


@pytest.mark.parametrize("modules", ["[", "[" * 10_000])
def test_damaged_modules_around_a_folder_are_refused(tmp_path: Path, modules: str) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(BrokenModel, match=r"modules\.json"):
        info(tmp_path / "0_Transformer")


@pytest.mark.parametrize("modules", ["{}", '[{"path": "../.."}]', "[7]", '[{"path": "a\\u0000"}]'])
def test_modules_that_name_another_folder_are_not_its_own(tmp_path: Path, modules: str) -> None:
    (tmp_path / "modules.json").write_text(modules)
    found = info(tmp_path / "0_Transformer")
    assert found.name == "0_Transformer"
    assert tmp_path / "modules.json" not in found.files


def test_the_files_of_all_modules_belong_to_the_model(tmp_path: Path) -> None:
    kinds = ("Transformer", "Pooling", "Dense")
    paths = ("0_Transformer", "1_Pooling", "2_Dense")
    write(
        tmp_path / "modules.json",
        [
            {"path": path, "type": f"sentence_transformers.models.{kind}"}
            for kind, path in zip(kinds, paths, strict=True)
        ],
    )
    write(tmp_path / "2_Dense" / "config.json", {})
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"12345")
    found = info(tmp_path / "0_Transformer")
    assert found.name == tmp_path.name
    for name in ("modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert tmp_path / name in found.files


@pytest.mark.parametrize(
    ("config", "model_type", "expected"),
    [
        ({}, "bert", True),
        ({}, "roberta", False),
        ({"tokenizer_class": "BertTokenizerFast"}, "x", True),
        ({"tokenizer_class": "RobertaTokenizer"}, "bert", False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "bert", False),
        ({"model_input_names": ["input_ids", "token_type_ids"]}, "x", True),
        ({"model_input_names": ["input_ids"], "tokenizer_class": "BertTokenizer"}, "bert", False),
    ],
)
def test_segments_are_given_where_transformers_gives_them(
    config: dict[str, Any], model_type: str, expected: bool
) -> None:
    assert gives_types(config, model_type) is expected
