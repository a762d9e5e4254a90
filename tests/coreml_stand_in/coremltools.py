"""Stand-in for coremltools that keeps the interpreter's lock while it compiles and predicts.

Copied into a folder with `behaviour.json`, and imported from there by the process of a model.  It
writes each call to `calls.jsonl` beside it: what began or ended, in which process, and when.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
TABLE = np.random.default_rng(7).normal(size=(8, 6)).astype(np.float32)
CONVERTERS = ("torch", "sklearn", "tensorflow")


def behaviour() -> dict[str, Any]:
    """Return what calls shall do, by their names."""
    found: dict[str, Any] = json.loads((FOLDER / "behaviour.json").read_text())
    return found


def call(name: str, detail: str = "") -> None:
    """Record a call, and do what `behaviour.json` says for its name."""
    wanted = behaviour().get(name, {})
    note(name, "begin", detail)
    if wanted.get("hold_s"):
        # Unlike ctypes.CDLL, PyDLL keeps the interpreter's lock, as coremltools does.
        ctypes.PyDLL(None).usleep(int(wanted["hold_s"] * 1e6))
    if wanted.get("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "errno" in wanted:
        raise OSError(wanted["errno"], "as the test wants it")
    if "error" in wanted:
        raise RuntimeError(wanted["error"])
    note(name, "end", detail)


def note(name: str, what: str, detail: str) -> None:
    """Write a line to `calls.jsonl`."""
    line = {"call": name, "what": what, "at": time.monotonic(), "pid": os.getpid()}
    with (FOLDER / "calls.jsonl").open("a") as file:
        file.write(json.dumps({**line, "detail": detail}) + "\n")


class State:
    """Holds float16, and shows float32 as Core ML does."""

    def __init__(self) -> None:
        self.values = {"keyCache": np.zeros((1, 16), np.float16)}

    def read_state(self, name: str) -> Any:
        """Return a copy."""
        call("read_state")
        return self.values[name].astype(np.float32)

    def write_state(self, name: str, value: Any) -> None:
        """Replace the values."""
        call("write_state")
        assert value.dtype == np.float32
        self.values[name] = value.astype(np.float16)


class Model:
    """Gives logits of each token, with a state of the sum of all tokens up to it."""

    def make_state(self) -> State:
        """Return an empty state."""
        call("make_state")
        return State()

    def predict(self, data: dict[str, Any], state: State | None = None) -> dict[str, Any]:
        """Compute once."""
        call("predict")
        tokens = data.get("input_ids", data.get("inputIds"))
        assert tokens is not None
        if state is None:
            hidden = TABLE[tokens]
            name = behaviour().get("output", "logits")
            return {name: hidden @ TABLE.T if name == "logits" else hidden}
        new, end = tokens.shape[1], data["causalMask"].shape[-1]
        kept = state.values["keyCache"]
        kept[0, end - new : end] = tokens[0] + 1
        sums = np.array([kept[0, : end - new + 1 + place].sum() for place in range(new)])
        return {"logits": sums[None, :, None].astype(np.float32) * np.arange(1, 9)}


class MLModel(Model):
    """Compiles a package for the time that it is open."""

    def __init__(self, path: str) -> None:
        call("compile", path)


class CompiledMLModel(Model):
    """Opens what `compile_model` made."""

    def __init__(self, path: str) -> None:
        call("open", path)
        if (Path(path) / "coremldata.bin").read_text() != "compiled":
            raise RuntimeError("the compiled model is damaged")


def compile_model(path: str, destination_path: str) -> str:
    """Compile a package to a folder."""
    call("compile", path)
    made = FOLDER / f"temporary-{os.getpid()}.mlmodelc"
    made.mkdir()
    (made / "coremldata.bin").write_text("compiled")
    shutil.move(made, destination_path)
    return destination_path


models = SimpleNamespace(
    MLModel=MLModel,
    CompiledMLModel=CompiledMLModel,
    utils=SimpleNamespace(compile_model=compile_model),
)

note("import", "end", " ".join(name for name in CONVERTERS if sys.modules.get(name, 1) is None))
