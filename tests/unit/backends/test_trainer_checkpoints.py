"""Checkpoints as trainers leave them: what is found, under which names, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from backends.base import ModelInfo
from backends.hf.folder import read_folder
from backends.pytorch.backend import PytorchBackend
from backends.pytorch.loading import load_model
from backends.registry import load_backends
from catalog.scan.identify import Refused, Unknown, examine
from core.errors import BrokenModel, NotThisFormat

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
COUNT = 2 * 32 * 8 + 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16 + 3 * 8


def weights() -> dict[str, Any]:
    """Return all weights of the model, each with numbers of its own."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "lm_head.weight": (32, 8),
        "model.norm.weight": (8,),
        **{
            f"{layer}{name}.weight": (8,)
            for name in ("input_layernorm", "post_attention_layernorm")
        },
        f"{layer}self_attn.q_proj.weight": (8, 8),
        f"{layer}self_attn.k_proj.weight": (4, 8),
        f"{layer}self_attn.v_proj.weight": (4, 8),
        f"{layer}self_attn.o_proj.weight": (8, 8),
        f"{layer}mlp.gate_proj.weight": (16, 8),
        f"{layer}mlp.up_proj.weight": (16, 8),
        f"{layer}mlp.down_proj.weight": (8, 16),
    }
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def save(path: Path, value: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(value, path)
    else:
        torch.save(value, path)
    return path


def examined(path: Path) -> Any:
    """Return what a scan makes of a file."""
    return examine(path, load_backends().values())


def described(path: Path) -> ModelInfo:
    found = examined(path)
    assert isinstance(found, ModelInfo), found
    return found


def is_left_to_others(found: Any) -> bool:
    """Whether a scan lists nothing for a file that lies beside a model."""
    return isinstance(found, Unknown) or (isinstance(found, Refused) and found.is_guess)


def prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in weights().items()}


CHECKPOINTS: Mapping[str, Any] = {
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "Lightning": {"state_dict": prefixed("model."), "epoch": 3, "global_step": 7},
    "Lightning with torch.compile": {"state_dict": prefixed("model._orig_mod.")},
    "a trainer's own": {"model": prefixed("module."), "optimizer": {"state": {}}, "epoch": 1},
    "DeepSpeed": {"module": weights(), "ds_version": "0.1"},
    "EMA in the same names": {**weights(), **prefixed("ema_model.")},
    "EMA beside the weights": {"model": weights(), "ema": {k: v * 0 for k, v in weights().items()}},
    "EMA alone": {"ema_state_dict": prefixed("module.")},
    "AveragedModel": {"n_averaged": torch.tensor(4), **prefixed("module.")},
    "a mixture": {
        name if index % 2 else f"module.{name}": value
        for index, (name, value) in enumerate(weights().items())
    },
    "TRL": {**prefixed("pretrained_model."), "v_head.summary.weight": torch.zeros(1, 8)},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "final.pt", "model.safetensors"])
def test_the_weights_of_a_checkpoint_are_the_models(folder: Path, name: str, kind: str) -> None:
    value = CHECKPOINTS[name]
    if kind.endswith("safetensors") and not all(
        isinstance(x, torch.Tensor) for x in value.values()
    ):
        return
    info = described(save(folder / kind, value))
    assert info.parameters == COUNT
    assert info.details["weights_bytes"] == 4 * COUNT
    if info.format == "pytorch":
        checked = PytorchBackend().check_runtimes(info, (), lambda _: None)
        assert checked.parameters == COUNT
    model = load_model(info, read_folder(folder))
    found = model.state_dict()
    for key, tensor in weights().items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    "extra",
    [
        "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors",
        "0000100_adapters.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_base", [True, False])
def test_an_adapter_is_refused_with_what_to_do_and_its_base_stays(
    folder: Path, extra: str, has_base: bool
) -> None:
    if has_base:
        base = save(folder / "model.safetensors", weights())
    else:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    found = examined(save(folder / extra, {name: torch.zeros(4, 8)}))
    assert isinstance(found, Refused)
    assert "org/base" in found.reason
    assert "merge" in found.reason
    if has_base:
        assert described(base).parameters == COUNT


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"base_model_name_or_path": ["x"]}', '{"base_model_name_or_path": "a\\u0000b"}'],
)
def test_an_adapters_odd_configuration_changes_only_the_reason(folder: Path, content: str) -> None:
    (folder / "adapter_config.json").write_text(content)
    found = examined(save(folder / "adapter_model.safetensors", {"a": torch.zeros(1)}))
    assert isinstance(found, Refused)
    assert "merge" in found.reason
    assert "\0" not in found.reason


def test_unmerged_adapters_inside_the_weights_are_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    found = examined(save(folder / "model.safetensors", {**weights(), name: torch.zeros(4, 8)}))
    assert isinstance(found, Refused)
    assert "merge_and_unload" in found.reason


