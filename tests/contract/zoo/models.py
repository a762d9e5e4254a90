"""The zoo's models in the user's cache, built when they are first asked for."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from tests.cache import cache_folder, locked
from tests.contract.zoo import builder
from tests.contract.zoo.architectures import ARCHITECTURES

_BUILT_WITH = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A model with the greedy answers of transformers' own `generate` to four prompts.

    `answers` are 24 tokens for each of `prompts`; `gap` is the least difference between the two
    likeliest logits of all of them.
    """

    name: str
    model_type: str
    folder: Path
    gap: float
    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    parameters: int

    def weights(self, layout: str) -> Path:
        """Return the file that a scan finds the model by; `layout` is `safetensors` or `bin`."""
        name = "model.safetensors" if layout == "safetensors" else "pytorch_model.bin"
        return self.folder / layout / name


class Builder:
    """The process that builds models; starts with the first that is missing."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def model(self, name: str) -> ZooModel:
        """Return a model, building it where needed; blocks for seconds the first time.

        Raises RuntimeError with the reason if transformers cannot build it.
        """
        folder = _folder(name)
        with locked(folder):
            if not (folder / "reference.json").is_file():
                self._build(name, folder)
        read = json.loads((folder / "reference.json").read_text())
        config = json.loads((folder / "safetensors" / "config.json").read_text())
        return ZooModel(
            name,
            config["model_type"],
            folder,
            read["gap"],
            tuple(read["prompts"]),
            tuple(tuple(ids) for ids in read["ids"]),
            tuple(tuple(answer) for answer in read["answers"]),
            tuple(read["texts"]),
            read["parameters"],
        )

    def close(self) -> None:
        """End the process; may be called twice."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def _build(self, name: str, folder: Path) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", builder.__name__],
                cwd=builder.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name}\t{folder}\n")
        self._process.stdin.flush()
        outcome, _, rest = self._process.stdout.readline().strip().partition("\t")
        if outcome != "ok":
            raise RuntimeError(rest or "the process that builds models ended")


def _folder(name: str) -> Path:
    """Return where a model stands: under a hash of what makes all, with one of its settings."""
    own = repr(ARCHITECTURES[name]).encode()
    return _cache() / f"{name}-{hashlib.sha256(own).hexdigest()[:8]}"


@cache
def _cache() -> Path:
    digest = hashlib.sha256(Path(builder.__file__).read_bytes())
    digest.update((builder.ROOT / "LICENSE").read_bytes())
    for package in _BUILT_WITH:
        digest.update(f"{package}=={version(package)}\n".encode())
    return cache_folder("zoo", digest.hexdigest())
