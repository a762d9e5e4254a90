"""Tests of what the doctor writes and prints: no names, no keys, and rows that can be read."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from scripts.doctor_lib import readings, tools
from scripts.doctor_lib.child import MISSING, TOO_LATE, run
from scripts.doctor_lib.privacy import Privacy
from scripts.doctor_lib.probes import (
    computations,
    generation,
    libraries,
    mac_readings,
    own_readings,
    starter,
)
from scripts.doctor_lib.report import write_report
from scripts.doctor_lib.row import FAIL, OK, WARN, Row
from tests.unit.scripts.doctor.conftest import Plant

PERSON = {
    "HOME": "/Us" + "ers/jane.doe",
    "USER": "jane.doe",
    "IMPETUS_API_KEY": "correct-horse-battery",
    "HF_TOKEN": "hf_abcdefgh",
    "PATH": os.environ["PATH"],
}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (PERSON["HOME"] + "/models/a.gguf", "~/models/a.gguf"),
        ("/Us" + "ers/other/x: denied", "/Us" + "ers/<user>/x: denied"),
        ("/ho" + "me/other/x", "/ho" + "me/<user>/x"),
        ("/Users/Shared/models", "/Users/Shared/models"),
        ("owner jane.doe, group staff", "owner <user>, group staff"),
        ("key correct-horse-battery", "key <secret>"),
        ("HF_TOKEN=hf_abcdefgh", "HF_TOKEN=<secret>"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer <secret>"),
        ("x-impetus-token: 0123", "x-impetus-token: <secret>"),
        ("key sk-proj-12345678", "key <secret>"),
        ("free disk 11.0 GiB", "free disk 11.0 GiB"),
    ],
)
def test_names_paths_and_keys_are_replaced(text: str, hidden: str) -> None:
    assert Privacy(PERSON).hide(text) == hidden


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("free 1 GiB where /srv/a b/impetus is", "free 1 GiB where <repository> is"),
        ("/srv/a b/impetus/.venv/bin/python", "<repository>/.venv/bin/python"),
        ("/srv/a b/impetus-2 is a file", "/srv/a b/impetus-2 is a file"),
        (PERSON["HOME"] + "/Secret Project/models/x.gguf", "<models>/x.gguf"),
        ("~/Secret Project/models", "<models>"),
        ("/Volumes/Jane/models, none", "<models>, none"),
        ("/Volumes/Jane/data/catalog.sqlite", "<data folder>/catalog.sqlite"),
        ("/Volumes/Jane/other/x: denied", "/Volumes/<path>: denied"),
        (PERSON["HOME"] + "/Documents/divorce/x.gguf", "~/<path>"),
        (
            PERSON["HOME"] + "/.pyenv/versions/3.12.1/bin/python3",
            "~/.pyenv/versions/3.12.1/bin/python3",
        ),
        (
            PERSON["HOME"] + "/Library/Application Support/impetus",
            "~/Library/Application Support/impetus",
        ),
        ("/opt/homebrew; libomp: none", "/opt/homebrew; libomp: none"),
    ],
)
def test_the_report_has_no_paths_of_the_users_own(text: str, hidden: str) -> None:
    environment = {
        **PERSON,
        "IMPETUS_MODELS_PATH": "~/Secret Project/models:/Volumes/Jane/models",
        "IMPETUS_HOME": "/Volumes/Jane/data/",
    }
    assert Privacy(environment, "/srv/a b/impetus").hide_paths(text) == hidden


def test_the_hosts_name_is_replaced_as_a_word_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "metal.local")
    privacy = Privacy(PERSON)
    assert privacy.hide("on metal.local and metal, metallic") == "on <host> and <host>, metallic"


def test_the_report_has_no_secret_and_only_the_user_reads_it(tmp_path: Path) -> None:
    home = PERSON["HOME"]
    rows = [
        Row("data folder", FAIL, f"{home}/x", f'"{home}" is a file', "key correct-horse-battery"),
        Row("port", OK, "8000 is free"),
    ]
    text, data = write_report(tmp_path, rows, {"tail": [home]}, Privacy(PERSON))
    for path in (text, data):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "jane" not in path.read_text()
        assert "horse" not in path.read_text()
    document = json.loads(data.read_text())
    assert document["rows"][0]["value"] == "~/<path>"
    assert document["tail"] == ["~"]
    assert text.read_text().splitlines()[0] == "FAIL  data folder                 ~/<path>"


def test_a_row_shows_its_problem_and_cure() -> None:
    row = Row("port", WARN, "8000\n", "It is used.", "stop it")
    assert row.lines() == [
        "warn  port                        8000",
        "      It is used.",
        "      (stop it)",
    ]


@pytest.mark.parametrize(
    ("command", "code", "ended"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 3"], 3, "ended with code 3"),
        (["sh", "-c", "kill -ABRT $$"], -6, "crashed with SIGABRT"),
        (["sleep", "30"], TOO_LATE, "did not end within"),
        (["no-such-program"], MISSING, "was not found"),
    ],
)
def test_a_child_ends_within_its_limit_and_says_how(
    command: list[str], code: int, ended: str
) -> None:
    done = run(command, 1.0, os.environ)
    assert (done.code, ended in done.ended) == (code, True)


def test_the_output_of_a_child_is_bounded() -> None:
    done = run(["sh", "-c", "yes | head -c 1000000; echo end"], 20.0, os.environ)
    assert len(done.text) < 80_000
    assert done.last_line == "end"


def test_probes_and_rows_have_the_same_names() -> None:
    modules = (computations, generation, libraries, mac_readings, own_readings, starter)
    there = {(module.__name__, name) for module in modules for name in module.PROBES}
    listed = {**readings.READINGS, **readings.COMPUTATIONS}
    start = "scripts.doctor_lib.probes."
    assert there == {(start + probe.module, name) for name, probe in listed.items()}


def test_footprints_answer_is_parsed() -> None:
    said = "======\npython3.12 [812]: 64-bit    Footprint: 91 MB (16384 bytes per page)\n======"
    assert mac_readings.footprint_bytes(said) == 91 * 2**20
    vmmap = "Physical footprint:         12.5M\nPhysical footprint (peak):  90.1M\n"
    assert mac_readings.footprint_bytes(vmmap) == 12.5 * 2**20
    assert mac_readings.footprint_bytes("no such process") == 0


def test_homebrew_and_its_openmp_are_told(plant: Plant) -> None:
    prefix = plant.top / "opt" / "homebrew"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "brew").write_text("")
    (prefix / "opt" / "libomp").mkdir(parents=True)
    rows = {row.what: row for row in tools.rows(plant.machine())}
    assert rows["Homebrew"].value == f"{prefix}; libomp: {prefix}/opt/libomp"
    assert rows["SDK"].value == "macOS 15.5"


def test_an_invalid_setting_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_MAX_SEQUENCES", "many")
    found = own_readings.settings()
    assert "max_sequences (IMPETUS_MAX_SEQUENCES)" in found.problem
    assert "many" not in found.problem


def test_a_public_address_without_a_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_HOST", "0.0.0.0")
    assert "no API key is set" in own_readings.settings().problem


def test_an_unknown_variable_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_PROT", "8001")
    found = own_readings.settings()
    assert (found.state, "did you mean IMPETUS_PORT?" in found.problem) == (WARN, True)


def test_a_port_that_would_be_taken_over_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_readings.busy_port().problem == ""
    monkeypatch.setattr("deployments.router.listener.bind", lambda *_: socket.socket())
    assert own_readings.busy_port().problem == "A port in use counts as free."


def test_a_probe_that_answers_nonsense_is_a_row(plant: Plant) -> None:
    plant.set_up("  *doctor_lib.probes*) echo '[1]' ;;")
    row = readings.run_probe(plant.machine(), "threads", readings.Probe(), 10.0)
    assert (row.state, row.problem) == (FAIL, "The probe gave no result: [1]")


def test_a_probe_that_crashes_at_its_end_is_a_warning(plant: Plant) -> None:
    result = '{"value": "fine", "problem": "", "cure": "", "state": "FAIL"}'
    plant.set_up(f"  *doctor_lib.probes*) echo '{result}'; kill -ABRT $$ ;;")
    row = readings.run_probe(plant.machine(), "threads", readings.Probe(), 10.0)
    assert (row.state, row.problem) == (WARN, "At its end the probe crashed with SIGABRT.")


@pytest.mark.parametrize("fails", [False, True])
def test_the_budget_of_a_mac_tells_what_other_applications_leave(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available() -> int:
        if fails:
            raise OSError("host_statistics64 failed with status 5, 0 words")
        return 3 << 30

    monkeypatch.setattr("scheduler.sensors.macos_pages.available_bytes", available)
    assert own_readings._others() == ""
    monkeypatch.setattr("sys.platform", "darwin")
    told = "applications: host_statistics64 failed" if fails else "applications leave 3.0 GiB"
    assert told in own_readings._others()
