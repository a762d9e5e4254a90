"""Reading GGUF headers: valid, damaged and malicious ones."""

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from backends.gguf.file import gguf_info, read_gguf, shard_files
from backends.gguf.layout import FILE_TYPES, TENSOR_TYPES
from core.errors import BrokenModel, NotThisFormat
from core.types import Capability
from tests.gguf_files import (
    TOOLS_TEMPLATE,
    bert_gguf,
    gemma2_gguf,
    llama_gguf,
    mamba_gguf,
    qwen2_gguf,
)
from tests.gguf_raw import (
    ARRAY,
    FLOAT32,
    INT32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Array,
    RawTensor,
    Typed,
    minimal_gguf,
    minimal_metadata,
    write_gguf,
)

GENERATES = frozenset({Capability.CHAT, Capability.COMPLETION})
EMBEDS = frozenset({Capability.EMBEDDING})
FLOATS = bytes(range(128))


def with_tensor(path: Path, tensor: RawTensor, **more: Any) -> Path:
    return write_gguf(path, minimal_metadata(**more), [tensor])


def with_metadata(path: Path, *pairs: tuple[str, Any]) -> Path:
    tensor = RawTensor("token_embd.weight", (8, 4), 0, FLOATS)
    return write_gguf(path, [*minimal_metadata().items(), *pairs], [tensor])


def shard(folder: Path, number: int, count: int, **more: Any) -> Path:
    path = folder / f"big-{number:05d}-of-{count:05d}.gguf"
    metadata = {"split.no": number - 1, "split.count": count, **more}
    if number == 1:
        metadata = minimal_metadata() | metadata
    return write_gguf(path, metadata, [RawTensor(f"blk.{number}.weight", (8, 4), 0, FLOATS)])


def test_tables_agree_with_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES, LlamaFileType

    known = {
        int(kind): (kind.name.lower(), elements, size)
        for kind, (elements, size) in GGML_QUANT_SIZES.items()
        if kind.name != "Q8_1"  # The package has its size before the scale became a half float.
    }
    assert {type_id: TENSOR_TYPES[type_id] for type_id in known} == known
    names = {int(kind): kind.name.lower() for kind in LlamaFileType if kind.name != "GUESSED"}
    for number, name in names.items():
        assert name.removeprefix("mostly_").removeprefix("all_").startswith(FILE_TYPES[number])


def test_llama_file_is_described(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "tiny.gguf")

    info = gguf_info(path)

    assert (info.format, info.name, info.architecture) == ("gguf", "Tiny llama", "llama")
    assert (info.quantization, info.context_length) == ("f32", 2048)
    assert info.files == (path,)
    assert info.size_bytes == path.stat().st_size
    assert info.license == "apache-2.0"
    assert info.capabilities == GENERATES
    assert info.chat_template is not None
    assert info.details["n_layer"] == 2
    assert info.details["n_head_kv"] == 2
    assert info.details["n_head_kv_sum"] == 4
    assert info.details["key_length"] == 16
    assert info.details["eos_token"] == "</s>"


