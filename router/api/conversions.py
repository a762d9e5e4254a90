"""`/api/convert`: conversions of models, each of which is a job."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.conversion_service import Conversions, ConversionWish
from router.requests.query import Query, read_query
from router.requests.strict_body import StrictBody, read_strict

_LONGEST_MODEL = 400


class ConversionRequest(StrictBody):
    """What to convert: `model` is an id, a name or an alias, `name` the name of the result.

    Without `quantization` it is the first choice of `GET /api/convert/choices`; `group_size` is
    a choice of MLX.
    """

    model: Annotated[str, Field(min_length=1, max_length=_LONGEST_MODEL)]
    format: Annotated[str, Field(min_length=1, max_length=40)]
    quantization: Annotated[str, Field(min_length=1, max_length=40)] | None = None
    group_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class ChoicesQuery(Query):
    """The model whose conversions are shown."""

    model: Annotated[str, Field(min_length=1, max_length=_LONGEST_MODEL)]


def choices_endpoint(conversions: Conversions) -> Endpoint:
    """Return the handler that shows what a model can be converted to."""

    async def show_choices(request: Request) -> Response:
        query = read_query(request, ChoicesQuery)
        return answer(await conversions.conversion_targets(query.model))

    return show_choices


def convert_endpoint(conversions: Conversions) -> Endpoint:
    """Return the handler that begins a conversion; it answers 202 with the job."""

    async def begin_conversion(request: Request) -> Response:
        body = await read_strict(request, ConversionRequest)
        wish = ConversionWish(
            model=body.model,
            format=body.format,
            quantization=body.quantization or "",
            group_size=body.group_size,
            name=body.name or "",
        )
        return answer(await conversions.convert(wish), 202)

    return begin_conversion
