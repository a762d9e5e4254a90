"""Calls about the Hugging Face Hub: searches, repositories and the token for it."""

from catalog.hub.client import HubClient
from catalog.hub.token import TokenFile, check_token, current_token, owner_of
from core.supervision import call_in_thread
from deployments.jobs.hub import HubReader
from deployments.serve.handles import returning_errors
from router.hub_service import (
    HubReadme,
    HubReferenceAnswer,
    HubRepositoryAnswer,
    HubResults,
    HubSearch,
    HubTokenAnswer,
)


class HubCalls:
    """The part of the deployment that asks the hub; for one event loop."""

    _hub: HubReader
    _token_file: TokenFile

    @returning_errors
    async def search(self, wanted: HubSearch) -> HubResults:
        """Return results of a search; see `router.hub_service.Hub`."""
        return await self._hub.search(wanted)

    @returning_errors
    async def repository(
        self, name: str, revision: str, context_tokens: int
    ) -> HubRepositoryAnswer:
        """Return a repository with what fits; see `router.hub_service.Hub`."""
        return await self._hub.repository(name, revision, context_tokens)

    @returning_errors
    async def readme(self, name: str, revision: str) -> HubReadme:
        """Return the README of a repository."""
        return HubReadme(markdown=await self._hub.readme(name, revision))

    @returning_errors
    async def resolve(self, text: str) -> HubReferenceAnswer:
        """Return what a pasted text refers to; see `router.hub_service.Hub`."""
        return await self._hub.resolve(text)

    @returning_errors
    async def token(self) -> HubTokenAnswer:
        """Return which token for the hub is in use."""
        found = await call_in_thread("impetus-token", lambda: current_token(self._token_file))
        return HubTokenAnswer(source=found.source)

    @returning_errors
    async def store_token(self, token: str) -> HubTokenAnswer:
        """Store a token once the hub has said whose it is; see `router.hub_service.Hub`."""

        def store() -> HubTokenAnswer:
            check_token(token)
            owner = owner_of(HubClient(token=token.strip()))
            self._token_file.save(token)
            return HubTokenAnswer(source=current_token(self._token_file).source, owner=owner)

        return await call_in_thread("impetus-token", store)

    @returning_errors
    async def remove_token(self) -> HubTokenAnswer:
        """Forget the stored token; return which one is in use then."""

        def remove() -> HubTokenAnswer:
            self._token_file.remove()
            return HubTokenAnswer(source=current_token(self._token_file).source)

        return await call_in_thread("impetus-token", remove)
