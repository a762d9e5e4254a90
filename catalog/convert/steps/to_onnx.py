"""Converts Hugging Face safetensors to ONNX, with onnxruntime-genai or PyTorch's exporter."""

import contextlib
import runpy
import sys
from pathlib import Path
from typing import Any

from catalog.convert.job import Job, Report, copy_sidecars, link_source
from core.errors import UnsupportedCapability

_PRECISIONS = {"f32": "fp32", "int4": "int4", "int8": "int8"}
_OPSET = 18


def to_onnx(job: Job, report: Report) -> None:
    """Write a folder with model.onnx, its data, the configurations and the tokenizer.

    The exporter "auto" falls back from "genai" to "torch" for architectures that only PyTorch
    supports, in f32.  Raises UnsupportedCapability.
    """
    source = link_source(job)
    if job.exporter in ("auto", "genai"):
        report(0.0, "building the graph")
        try:
            _build(job, source)
        except NotImplementedError as error:
            if job.exporter == "genai" or job.quantization != "f32":
                raise UnsupportedCapability(
                    f"{job.name} cannot be converted to ONNX in {job.quantization}: {error}"
                ) from error
            report(0.1, "tracing the model")
            export_by_tracing(source, job.output, job.threads)
    elif job.quantization != "f32":
        raise UnsupportedCapability(
            "PyTorch's exporter supports only f32; choose f32 or the exporter genai.",
            param="quantization",
        )
    else:
        report(0.0, "tracing the model")
        export_by_tracing(source, job.output, job.threads)
    copy_sidecars(source, job.output)
    report(1.0, "done")


def _build(job: Job, source: Path) -> None:
    """Run the builder's command line in this process, which does nothing else.

    Raises NotImplementedError for architectures that it does not support.
    """
    arguments = [
        "builder", "-i", str(source), "-o", str(job.output), "-e", "cpu",
        "-p", _PRECISIONS[job.quantization], "-c", str(job.work / "cache"),
        "--extra_options", "hf_remote=false", "hf_token=false",
    ]  # fmt: skip
    before = sys.argv
    sys.argv = arguments
    try:
        with contextlib.suppress(SystemExit):
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    finally:
        sys.argv = before
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
