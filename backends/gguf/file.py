"""Identifies a GGUF model from its headers: capabilities, sizes, shards of split models."""

import math
import re
from collections import Counter
from pathlib import Path

from backends.base import ModelInfo
from backends.gguf.header import TEMPLATE_KEY
from backends.gguf.header import GgufFile as GgufFile
from backends.gguf.header import read_gguf as read_gguf
from backends.gguf.layout import FILE_TYPES, broken
from backends.hf.kinds.other import refusal
from backends.prompt.infill import infill_details
from backends.prompt.named_templates import RAG, TOOL_USE, template_capabilities
from core.types import Capability

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_GUESSED_FILE_TYPE = 1024
# llama.cpp aborts the process above these (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS).
_MAX_LAYERS = 512
_MAX_EXPERTS = 512
_MAX_WIDTH = 2**24
_MAX_TOKENS = 2**31 - 1
_RANK_POOLING = 4
_RANK_HEADS = ("cls.weight", "cls.output.weight")
# llama.cpp returns the probabilities of yes and no for these (llama-graph.cpp, build_pooling).
YES_NO_RERANKERS = frozenset({"qwen3", "qwen3vl"})

# Source: llama.cpp's architectures with bidirectional attention and no language model head.
ENCODERS = frozenset({
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2",
    "jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed", "t5encoder",
})  # fmt: skip
_PARTS = {
    "clip": "a multimodal projector (images or sound)",
    "mmproj": "a multimodal projector (images or sound)",
    "wavtokenizer-dec": "a vocoder",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix for quantizing",
}
# `general.type` of files that llama.cpp's tools write, with what they are.
_PART_TYPES = {
    "adapter": "a LoRA adapter",
    "mmproj": "a multimodal projector (images or sound)",
    "imatrix": "an importance matrix for quantizing",
    "controlvector": "a control vector",
    "vocab": "a vocabulary without weights",
}
# Source: the architectures that ComfyUI-GGUF and stable-diffusion.cpp write.
_IMAGE_GENERATORS = frozenset({
    "flux", "sd1", "sd2", "sd3", "sdxl", "aura", "ltxv", "hyvid", "wan", "hidream", "cosmos",
    "lumina2", "qwen_image", "chroma", "z_image", "pig", "hunyuan_video", "mochi", "omnigen2",
})  # fmt: skip
_SPEECH = frozenset({"whisper", "parakeet", "moonshine", "kokoro", "outetts-vocoder", "silero"})
_UNSUPPORTED = {"t5": "encoder-decoder models are not supported"}

# Name in `ModelInfo.details`: metadata key after the architecture.
_OPTIONAL_NUMBERS = {
    "n_ff": "feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "key_length_swa": "attention.key_length_swa",
    "value_length_swa": "attention.value_length_swa",
    "kv_lora_rank": "attention.kv_lora_rank",
    "key_length_mla": "attention.key_length_mla",
    "value_length_mla": "attention.value_length_mla",
    "shared_kv_layers": "attention.shared_kv_layers",
    "full_attention_interval": "full_attention_interval",
    "expert_count": "expert_count",
    "expert_used_count": "expert_used_count",
    "pooling_type": "pooling_type",
    "ssm_conv_kernel": "ssm.conv_kernel",
    "ssm_inner_size": "ssm.inner_size",
    "ssm_state_size": "ssm.state_size",
    "ssm_time_step_rank": "ssm.time_step_rank",
    "ssm_group_count": "ssm.group_count",
    "wkv_head_size": "wkv.head_size",
    "token_shift_count": "token_shift_count",
}
_SAMPLING = "general.sampling."


