"""Each quantization of a repository is a model of its own, with the files that it needs."""

import pytest

from catalog.hub.entries import HubEntry, RepositoryFile, group, quantization_in, why_none


def files(*paths: str, size: int = 10) -> tuple[RepositoryFile, ...]:
    return tuple(RepositoryFile(path, size, "0" * 40) for path in paths)


def shown(entries: tuple[HubEntry, ...]) -> dict[str, tuple[str, str, int, int]]:
    return {
        entry.name: (entry.format, entry.quantization, len(entry.weights), len(entry.sides))
        for entry in entries
    }


def test_hub_entries_of_a_gguf_repository() -> None:
    found = group(
        files(
            *("README.md", "config.json", "mmproj-m-f16.gguf", "m.imatrix.gguf", "imatrix.dat"),
            *("m-Q4_K_M.gguf", "m-IQ3_XXS.gguf", "UD/m-UD-Q2_K_XL-00001-of-00002.gguf"),
            *("UD/m-UD-Q2_K_XL-00002-of-00002.gguf", "m-BF16-00001-of-00003.gguf"),
        ),
        (),
    )
    assert shown(found) == {
        "m-Q4_K_M.gguf": ("gguf", "q4_k_m", 1, 0),
        "m-IQ3_XXS.gguf": ("gguf", "iq3_xxs", 1, 0),
        "UD/m-UD-Q2_K_XL.gguf": ("gguf", "q2_k_xl", 2, 0),
        "m-BF16.gguf": ("gguf", "bf16", 1, 0),
    }
    assert {entry.name: entry.missing for entry in found if entry.missing} == {"m-BF16.gguf": 2}


def test_hub_entries_of_a_transformers_repository() -> None:
    found = group(
        files(
            *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
            *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            *("model.safetensors.index.json", "pytorch_model.bin.index.json", "LICENSE"),
            *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "modeling_x.py"),
            *("consolidated.00.pth", "consolidated.safetensors", "adapter_model.safetensors"),
            *("1_Pooling/config.json", "onnx/model.onnx", "onnx/model.onnx_data"),
            *("onnx/model_q4.onnx", "onnx/decoder_model.onnx", "onnx/config.json", "tf_model.h5"),
            *("other/deep/config.json", "logo.png"),
        ),
        ("safetensors",),
    )
    assert shown(found) == {
        "model.safetensors": ("safetensors", "", 2, 7),
        "pytorch_model.bin": ("pytorch", "", 1, 7),
        "onnx/model.onnx": ("onnx", "", 2, 7),
        "onnx/model_q4.onnx": ("onnx", "q4", 1, 7),
    }
    safetensors = next(entry for entry in found if entry.format == "safetensors")
    assert [file.path for file in safetensors.sides] == [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
        *("model.safetensors.index.json", "LICENSE", "1_Pooling/config.json"),
    ]
    assert (safetensors.weights_bytes, safetensors.size_bytes, safetensors.pickles) == (20, 90, ())
    pickled = next(entry for entry in found if entry.format == "pytorch")
    assert pickled.pickles == ("pytorch_model.bin",)


def test_hub_entries_of_mlx_and_core_ml() -> None:
    mlx = group(files("config.json", "model.safetensors", "tokenizer.json"), ("mlx", "4-bit"))
    assert shown(mlx) == {"model.safetensors": ("mlx", "", 1, 2)}
    coreml = group(
        files(
            *("a/Small.mlpackage/Manifest.json", "a/Small.mlpackage/Data/weights/weight.bin"),
            *("Large.mlmodelc/coremldata.bin", "config.json", "a/tokenizer.json"),
        ),
        (),
    )
    assert shown(coreml) == {
        "Large.mlmodelc": ("coreml", "", 1, 1),
        "a/Small.mlpackage": ("coreml", "", 2, 2),
    }


def test_hub_entries_leave_out_what_no_model_needs() -> None:
    assert group((), ()) == ()
    assert group(files("README.md", "a.bin", "flax_model.msgpack", "x.ckpt"), ()) == ()
    huge = RepositoryFile("tokenizer.json", 2**40, "")
    (entry,) = group((*files("model.safetensors"), huge), ())
    assert entry.sides == ()


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        *(("Qwen3-8B-Q4_K_M.gguf", "q4_k_m"), ("x.i1-IQ2_M.gguf", "iq2_m"), ("x-fp16.gguf", "f16")),
        *(("x-4bit", "4bit"), ("x-8-bit", "8bit"), ("model_quantized.onnx", "int8")),
        *(("onnx/model_uint8.onnx", "uint8"), ("gpt-oss-MXFP4.gguf", "mxfp4"), ("Qwen2.gguf", "")),
        *(("q8_0/model.gguf", "q8_0"), ("x-TQ1_0.gguf", "tq1_0"), ("model.safetensors", "")),
    ],
)
def test_hub_quantization_is_read_from_the_name(name: str, quantization: str) -> None:
    assert quantization_in(name) == quantization


