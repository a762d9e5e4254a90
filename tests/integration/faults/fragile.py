"""A plug-in for tests: echo models in one process, which words in a prompt end or hang."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from backends.base import Engine, EngineOptions, ModelInfo
from backends.echo import ByteTokenizer, EchoBackend, EchoStepper, echo_info
from backends.engine.batching import BatchingEngine
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Preparer
from backends.stepper import SequenceSpec, StepOutput
from core.plugins import hookimpl

FORMAT = "fragile"
MODELS = ("fragile", "innocent", "unloadable", "hanging")
KILL_PREPARE, KILL_PREFILL, HANG_PREFILL = "KILL-PREPARE", "KILL-PREFILL", "HANG-PREFILL"
# A token takes this long, so that streams last until a test has done what it wants.
_STEP_S = 0.01


class FragileTokenizer(ByteTokenizer):
    """Ends the process, as a crash in native code does, for one word."""

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        if KILL_PREPARE in text:
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        return super().encode(text, add_bos=add_bos, parse_special=parse_special)


class FragileStepper(EchoStepper):
    """Ends or hangs the process in the first step of a prompt with one of the words."""

    def __init__(self, max_sequences: int) -> None:
        super().__init__(max_sequences)
        self._new: list[bytes] = []

    def add(self, spec: SequenceSpec) -> None:
        super().add(spec)
        self._new.append(bytes(spec.prompt))

    def step(self) -> list[StepOutput]:
        time.sleep(_STEP_S)
        for prompt in self._new:
            if KILL_PREFILL.encode() in prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if KILL_PREFILL.encode() in prompt or HANG_PREFILL.encode() in prompt:
                time.sleep(600)
        self._new.clear()
        return super().step()


class FragileBackend(EchoBackend):
    """Several models, so that a process has more than one."""

    name: ClassVar[str] = FORMAT
    starts_on_demand: ClassVar[bool] = False

    def built_in(self) -> tuple[ModelInfo, ...]:
        return tuple(replace(echo_info(), format=FORMAT, name=name) for name in MODELS)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        if info.name == "unloadable":
            os.kill(os.getpid(), signal.SIGKILL)
        if info.name in ("unloadable", "hanging"):
            time.sleep(600)
        chat = ChatFormat("{{ messages[-1].content }}", "", "", tool_parser=options.tool_parser)
        preparer = Preparer(info, FragileTokenizer(), chat, context_tokens=info.context_length)
        return BatchingEngine(
            info,
            preparer,
            lambda: FragileStepper(options.max_sequences),
            max_waiting=options.max_waiting,
        )


class Plugin:
    """What the entry point names."""

    @hookimpl
    def register_backends(self, register: object) -> None:
        assert callable(register)
        register(FragileBackend())


plugin = Plugin()


def write_distribution(folder: Path) -> None:
    """Make `folder`, once it is on the path, an installed distribution with this plug-in."""
    info = folder / "impetus_fragile-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: impetus-fragile\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[impetus]\nfragile = {__name__}:plugin\n")
