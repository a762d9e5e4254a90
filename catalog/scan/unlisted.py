"""Shows model files that could not be inspected yet as entries, beside those of the catalog."""

from collections.abc import Collection, Sequence
from pathlib import Path

from catalog.inspections import Inspection, is_arriving
from catalog.models import Local, ModelRecord, unread_info
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
        promised = natural_format(path)
        if one.path in known or not (promised or is_arriving(one)):
            continue
        format = promised or UNKNOWN_FORMAT
        name = bare_name(path.parts, "")
        record_id = unique_id(model_id(name, format, ""), taken)
        taken.add(record_id)
        info = unread_info(format, name, path)
        found.append(
            ModelRecord(record_id, info, Local(""), "", 0.0, state="uninspected", reason=one.reason)
        )
    return found
