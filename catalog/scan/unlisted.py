"""Shows model files that could not be inspected yet as entries, beside those of the catalog."""

from collections.abc import Collection, Sequence
from pathlib import Path

from backends.base import ModelInfo
from catalog.inspections import Inspection, is_arriving
from catalog.models import Local, ModelRecord
from catalog.names import bare_name, model_id, unique_id
from catalog.scan.inspector import UNKNOWN_FORMAT
from catalog.scan.packages import natural_format


def unlisted_records(
    uninspected: Sequence[Inspection], records: Collection[ModelRecord]
) -> list[ModelRecord]:
    """Return an entry for each file that is arriving, or looks like a model, and has none.

    The entries are uninspected; asking for one by its name or id is answered with the reason.
    """
    known = {record.key for record in records}
    taken = {record.id for record in records}
    found = []
    for one in uninspected:
        path = Path(one.path)
        format = natural_format(path)
        if one.path in known or not (format or is_arriving(one)):
            continue
        name = bare_name(path.parts, "")
        record_id = unique_id(model_id(name, format or UNKNOWN_FORMAT, ""), taken)
        taken.add(record_id)
        info = ModelInfo(
            format=format or UNKNOWN_FORMAT,
            name=name,
            architecture="",
            quantization="",
            files=(path,),
            size_bytes=0,
            parameters=0,
            context_length=0,
            capabilities=frozenset(),
        )
        found.append(
            ModelRecord(record_id, info, Local(""), "", 0.0, state="uninspected", reason=one.reason)
        )
    return found
