"""Calls about conversions, and about models that cannot run without one."""

from core.errors import ImpetusError
from deployments.jobs.calls.jobs import JobCalls
from deployments.jobs.conversion_requests import ConversionRequests
from deployments.jobs.unrunnable import UnrunnableModels
from deployments.serve.handles import returning_errors
from router.conversion_service import ConversionTargets, ConversionWish
from router.job_service import JobDetail


class ConversionCalls(JobCalls):
    """The part of the deployment that converts models."""

    _conversion_requests: ConversionRequests
    _unrunnable: UnrunnableModels

    @returning_errors
    async def conversion_targets(self, model: str) -> ConversionTargets:
        """Return what a model can be converted to; see `router.conversion_service`."""
        return await self._conversion_requests.targets(model)

    @returning_errors
    async def convert(self, wish: ConversionWish) -> JobDetail:
        """Return the job of a conversion; see `router.conversion_service.Conversions`."""
        runner = await self._loaded()
        job = await self._conversion_requests.begin(wish, runner)
        return await self._changed(lambda _: job)

    @returning_errors
    async def explain_unrunnable(self, model_id: str, problem: ImpetusError) -> None:
        """Raise what a request for a model gets that cannot run here because of `problem`.

        With the setting `auto_convert` the conversion that helps begins.
        """
        raise await self._unrunnable.answer(model_id, problem, await self._loaded())
