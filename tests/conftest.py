"""Settings of all tiers."""

import gc
import os
from collections import OrderedDict
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import settings

# What other programs have on this machine is not part of a test.
os.environ["IMPETUS_DISCOVER"] = ""

# A machine under load is slow, and slowness is no failure.
settings.register_profile("impetus", deadline=None)
settings.load_profile("impetus")

# Files whose tests share a server, by what they share.
_SERVERS = {
    **dict.fromkeys(
        (
            "agent_apis",
            "chat",
            "faults",
            "formats",
            "managed_models",
            "parts_down",
            "rerank",
            "resume",
            "scheduler_down",
            "sdk_types",
            "turn_sharing",
        ),
        "shared server",
    ),
    **dict.fromkeys(
        ("auto_convert", "faults_drain", "lifecycle", "odd_folders", "scaling"), "own servers"
    ),
}
# Files of the contract whose tests share the engine of a variant, and those that share nothing.
_BY_VARIANT = ("backend", "grammar", "resume", "tokens")
_ALONE = ("close", "conversion", "gguf_kinds", "memory", "snapshots", "zoo")
# Single tests and small groups that take minutes, as they build models that others use too.
_LONG = ("coreml", "onnx-plain", "tests/contract/conversion/")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: closing an engine makes a whole one."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give tests that share something to one process, instead of whole files."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    scheduling = LoadFileScheduling(config, log)
    # xdist_group would be the public way; pytest-xdist 3.8 ignores it under pytest 9.2.
    scheduling._split_scope = sharing
    schedule = scheduling.schedule

    def long_first() -> None:
        schedule()
        start_long_first(scheduling.workqueue)

    scheduling.schedule = long_first
    return scheduling


def start_long_first(queue: OrderedDict[str, Any]) -> None:
    """Let no process be left with minutes of work when the others have none.

    The largest groups, by their number of tests, have been given out already.
    """
    for name in [each for each in reversed(queue) if each.startswith(_LONG)]:
        queue.move_to_end(name, last=False)


def sharing(nodeid: str) -> str:
    """Return the name of what a test shares with others; by default that is its file."""
    file, _, test = nodeid.partition("::")
    path = PurePosixPath(file)
    tier, name = path.parts[1], path.stem.removeprefix("test_")
    if tier == "integration":
        return _SERVERS.get(name, file)
    if tier == "contract" and name in _ALONE:
        return nodeid
    if tier == "contract" and name in _BY_VARIANT:
        from tests.models import GOLDEN, VARIANTS

        parameters = f"-{test.partition('[')[2].rpartition(']')[0]}-"
        found = [each for each in (*VARIANTS, *GOLDEN) if f"-{each}-" in parameters]
        # What has no variant uses the engine that test_gguf.py uses.
        return max(found, key=len, default="tests/contract/test_gguf.py")
    return file
