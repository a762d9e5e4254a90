"""Every file that looks like a model is listed or refused, once for each model, as what it is."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import onnx_files
from tests.gguf_raw import minimal_gguf, write_gguf
from tests.unit.catalog.scan.folders import (
    LLAMA,
    Shelf,
    write_json,
    write_model,
    write_shards,
    write_weights,
)

ZEROS = np.zeros((2, 2), np.float32)
ZIP = b"PK\x03\x04" + bytes(60)
SERVED = "this server runs language, embedding and reranking models"


def described(folder: Path, **config: object) -> Path:
    """Write a config.json and a tokenizer; return the folder."""
    write_json(folder / "config.json", config)
    onnx_files.write_tokenizer(folder)
    return folder


def voice_activity(folder: Path) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    inputs = [
        value("input", TensorProto.FLOAT, ["b", "n"]),
        value("state", TensorProto.FLOAT, [2, "b", 128]),
        value("sr", TensorProto.INT64, []),
    ]
    output = value("output", TensorProto.FLOAT, ["b", "n"])
    node = helper.make_node("Identity", ["input"], ["output"])
    graph = helper.make_graph([node], "vad", inputs, [output])
    data = helper.make_model(graph, ir_version=8).SerializeToString()
    (folder / "silero_vad.onnx").write_bytes(data)


def detector(folder: Path) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["pixels"], ["boxes"])
    sides = [value(name, TensorProto.FLOAT, [1, 3, 640, 640]) for name in ("pixels", "boxes")]
    graph = helper.make_graph([node], "detector", sides[:1], sides[1:])
    data = helper.make_model(graph, ir_version=8).SerializeToString()
    (folder / "yolo11n.onnx").write_bytes(data)


def whisper_onnx(folder: Path) -> None:
    described(folder / "whisper-tiny", model_type="whisper", is_encoder_decoder=True)
    inner = folder / "whisper-tiny" / "onnx"
    inner.mkdir()
    for half in ("encoder_model", "decoder_model", "decoder_model_merged"):
        for variant in ("", "_q4", "_fp16", "_int8"):
            graph = onnx_files.decoder(extras=("pixel_values",))
            onnx_files.write(inner, graph, name=f"{half}{variant}.onnx")


def diffusers(folder: Path) -> None:
    pipeline = folder / "sd-turbo"
    write_json(pipeline / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    for part in ("unet", "vae"):
        write_weights(pipeline / part / "diffusion_pytorch_model.safetensors")
        write_weights(pipeline / part / "diffusion_pytorch_model.fp16.safetensors")
        write_json(pipeline / part / "config.json", {"_class_name": "AutoencoderKL"})
    for part in ("text_encoder", "text_encoder_2"):
        write_model(pipeline / part, architectures=["CLIPTextModel"], model_type="clip_text_model")


def encoder_decoder(folder: Path) -> None:
    path = folder / "flan"
    described(path, **(LLAMA | {"model_type": "t5", "is_encoder_decoder": True}))
    write_shards(path, 4)
    (path / "pytorch_model.bin").write_bytes(ZIP)
    (path / "tf_model.h5").write_bytes(ZIP)
    (path / "flax_model.msgpack").write_bytes(b"\x81")


def all_frameworks(folder: Path) -> None:
    path = write_model(folder / "many")
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.tflite"):
        (path / name).write_bytes(b"\x01" * 100)


def checkpoint(folder: Path) -> None:
    path = write_model(folder / "run" / "checkpoint-500")
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt")
    for name in (*names, "training_args.bin"):
        (path / name).write_bytes(ZIP)
    write_json(path / "trainer_state.json", {})


def states_alone(folder: Path) -> None:
    path = folder / "stopped"
    (path / "global_step5").mkdir(parents=True)
    (path / "latest").write_text("global_step5")
    for name in ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        (path / "global_step5" / name).write_bytes(ZIP)


def adapter(folder: Path) -> None:
    write_weights(folder / "my-lora" / "adapter_model.safetensors", {"x.lora_A.weight": ZEROS})
    write_json(folder / "my-lora" / "adapter_config.json", {"base_model_name_or_path": "x"})


def adapter_beside_base(folder: Path) -> None:
    write_model(folder / "base")
    adapter(folder)
    for path in (folder / "my-lora").iterdir():
        shutil.move(path, folder / "base" / path.name)
    (folder / "my-lora").rmdir()


def tokenizer_alone(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    onnx_files.write_tokenizer(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"\x0a\x02ab")


def core_ml(folder: Path, name: str = "Vision.mlpackage") -> None:
    data = folder / name / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(b"\x08\x09\x12\x00\xa2\x1f\x00")
    (data / "weights" / "weight.bin").write_bytes(bytes(100))
    (data / "weights" / "more.bin").write_bytes(bytes(100))
    items = {"a": {"path": "com.apple.CoreML/model.mlmodel"}}
    items["b"] = {"path": "com.apple.CoreML/weights"}
    write_json(
        folder / name / "Manifest.json", {"itemInfoEntries": items, "rootModelIdentifier": "a"}
    )


def compiled_core_ml(folder: Path) -> None:
    path = folder / "Chat.mlmodelc"
    for name in ("coremldata.bin", "weights/weight.bin", "analytics/coremldata.bin", "model.mil"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(bytes(50))


def projector(folder: Path) -> None:
    path = folder / "llava"
    path.mkdir()
    minimal_gguf(path / "llava-Q4_0.gguf")
    metadata = {"general.architecture": "clip", "general.type": "mmproj"}
    write_gguf(path / "mmproj-f16.gguf", metadata, [])


def openvino(folder: Path) -> None:
    path = folder / "ov"
    path.mkdir()
    (path / "openvino_model.xml").write_text("<net/>")
    (path / "openvino_model.bin").write_bytes(bytes(100))


def file(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    return write


def weights(name: str, *tensors: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_weights(folder / name, dict.fromkeys(tensors, ZEROS))

    return write


def config_only(**config: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_weights(described(folder / "odd", **(LLAMA | config)) / "model.safetensors")

    return write


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (voice_activity, {"silero_vad@onnx": f"a voice activity model; {SERVED}"}),
        (detector, {"yolo11n@onnx": "image model"}),
        (whisper_onnx, {"whisper-tiny@onnx": "speech recognition model (whisper)"}),
        (diffusers, {"sd-turbo@safetensors": "generator (StableDiffusionPipeline)"}),
        (encoder_decoder, {"flan@safetensors": "encoder-decoder"}),
        (all_frameworks, {"many@safetensors-f32": ""}),
        (checkpoint, {"run-checkpoint-500@safetensors-f32": ""}),
        (states_alone, {"stopped@pytorch": "mp_rank_00_model_states.pt"}),
        (adapter, {"my-lora@safetensors": "adapter"}),
        (adapter_beside_base, {"base@safetensors": "adapter", "base@safetensors-f32": ""}),
        (tokenizer_alone, {}),
        (core_ml, {"vision@coreml": "Vision.mlpackage"}),
        (compiled_core_ml, {"chat@coreml": "compiled"}),
        (projector, {"llava@gguf-f32": "", "mmproj@gguf": "projector"}),
        (openvino, {"ov@openvino": "OpenVINO"}),
        (file("whisper.bin", b"lmgg" + bytes(60)), {"whisper@ggml": "GGML"}),
        (file("old.ggml", b"tjgg" + bytes(60)), {"old@ggml": "GGML"}),
        (file("a.tflite", bytes(4) + b"TFL3" + bytes(60)), {"a@tflite": "LiteRT"}),
        (file("a.llamafile", b"MZqFpD" + bytes(60)), {"a@llamafile": "llamafile"}),
        (file("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(60)), {"a@keras": "Keras"}),
        (file("a.keras", ZIP), {"a@keras": "Keras"}),
        (file("a.engine", b"ftrt" + bytes(60)), {"a@tensorrt": "TensorRT"}),
        (file("a.pte", bytes(4) + b"ET12" + bytes(60)), {"a@executorch": "ExecuTorch"}),
        (file("a.ort", bytes(4) + b"ORTM" + bytes(60)), {"a@onnx": "onnxruntime's own format"}),
        (file("a.ckpt", ZIP), {"a@pytorch": "state dict"}),
        (file("a.pth", b"\x80\x02nonsense"), {"a@pytorch": "a.pth"}),
        (file("a.npz", ZIP), {"a@mlx": "a.npz"}),
        (file("a.onnx", b"nonsense"), {"a@onnx": "ONNX"}),
        (file("a.mlmodel", b"nonsense"), {"a@coreml": "Core ML"}),
        (file("empty.gguf", b""), {"empty@gguf": "empty"}),
        (file("zeros.gguf", bytes(600)), {"zeros@gguf": "zeros"}),
        (file("page.gguf", b"<!DOCTYPE html><html>"), {"page@gguf": "error page"}),
        (file("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
         {"pointer@gguf": "Git LFS pointer"}),
        (file("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
         {"pointer@safetensors": "Git LFS pointer"}),
        (file("nice/pytorch_model.bin", b"nonsense"), {"nice@pytorch": "state dict"}),
        (file("firmware.bin", b"nonsense"), {}),
        (file("notes.txt", b"lm"), {}),
        (weights("v1-5-pruned-emaonly.safetensors", "model.diffusion_model.a"),
         {"v1-5-pruned-emaonly@safetensors": "image generator"}),
        (weights("style.safetensors", "lora_unet_down.lora_down.weight"),
         {"style@safetensors": "LoRA adapter of an image generator"}),
        (weights("tuned.safetensors", "a.lora_A.weight", "a.lora_B.weight"),
         {"tuned@safetensors": "LoRA adapter"}),
        (weights("lonely.safetensors", "model.norm.weight"),
         {"lonely@safetensors": "put the model's config.json and tokenizer.json beside it"}),
        (config_only(model_type="vit", architectures=["ViTForImageClassification"]),
         {"odd@safetensors": "image or video classifier"}),
        (config_only(model_type="wav2vec2", architectures=["Wav2Vec2ForCTC"]),
         {"odd@safetensors": "speech recognition"}),
        (config_only(model_type="clip", architectures=["CLIPModel"]),
         {"odd@safetensors": "compares images with texts (clip)"}),
        (config_only(model_type="newspeech", architectures=["NewForSpeechSeq2Seq"]),
         {"odd@safetensors": "speech recognition"}),
        (config_only(model_type="timesfm", architectures=["TimesFmModelForPrediction"]),
         {"odd@safetensors": "time series"}),
    ],
)  # fmt: skip
def test_what_is_found_is_told_once(
    shelf: Shelf, build: Callable[[Path], None], expected: dict[str, str]
) -> None:
    build(shelf.models)
    shelf.scan()
    states = {one: "refused" if reason else "ok" for one, reason in expected.items()}
    assert shelf.states() == states
    for model_id, reason in expected.items():
        assert reason in shelf.reason(model_id)
        # A person reads it: no path of this machine, no name of an exception.
        assert str(shelf.home) not in shelf.reason(model_id)
        assert not re.search(r"Error\b|Exception|Traceback", shelf.reason(model_id))
    shelf.scan()
    assert shelf.looked == []
    assert shelf.states() == states


def test_files_side_by_side_are_models_of_their_own(shelf: Shelf) -> None:
    for name in ("one.onnx", "two.onnx"):
        (shelf.models / name).write_bytes(b"nonsense")
    weights("three.safetensors", "a")(shelf.models)
    minimal_gguf(shelf.models / "four.gguf")
    shelf.scan()
    assert sorted(shelf.states()) == ["four@gguf-f32", "one@onnx", "three@safetensors", "two@onnx"]


def test_entries_of_one_package_become_one_when_it_is_described(shelf: Shelf) -> None:
    folder = shelf.models / "parts"
    weights("a.safetensors", "x")(folder)
    weights("b.safetensors", "y")(folder)
    shelf.scan()
    assert sorted(shelf.states()) == ["a@safetensors", "b@safetensors"]
    write_json(folder / "config.json", {"model_type": "vit"})
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"]
    assert shelf.looked != []
    shelf.scan()
    assert shelf.looked == []


def test_a_refused_package_becomes_a_model_when_it_is_mended(shelf: Shelf) -> None:
    folder = described(shelf.models / "tiny", **(LLAMA | {"is_encoder_decoder": True}))
    write_shards(folder, 3)
    shelf.scan()
    assert shelf.states() == {"tiny@safetensors": "refused"}
    write_json(folder / "config.json", LLAMA)
    shelf.scan()
    assert shelf.states() == {"tiny@safetensors-f32": "ok"}


def test_a_format_that_is_switched_off_is_not_called_damaged(shelf: Shelf) -> None:
    minimal_gguf(shelf.models / "a.gguf")
    shelf.formats = ("onnx",)
    shelf.scan()
    assert shelf.states() == {}
    shelf.formats = None
    shelf.scan()
    assert shelf.states() == {"a@gguf-f32": "ok"}


@pytest.mark.parametrize(
    "name", ["publisher/My-Model-GGUF/My-Model-Q4_K_M.gguf", "publisher/My-Model-MLX"]
)
def test_lm_studios_folders(shelf: Shelf, name: str) -> None:
    path = shelf.models / name
    if path.suffix:
        path.parent.mkdir(parents=True)
        minimal_gguf(path)
    else:
        write_model(path)
    shelf.scan()
    (record,) = [one for one in shelf.store.models() if one.info.files]
    assert record.info.name == "my-model"


def test_models_in_llama_cpp_s_cache_are_named_without_their_repository(shelf: Shelf) -> None:
    """Its manifests tell which part of a file's name is the repository's."""
    cache = shelf.models / "llama.cpp"
    cache.mkdir()
    minimal_gguf(cache / "some_one_A_Model-GGUF_A_Model-Q4_K_M.gguf", general__name="First")
    minimal_gguf(cache / "ggml-org_B-GGUF_sub_b-f16.gguf", general__name="Second")
    minimal_gguf(cache / "other_C-GGUF_c-q8_0.gguf", general__name="Third")
    write_json(cache / "manifest=some_one=A_Model-GGUF=latest.json", {})
    write_json(cache / "manifest=ggml-org=B-GGUF=f16.json", {})
    write_json(cache / "manifest=other=C.json", {})
    shelf.scan()
    assert shelf.states() == {
        "a_model@gguf-f32": "ok",
        "sub_b@gguf-f32": "ok",
        "other_c-gguf_c@gguf-f32": "ok",
    }
    shelf.scan()
    assert shelf.looked == []
