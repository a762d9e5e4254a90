"""Several weight files of one model: one name, with the others as its variants."""

import numpy as np
import pytest

from tests.unit.catalog.scan.folders import (
    LLAMA,
    Shelf,
    llama_tensors,
    write_json,
    write_model,
    write_shards,
    write_weights,
)

torch = pytest.importorskip("torch")


def half() -> dict[str, np.ndarray]:
    """Return the weights in half precision."""
    return {name: value.astype(np.float16) for name, value in llama_tensors().items()}


def state_dict() -> dict[str, object]:
    return {name: torch.from_numpy(value) for name, value in llama_tensors().items()}


def test_all_weights_in_a_folder_have_one_name(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    write_weights(folder / "model.fp16.safetensors", half())
    torch.save(state_dict(), folder / "pytorch_model.bin")
    original = {"tok_embeddings.weight": np.zeros((2, 2), np.float32)}
    write_weights(folder / "consolidated.safetensors", original)
    shelf.scan()
    assert shelf.states() == {
        "tiny@safetensors-f32": "ok",
        "tiny@safetensors-f16": "ok",
        "tiny@pytorch-f32": "ok",
    }
    names = {one.info.name for one in shelf.store.models() if one.info.files}
    assert names == {"tiny"}
    shelf.scan()
    assert shelf.looked == []


def test_shards_beside_the_original_layout_and_states_are_one_model(shelf: Shelf) -> None:
    folder = shelf.models / "run" / "checkpoint-7"
    write_json(folder / "config.json", LLAMA)
    write_json(folder / "tokenizer.json", {})
    write_shards(folder, 2)
    original = {"layers.0.attention.wq.weight": torch.zeros(2, 2)}
    torch.save(original, folder / "consolidated.00.pth")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"step": 3}, folder / name)
    shelf.scan()
    assert list(shelf.states().values()) == ["ok"]
    assert next(iter(shelf.states())).startswith("run-checkpoint-7@safetensors")


def test_a_quantized_model_is_listed_by_its_method(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    settings = {"quant_method": "hqq", "nbits": 4}
    write_json(folder / "config.json", {**LLAMA, "quantization_config": settings})
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"]
    assert "HQQ" in shelf.reason(next(iter(shelf.states())))
