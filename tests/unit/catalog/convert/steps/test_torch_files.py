"""The weights of a folder's files are listed under the names that the model gives them."""

from pathlib import Path
from typing import Any

import pytest

from catalog.convert.steps.torch_files import close_files, listed_tensors, tensor_rows
from core.errors import BrokenModel

torch = pytest.importorskip("torch")
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def saved(path: Path, prefix: str, *names: str) -> Path:
    """Write tensors of rows 0, 1, 2, …, each name after `prefix`."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {
        f"{prefix}{name}": torch.arange(6.0).reshape(3, 2).clone() for name in names
    }
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"epoch": 3, "model_state": tensors}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_training_adds_to_names_is_removed_over_all_files(tmp_path: Path, suffix: str) -> None:
    # Only the second file shows that the prefix holds the whole model.
    files = [
        saved(tmp_path / f"one{suffix}", "policy.", "score.weight"),
        saved(tmp_path / f"two{suffix}", "policy._orig_mod.", HEAD, TABLE),
        saved(tmp_path / f"three{suffix}", "ema_model.", HEAD, TABLE),
    ]
    listed = list(listed_tensors(files))
    assert [each.name for each in listed] == ["score.weight", HEAD, TABLE]
    assert [each.file for each in listed] == [files[0], files[1], files[1]]
    for each in listed:
        assert (each.dtype, each.shape) == ("F32", (3, 2))
        assert torch.cat(list(tensor_rows(each))).tolist() == [[0, 1], [2, 3], [4, 5]]
    close_files()


def test_an_adapter_beside_its_weights_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "model.safetensors", "", "a.base_layer.weight", "a.lora_A.x.weight")
    with pytest.raises(BrokenModel, match="not merged"):
        list(listed_tensors([file]))
    close_files()
