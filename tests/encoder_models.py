"""Tiny encoders of many architectures with random weights, saved as transformers saves them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 32
LENGTH = 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = (
    *SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *".,?!0123456789",
    "the", "cat", "sits", "on", "mat", "word", "stock", "prices", "query", ":", "passage",
)  # fmt: skip
TEXTS = (
    "The cat sits on the mat.",
    "a",
    "Stock prices fell, and the cat is on the mat?",
    "word " * 30 + "end",
    "many more words than any of these models can read " * 8,
)
PAIRS = ("where is the cat?", ("The cat sits on the mat.", "", "Stock prices fell.", "mat " * 90))

_SIZES = {
    "vocab_size": len(VOCABULARY), "hidden_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
}  # fmt: skip
# With two rows before that of the first token.
_OFFSET = {**_SIZES, "pad_token_id": 1, "max_position_embeddings": LENGTH + 2}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_DISTIL = {
    "vocab_size": len(VOCABULARY), "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
_T5 = {
    "vocab_size": len(VOCABULARY), "d_model": WIDTH, "num_layers": 2, "num_heads": 4, "d_ff": 64,
    "d_kv": 8, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoder:
    """An architecture: the start of its classes' names, its configuration, its model class."""

    prefix: str
    config: Mapping[str, Any] = field(default_factory=lambda: _SIZES)
    model: str = ""

    @property
    def class_name(self) -> str:
        """The name of the transformers class."""
        return self.model or f"{self.prefix}Model"