def test_hub_entries_of_an_embedding_model_have_its_later_modules() -> None:
    found = group(
        files(
            *("modules.json", "config.json", "model.safetensors", "pytorch_model.bin"),
            *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
            *("2_Dense/pytorch_model.bin", "3_Dense/config.json", "3_Dense/pytorch_model.bin"),
        ),
        (),
    )
    assert {entry.name for entry in found} == {"model.safetensors", "pytorch_model.bin"}
    for entry in found:
        paths = {file.path for file in entry.sides}
        assert {"2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"} <= paths
        assert "2_Dense/pytorch_model.bin" not in paths
        assert [file.path for file in entry.weights] == [entry.name]


def test_hub_entries_of_an_older_embedding_model_are_in_its_first_module() -> None:
    paths = ("modules.json", "0_Transformer/config.json", "0_Transformer/pytorch_model.bin")
    (entry,) = group(files(*paths, "2_Dense/config.json", "2_Dense/pytorch_model.bin"), ())
    assert entry.name == "0_Transformer/pytorch_model.bin"
    assert "2_Dense/pytorch_model.bin" in {file.path for file in entry.sides}


def test_hub_entries_without_a_list_of_modules_keep_numbered_folders() -> None:
    found = group(files("1_Base/model.safetensors", "2_Large/model.safetensors"), ())
    assert len(found) == 2


def test_hub_entries_of_one_model_in_several_pieces_and_as_a_whole() -> None:
    """Of weights that were uploaded again in other pieces only one set is a model's."""
    two = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    three = [f"model-0000{number}-of-00003.safetensors" for number in (1, 3)]
    index = "model.safetensors.index.json"
    found = group(files("config.json", index, "model.safetensors", *two, *three), ())
    assert {entry.name: [file.path for file in entry.weights] for entry in found} == {
        "model.safetensors": ["model.safetensors"],
        "model-of-00002.safetensors": two,
        "model-of-00003.safetensors": three,
    }
    by_name = {entry.name: entry for entry in found}
    assert [file.path for file in by_name["model.safetensors"].sides] == ["config.json"]
    assert [file.path for file in by_name["model-of-00002.safetensors"].sides] == [
        "config.json",
        index,
    ]
    assert {name: entry.missing for name, entry in by_name.items()} == {
        "model.safetensors": 0,
        "model-of-00002.safetensors": 0,
        "model-of-00003.safetensors": 1,
    }


def test_hub_entries_have_no_data_without_a_graph() -> None:
    """A part of a model, such as an encoder of images, is none, and neither is its data."""
    halves = ("onnx/decoder_model_merged", "onnx/vision_encoder", "onnx/embed_tokens_fp16")
    found = group(
        files(
            *(f"{half}.onnx" for half in halves),
            *(f"{half}.onnx_data" for half in halves),
            *("onnx/model_q4f16.onnx", "onnx/model_q4f16.onnx_data", "lost.onnx_data"),
        ),
        (),
    )
    assert [entry.name for entry in found] == ["onnx/model_q4f16.onnx"]
    assert len(found[0].weights) == 2


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "has an adapter"),
        (("adapters.safetensors", "adapter_config.json"), "has an adapter"),
        (("m.gguf.part1of2", "m.gguf.part2of2"), "pieces that have to be joined"),
        (("m-Q6_K.gguf-split-a", "m-Q6_K.gguf-split-b"), "pieces that have to be joined"),
        (("model_index.json", "unet/diffusion_pytorch_model.safetensors"), "diffusers"),
        (("model_index.json", "text_encoder/model.safetensors"), "diffusers"),
        (("tf_model.h5", "config.json"), "no model in a format that this server knows"),
        ((), "no model in a format that this server knows"),
    ],
)
def test_hub_repository_without_a_model_says_what_it_is(paths: tuple[str, ...], said: str) -> None:
    assert group(files(*paths), ()) == ()
    assert said in why_none(files(*paths))


def test_hub_entries_of_a_pipeline_of_diffusers_are_gguf_files() -> None:
    found = group(files("model_index.json", "vae/model.safetensors", "m-Q4_0.gguf"), ())
    assert [entry.name for entry in found] == ["m-Q4_0.gguf"]


def test_hub_entries_quantized_with_an_importance_matrix_are_models() -> None:
    """The matrix itself has no quantization in its name; a projector often has one."""
    models = ("m-Q4_K_M-imatrix.gguf", "m-imatrix-IQ2_M.gguf", "m.imatrix.Q6_K.gguf")
    parts = ("m.imatrix.gguf", "imatrix.gguf", "m-imatrix.gguf", "mmproj-m-Q8_0.gguf")
    found = group(files(*models, *parts), ())
    assert {entry.name for entry in found} == set(models)
    assert {entry.quantization for entry in found} == {"q4_k_m", "iq2_m", "q6_k"}


def test_hub_entries_leave_the_data_of_a_training_behind() -> None:
    """Of large texts only those that tokenizers and indexes are in."""
    needed = (
        *("tokenizer.json", "vocab.json", "merges.txt", "tekken.json", "vocab.txt"),
        *("model.safetensors.index.json", "spiece.model", "qwen.tiktoken", "added_tokens.json"),
    )
    weights = "model-00001-of-00001.safetensors"
    large = files(*needed, "train.json", "dataset.txt", "wandb-log.json", weights, size=5 << 20)
    (entry,) = group((*large, *files("config.json", "all_results.json")), ())
    assert {file.path for file in entry.sides} == {*needed, "config.json", "all_results.json"}
