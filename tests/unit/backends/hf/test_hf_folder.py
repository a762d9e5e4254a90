"""Tests of what a Hugging Face folder's files say, the hostile ones included."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from backends.hf.folder import (
    SafetensorsHeader,
    folder_info,
    is_mlx,
    quantization_of,
    read_folder,
    safetensors_header,
    tokenizer_files,
    weight_files,
)
from core.errors import BrokenModel, NotThisFormat
from core.types import Capability

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
    "vocab_size": 100,
}
BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "pad_token_id": 0,
}
GENERATES = frozenset({Capability.CHAT, Capability.COMPLETION})
EMBEDS = frozenset({Capability.EMBEDDING})


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def model(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    write_json(folder / "config.json", (LLAMA if config is None else config) | changes)
    return folder


def info(folder: Path) -> ModelInfo:
    path = folder / "model.safetensors"
    if not path.exists():
        path.write_bytes(b"weights")
    return folder_info(
        "safetensors",
        read_folder(folder),
        (path,),
        parameters=1000,
        weights_bytes=2000,
        quantization="bf16",
        details={"runs_on": "here"},
    )


def test_a_decoder_is_described(tmp_path: Path) -> None:
    folder = model(tmp_path / "Tiny-Llama")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not the model's")
    (folder / "chat_template.jinja").write_text("{% if tools %}{% endif %}<think>")
    described = info(folder)
    names = [path.name for path in described.files]
    assert names == ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
    assert described.size_bytes == sum(path.stat().st_size for path in described.files)
    assert (described.name, described.architecture) == ("Tiny-Llama", "llama")
    assert (described.license, described.context_length) == ("apache-2.0", 4096)
    assert described.capabilities == GENERATES | {Capability.TOOLS, Capability.REASONING}
    assert described.chat_template == "{% if tools %}{% endif %}<think>"
    assert dict(described.details) == {
        "n_layer": 2, "n_embd": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16, "n_ff": 128,
        "vocabulary_size": 100, "weights_bytes": 2000, "torch_dtype": "bfloat16",
        "is_encoder": False, "runs_on": "here",
    }  # fmt: skip


def test_files_are_absolute_whatever_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model(tmp_path / "m").parent)
    assert read_folder(Path("m")).path == tmp_path / "m"


@pytest.mark.parametrize(
    ("architectures", "model_type", "modules", "expected"),
    [
        (["LlamaForCausalLM"], "llama", False, GENERATES),
        (["GPT2LMHeadModel"], "gpt2", False, GENERATES),
        ([], "llama", False, GENERATES),
        (None, "llama", False, GENERATES),
        (["BertModel"], "bert", False, EMBEDS),
        (["BertForMaskedLM"], "bert", False, EMBEDS),
        (None, "modernbert", False, EMBEDS),
        (["Qwen2Model"], "qwen2", False, EMBEDS),
        (["Qwen3ForCausalLM"], "qwen3", True, EMBEDS),
        (["T5EncoderModel"], "t5", True, EMBEDS),
    ],
)
def test_capabilities_follow_the_head(
    tmp_path: Path,
    architectures: list[str] | None,
    model_type: str,
    modules: bool,
    expected: frozenset[Capability],
) -> None:
    model(tmp_path, architectures=architectures, model_type=model_type)
    if modules:
        (tmp_path / "modules.json").write_text("[]")
    assert info(tmp_path).capabilities == expected


def test_only_two_sided_models_are_encoders(tmp_path: Path) -> None:
    assert info(model(tmp_path, BERT)).details["is_encoder"] is True
    assert (
        info(model(tmp_path, model_type="qwen2", architectures=["Qwen2Model"])).details[
            "is_encoder"
        ]
        is False
    )


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    model(tmp_path, architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    with pytest.raises(BrokenModel, match="encoder-decoder"):
        info(tmp_path)


def test_adapters_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BrokenModel, match="is an adapter"):
        read_folder(tmp_path)
    with pytest.raises(BrokenModel, match="is an adapter"):
        weight_files(model(tmp_path), "safetensors")


def test_other_folders_are_not_this_format(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NotThisFormat):
            read_folder(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"hidden_size": float("inf")}, "hidden_size"),
        ({"hidden_size": 2.5}, "hidden_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"vocab_size": {"a": 1}}, "vocab_size"),
        ({"vocab_size": []}, "vocab_size"),
        ({"num_attention_heads": [4, "x"]}, "num_attention_heads"),
        ({"head_dim": -64}, "head_dim"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"rope_theta": float("nan")}, "its rope_theta is not a number"),
        ({"rope_scaling": {"factors": [1.0, float("nan")]}}, "its factors is not a number"),
        ({"architectures": ["X"] * 100_000}, "100000 architectures"),
    ],
)
def test_impossible_numbers_are_refused(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BrokenModel, match=problem):
        info(model(tmp_path, **changes))


def test_a_limit_of_time_steps_may_be_infinite(tmp_path: Path) -> None:
    assert info(model(tmp_path, time_step_limit=[0.0, float("inf")])).context_length


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, [[]], True, -1, float("nan")])
@pytest.mark.parametrize(
    "key",
    [
        *LLAMA, "text_config", "rope_parameters", "rope_scaling", "quantization", "head_dim",
        "quantization_config", "sliding_window", "is_encoder_decoder", "multi_query",
        "kv_lora_rank", "auto_map",
    ],
)  # fmt: skip
def test_wrong_types_never_crash(tmp_path: Path, key: str, value: Any) -> None:
    folder = model(tmp_path, **{key: value})
    for name in ("generation_config.json", "tokenizer_config.json"):
        write_json(folder / name, {"model_max_length": value, "chat_template": value})
    try:
        described = info(folder)
    except BrokenModel:
        return
    empty = SafetensorsHeader(folder / "model.safetensors", {}, {})
    assert not is_mlx(read_folder(folder), empty)
    json.dumps(dict(described.details), allow_nan=False)


def test_older_names_of_numbers_are_known(tmp_path: Path) -> None:
    gpt2 = {
        "model_type": "gpt2", "n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 1024,
        "vocab_size": 10, "n_inner": None,
    }  # fmt: skip
    described = info(model(tmp_path, gpt2))
    details = described.details
    assert (details["n_layer"], details["n_embd"], details["n_head_kv"]) == (3, 48, 4)
    assert (details["n_ff"], described.context_length) == (192, 1024)


@pytest.mark.parametrize(
    "kinds",
    [
        {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
        {"layer_types": ["full_attention"] * 3},
        {"hybrid_override_pattern": "M*-"},
    ],
)
def test_layers_are_counted_where_only_their_kinds_are_listed(
    tmp_path: Path, kinds: dict[str, Any]
) -> None:
    described = info(model(tmp_path, num_hidden_layers=None, **kinds))
    assert described.details["n_layer"] == 3


@pytest.mark.parametrize("kinds", [[], "", 3, ["full_attention"] * 5000, "M" * 5000, {"a": 1}])
def test_lists_of_layers_that_make_no_sense_are_refused(tmp_path: Path, kinds: Any) -> None:
    with pytest.raises(BrokenModel, match="no num_hidden_layers"):
        info(model(tmp_path, num_hidden_layers=None, layer_types=kinds))


def test_heads_of_unusual_attention(tmp_path: Path) -> None:
    falcon = info(model(tmp_path, num_key_value_heads=None, multi_query=True)).details
    assert falcon["n_head_kv"] == 1
    latent: dict[str, Any] = {
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
    }
    deepseek = info(model(tmp_path, **latent)).details
    assert (deepseek["n_head_kv"], deepseek["head_dim"], deepseek["value_head_dim"]) == (4, 16, 10)
    listed = info(model(tmp_path, num_key_value_heads=[1, 2, 4])).details
    assert listed["n_head_kv"] == 4


def test_a_window_counts_where_it_is_used(tmp_path: Path) -> None:
    assert info(model(tmp_path, sliding_window=512)).details["sliding_window"] == 512
    unused = info(model(tmp_path, sliding_window=512, use_sliding_window=False)).details
    assert "sliding_window" not in unused


@pytest.mark.parametrize(
    ("tokenizer_length", "expected"), [(1024, 1024), (10**30, 2048), ("x", 2048), (-5, 2048)]
)
def test_a_missing_context_is_the_tokenizers_or_the_usual(
    tmp_path: Path, tokenizer_length: Any, expected: int
) -> None:
    model(tmp_path, max_position_embeddings=None)
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": tokenizer_length})
    assert info(tmp_path).context_length == expected


@pytest.mark.parametrize("key", ["n_positions", "seq_length", "context_length", "model_max_length"])
def test_the_context_is_read_from_the_key_that_the_architecture_uses(
    tmp_path: Path, key: str
) -> None:
    folder = model(tmp_path, LLAMA | {"max_position_embeddings": None, key: 1536})
    assert info(folder).context_length == 1536


@pytest.mark.parametrize("kinds", [["mamba", "moe", "attention"], "M-*"])
def test_layers_that_are_only_listed_are_counted(tmp_path: Path, kinds: Any) -> None:
    key = "layers_block_type" if isinstance(kinds, list) else "hybrid_override_pattern"
    assert (
        info(model(tmp_path, LLAMA | {"num_hidden_layers": None, key: kinds})).details["n_layer"]
        == 3
    )
    with pytest.raises(BrokenModel, match="num_hidden_layers"):
        info(model(tmp_path, LLAMA | {"num_hidden_layers": None, key: kinds * 2000}))


def test_positions_behind_the_padding_are_not_usable(tmp_path: Path) -> None:
    roberta = model(
        tmp_path, BERT, model_type="xlm-roberta", max_position_embeddings=514, pad_token_id=1
    )
    assert info(roberta).context_length == 512
    assert info(model(tmp_path, BERT)).context_length == 512


def test_a_text_model_inside_another_is_flattened(tmp_path: Path) -> None:
    inner = LLAMA | {"model_type": "gemma3_text", "architectures": None, "hidden_size": 32}
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": inner,
        "vision_config": {"hidden_size": 7},
    }
    folder = read_folder(model(tmp_path, outer))
    assert (folder.config["hidden_size"], folder.config["eos_token_id"]) == (32, [1, 106])
    assert folder.architectures == ("Gemma3ForConditionalGeneration",)
    assert (folder.model_type, folder.config["wrapper_model_type"]) == ("gemma3_text", "gemma3")
    assert "vision_config" in folder.config


def test_rope_parameters_are_lifted(tmp_path: Path) -> None:
    plain = model(tmp_path, rope_parameters={"rope_theta": 1e5, "rope_type": "default"})
    config = read_folder(plain).config
    assert config["rope_theta"] == 1e5
    assert "rope_scaling" not in config
    yarn = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}
    config = read_folder(model(tmp_path, rope_parameters=yarn)).config
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (1e6, 0.5)
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    by_layer = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    config = read_folder(model(tmp_path, rope_parameters=by_layer)).config
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    kept = model(tmp_path, rope_theta=7.0, rope_parameters={"rope_theta": 1e5})
    assert read_folder(kept).config["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3.2\n---\n", "llama3.2"),
        ("---\nlicense: other\n---\n", "other"),
        ('---\nlicense:\n- "apache-2.0"\n---\n', "apache-2.0"),
        ("# A model\nlicense: mit\n", ""),
        ("---\nlanguage: en\n---\nlicense: mit\n", ""),
        ("\x00\ufffd", ""),
    ],
)
def test_the_license_is_in_the_cards_front_matter(tmp_path: Path, card: str, expected: str) -> None:
    (model(tmp_path) / "README.md").write_text(card)
    assert info(tmp_path).license == expected


def test_the_template_of_its_own_file_wins(tmp_path: Path) -> None:
    listed = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    write_json(model(tmp_path) / "tokenizer_config.json", {"chat_template": listed})
    assert read_folder(tmp_path).chat_template == "D"
    write_json(tmp_path / "chat_template.json", {"chat_template": "J"})
    assert read_folder(tmp_path).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert read_folder(tmp_path).chat_template == "F"


def with_templates(
    folder: Path, configured: Mapping[str, Any], files: Mapping[str, str]
) -> ModelInfo:
    """Describe a model with a tokenizer_config.json and files of named templates."""
    write_json(model(folder) / "tokenizer_config.json", configured)
    for name, text in files.items():
        path = folder / "additional_chat_templates" / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return info(folder)


def named(**templates: object) -> dict[str, Any]:
    return {"chat_template": [{"name": name, "template": x} for name, x in templates.items()]}


@pytest.mark.parametrize(
    ("configured", "files", "expected"),
    [
        (named(default="D", tool_use="T"), {}, ("D", "T")),
        (named(tool_use="T", default="D", rag="R"), {}, ("D", "T")),
        (named(tool_use="T"), {}, ("T", None)),
        (named(default="D", tool_use="D"), {}, ("D", None)),
        (named(default="D", tool_use=7), {}, ("D", None)),
        (named(default="D", tool_use=""), {}, ("D", None)),
        (named(default="D", tool_use="T"), {"tool_use": "F"}, ("D", "F")),
        ({"chat_template": "D"}, {"tool_use": "F"}, ("D", "F")),
        ({"chat_template": "D"}, {"rag": "R"}, ("D", None)),
        ({"chat_template": ["D", {}, None]}, {}, (None, None)),
        ({}, {"tool_use": "F"}, (None, "F")),
    ],
)
def test_the_template_for_tools_is_kept_beside_the_default(
    tmp_path: Path,
    configured: dict[str, Any],
    files: dict[str, str],
    expected: tuple[str | None, str | None],
) -> None:
    described = with_templates(tmp_path, configured, files)
    assert (described.chat_template, described.tool_template) == expected
    is_listed = tmp_path / "additional_chat_templates" / "tool_use.jinja" in described.files
    assert is_listed == ("tool_use" in files)


@pytest.mark.parametrize(
    ("configured", "files", "expected"),
    [
        (named(default="D", rag="R"), {}, ("D", "R")),
        (named(rag="R", default="D"), {}, ("D", "R")),
        (named(default="D", rag="D"), {}, ("D", None)),
        (named(default="D", rag="R"), {"rag": "F"}, ("D", "F")),
        ({"chat_template": "D"}, {"rag": "F", "tool_use": "T"}, ("D", "F")),
        ({"chat_template": "D"}, {"other": "F"}, ("D", None)),
    ],
)
def test_the_template_for_documents_is_kept_beside_the_default(
    tmp_path: Path,
    configured: dict[str, Any],
    files: dict[str, str],
    expected: tuple[str | None, str | None],
) -> None:
    described = with_templates(tmp_path, configured, files)
    assert (described.chat_template, described.rag_template) == expected
    is_listed = tmp_path / "additional_chat_templates" / "rag.jinja" in described.files
    assert is_listed == ("rag" in files)


@pytest.mark.parametrize(
    ("text", "added"),
    [("{{ tools }}", {Capability.TOOLS}), ("<think>", {Capability.REASONING}), ("x", set())],
)
def test_capabilities_follow_the_template_for_tools_too(
    tmp_path: Path, text: str, added: set[Capability]
) -> None:
    listed = named(default="D", tool_use=text)
    write_json(model(tmp_path) / "tokenizer_config.json", listed)
    assert info(tmp_path).capabilities == GENERATES | added


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_an_oversized_named_template_is_refused(tmp_path: Path, name: str) -> None:
    listed = named(**{"default": "D", name: "x" * (2**20 + 1)})
    write_json(model(tmp_path) / "tokenizer_config.json", listed)
    with pytest.raises(BrokenModel, match="larger than the limit of 1 MiB"):
        read_folder(tmp_path)


def test_oversized_descriptions_are_refused(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (2**20 + 1))
    with pytest.raises(BrokenModel, match=r"chat_template\.jinja.*over the limit"):
        read_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text(" " * (8 * 2**20 + 1))
    with pytest.raises(BrokenModel, match=r"config\.json.*over the limit"):
        read_folder(tmp_path)


def shards(folder: Path, count: int, kind: str = "safetensors", stem: str = "model") -> list[str]:
    names = [f"{stem}-{n:05d}-of-{count:05d}.{kind}" for n in range(1, count + 1)]
    for name in names:
        (folder / name).write_bytes(b"x")
    return names


def test_weights_without_an_index(tmp_path: Path) -> None:
    assert weight_files(tmp_path, "safetensors") == ()
    names = shards(tmp_path, 3)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x")
    assert [path.name for path in weight_files(tmp_path, "safetensors")] == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(BrokenModel, match="shard 2 of 3 is missing"):
        weight_files(tmp_path, "safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert weight_files(tmp_path, "safetensors") == (tmp_path / "model.safetensors",)


def test_weights_of_pytorch(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.bin", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"x")
    names = shards(tmp_path, 2, "bin", "pytorch_model")
    assert [path.name for path in weight_files(tmp_path, "bin")] == names


def test_a_model_of_another_name_or_layout(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"x")
    assert weight_files(tmp_path, "safetensors")[0].name == "consolidated.safetensors"
    (tmp_path / "my-model.safetensors").write_bytes(b"x")
    assert [p.name for p in weight_files(tmp_path, "safetensors")] == ["my-model.safetensors"]


def test_an_index_names_the_weights(tmp_path: Path) -> None:
    names = shards(tmp_path, 2)
    (tmp_path / "model.safetensors").write_bytes(b"another")
    weight_map = {"a": names[1], "b": names[0], "c": names[1]}
    index = write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    assert [path.name for path in weight_files(tmp_path, "safetensors")] == names
    described = info(model(tmp_path))
    assert index in described.files
    (tmp_path / names[0]).unlink()
    with pytest.raises(BrokenModel, match=f"{names[0]!r} that it lists is missing"):
        weight_files(tmp_path, "safetensors")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 7, None, ["x"]]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(BrokenModel, match=r"not a file (name|beside it)"):
        weight_files(tmp_path, "safetensors")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map_is_broken(tmp_path: Path, index: Any) -> None:
    write_json(tmp_path / "pytorch_model.bin.index.json", index)
    with pytest.raises(BrokenModel, match="no weight_map"):
        weight_files(tmp_path, "bin")


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--Good-Model" / "blobs"
    snapshot = tmp_path / "models--org--Good-Model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    write_json(blobs / "aa", LLAMA)
    (blobs / "bb").write_bytes(b"weights")
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    (snapshot / "model.safetensors").symlink_to("../../blobs/bb")
    assert weight_files(snapshot, "safetensors") == (snapshot / "model.safetensors",)
    assert info(snapshot).name == "Good-Model"


def test_tokenizer_files_are_those_that_exist(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "merges.txt", "other.json"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in tokenizer_files(tmp_path)] == ["tokenizer.json", "merges.txt"]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"F32": 10, "BF16": 90}, "bf16"),
        ({"F16": 10}, "f16"),
        ({"F32": 1, "I64": 0}, "f32"),
        ({"F8_E4M3": 9}, "fp8"),
        ({}, ""),
    ],
)
def test_weights_that_are_not_packed_are_named_by_their_type(
    dtypes: dict[str, int], expected: str
) -> None:
    assert quantization_of(dtypes) == expected


def test_mlx_packs_words_beside_scales(tmp_path: Path) -> None:
    def header(dtype: str, *, has_scales: bool) -> Path:
        tensors: dict[str, Any] = {
            "l.weight": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}
        }
        if has_scales:
            tensors["l.scales"] = {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]}
        text = json.dumps({"__metadata__": {"format": "mlx"}} | tensors).encode()
        data = bytes(12 if has_scales else 8)
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    folder = read_folder(model(tmp_path, quantization={"bits": 4, "group_size": 64}))
    assert is_mlx(folder, safetensors_header(header("U32", has_scales=True)))
    assert not is_mlx(folder, safetensors_header(header("U32", has_scales=False)))
    assert not is_mlx(folder, safetensors_header(header("F32", has_scales=True)))
