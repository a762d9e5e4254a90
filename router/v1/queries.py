"""Types that describe the query strings of the inference APIs; their endpoints read them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class ModelsQuery(BaseModel):
    """The page of models that Anthropic's clients ask for; `client_version` is Codex's."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 1000
    after_id: str | None = None
    before_id: str | None = None
    lifecycle: list[str] = []
    client_version: str | None = None


class InputItemsQuery(BaseModel):
    """The page of items before a stored answer, the latest first by default."""

    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class StoredResponseQuery(BaseModel):
    """A stored answer is not streamed again."""

    stream: Literal["false"] = "false"
