"""Makes request values from the SDKs' request types: each field, each variant, each literal.

What a new version of an SDK documents is thereby tried without naming it here.
"""

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from typing_extensions import ReadOnly, get_type_hints, is_typeddict

TEXT = "text"
# Also the id of a token, for biases.
KEY = "1"
_SCALARS: Mapping[Any, tuple[Any, ...]] = {
    str: (TEXT,),
    bytes: (TEXT,),
    int: (1,),
    float: (1, 0.5),
    bool: (True, False),
    NoneType: (None,),
    object: ({},),
    Any: ({},),
}
_MAX_DEPTH = 3
_WRAPPERS = (Annotated, Required, NotRequired, ReadOnly)


def fields(kind: type) -> dict[str, Any]:
    """Return the fields of a request type with their types."""
    return get_type_hints(kind, include_extras=True)


def samples(kind: Any, inside: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield values of a type, the plainest first; a type within itself has none.

    Below `_MAX_DEPTH` objects only the plainest value of each type is made.
    """
    if is_typeddict(kind):
        if kind not in inside:
            yield from _objects(kind, (*inside, kind))
    elif get_origin(kind) is None:
        yield from _SCALARS.get(kind, ())
    else:
        yield from _of_members(kind, inside)


def _of_members(kind: Any, inside: tuple[Any, ...]) -> Iterator[Any]:
    """Yield values of a type that has others as arguments."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        yield from members
    elif origin in _WRAPPERS:
        yield from samples(members[0], inside)
    elif origin in (Union, UnionType):
        for member in sorted(members, key=lambda one: one is NoneType):
            yield from samples(member, inside)
    elif origin in (dict, Mapping):
        yield from ({KEY: item} for item in samples(members[1], inside))
    else:
        yield from ([item] for item in samples(members[0], inside))


def _objects(kind: Any, inside: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Yield an object with the required fields alone, then one for each sample of each field."""
    hints = fields(kind)
    # `__required_keys__` knows nothing of annotations that are strings, as all are in the SDKs.
    required = {
        name
        for name, hint in hints.items()
        if get_origin(hint) is Required or (kind.__total__ and get_origin(hint) is not NotRequired)
    }
    base: dict[str, Any] = {}
    for name in hints:
        if name in required:
            first = next(samples(hints[name], inside), None)
            if first is None and NoneType not in get_args(hints[name]):
                return
            base[name] = first
    yield base
    if len(inside) > _MAX_DEPTH:
        return
    for name, hint in hints.items():
        for value in samples(hint, inside):
            if name not in base or value != base[name]:
                yield {**base, name: value}