ENCODERS: Mapping[str, Encoder] = {
    "bert": Encoder("Bert"),
    "bert-masked-lm": Encoder("Bert", model="BertForMaskedLM"),
    "roberta": Encoder("Roberta", _OFFSET),
    "xlm-roberta": Encoder("XLMRoberta", _OFFSET),
    "camembert": Encoder("Camembert", _OFFSET),
    "data2vec-text": Encoder("Data2VecText", _OFFSET),
    "mpnet": Encoder("MPNet", _OFFSET),
    "distilbert": Encoder("DistilBert", _DISTIL),
    "albert": Encoder("Albert", {**_SIZES, "embedding_size": 16}),
    "electra": Encoder("Electra", {**_SIZES, "embedding_size": 16}),
    "deberta": Encoder(
        "Deberta", {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "deberta-v2": Encoder(
        "DebertaV2", {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "ernie": Encoder("Ernie"),
    "megatron-bert": Encoder("MegatronBert"),
    "rembert": Encoder("RemBert", {**_SIZES, "input_embedding_size": 16}),
    "roformer": Encoder("RoFormer", {**_SIZES, "embedding_size": WIDTH}),
    "fnet": Encoder("FNet"),
    "modernbert": Encoder(
        "ModernBert", {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 16}
    ),
    "nomic": Encoder("NomicBert"),
    "eurobert": Encoder("EuroBert", {**_SIZES, "num_key_value_heads": 4}),
    "t5-encoder": Encoder("T5", _T5, "T5EncoderModel"),
    "qwen3": Encoder("Qwen3", _GROUPED),
    "llama": Encoder("Llama", _GROUPED),
    "gemma3-two-sided": Encoder(
        "Gemma3Text",
        {**_GROUPED, "use_bidirectional_attention": True, "sliding_window": 16},
    ),
}  # fmt: skip
RERANKERS: Mapping[str, Encoder] = {
    name: Encoder(encoder.prefix, {**encoder.config, "num_labels": 1},
                  f"{encoder.prefix}ForSequenceClassification")
    for name, encoder in ENCODERS.items()
    if name in ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2",
                "modernbert", "qwen3", "llama", "mpnet", "albert")
}  # fmt: skip


def tokenizer(**options: Any) -> Any:
    """Return a WordPiece tokenizer of `VOCABULARY` with BERT's frame and segments."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: token_id for token_id, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=options.pop("lowercase", True))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", **{
            "model_max_length": LENGTH,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **options,
        },
    )  # fmt: skip


def save_encoder(folder: Path, encoder: Encoder, *, seed: int = 3, **changes: Any) -> Path:
    """Write the model's folder with its tokenizer; `changes` are of its configuration."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{encoder.prefix}Config")(**{**encoder.config, **changes})
    model = getattr(transformers, encoder.class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def add_modules(
    folder: Path, *modules: tuple[str, Mapping[str, Any]], prefix: str = "models", **config: Any
) -> Path:
    """Write modules.json for a Transformer and `modules`, each a class with its config.json."""
    entries = [("Transformer", {}), *modules]
    listing = []
    for index, (kind, settings) in enumerate(entries):
        path = f"{index}_{kind}" if index else ""
        kind_path = f"sentence_transformers.{prefix}.{kind}"
        listing.append({"idx": index, "name": str(index), "path": path, "type": kind_path})
        if index:
            write_json(folder / path / "config.json", settings)
    write_json(folder / "modules.json", listing)
    write_json(folder / "config_sentence_transformers.json", config)
    return folder


def pooling(*modes: str, width: int = WIDTH, **settings: Any) -> tuple[str, dict[str, Any]]:
    """Return a Pooling module in the older form of boolean flags."""
    flags = (
        "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens",
        "lasttoken",
    )  # fmt: skip
    chosen = {f"pooling_mode_{flag}": flag in modes for flag in flags}
    return "Pooling", {"word_embedding_dimension": width, **chosen, **settings}


def save_dense(
    folder: Path, width: int, out_width: int, *, is_pickled: bool = False, seed: int = 5
) -> tuple[str, dict[str, Any]]:
    """Write the weights of a Dense module; return the module."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "linear.weight": torch.randn(out_width, width),
        "linear.bias": torch.randn(out_width),
    }
    if is_pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    activation = "torch.nn.modules.activation.Tanh"
    return "Dense", {
        "in_features": width, "out_features": out_width, "bias": True,
        "activation_function": activation,
    }  # fmt: skip


def move_transformer(folder: Path, name: str = "0_Transformer") -> Path:
    """Move the transformer's files into a folder of their own, as older models have them."""
    inner = folder / name
    inner.mkdir()
    outer = ("modules.json", "config_sentence_transformers.json")
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in outer:
            shutil.move(path, inner / path.name)
    listing = json.loads((folder / "modules.json").read_text())
    listing[0]["path"] = name
    write_json(folder / "modules.json", listing)
    return inner


def to_pickle(folder: Path) -> Path:
    """Replace model.safetensors by pytorch_model.bin; return the latter."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def export_onnx(folder: Path, encoder: Encoder, output: str = "last_hidden_state") -> Path:
    """Export the model of `folder` beside its files; return the graph's path."""
    import warnings

    import torch
    import transformers

    model = getattr(transformers, encoder.class_name).from_pretrained(
        folder, attn_implementation="eager"
    )
    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    path = folder / "model.onnx"
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _outputs(model.eval(), output), (example, example, example * 0), path,
            input_names=names, output_names=[output], opset_version=17, dynamo=False,
            dynamic_axes=dict.fromkeys(names, axes) | {output: axes},
        )  # fmt: skip
    (folder / "model.safetensors").unlink()
    return path


def _outputs(model: Any, output: str, *, adds_mask: bool = False) -> Any:
    """Return a module that gives one output of the model, for token ids, mask and segments.

    With `adds_mask` the mask is what is added to the scores, without transformers' own operators.
    """
    import torch

    class Outputs(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            if adds_mask:
                mask = (1 - mask[:, None, None, :].float()) * -10_000.0
            made = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)
            return getattr(made, output)

    return Outputs()


def export_coreml(folder: Path, encoder: Encoder) -> Path:
    """Export the token vectors of `folder`'s model as an ML program in float32."""
    import warnings

    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools

        model = getattr(transformers, encoder.class_name).from_pretrained(
            folder, attn_implementation="eager"
        )
        example = torch.ones((1, 8), dtype=torch.int32)
        with torch.no_grad():
            traced = torch.jit.trace(
                _outputs(model.eval(), "last_hidden_state", adds_mask=True),
                (example, example, example * 0),
            )
        tokens = coremltools.RangeDim(1, LENGTH, 8)
        inputs = [
            coremltools.TensorType(name=name, shape=(1, tokens), dtype=np.int32)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ]
        package = coremltools.convert(
            traced, inputs=inputs,
            outputs=[coremltools.TensorType(name="last_hidden_state", dtype=np.float32)],
            minimum_deployment_target=coremltools.target.macOS15,
            compute_precision=coremltools.precision.FLOAT32,
            skip_model_load=True,
        )  # fmt: skip
    path = folder / "encoder.mlpackage"
    package.save(str(path))
    (folder / "model.safetensors").unlink()
    return path


def tiny_qwen3() -> Any:
    """Return transformers' Qwen3 decoder with the random weights of a seed that it sets."""
    import torch
    import transformers

    torch.manual_seed(4)
    config = transformers.Qwen3Config(
        vocab_size=1200, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
        rope_theta=10_000.0,
    )  # fmt: skip
    return transformers.Qwen3Model(config).eval()
