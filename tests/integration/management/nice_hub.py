"""A running test hub whose one repository holds the starter under a name of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.hub_lib.server import Hub, running_hub
from tests.starter import starter_path

NAME = "Nice-135M-Q4_1.gguf"
ID = "nice-135m@gguf-q4_1"
REPOSITORY = "org/Nice-GGUF"


@contextmanager
def nice_hub(folder: Path) -> Iterator[Hub]:
    """Run the hub; its files are written to `folder`."""
    source = folder / "source"
    source.mkdir()
    shutil.copyfile(starter_path(), source / NAME)
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [gguf]\n---\n# Nice\n")
    with running_hub() as hub:
        hub.publish(REPOSITORY, source)
        yield hub
