"""PyTorch weights files: recognising, describing and loading them."""

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.pytorch.backend import PytorchBackend
from backends.pytorch.file import pytorch_info
from backends.pytorch.weights import load_tensors, read_torch_file
from core.errors import BrokenModel, NotThisFormat
from core.types import Capability

torch = pytest.importorskip("torch")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def weights() -> dict[str, Any]:
    """Return a state dict with two tied tensors and one strided view."""
    tied = torch.arange(256.0).reshape(32, 8)
    view = torch.arange(64.0).reshape(8, 8).t()
    return {"model.embed_tokens.weight": tied, "lm_head.weight": tied, "model.view": view}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def test_a_folder_with_pytorch_model_bin(folder: Path) -> None:
    info = pytorch_info(save(folder / "pytorch_model.bin", weights()))
    assert (info.format, info.quantization, info.architecture) == ("pytorch", "f32", "llama")
    assert info.files[0] == folder / "pytorch_model.bin"
    assert info.parameters == 32 * 8 + 64
    assert info.details["weights_bytes"] == 4 * info.parameters
    assert info.context_length == 64
    assert info.capabilities == {Capability.CHAT, Capability.COMPLETION}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_wrapped_state_dict_beside_a_config(folder: Path, wrapper: str) -> None:
    path = save(folder / "final.pt", {wrapper: weights(), "epoch": 3, "args": {"lr": 0.1}})
    assert pytorch_info(path).parameters == 320
    loaded = load_tensors([path])
    assert set(loaded) == set(weights())
    assert torch.equal(loaded["model.view"], weights()["model.view"])


def test_the_layout_before_zip_archives(folder: Path) -> None:
    path = save(folder / "old.pth", weights(), _use_new_zipfile_serialization=False)
    assert pytorch_info(path).parameters == 320
    assert torch.equal(load_tensors([path])["model.view"], weights()["model.view"])
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(BrokenModel, match="ends before"):
        pytorch_info(path)


def test_weights_are_mapped_from_the_file_and_tied_ones_stay_tied(folder: Path) -> None:
    path = save(folder / "pytorch_model.bin", weights())
    loaded = load_tensors([path])
    first, second = loaded["model.embed_tokens.weight"], loaded["lm_head.weight"]
    assert first.data_ptr() == second.data_ptr()
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()


def test_all_shards_are_one_model(folder: Path) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, keys in zip(names, (["a", "b"], ["c"]), strict=True):
        save(folder / name, {key: torch.zeros(10, dtype=torch.bfloat16) for key in keys})
    index = {"weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    infos = [pytorch_info(folder / name) for name in names]
    assert infos[0] == infos[1]
    assert [path.name for path in infos[0].files[:2]] == names
    assert (infos[0].parameters, infos[0].quantization) == (30, "bf16")
    assert set(load_tensors(infos[0].files[:2])) == {"a", "b", "c"}
    (folder / names[1]).unlink()
    with pytest.raises(BrokenModel, match="missing"):
        pytorch_info(folder / names[0])


def test_weights_alone_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match=r"config\.json"):
        pytorch_info(save(tmp_path / "model.pt", weights()))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_pickle_that_runs_code_is_refused_unrun(folder: Path, options: dict[str, Any]) -> None:
    path = save(folder / "pytorch_model.bin", {"a": Evil(folder / "made")}, **options)
    with pytest.raises(BrokenModel, match="mkdir"):
        pytorch_info(path)
    with pytest.raises(BrokenModel, match="mkdir"):
        load_tensors([path])
    assert not (folder / "made").exists()


def test_a_whole_module_is_refused_by_its_class(folder: Path) -> None:
    path = save(folder / "pytorch_model.bin", torch.nn.Linear(2, 2))
    with pytest.raises(BrokenModel, match=r"torch\.nn\.modules\.linear\.Linear"):
        pytorch_info(path)


def _text(path: Path) -> None:
    path.write_text("no weights")


def _other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _number(path: Path) -> None:
    torch.save({"step": 3}, path)


def _plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("write", [_text, _other_zip, _number, _plain_pickle])
def test_other_files_are_another_format(folder: Path, write: Callable[[Path], None]) -> None:
    path = folder / "pytorch_model.bin"
    write(path)
    with pytest.raises(NotThisFormat):
        pytorch_info(path)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "rng_state.pth", "a.txt"])
def test_a_training_state_is_no_model(folder: Path, name: str) -> None:
    with pytest.raises(NotThisFormat):
        pytorch_info(save(folder / name, weights()))


def test_a_part_of_a_larger_model_is_no_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"in_features": 8, "out_features": 8}))
    with pytest.raises(NotThisFormat):
        pytorch_info(save(folder / "pytorch_model.bin", weights()))


def test_dense_weights_that_are_declared_as_quantized_are_refused(folder: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenModel, match="gptq"):
        pytorch_info(save(folder / "pytorch_model.bin", weights()))


def test_every_cut_of_an_archive_is_refused(folder: Path) -> None:
    path = save(folder / "pytorch_model.bin", weights())
    data = path.read_bytes()
    for length in range(20, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises((BrokenModel, NotThisFormat)):
            pytorch_info(path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """Write the archive again with its entries changed; None leaves one out."""
    copy = path.with_suffix(".pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", **options) as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)
    return copy


@pytest.mark.parametrize("keep", [0, 100])
def test_a_storage_that_is_missing_or_cut_is_refused(folder: Path, keep: int) -> None:
    path = save(folder / "pytorch_model.bin", weights())

    def cut(name: str, data: bytes) -> bytes | None:
        if "/data/" not in name:
            return data
        return data[:keep] or None

    with pytest.raises(BrokenModel, match="missing or cut off"):
        read_torch_file(rewritten(path, cut))


def test_a_compressed_archive_is_refused(folder: Path) -> None:
    path = save(folder / "pytorch_model.bin", weights())
    packed = rewritten(path, lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(BrokenModel, match="compressed"):
        read_torch_file(packed)


def test_a_script_program_is_refused(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/constants.pkl", b"\x80\x02N.")
    with pytest.raises(BrokenModel, match="TorchScript"):
        pytorch_info(path)


def test_the_context_ends_where_positions_would_change(folder: Path) -> None:
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_scaling": scaling}))
    path = save(folder / "pytorch_model.bin", weights())
    assert PytorchBackend().identify(path).context_length == 16


def test_missing_weights_are_named(folder: Path) -> None:
    from backends.hf.config import read_folder
    from backends.pytorch.loading import load_model

    path = save(folder / "pytorch_model.bin", weights())
    with pytest.raises(BrokenModel, match="weights are missing"):
        load_model(pytorch_info(path), read_folder(folder))


def test_an_architecture_that_transformers_does_not_know(folder: Path) -> None:
    from backends.hf.config import read_folder
    from backends.pytorch.loading import load_model

    path = save(folder / "pytorch_model.bin", weights())
    info = pytorch_info(path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "nonesuch"}))
    with pytest.raises(BrokenModel, match="nonesuch"):
        load_model(info, read_folder(folder))
    shutil.rmtree(folder)


def test_float8_weights_are_read(folder: Path) -> None:
    values = torch.arange(256.0).reshape(32, 8)
    state = {"model.embed_tokens.weight": values.to(torch.float8_e4m3fn)}
    info = pytorch_info(save(folder / "pytorch_model.bin", state))
    assert (info.parameters, info.quantization) == (256, "fp8")
    loaded = load_tensors([folder / "pytorch_model.bin"])["model.embed_tokens.weight"]
    assert torch.equal(loaded.float(), values.to(torch.float8_e4m3fn).float())
