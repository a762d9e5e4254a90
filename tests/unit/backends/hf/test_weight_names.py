"""Names of tensors as training code leaves them, and the model's names."""

from pathlib import Path

import pytest

from backends.hf.names import model_names
from core.errors import BrokenModel

PLAIN = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
GPT2 = ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight")
HEADLESS = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight")
OTHERS = (
    ("model.decoder.layers.0.fc1.weight", "model.decoder.embed_tokens.weight"),
    ("model.transformer.wte.weight", "model.transformer.blocks.0.ff_out.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"),
    ("backbone.layers.0.mixer.A_log", "backbone.embedding.weight"),
    ("model.language_model.layers.0.up.weight", "model.visual.patch.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    ("0.auto_model.layer.weight", "linear.weight"),
    ("encoder.module.layer.weight", "model.module.ema.weight", "x.module.module.weight"),
)


def found(*names: str) -> dict[str, str]:
    return dict(model_names(Path("model.bin"), names))


@pytest.mark.parametrize("names", [PLAIN, GPT2, HEADLESS, *OTHERS])
def test_the_names_of_models_stay(names: tuple[str, ...]) -> None:
    assert found(*names) == {name: name for name in names}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.",
        "_forward_module.", "_fsdp_wrapped_module.", "model.", "_forward_module.model.",
        "model._orig_mod.", "module.model.", "net.", "policy.", "student.module.",
        "base_model.model.", "pretrained_model.", "model.model_ema.".removesuffix("model_ema."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("names", [PLAIN, GPT2])
def test_wrappers_are_removed(prefix: str, names: tuple[str, ...]) -> None:
    if names is GPT2 and prefix.endswith("model.") and not prefix.endswith("base_model.model."):
        names = (*GPT2, "lm_head.weight")
    assert found(*(prefix + name for name in names)) == {prefix + name: name for name in names}


def test_wrappers_inside_names_are_removed() -> None:
    assert found(
        "module.model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.up.weight",
        "model.layers.1._orig_mod.up.weight",
        "lm_head.weight",
    ) == {
        "module.model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.up.weight": (
            "model.layers.0.up.weight"
        ),
        "model.layers.1._orig_mod.up.weight": "model.layers.1.up.weight",
        "lm_head.weight": "lm_head.weight",
    }


def test_a_mixture_of_wrapped_and_plain_names_is_one_model() -> None:
    names = (f"module.{PLAIN[0]}", f"_orig_mod.{PLAIN[1]}", PLAIN[2])
    assert set(found(*names).values()) == set(PLAIN)


@pytest.mark.parametrize(
    "average", ["ema.", "ema_model.", "model_ema.module.", "ema_model._orig_mod."]
)
def test_averaged_copies_are_left_out_or_used_if_they_are_all(average: str) -> None:
    copies = [average + name for name in PLAIN]
    assert found(*PLAIN, *copies) == {name: name for name in PLAIN}
    assert found(*copies) == dict(zip(copies, PLAIN, strict=True))


def test_what_only_training_needs_is_left_out() -> None:
    extra = ("n_averaged", "v_head.summary.weight", "criterion.weight", "val_acc.total")
    assert found(*(f"module.{name}" for name in PLAIN), *extra) == {
        f"module.{name}": name for name in PLAIN
    }


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.q_proj.lora_A.weight",
        "model.layers.0.q_proj.base_layer.weight",
        "model.layers.0.q_proj.lora_B.default.weight",
        "lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_a",
    ],
)
def test_an_unmerged_adapter_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(BrokenModel, match="merge_and_unload"):
        found(*PLAIN, name)


@pytest.mark.parametrize("name", ["layers.0.attention.wq.weight", "tok_embeddings.weight"])
def test_other_layouts_of_the_same_model_are_refused(name: str) -> None:
    with pytest.raises(BrokenModel, match="Meta's or Mistral's"):
        found(name, "norm.weight")


def test_a_part_of_a_sharded_training_state_is_refused() -> None:
    with pytest.raises(BrokenModel, match="FSDP"):
        found("model._fsdp_wrapped_module.flat_param")


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BrokenModel, match=r"'lm_head\.weight' twice"):
        found(*PLAIN, "module.lm_head.weight")


def test_odd_names_end() -> None:
    odd = ("", ".", "..", "module", "module.", "module." * 5000, "model." * 5000 + "lm_head.weight")
    for name in odd:
        assert list(found(name)) == [name]
    assert found() == {}
