"""The starter cut to its first layers: the same vocabulary, template and length of prompts."""

from pathlib import Path

from gguf import GGUFReader, GGUFWriter

from tests.starter import starter_path

LAYERS = 2


def write_small_model(target: Path) -> Path:
    """Write the starter without its layers from LAYERS on."""
    reader = GGUFReader(starter_path())
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    layers = f"{architecture}.block_count"
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", layers):
            continue
        kind, *items = field.types
        writer.add_key_value(name, field.contents(), kind, items[-1] if items else None)
    writer.add_uint32(layers, LAYERS)
    for tensor in reader.tensors:
        if _layer(tensor.name) < LAYERS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _layer(name: str) -> int:
    """Return a tensor's layer, -1 for those of no layer."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1