def test_a_checkpoint_folder_of_the_trainer_is_one_model(folder: Path) -> None:
    """What `Trainer` writes: weights beside the states of optimizer, scheduler and generators."""
    checkpoint = folder / "checkpoint-500"
    checkpoint.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (checkpoint / name).write_text((folder / name).read_text())
    (checkpoint / "trainer_state.json").write_text('{"global_step": 500}')
    state = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(8)}}}
    others = [
        save(checkpoint / "optimizer.pt", {**state, "param_groups": [{"lr": 1e-4, "params": [0]}]}),
        save(checkpoint / "scheduler.pt", {"last_epoch": 500, "_last_lr": [1e-4]}),
        save(checkpoint / "scaler.pt", {"scale": 65536.0}),
        save(checkpoint / "rng_state.pth", {"python": (3, (1, 2), None), "cpu": torch.zeros(8)}),
        save(checkpoint / "rng_state_0.pth", {"cpu": torch.zeros(8)}),
        save(checkpoint / "training_args.bin", {"lr": 1e-4}),
        save(checkpoint / "optimizer.bin", state),
        save(checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt", state),
        save(checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", state),
    ]
    info = described(save(checkpoint / "model.safetensors", weights()))
    assert info.parameters == COUNT
    assert info.name == f"{folder.name}-checkpoint-500"
    for path in others:
        assert is_left_to_others(examined(path)), path.name


@pytest.mark.parametrize("name", ["checkpoint-12", "epoch_3", "step1000", "best", "final_model"])
def test_a_checkpoint_has_its_runs_name_too(tmp_path: Path, name: str) -> None:
    place = tmp_path / "my-run" / name
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "tokenizer.json").write_text("{}")
    assert described(save(place / "model.safetensors", weights())).name == f"my-run-{name}"


def test_a_part_of_deepspeeds_state_is_refused_with_what_to_do(folder: Path) -> None:
    path = save(folder / "mp_rank_00_model_states.pt", {"module": weights()})
    found = examined(path)
    assert isinstance(found, Refused)
    assert "zero_to_fp32.py" in found.reason


def test_two_kinds_of_file_are_variants_of_one_name(folder: Path) -> None:
    first = described(save(folder / "model.safetensors", weights()))
    second = described(save(folder / "pytorch_model.bin", weights()))
    assert first.name == second.name
    assert (first.format, second.format) == ("safetensors", "pytorch")
    assert first.parameters == second.parameters == COUNT


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_variant_in_half_precision_is_a_variant_of_the_same_name(folder: Path, kind: str) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    half = {name: value.half() for name, value in weights().items()}
    whole = described(save(folder / f"{stem}.{kind}", weights()))
    small = described(save(folder / f"{stem}.fp16.{kind}", half))
    assert whole.name == small.name
    assert (whole.quantization, small.quantization) == ("f32", "f16")
    assert whole.files[0].name == f"{stem}.{kind}"
    assert small.files[0].name == f"{stem}.fp16.{kind}"
    assert whole.parameters == small.parameters == COUNT
    assert f"{stem}.fp16.{kind}" not in {path.name for path in whole.files}


def test_a_variant_alone_is_the_model_and_two_are_two(folder: Path) -> None:
    half = {name: value.half() for name, value in weights().items()}
    brain = {name: value.bfloat16() for name, value in weights().items()}
    first = save(folder / "model.fp16.safetensors", half)
    assert described(first).parameters == COUNT
    second = save(folder / "model.bf16.safetensors", brain)
    assert [described(path).parameters for path in (first, second)] == [COUNT, COUNT]


def test_a_variant_in_shards_is_one_model(folder: Path) -> None:
    save(folder / "model.safetensors", weights())
    names = list(weights())
    paths = []
    for number, part in ((1, names[:5]), (2, names[5:])):
        path = folder / f"model.fp16-0000{number}-of-00002.safetensors"
        paths.append(save(path, {name: weights()[name].half() for name in part}))
    infos = [described(path) for path in paths]
    assert infos[0] == infos[1]
    assert infos[0].parameters == COUNT
    paths[1].unlink()
    found = examined(paths[0])
    assert isinstance(found, Refused)
    assert "missing" in found.reason


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth"])
def test_the_original_layout_beside_shards_is_no_model_of_its_own(folder: Path, name: str) -> None:
    original = {"tok_embeddings.weight": torch.zeros(32, 8), "norm.weight": torch.zeros(8)}
    path = save(folder / name, original)
    found = examined(path)
    assert isinstance(found, Refused)
    assert not found.is_guess
    assert "Hugging Face" in found.reason
    weights_path = save(folder / "model.safetensors", weights())
    assert is_left_to_others(examined(path))
    assert described(weights_path).parameters == COUNT


def test_the_original_layout_without_a_config_is_named(tmp_path: Path) -> None:
    path = save(
        tmp_path / "consolidated.00.pth", {"layers.0.attention.wq.weight": torch.ones(2, 2)}
    )
    found = examined(path)
    assert isinstance(found, Refused)
    assert "Meta's or Mistral's" in found.reason


@pytest.mark.parametrize("number", [0, 99999])
def test_odd_shard_numbers_are_refused(folder: Path, number: int) -> None:
    path = save(folder / f"model.fp16-00001-of-{number:05d}.safetensors", weights())
    with pytest.raises((BrokenModel, NotThisFormat)):
        load_backends()["safetensors"].identify(path)
