"""`scripts/models`: searching the hub, showing a repository, the token."""

from datetime import UTC, datetime

import pytest

from core.errors import HubOffline
from core.types import Capability
from router.hub_service import (
    HubChoiceAnswer,
    HubRepositoryAnswer,
    HubResult,
    HubResults,
    HubSearch,
)
from tests.unit.models_cli.conftest import Run, Stand
from tests.unit.router.api.test_router_hub import ENTRY, FIT, MODEL, REPOSITORY


async def test_search_prints_what_fits_and_how_to_go_on(stand: Stand, run: Run) -> None:
    shown = await run("search", "tiny", "--limit", "1")
    assert shown.code == 0
    titles = ["MODEL", "PARAMETERS", "FORMATS", "DOWNLOADS", "UPDATED", "FIT"]
    assert shown.lines == [titles, ["org/tiny", "4", "gguf", "2", "fits", "(3", "B)"]]
    assert "--cursor 'next'" in shown.err
    assert stand.hub.calls == [HubSearch(text="tiny", limit=1)]
    found = await run("search", "tiny", "--limit", "1", "--json")
    assert found.err == ""
    assert (found.document["models"][0]["id"], found.document["cursor"]) == ("org/tiny", "next")


async def test_search_asks_with_every_filter(stand: Stand, run: Run) -> None:
    options = {
        "--format": "gguf",
        "--author": "org",
        "--capability": "chat",
        "--license": "mit",
        "--min-parameters": "500M",
        "--max-parameters": "7.5B",
        "--updated-after": "2026-01-31",
        "--sort": "downloads",
        "--limit": "1",
        "--cursor": "abc",
    }
    words = [word for option in options.items() for word in option]
    assert (await run("search", *words, "--no-gated")).code == 0
    (asked,) = stand.hub.calls
    assert asked.updated_after.replace(tzinfo=UTC) == datetime(2026, 1, 31, tzinfo=UTC)
    assert asked.model_copy(update={"updated_after": None}) == HubSearch(
        format="gguf",
        author="org",
        capability=Capability.CHAT,
        licence="mit",
        gated=False,
        min_parameters=500_000_000,
        max_parameters=7_500_000_000,
        sort="downloads",
        limit=1,
        cursor="abc",
    )


async def test_search_within_a_size_reads_on_until_there_is_something(
    stand: Stand, run: Run
) -> None:
    sizes = iter([5 * 10**9, 0, 3 * 10**9])

    async def search(wanted: HubSearch) -> HubResults:
        stand.hub.calls.append(wanted)
        fit = FIT.model_copy(update={"weights_bytes": next(sizes)})
        name = f"org/number{len(stand.hub.calls)}"
        return HubResults(
            models=(HubResult(**{**MODEL, "id": name}, fit=fit),), cursor=f"page{len(name)}"
        )

    stand.hub.search = search  # type: ignore[method-assign,assignment]
    shown = await run("search", "--max-size", "4GB", "--limit", "1")
    assert [line[0] for line in shown.lines] == ["MODEL", "org/number3"]
    assert [call.cursor for call in stand.hub.calls] == ["", "page11", "page11"]


@pytest.mark.usefixtures("stand")
async def test_search_that_finds_nothing_says_so(run: Run) -> None:
    shown = await run("search", "--min-size", "1TB")
    assert (shown.code, "Nothing was found" in shown.out) == (0, True)


@pytest.mark.parametrize(
    "options",
    [("--max-size", "big"), ("--min-parameters", "7X"), ("--sort", "luck"), ("--capability", "x")],
)
@pytest.mark.usefixtures("stand")
async def test_search_refuses_values_that_are_none(run: Run, options: tuple[str, str]) -> None:
    shown = await run("search", *options)
    assert (shown.code, shown.out) == (2, "")
    assert options[1] in shown.err


