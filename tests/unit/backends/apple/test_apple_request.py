"""Tests of what the Apple backend says and refuses before it asks the system."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.apple.backend import AppleFoundationBackend, apple_info, system_problem
from backends.apple.request import read_session_request
from backends.base import EngineOptions
from core.errors import (
    BackendUnavailable,
    NotThisFormat,
    RequestError,
    UnsupportedParameter,
)
from core.types import Capability, JsonOutput, TokenRules, Tool
from tests.requests import chat, request

ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("system", "release", "problem"),
    [
        ("linux", 0, "needs macOS 26"),
        ("darwin", 15, "this is 15"),
        ("darwin", 0, "this is unknown"),
        ("darwin", 26, ""),
        ("darwin", 27, ""),
    ],
)
def test_system_must_be_macos_26(system: str, release: int, problem: str) -> None:
    found = system_problem(system, release)
    assert problem in found
    assert bool(found) == bool(problem)


def test_macos_26_is_recognized_by_a_python_of_an_older_sdk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    # What such a Python reads on macOS 26, and what the kernel says.
    monkeypatch.setattr("platform.mac_ver", lambda: ("16.0", ("", "", ""), "arm64"))
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(release="25.1.0"))
    monkeypatch.setattr("backends.apple.backend._model_problem", lambda: "")
    assert AppleFoundationBackend().availability().is_available


@pytest.mark.skipif(sys.platform == "darwin", reason="the model may be there")
def test_elsewhere_it_is_listed_with_the_reason() -> None:
    backend = AppleFoundationBackend()
    (info,) = backend.built_in()
    assert info.context_length == 4096
    assert info.capabilities == {Capability.CHAT, Capability.TOOLS}
    assert backend.availability().reason == "Apple's model needs macOS 26 or later"
    with pytest.raises(BackendUnavailable, match="macOS 26"):
        backend.open(info, EngineOptions())


def test_macos_without_the_sdk_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.apple.backend.system_problem", lambda *_: "")
    monkeypatch.setattr(
        "backends.apple.backend.importlib.util.find_spec",
        lambda name: None if name == "apple_fm_sdk" else object(),
    )
    assert "not installed" in AppleFoundationBackend().availability().reason


def test_sdk_that_cannot_be_imported_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "apple_fm_sdk.py").write_text("raise ImportError('no bindings')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apple_fm_sdk", raising=False)
    monkeypatch.setattr("backends.apple.backend.system_problem", lambda *_: "")
    availability = AppleFoundationBackend().availability()
    assert not availability.is_available
    assert "no bindings" in availability.reason


def test_no_file_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(NotThisFormat):
        AppleFoundationBackend().identify(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("asked", "granted"), [(None, 4096), (1000, 1000), (8192, 4096)])
def test_context_is_at_most_the_models(asked: int | None, granted: int) -> None:
    estimate = AppleFoundationBackend().estimate(apple_info(), EngineOptions(context_tokens=asked))
    assert (estimate.total_bytes, estimate.context_tokens) == (0, granted)


def test_import_brings_no_sdk() -> None:
    code = "import sys, backends.apple.backend; sys.exit('apple_fm_sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("seed", 0),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("logit_bias", {1: 2.0}),
    ],
)
def test_sampling_that_the_sdk_drops_is_refused(param: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read_session_request(request(chat("Hi"), **{"temperature": 0.5, param: value}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [("ignore_eos", True), ("min_tokens", 2), ("stop_token_ids", (5,)), ("bad_words", ("no",))],
)
def test_rules_of_tokens_are_refused(param: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read_session_request(request(chat("Hi"), rules=TokenRules(**{param: value})))
    assert caught.value.param == param
    read_session_request(request(chat("Hi"), rules=TokenRules()))


def test_logprobs_are_refused() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read_session_request(request(chat("Hi"), top_logprobs=0))
    assert caught.value.param == "logprobs"


def test_what_changes_nothing_is_taken() -> None:
    greedy, _ = read_session_request(request(chat("Hi"), top_p=0.5, top_k=3, min_p=0.1, seed=7))
    warm, _ = read_session_request(
        request(chat("Hi"), temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    )
    assert (greedy.temperature, warm.temperature) == (0.0, 1.0)


def test_any_json_object_is_refused() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read_session_request(request(chat("Hi"), output=JsonOutput()))
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("choice", ["required", ("function", "other")])
def test_choice_of_a_tool_that_is_not_given_is_refused(choice: Any) -> None:
    tools = () if choice == "required" else (Tool("clock"),)
    with pytest.raises(RequestError) as caught:
        read_session_request(request(chat("Hi", tools=tools, tool_choice=choice)))
    assert caught.value.param == "tool_choice"


def test_a_forced_call_wins_over_the_schema() -> None:
    prompt = chat("Hi", tools=(Tool("clock"),), tool_choice="required")
    job, _ = read_session_request(request(prompt, output=JsonOutput(ARGUMENTS)))
    assert job.schema is None
    assert [tool.name for tool in job.forced] == ["clock"]


def test_forced_tools_bring_their_schemas() -> None:
    tools = (Tool("clock", parameters={"type": "object"}), Tool("say", parameters=ARGUMENTS))
    job, _ = read_session_request(request(chat("Hi", tools=tools, tool_choice="required")))
    assert [(tool.name, tool.schema is None) for tool in job.forced] == [
        ("clock", True),
        ("say", False),
    ]
    free, _ = read_session_request(request(chat("Hi", tools=tools)))
    assert free.forced == ()


def test_no_tokens_at_all_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        read_session_request(request(chat("Hi"), max_tokens=0))
    assert caught.value.param == "max_tokens"
