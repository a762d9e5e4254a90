"""Parses and validates query strings of the management API; unknown parameters are errors."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from core.errors import RequestError

_LONGEST_PARAM = 64


class Query(BaseModel):
    """Base of the parameters of a query string; an empty value means the default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


Parameters = TypeVar("Parameters", bound=Query)


def read_query(request: Request, model: type[Parameters]) -> Parameters:
    """Return the query's parameters.  Raises RequestError naming what is wrong or given twice."""
    given = request.query_params.multi_items()
    values = {name: value for name, value in given if value}
    if len({name for name, _ in given}) != len(given):
        twice = next(name for name, _ in given if len(request.query_params.getlist(name)) > 1)
        raise RequestError(
            f"{twice[:_LONGEST_PARAM]}: given more than once; send it once.",
            param=twice[:_LONGEST_PARAM],
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"])[:_LONGEST_PARAM]
        raise RequestError(f"{param}: {first['msg']}", param=param) from error
