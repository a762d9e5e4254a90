"""A plug-in for tests: Core ML models of every process of a server run on the stand-in."""

from importlib.metadata import distribution
from pathlib import Path

from core.plugins import hookimpl
from tests.coreml_stand_in.install import StandIn, new_stand_in, replacements

_NAME = "impetus-coreml-stand-in"
_FOLDER = "stand-in"


class Plugin:
    """What the entry point names."""

    @hookimpl
    def register_backends(self, register: object) -> None:
        """Register nothing; replace what the format uses, once in a process."""
        del register
        folder = Path(str(distribution(_NAME).locate_file(_FOLDER)))
        for module, name, value in replacements(folder):
            setattr(module, name, value)


plugin = Plugin()


def write_distribution(folder: Path) -> StandIn:
    """Make `folder`, once it is on the path, an installed distribution with this plug-in."""
    info = folder / f"{_NAME.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[impetus]\ncoreml-stand-in = {__name__}:plugin\n")
    return new_stand_in(folder / _FOLDER)
