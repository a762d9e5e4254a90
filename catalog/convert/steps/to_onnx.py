"""Converts Hugging Face safetensors to ONNX, with onnxruntime-genai or PyTorch's exporter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.hf.config import read_folder
from catalog.convert.job import (
    Job,
    Report,
    first_line,
    link_source,
    read_json,
    write_json,
)
from catalog.convert.sidecars import copy_sidecars, remove_tokenizer
from catalog.convert.steps.hf_defaults import complete_config
from catalog.convert.steps.onnx_builder import run_builder
from catalog.convert.steps.onnx_source import map_weights
from catalog.convert.steps.rotary import limit_to_window
from catalog.convert.support import ONNX_BUILT, onnx_reason
from core.errors import UnsupportedCapability

_PRECISIONS = {"f32": "fp32", "int4": "int4", "int8": "int8"}
_OPSET = 18


def to_onnx(job: Job, report: Report) -> None:
    """Write a folder with model.onnx, its data, the configurations and the tokenizer.

    The exporter "auto" takes "genai" for the architectures that it writes correctly, else "torch",
    which writes f32 only.  Raises UnsupportedCapability.
    """
    source = link_source(job)
    exporter = _exporter(job, read_folder(source).config)
    report(0.0, "reading the weights")
    map_weights(job, source, in_f32=exporter == "torch")
    if exporter == "genai":
        report(0.1, "building the graph")
        make_loadable(source)
        name_class(source)
        try:
            _build(job, source)
        except NotImplementedError as error:
            raise UnsupportedCapability(
                f"{job.name} cannot be converted to ONNX in {job.quantization}: "
                f"{first_line(error)}",
                param="target_format",
            ) from error
    else:
        report(0.1, "tracing the model")
        export_by_tracing(source, job.output, job.threads)
    _write_configs(source, job.output)
    copy_sidecars(job.folder, job.output)
    report(1.0, "done")


def make_loadable(source: Path) -> None:
    """Put a placeholder in place of a tokenizer that transformers cannot load.

    The builder loads it after all weights are written, only to save it again.
    """
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception:
        remove_tokenizer(source)
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(source / "tokenizer.json"))
        write_json(source / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def name_class(source: Path) -> None:
    """Add the class of a model to its config.json, by which the builder chooses its code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(source / "config.json")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    if not config.get("architectures") and isinstance(name, str):
        write_json(source / "config.json", config | {"architectures": [name]})


def _exporter(job: Job, config: Mapping[str, Any]) -> str:
    """Return the exporter to use, "genai" or "torch".  Raises UnsupportedCapability."""
    if reason := onnx_reason(config, job.quantization):
        raise UnsupportedCapability(
            f"{job.name} cannot be converted to ONNX: {reason}.", param="target_format"
        )
    is_built = config.get("model_type") in ONNX_BUILT
    exporter = job.exporter if job.exporter != "auto" else "genai" if is_built else "torch"
    if exporter == "torch" and job.quantization != "f32":
        raise UnsupportedCapability(
            "PyTorch's exporter supports only f32; choose f32 or the exporter genai.",
            param="quantization",
        )
    if exporter == "genai" and not is_built:
        raise UnsupportedCapability(
            f"onnxruntime-genai does not write the architecture {config.get('model_type')!r} "
            "correctly; choose the exporter torch.",
            param="exporter",
        )
    return exporter


def _write_configs(source: Path, output: Path) -> None:
    """Write config.json; in it and in the builder's own file, the context ends at a window."""
    config = complete_config(source)
    limit_to_window(config)
    write_json(output / "config.json", config)
    path, longest = output / "genai_config.json", config.get("max_position_embeddings")
    if path.is_file() and type(longest) is int:
        genai = read_json(path)
        for part, key in (("model", "context_length"), ("search", "max_length")):
            section = genai.get(part)
            if isinstance(section, dict) and type(section.get(key)) is int:
                section[key] = min(section[key], longest)
        write_json(path, genai)


def _build(job: Job, source: Path) -> None:
    """Run the builder.  Raises NotImplementedError for architectures that it does not support."""
    run_builder([
        "-i", str(source), "-o", str(job.output), "-e", "cpu",
        "-p", _PRECISIONS[job.quantization], "-c", str(job.work / "cache"),
        "--extra_options", "hf_remote=false", "hf_token=false",
    ])  # fmt: skip
    if not (job.output / "model.onnx").is_file():
        raise UnsupportedCapability(
            "onnxruntime-genai's builder did not write a model; try the exporter torch.",
            param="target_format",
        )


def export_by_tracing(source: Path, output: Path, threads: int) -> None:
    """Export with standard operators; inputs, cache and positions have Optimum's names."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).eval()
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, length, past = 2, 3, 5
    total = length + past
    cache = [
        (torch.zeros(batch, heads, past, width), torch.zeros(batch, heads, past, width))
        for _ in range(layers)
    ]
    positions = torch.arange(past, total)[None].expand(batch, length).contiguous()
    ones = torch.ones(batch, total, dtype=torch.long)
    any_size = torch.export.Dim.DYNAMIC
    row = {0: any_size, 1: any_size}
    kept = {0: any_size, 2: any_size}
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            _with_flat_cache(model),
            (ones[:, :length].contiguous(), ones, positions, cache),
            dynamo=True,
            dynamic_shapes=(row, row, row, [(kept, kept)] * layers),
            input_names=[
                "input_ids", "attention_mask", "position_ids",
                *(f"past_key_values.{name}" for name in names),
            ],
            output_names=["logits", *(f"present.{name}" for name in names)],
            opset_version=_OPSET,
            external_data=True,
            optimize=True,
        )  # fmt: skip
    program.save(str(output / "model.onnx"), external_data=True)


def _with_flat_cache(model: Any) -> Any:
    """Return a module that takes and returns the cache as tensors and builds its own mask."""
    import torch
    from transformers.cache_utils import DynamicCache

    class FlatCache(torch.nn.Module):  # type: ignore[misc]
        """`model` with (key, value) pairs of shape (batch, heads, past, width) for its cache."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any
        ) -> tuple[Any, ...]:
            """Return the logits, then every layer's key and value."""
            cache = DynamicCache(config=self.model.config)
            for layer, (key, value) in zip(cache.layers, past, strict=True):
                layer.lazy_initialization(key, value)
                layer.keys, layer.values = key, value
            length, total = input_ids.shape[1], attention_mask.shape[1]
            columns = torch.arange(total)[None, None, None, :]
            rows = (torch.arange(length) + (total - length))[None, None, :, None]
            is_seen = (columns <= rows) & (attention_mask[:, None, None, :] > 0)
            lowest = torch.tensor(torch.finfo(torch.float32).min)
            mask = torch.where(is_seen, torch.tensor(0.0), lowest)
            out = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            flat = [
                part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)
            ]
            return (out.logits, *flat)

    return FlatCache()