def test_counts_agree_with_the_gguf_package(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = llama_gguf(tmp_path / "tiny.gguf")
    reference = GGUFReader(path)

    file = read_gguf(path)

    assert file.tensor_count == len(reference.tensors)
    assert file.parameters == sum(int(tensor.n_elements) for tensor in reference.tensors)
    assert file.tensor_bytes == sum(int(tensor.n_bytes) for tensor in reference.tensors)
    tokens = reference.fields["tokenizer.ggml.tokens"]
    assert file.vocabulary_size == len(tokens.data)


def test_large_vocabulary_is_counted_and_looked_up(tmp_path: Path) -> None:
    file = read_gguf(qwen2_gguf(tmp_path / "tiny.gguf"))

    assert file.vocabulary_size == 151_936
    assert (file.bos_token, file.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert file.quantization == "f16"
    assert "tokenizer.ggml.tokens" not in file.metadata


@pytest.mark.parametrize(
    ("build", "expected"),
    [(gemma2_gguf, GENERATES), (mamba_gguf, GENERATES), (bert_gguf, EMBEDS)],
)
def test_capabilities_follow_the_architecture(tmp_path: Path, build: Any, expected: Any) -> None:
    assert gguf_info(build(tmp_path / "tiny.gguf")).capabilities == expected


def test_details_of_special_architectures(tmp_path: Path) -> None:
    gemma = gguf_info(gemma2_gguf(tmp_path / "gemma.gguf")).details
    mamba = gguf_info(mamba_gguf(tmp_path / "mamba.gguf")).details

    assert (gemma["sliding_window"], gemma["key_length"]) == (64, 32)
    assert (mamba["ssm_state_size"], mamba["n_head_kv_sum"], mamba["key_length"]) == (16, 0, 0)


def test_the_template_for_tools_is_kept_beside_the_default(tmp_path: Path) -> None:
    templates: dict[str, Any] = {
        "tokenizer.chat_template": "D",
        "tokenizer.chat_template.tool_use": "T",
        "tokenizer.chat_template.rag": "R",
    }
    described = gguf_info(minimal_gguf(tmp_path / "tiny.gguf", **templates))
    assert (described.chat_template, described.tool_template) == ("D", "T")
    assert described.rag_template == "R"


@pytest.mark.parametrize(
    ("more", "added"),
    [
        ({"tokenizer.chat_template": TOOLS_TEMPLATE}, {Capability.TOOLS}),
        ({"tokenizer.chat_template": "{{ '<think>' }}"}, {Capability.REASONING}),
        ({"tokenizer.chat_template.tool_use": TOOLS_TEMPLATE}, {Capability.TOOLS}),
        ({"tokenizer.chat_template.tool_use": "<think>"}, {Capability.REASONING}),
        ({"tokenizer.chat_template.other": TOOLS_TEMPLATE}, set()),
        ({"tokenizer.chat_template.tool_use": 7}, set()),
        ({"tokenizer.chat_template": "{# no tools #}{{ messages }}{#- nor tools"}, set()),
        ({"tokenizer.chat_template": "{# none #}{{ tools }}{# none #}"}, {Capability.TOOLS}),
        ({"tokenizer.chat_template": "{# none #}{# none #}{{ tools }}"}, {Capability.TOOLS}),
        ({"tokenizer.ggml.tokens": ["a", "<think>"]}, {Capability.REASONING}),
        ({"tokenizer.ggml.tokens": ["a", "x<think>"]}, set()),
        ({"llama.pooling_type": 3}, {Capability.EMBEDDING}),
        ({"llama.pooling_type": 0}, set()),
        ({"llama.pooling_type": 4}, set()),
    ],
)
def test_capabilities_follow_the_metadata(
    tmp_path: Path, more: dict[str, Any], added: set[Capability]
) -> None:
    path = minimal_gguf(tmp_path / "tiny.gguf", **more)
    assert gguf_info(path).capabilities == GENERATES | added


RANKER = {
    "general.architecture": "bert", "bert.pooling_type": 4, "bert.context_length": 512,
    "bert.block_count": 1, "bert.embedding_length": 8, "bert.attention.head_count": 1,
}  # fmt: skip
HEAD = RawTensor("cls.output.weight", (8, 1), 0, bytes(32))


def test_a_reranker_has_a_head_and_one_label(tmp_path: Path) -> None:
    path = with_tensor(tmp_path / "tiny.gguf", HEAD, **RANKER)
    assert gguf_info(path).capabilities == {Capability.RERANK}
    with pytest.raises(BrokenModel, match="no classification head"):
        gguf_info(minimal_gguf(tmp_path / "headless.gguf", **RANKER))
    labels = {"bert.classifier.output_labels": Array(STRING, ["no", "maybe", "yes"])}
    with pytest.raises(BrokenModel, match="classifier with 3 labels"):
        gguf_info(with_tensor(tmp_path / "classifier.gguf", HEAD, **RANKER, **labels))


def test_the_place_of_a_tensor_is_its_first_byte(tmp_path: Path) -> None:
    marked = RawTensor("cls.output.weight", (8, 1), 0, bytes(range(32)))
    path = with_tensor(tmp_path / "tiny.gguf", marked, **RANKER)
    place = read_gguf(path).places["cls.output.weight"]
    assert (place.type_name, place.elements) == ("f32", 8)
    assert path.read_bytes()[place.offset : place.offset + 32] == bytes(range(32))


def test_per_layer_heads_and_recommended_sampling_become_scalars(tmp_path: Path) -> None:
    path = with_metadata(
        tmp_path / "tiny.gguf",
        ("llama.attention.head_count_kv", Array(INT32, [2, 0, 4])),
        ("general.sampling.temp", 0.5),
        ("general.sampling.top_p", Typed(FLOAT32, float("nan"))),
    )
    details = gguf_info(path).details

    assert (details["n_head_kv"], details["n_head_kv_sum"]) == (4, 6)
    assert details["sampling_temp"] == 0.5
    assert "sampling_top_p" not in details


def test_quantization_falls_back_to_the_dominating_type(tmp_path: Path) -> None:
    blocks = RawTensor("token_embd.weight", (256, 2), 12, bytes(288))
    path = with_tensor(tmp_path / "tiny.gguf", blocks, **{"general.file_type": 999})
    assert gguf_info(path).quantization == "q4_k"


@pytest.mark.parametrize(("file_type", "name"), [(15, "q4_k_m"), (1024 + 15, "q4_k_m")])
def test_quantization_comes_from_the_file_type(tmp_path: Path, file_type: int, name: str) -> None:
    path = minimal_gguf(tmp_path / "tiny.gguf", general__file_type=file_type)
    assert gguf_info(path).quantization == name


def test_version_2_and_other_alignments_are_read(tmp_path: Path) -> None:
    tensors = [RawTensor("a", (3,), 0, bytes(12)), RawTensor("b", (2,), 1, bytes(4))]
    metadata = minimal_metadata(general__alignment=8)
    path = write_gguf(tmp_path / "tiny.gguf", metadata, tensors, version=2, alignment=8)
    assert gguf_info(path).details["tensor_bytes"] == 16


def test_name_loses_control_characters(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "tiny.gguf", general__name="Big\n\x1b[31mModel\x00")
    assert gguf_info(path).name == "Big[31mModel"


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04" + bytes(40), b"gguf" + bytes(40)])
def test_other_content_is_not_this_format(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(NotThisFormat):
        gguf_info(path)


def test_folder_is_not_this_format(tmp_path: Path) -> None:
    with pytest.raises(NotThisFormat):
        gguf_info(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="No such file"):
        gguf_info(tmp_path / "none.gguf")


def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(BrokenModel, match="big-endian"):
        gguf_info(path)


TENSOR_CASES = [
    (RawTensor("w", (8, 4), 99, FLOATS), "unknown type 99"),
    (RawTensor("w", (8, 4), 31, FLOATS), "unknown type 31"),
    (RawTensor("w", (), 0, FLOATS), "0 dimensions"),
    (RawTensor("w", (1,) * 5, 0, FLOATS), "5 dimensions"),
    (RawTensor("w", (1,) * 99, 0, FLOATS), "99 dimensions"),
    (RawTensor("w", (0, 4), 0, FLOATS), "impossible shape"),
    (RawTensor("w", (2**32, 2**32), 0, FLOATS), "impossible shape"),
    (RawTensor("w", (2**63 - 1,), 0, FLOATS), "impossible shape"),
    (RawTensor("w", (8, 4), 2, FLOATS), "not a multiple of 32"),
    (RawTensor("w", (8, 4), 0, FLOATS, offset=32), "offset 32"),
    (RawTensor("w", (8, 4), 0, FLOATS, offset=2**63), "offset"),
    (RawTensor("w", (8, 5), 0, FLOATS), "32 bytes of its tensors are missing"),
    (RawTensor("w", (2**40,), 0, FLOATS), "are missing"),
    (RawTensor("", (8, 4), 0, FLOATS), "tensor's name"),
    (RawTensor("w" * 64, (8, 4), 0, FLOATS), "tensor's name"),
]


@pytest.mark.parametrize(("tensor", "reason"), TENSOR_CASES)
def test_bad_tensor_is_refused(tmp_path: Path, tensor: RawTensor, reason: str) -> None:
    with pytest.raises(BrokenModel, match=reason):
        gguf_info(with_tensor(tmp_path / "model.gguf", tensor))


METADATA_CASES = [
    (("general.license", "mit"), "occurs twice"),
    (("a", Typed(77, b"")), "unknown type 77"),
    (("general.alignment", 0), "alignment"),
    (("general.alignment", 2**31), "alignment"),
    (("general.alignment", 48), "alignment"),
    (("general.alignment", Typed(UINT64, 32)), "alignment"),
    (("a", Array(ARRAY, [], 5)), "nested arrays"),
    (("a", Array(88, [], 5)), "element type 88"),
    (("a", Array(UINT8, [], 2**62)), "missing"),
    (("a", Array(UINT64, [], 2**61)), "missing"),
    (("a", Array(STRING, [], 2**60)), "missing"),
    (("tokenizer.chat_template", "x" * (1024**2 + 1)), "chat template of 1.0 MiB"),
    (("tokenizer.chat_template.tool_use", "x" * (1024**2 + 1)), "chat template of 1.0 MiB"),
    (("tokenizer.ggml.merges", Array(UINT32, [1, 2])), "wrong element type"),
    (("tokenizer.ggml.scores", Array(FLOAT32, [1.0])), "one element for each token"),
    (("tokenizer.ggml.scores", Array(UINT8, [1] * 4)), "wrong element type"),
    (("tokenizer.ggml.token_type", Array(INT32, [1] * 3)), "one element for each token"),
    (("llama.attention.head_count_kv", "two"), "whole number"),
    (("llama.attention.head_count_kv", 2.0), "whole number"),
]


@pytest.mark.parametrize(("pair", "reason"), METADATA_CASES)
def test_bad_metadata_is_refused(tmp_path: Path, pair: tuple[str, Any], reason: str) -> None:
    path = with_metadata(tmp_path / "model.gguf", ("general.license", "mit"), pair)
    with pytest.raises(BrokenModel, match=reason):
        gguf_info(path)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"general.architecture": "clip"}, "not a model by itself"),
        ({"general.type": "adapter"}, "LoRA adapter"),
        ({"general.type": "mmproj", "general.architecture": "new"}, "multimodal projector"),
        ({"general.type": "imatrix", "general.architecture": ""}, "importance matrix"),
        ({"general.architecture": "controlvector"}, "control vector"),
        ({"general.architecture": "flux"}, r"image or video generator \(flux\); this server"),
        ({"general.architecture": "whisper"}, "sound or speech"),
        ({"general.architecture": "t5"}, "encoder-decoder"),
        ({"general.architecture": "qwen3"}, "no qwen3.context_length"),
        ({"general.architecture": 7}, "no general.architecture"),
        ({"llama.context_length": 0}, "llama.context_length"),
        ({"llama.expert_count": 513}, "llama.expert_count"),
        ({"tokenizer.ggml.model": "llama"}, "no token for the byte 0x00"),
        ({"tokenizer.ggml.tokens": ["<\0a", "<\0b"]}, "token b'<' twice"),
        ({"llama.block_count": 513}, "llama.block_count"),
        ({"tokenizer.ggml.tokens": Array(STRING, [])}, "no vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "token b'a' twice"),
        ({"split.count": 2}, "must be named"),
    ],
)
def test_useless_model_is_refused(tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(BrokenModel, match=reason):
        gguf_info(minimal_gguf(tmp_path / "model.gguf", **more))


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"tensor_count": 2**63}, "tensors, at most"),
        ({"tensor_count": 65_536}, "missing"),
        ({"metadata_count": 65_537}, "metadata entries, at most"),
        ({"version": 1}, "version is 1"),
        ({"version": 4}, "version is 4"),
    ],
)
def test_bad_header_is_refused(tmp_path: Path, counts: dict[str, int], reason: str) -> None:
    path = write_gguf(
        tmp_path / "model.gguf", minimal_metadata(), tensor_count=counts.get("tensor_count"),
        metadata_count=counts.get("metadata_count"), version=counts.get("version", 3),
    )  # fmt: skip
    with pytest.raises(BrokenModel, match=reason):
        gguf_info(path)


