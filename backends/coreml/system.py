"""Tells which release of macOS a Core ML model needs."""

from core.errors import BackendUnavailable
from core.machine import macos_release

# Source: coremltools 9.0, `_SPECIFICATION_VERSION_IOS_18` and `_SPECIFICATION_VERSION_IOS_26`, the
# iOS releases that belong to macOS 15 and 26.  Every older version runs on macOS 14.
_RELEASES = ((10, 26), (9, 15))
# Source: coremltools 9.0, `MLModel.make_state`: "only supported on macOS 15+".
_STATES_RELEASE = 15


def needed_release(version: int, *, has_states: bool) -> int:
    """Return the first macOS that runs a model with this specification; 0 for every supported one.

    `version` is the model's specificationVersion, 0 if it is not known.
    """
    needed = next((release for least, release in _RELEASES if version >= least), 0)
    return max(needed, _STATES_RELEASE) if has_states else needed


def check_release(name: str, version: int, *, has_states: bool) -> None:
    """Raise BackendUnavailable if this Mac's system is too old for the model `name`.

    Core ML itself says less: a newer model is opened without an engine, and a state is refused by
    a bare exception.  Other systems than macOS run the reference interpreter and pass.
    """
    release = macos_release()
    needed = needed_release(version, has_states=has_states)
    if not 0 < release < needed:
        return
    what = "with a state " if has_states else ""
    raise BackendUnavailable(
        f"{name} is a Core ML model {what}for macOS {needed} or later; this is macOS {release}. "
        "Update macOS, or use the model in another format.",
        param="model",
    )