async def test_repository_is_shown_with_its_entries_and_the_choice(stand: Stand, run: Run) -> None:
    large = ENTRY.model_copy(
        update={
            "name": "b-f16.gguf",
            "files": ("b-f16.gguf",),
            "quantization": "f16",
            "size_bytes": 3 * 2**30,
            "fit": FIT.model_copy(
                update={"verdict": "too_big", "reason": "It needs more.", "total_bytes": 2**32}
            ),
        }
    )
    _answer(stand, entries=(ENTRY, large), gated="manual")
    shown = await run("show", "https://huggingface.co/org/tiny", "--context", "512")
    assert shown.code == 0
    assert stand.hub.calls == [("org/tiny", "", 512)]
    assert ["*", "a.gguf", "gguf", "q8_0", "1", "B", "32", "fits", "(3", "B)"] in shown.lines
    assert "too big (4.0 GiB): It needs more." in shown.out
    assert "* Best here: a.gguf. It is the only one." in shown.out
    assert "token set" in shown.out
    one = await run("show", "hf.co/org/tiny:F16")
    assert ("b-f16.gguf" in one.out, " a.gguf " in one.out) == (True, False)
    file = await run("show", "org/tiny/b-f16.gguf")
    assert ("b-f16.gguf" in file.out, " a.gguf " in file.out) == (True, False)
    document = (await run("show", "org/tiny", "--json")).document
    assert document["choice"]["entry"] == "a.gguf"


async def test_repository_without_a_choice_says_why(stand: Stand, run: Run) -> None:
    choice = HubChoiceAnswer(entry="", reason="Nothing fits.", convert_to="")
    _answer(stand, entries=(), choice=choice)
    assert "It has no model." in (await run("show", "org/tiny")).out
    refused = ENTRY.model_copy(update={"is_refused": True, "problem": "It is a pickle."})
    _answer(stand, entries=(refused,), choice=choice)
    shown = await run("show", "org/tiny")
    assert "refused: It is a pickle." in shown.out
    assert "None is best here: Nothing fits." in shown.out


@pytest.mark.usefixtures("stand")
async def test_readme_is_printed_as_text(run: Run) -> None:
    assert (await run("show", "org/tiny", "--readme")).out == "# Tiny\n"
    assert (await run("show", "org/tiny", "--readme", "--json")).document == {"markdown": "# Tiny"}


@pytest.mark.usefixtures("stand")
async def test_what_names_no_repository_is_wrong_usage(run: Run) -> None:
    shown = await run("show", "https://example.com/org/tiny")
    assert (shown.code, shown.out) == (2, "")
    assert "example.com" in shown.err


async def test_refusals_of_the_hub_are_told(stand: Stand, run: Run) -> None:
    stand.hub.problem = HubOffline("HF_HUB_OFFLINE is set: the hub is not asked.")
    shown = await run("search", "tiny")
    assert (shown.code, shown.err) == (1, "HF_HUB_OFFLINE is set: the hub is not asked.\n")


async def test_token_is_read_from_standard_input_and_never_shown(
    stand: Stand, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hf auth login" in (await run("token")).out
    monkeypatch.setattr("sys.stdin.readline", lambda: "hf_secret\n", raising=False)
    shown = await run("token", "set")
    assert (shown.code, shown.out) == (0, "In use: the token that was stored here of jane.\n")
    assert stand.hub.calls[-1] == ("store", "hf_secret")
    assert (await run("token", "rm")).out == "No token is in use.\n"
    monkeypatch.setattr("sys.stdin.readline", lambda: "", raising=False)
    assert (await run("token", "set")).code == 2


def _answer(stand: Stand, **changes: object) -> None:
    repository = REPOSITORY.model_copy(update=changes)

    async def answer(name: str, revision: str, context_tokens: int) -> HubRepositoryAnswer:
        stand.hub.calls.append((name, revision, context_tokens))
        return repository

    stand.hub.repository = answer  # type: ignore[method-assign]