def test_same_tensor_twice_is_refused(tmp_path: Path) -> None:
    tensors = [RawTensor("w", (8, 4), 0, FLOATS), RawTensor("w", (8, 4), 0, FLOATS)]
    with pytest.raises(BrokenModel, match="occurs twice"):
        gguf_info(write_gguf(tmp_path / "model.gguf", minimal_metadata(), tensors))


def test_metadata_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="no tensors"):
        gguf_info(write_gguf(tmp_path / "model.gguf", minimal_metadata()))


def test_truncation_names_the_missing_bytes(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(BrokenModel, match=r"1,000 bytes of its tensors are missing"):
        gguf_info(path)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "model.gguf")
    data = path.read_bytes()
    for length in range(4, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(BrokenModel):
            gguf_info(path)


def test_random_damage_gives_typed_errors_only(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "model.gguf", tokenizer__chat_template=TOOLS_TEMPLATE)
    valid = path.read_bytes()
    source = random.Random(20)
    refused = 0
    for _ in range(4000):
        data = bytearray(valid)
        for _ in range(source.randint(1, 3)):
            _damage(data, source)
        path.write_bytes(data)
        try:
            gguf_info(path)
        except (BrokenModel, NotThisFormat):
            refused += 1
    assert refused > 1000


def _damage(data: bytearray, source: random.Random) -> None:
    place = source.randrange(max(1, len(data) - 8))
    match source.randrange(5):
        case 0:
            data[place] ^= 1 << source.randrange(8)
        case 1:
            data[place] = source.randrange(256)
        case 2:
            huge = source.choice([2**64 - 1, 2**63, 2**40, 2**32, 0xFFFF, 0])
            data[place : place + 8] = struct.pack("<Q", huge)
        case 3:
            del data[place : place + source.randrange(1, 40)]
            data += bytes(8) if len(data) < 8 else b""
        case _:
            data[place:place] = source.randbytes(source.randrange(1, 16))


def test_split_model_is_one_model(tmp_path: Path) -> None:
    files = tuple(shard(tmp_path, number, 3) for number in (1, 2, 3))

    info = gguf_info(files[1])

    assert shard_files(files[2]) == files
    assert info.files == files
    assert info.parameters == 96
    assert info.size_bytes == sum(file.stat().st_size for file in files)
    assert info.details["tensor_bytes"] == 384


def test_split_model_names_the_missing_shard(tmp_path: Path) -> None:
    first = shard(tmp_path, 1, 3)
    shard(tmp_path, 3, 3)
    with pytest.raises(BrokenModel, match="shard 2 of 3 is missing"):
        gguf_info(first)


def test_split_model_with_a_foreign_shard_is_refused(tmp_path: Path) -> None:
    first = shard(tmp_path, 1, 2)
    second = shard(tmp_path, 2, 2)
    second.write_bytes(first.read_bytes())
    with pytest.raises(BrokenModel, match="its name says shard 2 of 2, its metadata 1 of 2"):
        gguf_info(first)
