"""`DELETE /api/models/{id}` and `/api/bin`: models in the bin, restoring and purging them."""

from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.api.models import named_model
from router.context import RouteContext
from router.job_service import Answer
from router.requests.strict_body import EmptyBody, read_strict
from router.services import Binned, Management


class BinnedModel(Answer):
    """A deleted model; `freed_bytes` is what the disk gets back at `purge_at`, in Unix seconds."""

    id: str
    model: str
    paths: list[str]
    freed_bytes: int
    deleted_at: int
    purge_at: int


class BinList(Answer):
    """What is in the bin, oldest first."""

    models: list[BinnedModel]
    freed_bytes: int


def delete_endpoint(context: RouteContext, management: Management) -> Endpoint:
    """Return the handler that moves a model into the bin."""

    async def delete_model(request: Request) -> Response:
        view = await named_model(context, request)
        return answer(_described(await management.delete_model(view.id)))

    return delete_model


def bin_endpoint(management: Management) -> Endpoint:
    """Return the handler of the list."""

    async def list_bin(request: Request) -> Response:
        del request
        models = [_described(one) for one in await management.binned()]
        total = sum(one.freed_bytes for one in models)
        return answer(BinList(models=models, freed_bytes=total))

    return list_bin


def restore_endpoint(management: Management) -> Endpoint:
    """Return the handler that moves a model back from the bin."""

    async def restore_model(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        entry_id = str(request.path_params["bin_id"])
        return answer(_described(await management.restore_model(entry_id)))

    return restore_model


def purge_endpoint(management: Management) -> Endpoint:
    """Return the handler that deletes a model in the bin for good."""

    async def purge_model(request: Request) -> Response:
        entry_id = str(request.path_params["bin_id"])
        return answer(_described(await management.purge_model(entry_id)))

    return purge_model


def _described(one: Binned) -> BinnedModel:
    return BinnedModel(
        id=one.id,
        model=one.model_id,
        paths=list(one.paths),
        freed_bytes=one.freed_bytes,
        deleted_at=int(one.deleted_at),
        purge_at=int(one.purge_at),
    )
