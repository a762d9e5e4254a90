"""Makes a library of models whose headers are real and whose weights are holes in sparse files."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.units import MIB

FILES = 5000
# Of each hundred files: 60 GGUF models, 8 folders of 5 files.
_FOLDER_FILES = 5
_FOLDERS_PER_HUNDRED = 8
_PER_FOLDER = 20
_WORDS = 256
_WIDTH = 64
_SPARSE_BYTES = 8 * MIB
_NAME = "bench-00000"
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "vocab_size": _WORDS,
}


@dataclass(frozen=True, slots=True)
class Library:
    """A folder of models; `files` and `models` are how many there are."""

    folder: Path
    files: int
    models: int


def write_library(folder: Path, files: int = FILES) -> Library:
    """Write GGUF files, twenty to a folder, and folders as transformers writes them; blocks."""
    folders = files * _FOLDERS_PER_HUNDRED // 100
    singles = files - folders * _FOLDER_FILES
    template = _gguf(folder)
    for number in range(singles):
        name = f"bench-{number:05d}"
        place = folder / "gguf" / f"publisher-{number // _PER_FOLDER}"
        place.mkdir(parents=True, exist_ok=True)
        _write_sparse(place / f"{name}-Q8_0.gguf", template.replace(_NAME.encode(), name.encode()))
    for number in range(folders):
        _write_folder(folder / "hf" / f"folder-{number:05d}", number)
    return Library(folder, files, singles + folders)


def _write_sparse(path: Path, head: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + _SPARSE_BYTES)


def _gguf(folder: Path) -> bytes:
    """Return the header of a Llama, whose weights are the zeros after it."""
    from gguf import GGMLQuantizationType, GGUFWriter

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "template.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name(_NAME)
    writer.add_license("apache-2.0")
    writer.add_context_length(4096)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * _WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(7)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{word:02X}>" for word in range(_WORDS)])
    writer.add_token_scores([0.0] * _WORDS)
    writer.add_token_types([6] * _WORDS)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    for name, shape in _tensors("blk.0", gguf=True).items():
        size = int(np.prod(shape)) // 32 * 34 if len(shape) == 2 else int(np.prod(shape)) * 4
        kind = GGMLQuantizationType.Q8_0 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return content


def _tensors(layer: str, *, gguf: bool) -> Mapping[str, Sequence[int]]:
    """Return the shapes of the weights of a Llama with one layer."""
    names = _GGUF_NAMES if gguf else _HF_NAMES
    return {name.format(layer=layer): shape for name, shape in names.items()}


_GGUF_NAMES: Mapping[str, Sequence[int]] = {
    "token_embd.weight": (_WORDS, _WIDTH),
    "{layer}.attn_norm.weight": (_WIDTH,),
    "{layer}.attn_q.weight": (_WIDTH, _WIDTH),
    "{layer}.attn_k.weight": (_WIDTH // 2, _WIDTH),
    "{layer}.attn_v.weight": (_WIDTH // 2, _WIDTH),
    "{layer}.attn_output.weight": (_WIDTH, _WIDTH),
    "{layer}.ffn_norm.weight": (_WIDTH,),
    "{layer}.ffn_gate.weight": (2 * _WIDTH, _WIDTH),
    "{layer}.ffn_up.weight": (2 * _WIDTH, _WIDTH),
    "{layer}.ffn_down.weight": (_WIDTH, 2 * _WIDTH),
    "output_norm.weight": (_WIDTH,),
}
_HF_NAMES: Mapping[str, Sequence[int]] = {
    "model.embed_tokens.weight": (_WORDS, _WIDTH),
    "{layer}.input_layernorm.weight": (_WIDTH,),
    "{layer}.self_attn.q_proj.weight": (_WIDTH, _WIDTH),
    "{layer}.self_attn.k_proj.weight": (_WIDTH // 2, _WIDTH),
    "{layer}.self_attn.v_proj.weight": (_WIDTH // 2, _WIDTH),
    "{layer}.self_attn.o_proj.weight": (_WIDTH, _WIDTH),
    "{layer}.post_attention_layernorm.weight": (_WIDTH,),
    "{layer}.mlp.gate_proj.weight": (2 * _WIDTH, _WIDTH),
    "{layer}.mlp.up_proj.weight": (2 * _WIDTH, _WIDTH),
    "{layer}.mlp.down_proj.weight": (_WIDTH, 2 * _WIDTH),
    "model.norm.weight": (_WIDTH,),
}


def _write_folder(folder: Path, number: int) -> None:
    """Write a model of five files, as transformers saves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG | {"_name_or_path": f"x/{number}"}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "README.md").write_text(f"# Model {number}\n")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in _tensors("model.layers.0", gguf=False).items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def _tokenizer() -> Mapping[str, Any]:
    vocabulary = {chr(number): number for number in range(_WORDS)}
    return {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
