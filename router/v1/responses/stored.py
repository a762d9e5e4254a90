"""Routes of stored responses: show, list the input's items, cancel and delete."""

import json
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core.errors import NotFound, RequestError
from router.requests.fields import refuse_unless_off
from router.v1.responses.store import ResponseStore, StoredItem, StoredResponse

_Handler = Callable[[Request], Awaitable[Response]]

# Source: OpenAI's reference of "List input items".
_DEFAULT_LIMIT = 20
_MAX_LIMIT = 100


def stored_response_endpoint(store: ResponseStore) -> _Handler:
    """Return the handler that shows a stored answer."""

    async def retrieve_response(request: Request) -> Response:
        refuse_unless_off("stream", request.query_params.get("stream", "false"), ("false",))
        return Response(_stored(store, request).body, media_type="application/json")

    return retrieve_response


def input_items_endpoint(store: ResponseStore) -> _Handler:
    """Return the handler that lists the items before a stored answer."""

    async def list_input_items(request: Request) -> Response:
        items = list(_stored(store, request).inputs)
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError('order: must be "asc" or "desc"', param="order")
        if order == "desc":
            items.reverse()
        if (after := query.get("after")) is not None:
            items = items[_index(items, after) + 1 :]
        limit = _limit(query.get("limit"))
        return Response(
            _page(items[:limit], has_more=len(items) > limit), media_type="application/json"
        )

    return list_input_items


def cancel_response_endpoint(store: ResponseStore) -> _Handler:
    """Return the handler that refuses to cancel: answers in the background do not exist here."""

    async def cancel_response(request: Request) -> Response:
        _stored(store, request)
        raise RequestError(
            "Cannot cancel a synchronous response: it is already complete. To end an answer that "
            "is being generated, close its connection."
        )

    return cancel_response


def delete_response_endpoint(store: ResponseStore) -> _Handler:
    """Return the handler that deletes a stored answer."""

    async def delete_response(request: Request) -> Response:
        response_id = str(request.path_params["response_id"])
        if not store.delete(response_id):
            raise _unknown(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return delete_response


def _stored(store: ResponseStore, request: Request) -> StoredResponse:
    response_id = str(request.path_params["response_id"])
    stored = store.get(response_id)
    if stored is None:
        raise _unknown(response_id)
    return stored


def _unknown(response_id: str) -> NotFound:
    return NotFound(
        f"There is no stored response with the id {response_id[:100]!r}; an answer is stored once "
        "it is complete."
    )


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= _MAX_LIMIT):
        raise RequestError(f"limit: must be 1 to {_MAX_LIMIT}", param="limit")
    return int(text)


def _index(items: Sequence[StoredItem], item_id: str) -> int:
    for index, item in enumerate(items):
        if item.id == item_id:
            return index
    raise RequestError(f"after: the input has no item with the id {item_id[:100]!r}", param="after")


def _page(items: Sequence[StoredItem], *, has_more: bool) -> bytes:
    rest = {
        "object": "list",
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
        "has_more": has_more,
    }
    data = b",".join(item.body for item in items)
    return b'{"data":[' + data + b"]," + json.dumps(rest).encode()[1:]
