"""The door through which formats enter: the built-in ones and those of other packages."""

from collections.abc import Callable
from typing import Any

import pluggy

GROUP = "impetus"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class PluginSpecs:
    """What a plug-in may implement."""

    @hookspec
    def register_backends(self, register: Callable[[Any], None]) -> None:
        """Call `register` with an instance of `backends.base.Backend` for each format."""


def plugin_manager() -> pluggy.PluginManager:
    """Return a manager that knows the specifications and has nothing registered."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(PluginSpecs)
    return manager