def shard_files(path: Path) -> tuple[Path, ...]:
    """Return all files of a split model, first shard first; only `path` if it is not split.

    Raises BrokenModel that names the first missing shard.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise broken(path, f"its name says shard {int(match[2])} of {count}")
    files = []
    for number in range(1, count + 1):
        shard = path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf")
        if not shard.is_file():
            raise broken(path, f"shard {number} of {count} is missing ({shard.name})")
        files.append(shard)
    return tuple(files)


def gguf_info(path: Path) -> ModelInfo:
    """Describe the model in `path`, or in the split model that it is a shard of.

    A decoder without a chat template still has the chat capability: there is a plain fallback.
    `details` holds numbers for the memory estimate, the texts of the bos and eos tokens, and the
    recommended sampling parameters.  Raises NotThisFormat, BrokenModel.
    """
    files = _read_set(path)
    first = files[0]
    architecture = first.architecture
    _check_is_model(first)
    context_length = first.required(f"{architecture}.context_length", _MAX_TOKENS)
    details = _details(first)
    details["tensor_bytes"] = sum(file.tensor_bytes for file in files)
    if not details["tensor_bytes"]:
        raise broken(first.path, "it has no tensors, only metadata; download the complete model")
    return ModelInfo(
        format="gguf",
        name=_one_line(first.text("general.name")) or _one_line(first.path.stem),
        architecture=architecture,
        quantization=_quantization(files),
        files=tuple(file.path for file in files),
        size_bytes=sum(file.size_bytes for file in files),
        parameters=sum(file.parameters for file in files),
        context_length=context_length,
        capabilities=_capabilities(files),
        license=_one_line(first.text("general.license")),
        chat_template=first.text(TEMPLATE_KEY) or None,
        tool_template=first.text(f"{TEMPLATE_KEY}.{TOOL_USE}") or None,
        rag_template=first.text(f"{TEMPLATE_KEY}.{RAG}") or None,
        details=details,
    )


def _read_set(path: Path) -> list[GgufFile]:
    """Read all shards; name and metadata of each must give the same shard number."""
    paths = shard_files(path.absolute())
    files = [read_gguf(each) for each in paths]
    for index, file in enumerate(files):
        count = file.number("split.count", 0, 99_999) or 1
        number = file.number("split.no", 0, 99_999) or 0
        if len(files) == 1 and count > 1:
            raise broken(
                file.path,
                f"it is shard {number + 1} of {count}, so it must be named "
                f"<name>-{number + 1:05d}-of-{count:05d}.gguf and lie beside the others",
            )
        if (count, number) != (len(files), index):
            raise broken(
                file.path,
                f"its name says shard {index + 1} of {len(files)}, its metadata {number + 1} of "
                f"{count}",
            )
    return files


def _check_is_model(file: GgufFile) -> None:
    architecture = file.architecture
    part = _PART_TYPES.get(file.text("general.type")) or _PARTS.get(architecture)
    if part is not None:
        raise broken(file.path, f"it is {part}, which is not a model by itself")
    if not architecture:
        raise broken(file.path, "it has no general.architecture")
    if architecture in _IMAGE_GENERATORS:
        raise broken(file.path, refusal(f"an image or video generator ({architecture})"))
    if architecture in _SPEECH:
        raise broken(file.path, refusal(f"a model of sound or speech ({architecture})"))
    if architecture in _UNSUPPORTED:
        raise broken(file.path, _UNSUPPORTED[architecture])
    if not file.vocabulary_size:
        raise broken(file.path, "it has no vocabulary")


def _one_line(text: str) -> str:
    """Return `text` without control characters, at most 200 characters long."""
    return "".join(char for char in text if char.isprintable()).strip()[:200]


def _quantization(files: list[GgufFile]) -> str:
    """Return the name of the file type, or the tensor type of most elements."""
    file_type = files[0].metadata.get("general.file_type")
    if isinstance(file_type, int):
        name = FILE_TYPES.get(file_type & ~_GUESSED_FILE_TYPE)
        if name is not None:
            return name
    elements: Counter[str] = Counter()
    for file in files:
        elements.update(file.elements_by_type)
    return elements.most_common(1)[0][0]


def _reranks(files: list[GgufFile]) -> bool:
    """Whether the model scores pairs of texts.  Raises BrokenModel for other classifiers."""
    file = files[0]
    architecture = file.architecture
    if file.number(f"{architecture}.pooling_type", 0, _RANK_POOLING) != _RANK_POOLING:
        return False
    if not any(name in each.places for each in files for name in _RANK_HEADS):
        if architecture in ENCODERS:
            raise broken(file.path, "it is to score texts, but has no classification head (cls)")
        return False
    labels = file.array_counts.get(f"{architecture}.classifier.output_labels", 1)
    if labels > 1 and architecture not in YES_NO_RERANKERS:
        raise broken(file.path, refusal(f"a classifier with {labels} labels"))
    return True


def _capabilities(files: list[GgufFile]) -> frozenset[Capability]:
    if _reranks(files):
        return frozenset({Capability.RERANK})
    file = files[0]
    architecture = file.architecture
    pooling = file.number(f"{architecture}.pooling_type", 0, _RANK_POOLING)
    is_encoder = architecture in ENCODERS
    capabilities: set[Capability] = set()
    if pooling != _RANK_POOLING and (pooling or is_encoder):
        capabilities.add(Capability.EMBEDDING)
    if is_encoder or file.metadata.get(f"{architecture}.attention.causal") is False:
        return frozenset(capabilities)
    capabilities |= {Capability.CHAT, Capability.COMPLETION}
    templates = (file.text(TEMPLATE_KEY), file.text(f"{TEMPLATE_KEY}.{TOOL_USE}"))
    capabilities |= template_capabilities(templates)
    if file.has_think_token:
        capabilities.add(Capability.REASONING)
    if file.infill is not None:
        capabilities.add(Capability.INFILL)
    return frozenset(capabilities)


def _details(file: GgufFile) -> dict[str, int | float | str | bool]:
    prefix = file.architecture
    layers = file.required(f"{prefix}.block_count", _MAX_LAYERS)
    width = file.required(f"{prefix}.embedding_length", _MAX_WIDTH)
    heads = file.number(f"{prefix}.attention.head_count", 0, _MAX_WIDTH) or 0
    kv_key = f"{prefix}.attention.head_count_kv"
    kv_heads = file.number(kv_key, 0, _MAX_WIDTH)
    kv_heads = heads if kv_heads is None else kv_heads
    by_layer = file.metadata.get(kv_key)
    details: dict[str, int | float | str | bool] = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_head_kv": kv_heads,
        "n_head_kv_sum": int(sum(by_layer)) if isinstance(by_layer, tuple) else kv_heads * layers,
        "vocabulary_size": file.vocabulary_size,
    }
    for name in ("key_length", "value_length"):
        length = file.number(f"{prefix}.attention.{name}", 0, _MAX_WIDTH)
        details[name] = length if length is not None else width // heads if heads else 0
    for name, key in _OPTIONAL_NUMBERS.items():
        high = _MAX_EXPERTS if key == "expert_count" else _MAX_TOKENS
        number = file.number(f"{prefix}.{key}", 0, high)
        if number is not None:
            details[name] = number
    for name, text in (("bos_token", file.bos_token), ("eos_token", file.eos_token)):
        if text:
            details[name] = text
    return details | infill_details(file.infill) | _recommended_sampling(file)


def _recommended_sampling(file: GgufFile) -> dict[str, int | float | str | bool]:
    """Return `general.sampling.*` keys as `sampling_*`, finite scalars only."""
    return {
        "sampling_" + key.removeprefix(_SAMPLING): value
        for key, value in file.metadata.items()
        if key.startswith(_SAMPLING)
        and not isinstance(value, tuple)
        and not (isinstance(value, float) and not math.isfinite(value))
    }
