"""What to do about an event: pure, no clock, no I/O."""

from collections.abc import Sequence

from core.units import format_bytes
from scheduler.eviction import victims
from scheduler.state import Action, HostState, Load, LoadWanted, Reject, Unload


def decide(state: HostState, event: LoadWanted) -> Sequence[Action]:
    """Return the actions for `event`, in order.

    1. The model is resident or being loaded: nothing.
    2. It fits beside what is held: load it.
    3. It fits once others are unloaded: unload those, then load.
    4. Otherwise reject it with the numbers.
    """
    known = {resident.model_id for resident in state.residents}
    known.update(model_id for model_id, _ in state.loading)
    if event.model_id in known:  # (1)
        return ()
    missing = state.used_bytes + event.needed_bytes - state.budget_bytes
    evicted = victims(missing, state.residents)
    if evicted is None:  # (4)
        return (Reject(event.model_id, _refusal(state, event)),)
    unloads = [
        Unload(resident.model_id, f"{event.model_id} needs {format_bytes(event.needed_bytes)}")
        for resident in evicted
    ]
    return (*unloads, Load(event.model_id, event.needed_bytes))  # (2) (3)


def _refusal(state: HostState, event: LoadWanted) -> str:
    return (
        f"{event.model_id} needs {format_bytes(event.needed_bytes)}; models may use "
        f"{format_bytes(state.budget_bytes)} together and {format_bytes(state.used_bytes)} of that "
        "is in use and cannot be freed."
    )
