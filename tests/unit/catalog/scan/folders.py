"""Builders of model folders as programs leave them, and a scan of them with the real formats."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from backends.registry import load_backends
from catalog.models import ScanReport
from catalog.scan.identify import Outcome, examine
from catalog.scan.scan import scan
from catalog.store import CatalogStore
from core.settings import Settings
from tests.onnx_files import write_tokenizer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "vocab_size": 64,
}
# In Unix seconds; long after the files of a test were written.
MUCH_LATER = 4_000_000_000.0


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def llama_tensors() -> dict[str, np.ndarray]:
    """Return the weights of a one-layer Llama."""
    width, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (LLAMA["vocab_size"], width),
        f"{layer}.self_attn.q_proj": (width, width),
        f"{layer}.self_attn.k_proj": (width, width),
        f"{layer}.self_attn.v_proj": (width, width),
        f"{layer}.self_attn.o_proj": (width, width),
        f"{layer}.mlp.gate_proj": (inner, width),
        f"{layer}.mlp.up_proj": (inner, width),
        f"{layer}.mlp.down_proj": (width, inner),
        f"{layer}.input_layernorm": (width,),
        f"{layer}.post_attention_layernorm": (width,),
        "model.norm": (width,),
    }
    random = np.random.default_rng(3)
    return {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_weights(path: Path, tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write a safetensors file, by default a Llama's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors or llama_tensors()), path, metadata={"format": "pt"})
    return path


def write_shards(folder: Path, count: int = 3) -> list[Path]:
    """Write a Llama's weights as shards with their index."""
    tensors = llama_tensors()
    names = sorted(tensors)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        own = names[number::count]
        files.append(write_weights(file, {name: tensors[name] for name in own}))
        weight_map |= dict.fromkeys(own, file.name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return files


def write_model(folder: Path, **config: Any) -> Path:
    """Write a whole Llama as transformers saves it; return the folder."""
    write_json(folder / "config.json", {**LLAMA, **config})
    write_weights(folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


@dataclass(slots=True)
class Shelf:
    """A model folder that is scanned with every format, at a time of the test's choice."""

    home: Path
    store: CatalogStore
    looked: list[Path] = field(default_factory=list)
    now: float = MUCH_LATER
    extra: tuple[Path, ...] = ()
    # None: all of them.
    formats: tuple[str, ...] | None = None

    @property
    def models(self) -> Path:
        """The folder that is scanned."""
        return self.home / "models"

    def scan(self, *, later_s: float = 0.0) -> ScanReport:
        """Scan; `looked` are the files that were inspected."""
        self.now += later_s
        self.looked.clear()
        formats = self.formats or [name for name in load_backends() if name != "echo"]
        backends = [load_backends()[name] for name in formats]

        def identify(path: Path) -> Outcome:
            self.looked.append(path)
            return examine(path, backends)

        return scan(
            Settings(home=self.home, starters=False, models_path=list(self.extra)),
            self.store,
            backends,
            identify_file=identify,
            clock=lambda: self.now,
        )

    def states(self) -> dict[str, str]:
        """Return the state of every entry by id, except models that need no files."""
        return {one.id: one.state for one in self.store.models() if one.info.files}

    def reason(self, model_id: str) -> str:
        """Return why an entry is refused."""
        record = self.store.get(model_id)
        assert record is not None, self.states()
        return record.reason

    def touch(self, *paths: Path, age_s: float = 0.0) -> None:
        """Set the times of files to now, or to `age_s` before."""
        for path in paths:
            time_ns = int((self.now - age_s) * 1e9)
            os.utime(path, ns=(time_ns, time_ns))
