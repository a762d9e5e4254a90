"""Runs a local hub that speaks the Hugging Face Hub's API, until Ctrl-C.

It has the starter models, and each folder of --publish as a repository.  Set HF_ENDPOINT to the
address that it prints, and HF_HUB_DISABLE_XET=1.  `test/gated` needs the token `hf_test`.

Faults, by --fault or as the body of POST /_control/faults (DELETE clears them), such as
`stall,file=*.gguf,at=1000` or `status,value=429,seconds=5,repository=test/*,times=2`:
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from catalog.scan.starters import STARTERS, installed_starter
from scripts.hub_lib.faults import KINDS, parse_fault
from scripts.hub_lib.server import Hub, running_hub

_TOKEN = "hf_test"
_ENDINGS = (signal.SIGINT, signal.SIGTERM)
_CARD = """---
license: {license}
pipeline_tag: {task}
library_name: {library}
---
# {title}
A model of the local test hub.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 after Ctrl-C, 1 if the hub could not start."""
    options = _parser().parse_args(arguments)
    # Also those of the threads that start later.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        faults = [parse_fault(text) for text in options.fault]
        folders = [_published(text) for text in options.publish]
        with tempfile.TemporaryDirectory() as kept, running_hub(options.port) as hub:
            hub.add_user("tester", _TOKEN)
            _publish_starters(hub, Path(kept))
            for name, folder in folders:
                hub.publish(name, folder)
            for fault in faults:
                hub.faults.add(fault)
            print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
            signal.sigwait(_ENDINGS)
    except (OSError, ValueError) as problem:
        sys.stderr.write(f"The hub did not start: {problem}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, KINDS))
    kinds = "\n".join(f"  {kind:<{width}}  {text}" for kind, text in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/hub",
        description=f"{__doc__}\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=8900, help="port (default: 8900; 0: any)")
    parser.add_argument(
        "--publish", action="append", default=[], metavar="OWNER/NAME=FOLDER", help="repository"
    )
    parser.add_argument("--fault", action="append", default=[], metavar="KIND[,NAME=VALUE...]")
    return parser


def _published(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or name.count("/") != 1 or not Path(folder).is_dir():
        raise ValueError(f"--publish {text}: write OWNER/NAME=FOLDER with an existing folder")
    return name, Path(folder)


def _publish_starters(hub: Hub, kept: Path) -> None:
    for number, (name, folder) in enumerate(_starter_folders(kept)):
        hub.publish(name, folder, likes=100 - number, downloads=1000, trending=10 - number)
        if number == 0:
            hub.publish("test/gated", folder, gated="manual", readers=frozenset({"tester"}))


def _starter_folders(kept: Path) -> Iterator[tuple[str, Path]]:
    """Yield a repository's name and folder for each installed starter that stands by itself."""
    for starter in STARTERS:
        found = installed_starter(starter) if starter.tokenizer is None else None
        if found is None:
            continue
        is_gguf = found.path.suffix == ".gguf"
        name = found.name or found.path.stem.partition(".")[0]
        folder = kept / name
        if is_gguf:
            folder.mkdir()
            (folder / found.path.name).symlink_to(found.path)
        else:
            shutil.copytree(found.path.parent, folder, copy_function=_link)
        card = _CARD.format(
            license=(found.license or "other").lower(),
            task="text-generation" if is_gguf else "sentence-similarity",
            library="gguf" if is_gguf else "sentence-transformers",
            title=name,
        )
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "README.md").write_text(card)
        yield f"test/{name}", folder


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


if __name__ == "__main__":
    raise SystemExit(main())
