"""`scripts/models`: the list, one model, deleting and restoring, aliases."""

from pathlib import Path

import pytest

from core.errors import ModelInUse
from router.services import Binned, SettingsView
from tests.fakes import CHAT_MODEL, make_view
from tests.unit.models_cli.conftest import DONE, Run, Stand

BIN_ID = "0" * 16


@pytest.mark.usefixtures("stand")
async def test_list_has_sizes_contexts_reasons_and_what_arrives(run: Run) -> None:
    shown = await run("list")
    assert (shown.code, shown.err) == (0, "")
    assert shown.lines[0] == ["MODEL", "SIZE", "FORMAT", "CONTEXT", "STATE"]
    assert shown.lines[1][:3] == ["big@gguf-f16", "3.0", "GiB"]
    assert shown.out.splitlines()[1].endswith("cannot run: It needs 90 GiB.")
    assert shown.lines[2] == [CHAT_MODEL, "2.0", "KiB", "gguf", "2,048", "ready"]
    assert shown.out.splitlines()[3].endswith("arriving: 25%, 2.0 KiB/s, 2 s left")
    # One that is done is a model.
    assert "org/old" not in shown.out
    assert "\x1b" not in shown.out


async def test_list_is_narrowed_by_a_text_and_by_tags(stand: Stand, run: Run) -> None:
    assert [line[0] for line in (await run("list", "BIG")).lines[1:]] == ["big@gguf-f16"]
    assert [line[0] for line in (await run("list", "coder")).lines[1:]] == [CHAT_MODEL]
    assert "No model" in (await run("list", "nobody")).out
    stand.catalog.settings = {CHAT_MODEL: SettingsView(tags=["work"], favourite=True)}
    for options in (["--tag", "work"], ["--favourite"], ["--format", "gguf", "--tag", "work"]):
        shown = await run("list", *options)
        assert [line[0] for line in shown.lines[1:]] == [CHAT_MODEL]
    assert "No model" in (await run("list", "--format", "mlx")).out


@pytest.mark.usefixtures("stand")
async def test_list_is_sorted(run: Run) -> None:
    for key, first in (("size", CHAT_MODEL), ("-size", "big@gguf-f16")):
        assert (await run("list", f"--sort={key}")).lines[1][0] == first
    assert (await run("list", "--sort", "luck")).code == 2


@pytest.mark.usefixtures("stand")
async def test_list_as_json_is_one_document(run: Run) -> None:
    for arguments in (["--json", "list"], ["list", "--json"]):
        shown = await run(*arguments)
        assert shown.err == ""
        assert [model["id"] for model in shown.document["models"]] == ["big@gguf-f16", CHAT_MODEL]
        assert [job["id"] for job in shown.document["arriving"]] == ["a1"]


async def test_model_is_shown_by_id_and_alias(stand: Stand, run: Run) -> None:
    for name in (CHAT_MODEL, "coder"):
        shown = await run("show", name)
        assert (shown.code, shown.lines[0]) == (0, [CHAT_MODEL])
        assert ["names:", "tiny,", "coder"] in shown.lines
        assert "2,048 tokens here, trained with 4,096" in shown.out
    assert (await run("show", "coder", "--json")).document["id"] == CHAT_MODEL
    unknown = await run("show", "nobody")
    assert (unknown.code, unknown.out) == (1, "")
    assert "nobody" in unknown.err
    assert stand.hub.calls == []


async def test_rm_deletes_with_yes_and_says_what_restores_it(stand: Stand, run: Run) -> None:
    shown = await run("rm", "coder", "--yes")
    assert shown.code == 0
    assert "gets back 7 B" in shown.out
    assert f"scripts/models restore {BIN_ID}" in shown.out
    assert stand.management.calls == [("delete", CHAT_MODEL)]
    assert (await run("bin")).lines[1][:2] == [BIN_ID, CHAT_MODEL]
    assert (await run("bin", "list", "--json")).document["freed_bytes"] == 7
    restored = await run("restore", CHAT_MODEL)
    assert (restored.code, restored.out) == (0, f"{CHAT_MODEL} is restored.\n")
    assert stand.management.calls[-1] == ("restore", BIN_ID)
    assert (await run("bin")).out == "The bin is empty.\n"
    missing = await run("restore", CHAT_MODEL)
    assert (missing.code, "The bin has no model" in missing.err) == (1, True)


