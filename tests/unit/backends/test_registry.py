"""Formats are found once, and a bad plug-in harms neither the process nor the others."""

import errno
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from backends import registry
from backends.base import EngineOptions, ModelInfo
from backends.echo import echo_info
from backends.registry import backends_for, load_backends
from catalog.scan.identify import Uninspected, examine
from core import plugins
from core.child import Child
from core.errors import BackendUnavailable, RequestError
from tests.gguf_raw import minimal_gguf

Install = Callable[..., None]

GOOD = """
    from backends.echo import EchoBackend
    from core.plugins import hookimpl

    class Another(EchoBackend):
        name = {name!r}

    class Plugin:
        @hookimpl
        def register_backends(self, register):
            {first}
            register(Another())

    plugin = Plugin()
"""
# The probe's process passes; the one that trusts it does not.
LATE = """
    from pathlib import Path
    mark = Path(__file__).with_suffix(".seen")
    if mark.exists():
        raise SystemExit("later")
    mark.touch()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install plug-ins: name -> (code at import, code when it registers)."""
    monkeypatch.syspath_prepend(tmp_path)
    registry._discover.cache_clear()

    def install_all(**codes: tuple[str, str]) -> None:
        for name, (at_import, at_register) in codes.items():
            module = f"impetus_test_{name}_{tmp_path.name}".replace("-", "_")
            code = textwrap.dedent(GOOD).format(name=name, first=at_register or "pass")
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(at_import) + code)
            info = tmp_path / f"{module}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
            (info / "entry_points.txt").write_text(f"[impetus]\n{name} = {module}:plugin\n")

    yield install_all
    registry._discover.cache_clear()


@pytest.mark.parametrize(
    ("at_import", "at_register", "reason"),
    [
        ("raise ValueError('no luck')", "", "ValueError: no luck"),
        ("raise SystemExit(3)", "", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "", "KeyboardInterrupt"),
        ("import os; os._exit(0)", "", "ended with code 0"),
        ("import os; os.abort()", "", "was killed by SIGABRT"),
        ("import sys; sys.stderr.write('oh no'); sys.stderr.flush(); import os; os._exit(4)", "",
         "ended with code 4 (the end of its output: oh no)"),
        ("", "raise SystemExit(3)", "SystemExit: 3"),
        ("", "register(None)", "AttributeError"),
        (LATE, "", "SystemExit: later"),
        ("import no_such_module", "", "No module named 'no_such_module'"),
    ],
)  # fmt: skip
def test_a_bad_plugin_is_left_out_with_the_reason(
    install: Install,
    caplog: pytest.LogCaptureFixture,
    at_import: str,
    at_register: str,
    reason: str,
) -> None:
    install(bad=(at_import + "\n", at_register), good=("", ""))
    with caplog.at_level(logging.ERROR):
        found = load_backends()
    assert "good" in found
    assert "bad" not in found
    assert {"gguf", "mlx", "safetensors"} <= found.keys()
    (record,) = [each for each in caplog.records if "not used" in each.message]
    assert "plug-in bad" in record.message
    assert reason in record.message


def test_a_plugin_that_hangs_is_left_out(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "PROBE_LIMIT_S", 0.5)
    install(bad=("import time; time.sleep(600)\n", ""))
    with caplog.at_level(logging.ERROR):
        assert "bad" not in load_backends()
    assert "took longer than 0.5 s" in caplog.text


def test_what_plugins_print_does_not_matter(install: Install) -> None:
    install(good=("print('hello')\nimport sys; print('{', file=sys.__stdout__, flush=True)\n", ""))
    assert "good" in load_backends()


def test_without_plugins_no_process_is_started(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install is not None
    monkeypatch.setattr(plugins, "Child", None)
    assert "gguf" in load_backends()


def test_discovery_happens_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(good=("", ""))
    calls: list[Sequence[EntryPoint]] = []
    original = plugins.probe

    def counted(entries: Sequence[EntryPoint]) -> list[str]:
        calls.append(entries)
        return original(entries)

    monkeypatch.setattr(registry, "probe", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_backends(), range(4)))
    assert all(each is found[0] for each in found)
    assert backends_for(["good"])["good"] is found[0]["good"]
    assert len(calls) == 1


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(RequestError, match=r"Unknown format nonesuch; the formats are .*gguf"):
        backends_for(["gguf", "nonesuch"])


def test_a_format_that_is_registered_twice_keeps_the_first(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(echo=("", ""))
    with caplog.at_level(logging.ERROR):
        found = load_backends()
    assert type(found["echo"]).__name__ == "EchoBackend"
    assert "format echo is registered twice" in caplog.text


@pytest.fixture
def broken_onnx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the import of the ONNX backend fail."""
    # None makes an import of the module raise ImportError.
    monkeypatch.setitem(sys.modules, "backends.onnx.backend", None)
    registry._discover.cache_clear()
    yield
    registry._discover.cache_clear()


@pytest.mark.usefixtures("broken_onnx")
def test_a_format_whose_code_fails_does_not_end_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_backends()
    assert set(found) == set(registry._BUILT_IN_CLASSES)
    assert "the format onnx cannot be used" in caplog.text
    onnx = backends_for(["gguf", "onnx"])["onnx"]
    assert not onnx.availability().is_available
    assert "could not be loaded" in onnx.availability().reason
    for refuse in (onnx.estimate, onnx.open):
        with pytest.raises(BackendUnavailable, match="could not be loaded"):
            refuse(echo_info(), EngineOptions())
    # The other formats still recognize their files; the rest is nobody's verdict.
    backends = list(backends_for(["gguf", "onnx"]).values())
    model = minimal_gguf(tmp_path / "a.gguf")
    assert isinstance(examine(model, backends), ModelInfo)
    (tmp_path / "b.onnx").write_bytes(b"ONNX")
    assert isinstance(examine(tmp_path / "b.onnx", backends), Uninspected)


def test_every_built_in_format_is_registered_under_its_name() -> None:
    found = load_backends()
    for name, (module, kind) in registry._BUILT_IN_CLASSES.items():
        assert found[name].name == name
        assert (type(found[name]).__module__, type(found[name]).__name__) == (module, kind)


@pytest.mark.parametrize("trouble", ["no process", "killed"])
def test_a_passing_trouble_of_a_probe_is_no_verdict(
    install: Install, trouble: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "killed"
    killed = (
        f"import os, signal; mark = {str(mark)!r}\n"
        "if not os.path.exists(mark):\n"
        "    open(mark, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    install(one=(killed if trouble == "killed" else "", ""), two=("", ""))
    starts = 0
    start = Child

    def child(*arguments: Any, **options: Any) -> Any:
        nonlocal starts
        starts += 1
        if trouble == "no process" and starts == 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*arguments, **options)

    monkeypatch.setattr(plugins, "Child", child)
    assert {"one", "two"} <= set(load_backends())
    # The one that was tested is not tested again.
    assert starts == 3