async def test_missing_model_is_shown_located_and_removed(
    stand: Stand, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = make_view("lost@gguf-q8_0", state="missing", reason="Its files are gone.")
    monkeypatch.setattr(stand.catalog, "_views", (lost,))
    assert (await run("list")).out.splitlines()[1].endswith("missing: Its files are gone.")
    monkeypatch.chdir(tmp_path)
    shown = await run("locate", "lost@gguf-q8_0", "new.gguf")
    assert (shown.code, shown.out) == (0, "lost@gguf-q8_0: missing: Its files are gone.\n")
    assert stand.management.calls == [("locate", "lost@gguf-q8_0", str(tmp_path / "new.gguf"))]

    async def delete(model_id: str) -> Binned:
        return Binned("", model_id, (), 0, 1.0, 1.0)

    monkeypatch.setattr(stand.management, "delete_model", delete)
    gone = await run("rm", "lost@gguf-q8_0", "--yes")
    assert gone.out == "lost@gguf-q8_0 is removed; its files were gone already.\n"


async def test_rm_asks_and_does_nothing_where_nobody_can_answer(stand: Stand, run: Run) -> None:
    for arguments in (["rm", "coder"], ["rm", "coder", "--json"]):
        shown = await run(*arguments)
        assert (shown.code, "--yes" in shown.err) == (2, True)
    assert stand.management.calls == []


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("yes", 0), ("n", 1), ("", 1)])
async def test_rm_obeys_the_answer(
    stand: Stand, run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr("sys.stdin.readline", lambda: f"{answer}\n", raising=False)
    monkeypatch.setattr("scripts.models_lib.screen.Screen.can_ask", lambda _: True)
    shown = await run("rm", "coder")
    assert shown.code == code
    assert f"Delete {CHAT_MODEL} (2.0 KiB)? [y/N]" in shown.err
    assert bool(stand.management.calls) is (code == 0)


async def test_purge_deletes_for_good(stand: Stand, run: Run) -> None:
    await run("rm", "coder", "-y")
    assert (await run("bin", "purge", BIN_ID)).code == 2
    shown = await run("bin", "purge", BIN_ID, "--yes")
    assert (shown.code, "7 B" in shown.out) == (0, True)
    assert stand.management.calls[-1] == ("purge", BIN_ID)


async def test_refusal_is_told_in_the_servers_words(stand: Stand, run: Run) -> None:
    stand.management.problem = ModelInUse("It is loaded; unload it first.")
    shown = await run("rm", "coder", "--yes")
    assert (shown.code, shown.out, shown.err) == (1, "", "It is loaded; unload it first.\n")
    told = await run("rm", "coder", "--yes", "--json")
    assert told.document["error"]["code"] == "model_in_use"


async def test_aliases_are_set_listed_and_deleted(stand: Stand, run: Run) -> None:
    assert "no aliases" in (await run("alias")).out
    shown = await run("alias", "set", "me/fast:1", "coder")
    assert (shown.code, shown.out) == (0, f"me/fast:1 is now {CHAT_MODEL}.\n")
    assert (await run("alias")).lines == [["ALIAS", "MODEL"], ["me/fast:1", CHAT_MODEL]]
    assert (await run("alias", "list", "--json")).document == {
        "aliases": [{"alias": "me/fast:1", "model": CHAT_MODEL}]
    }
    gone = await run("alias", "rm", "me/fast:1", "--json")
    assert (gone.document, stand.management.alias_ids) == ({"deleted": "me/fast:1"}, {})


async def test_control_characters_of_names_are_not_printed(stand: Stand, run: Run) -> None:
    stand.jobs.begun = DONE.model_copy(update={"state": "paused", "title": "org/\x1b[2Jx: y"})
    assert "\x1b" not in (await run("list")).out
